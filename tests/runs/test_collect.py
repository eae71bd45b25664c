"""Tables from folders of outputs: ours, upstream's, base to new, paired differences, and runs that do not count."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from oodprompt.errors import UserError
from oodprompt.runs.aggregate import (
    Difference,
    Row,
    baselines,
    collect,
    differences,
    harmonic_mean,
    paired_difference,
    upstream_summary,
)
from oodprompt.runs.collect import run
from oodprompt.runs.reading import log_metrics, upstream_values
from oodprompt.runs.tables import figure, tables


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def result(accuracy: float) -> str:
    return (
        f"=> result\n* total: 2,465\n* correct: 2,000\n* accuracy: {accuracy:.1f}%\n* error: {100 - accuracy:.1f}%\n"
        f"* macro_f1: {accuracy - 1:.1f}%\n=> per-class result\n* class: 0 (face)\ttotal: 1\tcorrect: 1\tacc: 100.0%\n"
    )


def trained(accuracy: float, end: str = "Finish training") -> str:
    """A log of Dassl's training with validation by epoch: what counts comes after the end of training."""
    head = "***************\n** Arguments **\neval_only: False\ndataset_config_file: configs/datasets/caltech101.yaml\n"
    return (
        f"{head}epoch [1/1] batch [1/1] loss 1.0\n{result(12.3)}{end}\nDeploy the last-epoch model\n{result(accuracy)}"
    )


def evaluated(accuracy: float) -> str:
    return (
        f"** Arguments **\neval_only: True\ndataset_config_file: configs/datasets/caltech101.yaml\n{result(accuracy)}"
    )


UPSTREAM = {"CoOp": (93.6, 94.1, 93.9, 93.7), "MaPLe": (95.0, 94.3, 94.6)}


def upstream_tree(root: Path) -> Path:
    """Seeds of two experiments; a third run of CoOp's was cut short and one of MaPLe's only evaluated."""
    for method, values in UPSTREAM.items():
        for seed, value in enumerate(values, 1):
            write(root / method / f"seed{seed}" / "log.txt", trained(value))
    write(root / "CoOp" / "seed5" / "log.txt", trained(50.0).split("Finish")[0] + "Killed\n")
    write(root / "MaPLe" / "seed4" / "log.txt", evaluated(91.2))
    (root / "CoOp" / ".hidden").mkdir()
    return root


def ours(folder: Path, accuracy: float, worst: float | None = None, dataset: str = "Waterbirds") -> None:
    gap = None if worst is None else accuracy - worst
    content = {"dataset": dataset, "accuracy": accuracy, "macro_f1": accuracy / 2, "worst_group_accuracy": worst}
    write(folder / "results.json", json.dumps({**content, "adjusted_average_accuracy": worst, "gap": gap}))
    write(folder / "config.yaml", "SEED: 1\n")
    write(folder / "log.txt", "printed\n")


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    run([str(word) for word in arguments])
    done = capsys.readouterr()
    return done.out, done.err


# --- upstream's numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "summaries"),
    [
        # As upstream's own parse_test_res.py prints them on this tree.
        (("CoOp",), ["* accuracy: 93.83% +- 0.19%"]),
        (("CoOp", "--ci95"), ["* accuracy: 93.83% +- 0.19%"]),
        (("MaPLe",), ["* accuracy: 94.63% +- 0.29%"]),
        (("MaPLe", "--ci95"), ["* accuracy: 94.63% +- 0.32%"]),
        (("MaPLe", "--keyword", "macro_f1"), ["* macro_f1: 93.63% +- 0.29%"]),
        (("MaPLe", "--test-log"), ["* accuracy: 93.77% +- 1.51%"]),
        (("MaPLe", "--keyword", "(macro_f1|accuracy)"), ["* (macro_f1|accuracy): 93.63% +- 0.29%"]),
        ((".", "--multi-exp"), ["93.83% +- 0.19%", "94.63% +- 0.29%", "* accuracy: 94.23%\n"]),
    ],
)
def test_upstream_flag_prints_upstreams_numbers(
    flags: Sequence[str],
    summaries: Sequence[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = upstream_tree(tmp_path)
    out, err = printed(capsys, root / flags[0], *flags[1:], "--upstream")
    assert [text for text in summaries if text not in out] == [] and out.count("+-") == max(1, len(summaries) - 1)
    assert "CoOp/seed5: no" in err if flags[0] != "MaPLe" else ("MaPLe/seed4: no" in err) != ("--test-log" in flags)


def test_rounding_of_a_tie_is_numpys(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        values = [float(v) for v in rng.integers(500, 1000, 4) / 10]
        mean, deviation = upstream_summary(values, False)
        assert (f"{mean:.2f}", f"{deviation:.2f}") == (f"{np.mean(values):.2f}", f"{np.std(values):.2f}")
        assert f"{upstream_summary(values, True)[1]:.2f}" == f"{1.96 * np.std(values) / np.sqrt(4):.2f}"


def test_last_line_of_several_metrics_counts(tmp_path: Path) -> None:
    write(tmp_path / "seed1" / "log.txt", "Finish training\n* b: 1.0%\n* a: 2.0%\n* b: 3.0%\n")
    assert list(upstream_values(tmp_path, "(a|b)", False)[0].values()) == [3.0]


def test_upstreams_logs_with_our_spread(tmp_path: Path) -> None:
    tree = collect(upstream_tree(tmp_path), ["accuracy", "macro_f1"])
    assert [(row.name, row.seeds, row.dataset) for row in tree.rows] == [
        ("CoOp", 4, "caltech101"),
        ("MaPLe", 4, "caltech101"),  # the evaluation says itself what it is
    ]
    mean = sum(UPSTREAM["CoOp"]) / 4
    deviation = math.sqrt(sum((v - mean) ** 2 for v in UPSTREAM["CoOp"]) / 3)
    assert tree.rows[0].cells["accuracy"] == pytest.approx((mean, deviation))
    assert tree.rows[0].cells["macro_f1"] == pytest.approx((mean - 1, deviation))
    assert tree.problems == [f"{tmp_path}/CoOp/seed5: unfinished, its log ends in: Killed"]


def test_old_dassl_and_later_logs_of_the_same_folder(tmp_path: Path) -> None:
    write(tmp_path / "seed1" / "log.txt", trained(80.0, "Finished training"))
    write(tmp_path / "seed2" / "log.txt", trained(70.0).split("Finish")[0])
    write(tmp_path / "seed2" / "log.txt-2023-01-01-00-00-00", trained(71.0))
    write(tmp_path / "seed2" / "log.txt-2023-01-02-00-00-00", trained(72.0))
    write(tmp_path / "seed2" / "log.txt-2023-01-03-00-00-00", "started\n")
    tree = collect(tmp_path)
    assert tree.rows[0].values == {"accuracy": {1: 80.0, 2: 72.0}} and tree.rows[0].name == tmp_path.name
    assert len(tree.problems) == 1 and "log.txt-2023-01-02-00-00-00, a later run" in tree.problems[0]
    assert list(upstream_values(tmp_path, "accuracy", False)[0].values()) == [80.0]


def test_logs_of_evaluations_and_unreadable_numbers(tmp_path: Path) -> None:
    write(tmp_path / "seed1" / "log.txt", result(60.0) + "* accuracy: 6.1.2%\n* accuracy: nan%\n")
    with pytest.raises(UserError, match="no finished runs; 1 unfinished"):
        collect(tmp_path)
    assert collect(tmp_path, evaluation=True).rows[0].values["accuracy"] == {1: 60.0}
    assert log_metrics(tmp_path / "seed1" / "log.txt") == {}


# --- ours --------------------------------------------------------------------------------------------------------


def our_tree(root: Path) -> Path:
    for seed, (coop, other, worst) in enumerate([(0.80, 0.85, 0.60), (0.78, 0.86, 0.62), (0.81, 0.84, 0.61)], 1):
        ours(root / "waterbirds" / "CoOp" / f"seed{seed}", coop, coop - 0.3)
        ours(root / "waterbirds" / "CoOpOOD" / f"seed{seed}", other, worst)
        ours(root / "celeba" / "CoOp" / f"seed{seed}", coop - 0.1, dataset="CelebA")
    ours(root / "celeba" / "CoOpOOD" / "seed7", 0.9, dataset="CelebA")
    return root


def test_rows_are_means_over_seeds_of_the_known_metrics(tmp_path: Path) -> None:
    tree = collect(our_tree(tmp_path))
    cells = {row.name: row.cells for row in tree.rows}
    assert cells["waterbirds/CoOpOOD"]["accuracy"] == pytest.approx((85.0, 1.0))
    assert cells["waterbirds/CoOpOOD"]["worst_group_accuracy"] == pytest.approx((61.0, 1.0))
    assert cells["waterbirds/CoOpOOD"]["gap"] == pytest.approx((24.0, math.sqrt(((1**2) + 0 + 1**2) / 2)))
    assert set(cells["celeba/CoOp"]) == {"accuracy"} and cells["celeba/CoOpOOD"]["accuracy"] == (90.0, None)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables(tree).splitlines()]
    assert lines[0] == ["method", "accuracy, %", "worst group, %", "gap, %", "seeds"]
    assert ["waterbirds/CoOpOOD", "85.0 ± 1.0", "61.0 ± 1.0", "24.0 ± 1.0", "3"] in lines
    assert ["celeba/CoOpOOD", "90.0", "-", "-", "1"] in lines
    assert "85.000 ± 1.000" in tables(tree, digits=3)


def test_unlike_runs_in_a_row_are_named(tmp_path: Path) -> None:
    for seed, alpha in {1: 0.1, 2: 0.1, 3: 0.2}.items():
        ours(tmp_path / "CoOpOOD" / f"seed{seed}", 0.5)
        text = f"SEED: {seed}\nOUTPUT_DIR: at{seed}\nTRAINER:\n  COOPOOD:\n    ALPHA: {alpha}\n"
        write(tmp_path / "CoOpOOD" / f"seed{seed}" / "config.yaml", text)
    assert collect(tmp_path).problems == ["CoOpOOD: runs of seeds 1 and 3 differ in TRAINER.COOPOOD.ALPHA 0.1 and 0.2"]
    write(tmp_path / "CoOpOOD" / "seed3" / "config.yaml", "[")
    assert collect(tmp_path).problems == []


def test_a_negative_seed_is_another(tmp_path: Path) -> None:
    for seed, accuracy in {"seed-1": 0.9, "seed1": 0.1, "seed_2": 0.2}.items():
        ours(tmp_path / "CoOp" / seed, accuracy)
    assert collect(tmp_path).rows[0].values["accuracy"] == {-1: 90.0, 1: 10.0, 2: 20.0}


def test_interval_in_place_of_the_deviation(tmp_path: Path) -> None:
    row = {r.name: r for r in collect(our_tree(tmp_path), ci95=True).rows}["waterbirds/CoOpOOD"]
    assert row.cells["accuracy"] == pytest.approx((85.0, 4.302653 / math.sqrt(3)), abs=1e-5)  # t_{0.975, 2} = 4.302653


def test_keywords_and_their_names(tmp_path: Path) -> None:
    root = our_tree(tmp_path)
    tree = collect(root, ["worst_group", "error", "macro_f1"])
    row = {r.name: r for r in tree.rows}["waterbirds/CoOpOOD"]
    assert list(row.cells) == ["worst_group_accuracy", "error", "macro_f1"]
    assert row.cells["error"] == pytest.approx((15.0, 1.0)) and row.cells["macro_f1"] == pytest.approx((42.5, 0.5))
    with pytest.raises(UserError, match="--keyword: no run in .* has 'acuracy': did you mean 'accuracy'"):
        collect(root, ["acuracy"])


def test_average_over_all_rows(tmp_path: Path) -> None:
    tree = collect(our_tree(tmp_path), average=True)
    last = tree.rows[-1]
    assert last.average and last.cells["accuracy"] == (pytest.approx((239 / 3 + 85 + 209 / 3 + 90) / 4), None)
    assert last.cells["gap"] == (pytest.approx(27.0), None)  # of the two rows that have one
    assert "| average" in tables(tree)


def test_names_give_the_rows_and_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = base2new_tree(our_tree(tmp_path), log=False)

    def names(*words: str) -> list[str]:
        lines = printed(capsys, root, *words)[0].splitlines()
        return [line.split("|")[1].strip() for line in lines if line[:3] not in ("", "|--") and "method" not in line]

    assert names("CoOpOOD", "celeba/CoOp") == ["celeba/CoOpOOD", "waterbirds/CoOpOOD", "celeba/CoOp"]
    assert names("waterbirds", "dtd") == ["waterbirds/CoOp", "waterbirds/CoOpOOD", "dtd/shots_16/MaPLe/cfg"]
    assert names("CoOpOOD", "waterbirds/CoOpOOD") == ["celeba/CoOpOOD", "waterbirds/CoOpOOD"], "each once"
    with pytest.raises(UserError, match="NAME: no row is of 'CoOpood': did you mean 'CoOpOOD'"):
        run([str(root), "CoOpood"])


def test_what_does_not_count_is_named(tmp_path: Path) -> None:
    root = our_tree(tmp_path)
    write(root / "celeba" / "CoOpOOD" / "seed8" / "results.json", '{"accuracy": 0.')
    write(root / "celeba" / "CoOpOOD" / "seed9" / "results.json", "[1]")
    for seed, value in {12: "NaN", 13: "true"}.items():
        write(root / "celeba" / "CoOpOOD" / f"seed{seed}" / "results.json", f'{{"accuracy": {value}}}')
    write(root / "celeba" / "CoOpOOD" / "seed10" / "log.txt", trained(10.0))  # ours: results.json is what counts
    write(root / "celeba" / "CoOpOOD" / "seed10" / "config.yaml", "SEED: 10\n")
    (root / "celeba" / "CoOpOOD" / "seed11").mkdir()
    ours(root / "celeba" / "CoOpOOD" / "seed07", 0.1)
    tree = collect(root)
    problems = sorted(line.replace(f"{root}/celeba/CoOpOOD", "...") for line in tree.problems)
    assert [line.split(",")[0] for line in problems] == [
        ".../seed10: unfinished",
        ".../seed11: unfinished",
        ".../seed12: broken results.json",
        ".../seed13: broken results.json",
        ".../seed8: broken results.json",
        ".../seed9: broken results.json",
        "celeba/CoOpOOD: two runs of seed 7; the first counts",
    ]
    assert {r.name: r.seeds for r in tree.rows}["celeba/CoOpOOD"] == 1
    with pytest.raises(UserError, match="no folder"):
        collect(root / "nowhere")
    (root / "empty").mkdir()
    with pytest.raises(UserError, match="has no finished runs$"):
        collect(root / "empty")


def test_only_some_folders_and_evaluations_below_runs(tmp_path: Path) -> None:
    root = our_tree(tmp_path)
    ours(root / "waterbirds" / "CoOp" / "seed1" / "eval", 0.5)
    ours(root / ".old" / "CoOp" / "seed1", 0.5)
    ours(root / "seed5" / "sweep" / "seed1", 0.5)
    names = {row.name: row.seeds for row in collect(root).rows}
    assert names["waterbirds/CoOp"] == 3 and names["waterbirds/CoOp/eval"] == 1
    assert names["seed5/sweep"] == 1 and len(names) == 6
    tree = collect(root, only=[root / "waterbirds" / "CoOp" / f"seed{s}" for s in (1, 3)])
    assert [(row.name, row.values["accuracy"]) for row in tree.rows] == [
        ("waterbirds/CoOp", pytest.approx({1: 80.0, 3: 81.0}))
    ]


# --- base to new -------------------------------------------------------------------------------------------------


def base2new_tree(root: Path, log: bool) -> Path:
    values = {"caltech101": [(98.0, 94.0), (97.0, 95.0)], "dtd": [(80.0, 60.0), (82.0, 56.0)]}
    for dataset, pairs in values.items():
        for seed, (base, new) in enumerate(pairs, 1):
            for side, value, text in (("train_base", base, trained), ("test_new", new, result)):
                folder = root / "base2new" / side / dataset / "shots_16" / "MaPLe" / "cfg" / f"seed{seed}"
                if log:
                    write(folder / "log.txt", text(value))
                else:
                    ours(folder, value / 100, worst=0.5)
    return root


@pytest.mark.parametrize("log", [True, False])
def test_base_new_and_harmonic_mean(log: bool, tmp_path: Path) -> None:
    root = base2new_tree(tmp_path, log)
    extra = root / "base2new" / "train_base" / "dtd" / "shots_16" / "MaPLe" / "cfg" / "seed3"
    write(extra / "log.txt", trained(10.0))
    alone = root / "base2new" / "train_base" / "pets" / "shots_16" / "MaPLe" / "cfg" / "seed1"
    write(alone / "log.txt", trained(20.0))
    tree = collect(root)
    rows = {row.name: row for row in tree.base2new}
    row = rows["dtd/shots_16/MaPLe/cfg"]
    assert row.cells["base"] == pytest.approx((81.0, math.sqrt(2)))  # without seed 3, which has no new
    assert row.cells["new"] == pytest.approx((58.0, math.sqrt(8)))
    assert row.cells["H"] == (pytest.approx(2 * 81 * 58 / (81 + 58)), None)
    assert [c.strip() for c in tables(tree).splitlines()[0].split("|")[2:5]] == ["base, %", "new, %", "H, %"]
    assert row.values["H"] == pytest.approx({1: 2 * 80 * 60 / 140, 2: 2 * 82 * 56 / 138})
    assert [p.split(": ")[1] for p in tree.problems] == ["seed 3 has no finished run of new; left out"]
    average = rows["average of 2/shots_16/MaPLe/cfg"].cells
    base, new = (97.5 + 81) / 2, (94.5 + 58) / 2
    assert average == {
        "base": (base, None),
        "new": (new, None),
        "H": (pytest.approx(2 * base * new / (base + new)), None),
    }
    assert tree.rows == [] and collect(root / "base2new").base2new[0].name == "caltech101/shots_16/MaPLe/cfg"


def test_evaluation_of_base_classes_goes_first_and_one_side_alone_stays(tmp_path: Path) -> None:
    for side, value in (("train_base", 0.7), ("test_base", 0.8), ("test_new", 0.6)):
        ours(tmp_path / side / "dtd" / "MaPLe" / "seed1", value)
    ours(tmp_path / "train_base" / "dtd" / "CoOp" / "seed1", 0.9)
    rows = {row.name: row.cells for row in collect(tmp_path).base2new}
    assert rows["dtd/MaPLe"]["base"] == (pytest.approx(80.0), None)
    assert set(rows["dtd/CoOp"]) == {"base"}
    assert "| dtd/CoOp" in tables(collect(tmp_path)) and harmonic_mean(0, 0) == 0


def test_base_to_new_of_several_metrics(tmp_path: Path) -> None:
    root = base2new_tree(tmp_path, True)
    row = collect(root, ["accuracy", "macro_f1"]).base2new[1]
    assert set(row.cells) == {f"{m} {side}" for m in ("accuracy", "macro_f1") for side in ("base", "new", "H")}
    assert row.cells["macro_f1 new"][0] == pytest.approx(57.0)
    assert row.cells["macro_f1 H"][0] == pytest.approx(2 * 80 * 57 / 137)


# --- paired differences ------------------------------------------------------------------------------------------


def test_paired_difference_by_hand() -> None:
    # d = 1, 2, 6: mean 3, s = sqrt(7); t = 3 / sqrt(7/3) = 1.963961 with 2 degrees of freedom, for which
    # p = 1 - t / sqrt(t^2 + 2); t_{0.975, 2} = 4.302653
    found = paired_difference({1: 11.0, 2: 22.0, 3: 36.0, 4: 0.0}, {3: 30.0, 2: 20.0, 1: 10.0, 9: 5.0})
    t = 3 / math.sqrt(7 / 3)
    half = 4.302652729911275 * math.sqrt(7 / 3)
    assert (found.pairs, found.mean) == (3, 3.0)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))


def test_paired_differences_that_are_undefined() -> None:
    assert paired_difference({1: 2.0}, {2: 1.0}) is None
    assert paired_difference({1: 2.0, 2: 5.0}, {1: 1.5}) == Difference(1, 0.5, None, None, None)
    same = paired_difference({1: 0.3, 2: 0.4}, {1: 0.1, 2: 0.2})
    assert same.p is None and same.low == same.high == same.mean == pytest.approx(0.2)


def test_differences_to_a_baseline_of_the_same_data_set(tmp_path: Path) -> None:
    tree = collect(our_tree(tmp_path))
    found = differences(tree.rows, "CoOp")
    assert set(found) == {"waterbirds/CoOpOOD", "celeba/CoOpOOD"}
    base, by = found["waterbirds/CoOpOOD"]
    assert base.name == "waterbirds/CoOp" and by["accuracy"].pairs == 3 and by["accuracy"].mean == pytest.approx(16 / 3)
    assert found["celeba/CoOpOOD"][1] == {}  # no seed in common
    text = tables(tree, baseline="CoOp")
    line = next(line for line in text.splitlines()[2:] if "waterbirds/CoOpOOD" in line and "waterbirds/CoOp " in line)
    assert "+5.3 [-0.9, +11.6], p = 0.067" in line
    with pytest.raises(UserError, match="--baseline: no row is of 'CoOpp': did you mean 'CoOp'"):
        differences(tree.rows, "CoOpp")


def row_of(path: str, dataset: str = "") -> Row:
    return Row(tuple(path.split("/")), dataset, {"accuracy": {1: 1.0}}, name=path)


def test_which_row_is_the_baseline() -> None:
    names = ["d1/CoOp/a/16", "d1/CoOp/a/8", "d1/MaPLe/b/8", "d2/MaPLe/b/8", "d3/CoOp/a/8"]
    chosen = baselines([row_of(name) for name in names], "CoOp")
    assert {name: base.name for name, base in chosen.items()} == {"d1/MaPLe/b/8": "d1/CoOp/a/8"}
    with pytest.raises(UserError, match="d1/MaPLe/b/4 both d1/CoOp/a/16 and d1/CoOp/a/8 are CoOp; say more"):
        baselines([*map(row_of, names[:2]), row_of("d1/MaPLe/b/4")], "CoOp")
    rows = [row_of("CoOp/x", "dtd"), row_of("MaPLe/x", "dtd"), row_of("MaPLe/y", "pets")]
    assert set(baselines(rows, "CoOp")) == {"MaPLe/x"}
    rows = [row_of("a/CoOp/16"), row_of("a/CoOp/8"), row_of("a/X/4")]
    assert {n: b.name for n, b in baselines(rows, "CoOp/8").items()} == dict.fromkeys(
        ["a/CoOp/16", "a/X/4"], "a/CoOp/8"
    )


# --- forms -------------------------------------------------------------------------------------------------------


def test_csv_has_full_precision_and_a_column_for_each_number(tmp_path: Path) -> None:
    tree = collect(base2new_tree(our_tree(tmp_path), True))
    rows = list(csv.DictReader(io.StringIO(tables(tree, "csv", baseline="CoOp"))))
    by_name = {row["method"]: row for row in rows}
    row = by_name["waterbirds/CoOpOOD"]
    assert float(row["accuracy_mean"]) == pytest.approx(85.0) and float(row["accuracy_std"]) == pytest.approx(1.0)
    assert row["baseline"] == "waterbirds/CoOp" and float(row["accuracy_difference_mean"]) == pytest.approx(16 / 3)
    assert float(row["accuracy_difference_low"]) < 16 / 3 < float(row["accuracy_difference_high"])
    assert 0 < float(row["gap_difference_p"]) < 1 and row["accuracy_difference_pairs"] == "3"
    assert row["base_mean"] == "" and by_name["waterbirds/CoOp"]["baseline"] == ""
    assert float(by_name["dtd/shots_16/MaPLe/cfg"]["new_mean"]) == pytest.approx(58.0)
    header = tables(collect(tmp_path, ci95=True), "csv").splitlines()[0]
    assert "accuracy_ci95" in header and "baseline" not in header


def test_latex(tmp_path: Path) -> None:
    ours(tmp_path / "a_b" / "seed1", 0.5)
    ours(tmp_path / "a_b" / "seed2", 0.6)
    text = tables(collect(tmp_path), "latex")
    assert r"\toprule" in text and r"a\_b" in text and r"55.0 $\pm$ 7.1" in text and r"accuracy, \%" in text


def test_script_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = base2new_tree(our_tree(tmp_path / "runs"), True)
    (root / "celeba" / "CoOp" / "seed4").mkdir()
    plot, out = tmp_path / "plots" / "p.png", tmp_path / "table.csv"
    flags = ["--plot", plot, "--out", out, "--format", "csv", "--baseline", "CoOp", "--multi-exp", "--digits", 2]
    stdout, stderr = printed(capsys, root, *flags)
    assert stdout == out.read_text() and "average" in stdout
    assert f"{root}/celeba/CoOp/seed4: unfinished" in stderr and plot.stat().st_size > 5000
    drawn = figure(collect(root), "title")
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == [r.name for r in collect(root).rows]
    widths = [bar.get_width() for bar in drawn.axes[0].containers[1].patches]
    assert (
        widths[:2] == pytest.approx([r.cells["accuracy"][0] for r in collect(root).rows[:2]]) and len(drawn.axes) == 2
    )


def test_mean_ranks_over_data_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A data set of many settings weighs as much as one of a single setting; equals share the mean of their ranks."""
    worst = {  # data set/setting -> methods
        "shapes/0.5": {"A": 0.9, "B": 0.8, "C": 0.8},
        "shapes/0.9": {"A": 0.9, "B": 0.5, "C": 0.4},
        "photos/0.9": {"A": 0.1, "B": 0.3, "C": 0.2, "D": 0.9},
    }
    for place, methods in worst.items():
        for name, value in methods.items():
            for seed in (1, 2):
                ours(tmp_path / "o" / place / name / f"seed{seed}", 0.95, value + 0.01 * seed)
    out, err = printed(capsys, tmp_path / "o", "--ranks", tmp_path / "ranks.png")
    assert "lacks them: D" in err and (tmp_path / "ranks.png").stat().st_size > 5000
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in out.splitlines() if " to " in line]
    assert cells == [
        ["B", "1.6", "1.0 to 2.4", "1.0", "2.2"],
        ["A", "2.0", "1.0 to 3.0", "3.0", "1.0"],
        ["C", "2.4", "2.0 to 2.9", "2.0", "2.8"],
    ]


def test_ranks_need_two_methods(tmp_path: Path) -> None:
    ours(tmp_path / "0.5" / "A" / "seed1", 0.9, 0.8)
    ours(tmp_path / "0.9" / "B" / "seed1", 0.9, 0.8)
    with pytest.raises(UserError, match="DATA_SET/SETTING/METHOD/seed<N>"):
        run([str(tmp_path), "--ranks", str(tmp_path / "ranks.png")])
    with pytest.raises(UserError, match="leave out --format"):
        run([str(tmp_path), "--ranks", str(tmp_path / "ranks.png"), "--format", "csv"])
