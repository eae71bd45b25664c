"""The configuration tree: defaults, precedence, upstream's files, and errors that name the place and the mend."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from yacs.config import CfgNode

from oodprompt.cli import build_parser, setup_cfg
from oodprompt.config.keys import declared_keys, get_cfg_default, leaves, merge_file, merge_opts, set_key
from oodprompt.errors import UserError

# Values of Dassl 0.6.3, dassl/config/defaults.py.
DASSL = {
    "SEED": -1,
    "USE_CUDA": True,
    "INPUT.SIZE": (224, 224),
    "INPUT.INTERPOLATION": "bilinear",
    "INPUT.TRANSFORMS": (),
    "INPUT.PIXEL_MEAN": [0.485, 0.456, 0.406],
    "INPUT.RRCROP_SCALE": (0.08, 1.0),
    "INPUT.GB_K": 21,
    "INPUT.CUTOUT_LEN": 16,
    "DATASET.NUM_SHOTS": -1,
    "DATALOADER.NUM_WORKERS": 4,
    "DATALOADER.K_TRANSFORMS": 1,
    "DATALOADER.RETURN_IMG0": False,
    "DATALOADER.TRAIN_X.SAMPLER": "RandomSampler",
    "DATALOADER.TRAIN_X.BATCH_SIZE": 32,
    "DATALOADER.TRAIN_X.N_DOMAIN": 0,
    "DATALOADER.TRAIN_X.N_INS": 16,
    "DATALOADER.TRAIN_U.SAME_AS_X": True,
    "DATALOADER.TRAIN_U.BATCH_SIZE": 32,
    "DATALOADER.TEST.SAMPLER": "SequentialSampler",
    "DATALOADER.TEST.BATCH_SIZE": 32,
    "OPTIM.NAME": "adam",
    "OPTIM.LR": 0.0003,
    "OPTIM.WEIGHT_DECAY": 5e-4,
    "OPTIM.MOMENTUM": 0.9,
    "OPTIM.SGD_DAMPNING": 0,
    "OPTIM.SGD_NESTEROV": False,
    "OPTIM.RMSPROP_ALPHA": 0.99,
    "OPTIM.ADAM_BETA1": 0.9,
    "OPTIM.ADAM_BETA2": 0.999,
    "OPTIM.STAGED_LR": False,
    "OPTIM.NEW_LAYERS": (),
    "OPTIM.BASE_LR_MULT": 0.1,
    "OPTIM.LR_SCHEDULER": "single_step",
    "OPTIM.STEPSIZE": (-1,),
    "OPTIM.GAMMA": 0.1,
    "OPTIM.MAX_EPOCH": 10,
    "OPTIM.WARMUP_EPOCH": -1,
    "OPTIM.WARMUP_TYPE": "linear",
    "OPTIM.WARMUP_CONS_LR": 1e-5,
    "OPTIM.WARMUP_MIN_LR": 1e-5,
    "OPTIM.WARMUP_RECOUNT": True,
    "TRAIN.CHECKPOINT_FREQ": 0,
    "TRAIN.PRINT_FREQ": 10,
    "TEST.EVALUATOR": "Classification",
    "TEST.PER_CLASS_RESULT": False,
    "TEST.COMPUTE_CMAT": False,
    "TEST.NO_TEST": False,
    "TEST.SPLIT": "test",
    "TEST.FINAL_MODEL": "last_step",
}


def cfg_of(*argv: str | Path) -> CfgNode:
    """The config of a command line."""
    return setup_cfg(build_parser().parse_intermixed_args([str(word) for word in argv]))


def yaml_file(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("key", "value"), DASSL.items())
def test_defaults_are_dassls(key: str, value: object) -> None:
    assert leaves(get_cfg_default())[key] == value


def test_every_key_has_documentation() -> None:
    assert not [name for name, key in declared_keys().items() if not key.doc.strip()]
    assert not [name for name, key in declared_keys().items() if "\n" in key.doc]


def test_later_sources_win(tmp_path: Path) -> None:
    dataset = yaml_file(tmp_path / "d.yaml", "DATASET: {NAME: A, ROOT: a}\nSEED: 1\nOPTIM: {LR: 1.0, GAMMA: 0.5}")
    method = yaml_file(tmp_path / "m.yaml", "DATASET: {ROOT: b, TEMPLATE: 'é {}'}\nSEED: 2\nOPTIM: {LR: 2.0}")
    files = ("--config-file", method, "--dataset-config-file", dataset)
    cfg = cfg_of(*files, "--trainer", "CoOp", "--seed", 3, "OPTIM.LR", "4", "SEED", "4")
    assert (cfg.OPTIM.GAMMA, cfg.DATASET.NAME, cfg.DATASET.ROOT, cfg.SEED, cfg.OPTIM.LR) == (0.5, "A", "b", 4, 4.0)
    assert DASSL["OPTIM.MAX_EPOCH"] == cfg.OPTIM.MAX_EPOCH
    assert cfg.DATASET.TEMPLATE == "é {}"
    assert cfg_of(*files, "--trainer", "CoOp", "--root", "c").DATASET.ROOT == "c"


def test_data_set_of_its_own_file_wins_over_the_embedded_one(tmp_path: Path) -> None:
    dataset = yaml_file(tmp_path / "d.yaml", "DATASET: {NAME: A, NUM_SHOTS: 4}\nOPTIM: {LR: 1.0}")
    method = yaml_file(tmp_path / "m.yaml", "DATASET: {NAME: B, ROOT: b, NUM_SHOTS: 16}\nOPTIM: {LR: 2.0}")
    files = ["--config-file", str(method), "--dataset-config-file", str(dataset), "--trainer", "CoOp"]
    cfg = cfg_of(*files)
    assert (cfg.DATASET.NAME, cfg.DATASET.NUM_SHOTS, cfg.DATASET.ROOT, cfg.OPTIM.LR) == ("A", 4, "", 2.0)
    yaml_file(method, "DATASET: {NAME: A, ROOT: b, NUM_SHOTS: 16}")  # the same data set: what is said of it in addition
    cfg = cfg_of(*files)
    assert (cfg.DATASET.NAME, cfg.DATASET.NUM_SHOTS, cfg.DATASET.ROOT) == ("A", 4, "b")


def test_what_a_file_overrides_of_another_is_said(tmp_path: Path) -> None:
    dataset = yaml_file(tmp_path / "d.yaml", "DATASET: {NAME: A}\nOPTIM: {LR: 1.0, GAMMA: 0.5}\nSEED: 1")
    method = yaml_file(tmp_path / "m.yaml", "DATASET: {NAME: B, ROOT: b}\nOPTIM: {LR: 2.0, STEPSIZE: 7}\nSEED: 1")
    said: list[str] = []
    words = [
        "--config-file",
        str(method),
        "--dataset-config-file",
        str(dataset),
        "--trainer",
        "CoOp",
        "OPTIM.GAMMA",
        "0.1",
    ]
    setup_cfg(build_parser().parse_intermixed_args(words), said.append)
    assert said == [
        f"Note: {dataset} overrides of {method}: DATASET.NAME 'A' (was 'B'), DATASET.ROOT '' (was 'b')",
        f"Note: {method} overrides of {dataset}: OPTIM.LR 2.0 (was 1.0)",
    ]


def test_upstream_file_merges_unchanged(tmp_path: Path) -> None:
    path = yaml_file(
        tmp_path / "upstream.yaml",
        """
DATALOADER:
  TRAIN_X:
    BATCH_SIZE: 16
INPUT:
  SIZE: (96, 96)
  PIXEL_MEAN: [0.5, 0.4, 0.3]
  TRANSFORMS: ["random_resized_crop", "normalize"]
  RRCROP_SCALE: [0.5, 1]
OPTIM:
  NAME: "sgd"
  LR: 1
  WARMUP_CONS_LR: 1e-5
  STEPSIZE: 7
  SGD_DAMPNING: 0
MODEL:
  BACKBONE:
    NAME: "ViT-B/16"
TRAINER:
  COOP:
    CTX_INIT: "a photo of a"
    CSC: True
""",
    )
    cfg = get_cfg_default()
    merge_file(cfg, path)
    flat = leaves(cfg)
    expected = {
        "INPUT.SIZE": (96, 96),
        "INPUT.PIXEL_MEAN": [0.5, 0.4, 0.3],
        "INPUT.TRANSFORMS": ("random_resized_crop", "normalize"),
        "INPUT.RRCROP_SCALE": (0.5, 1),
        "OPTIM.LR": 1.0,
        "OPTIM.WARMUP_CONS_LR": 1e-5,
        "OPTIM.STEPSIZE": (7,),
        "TRAINER.COOP.CTX_INIT": "a photo of a",
        "TRAINER.COOP.CSC": True,
    }
    assert {key: flat[key] for key in expected} == expected
    assert {key: type(flat[key]) for key in expected} == {key: type(value) for key, value in expected.items()}


@pytest.mark.parametrize(
    ("key", "raw", "value"),
    [
        ("OPTIM.LR", "1e-3", 1e-3),
        ("INPUT.SIZE", "(48, 48)", (48, 48)),
        ("INPUT.SIZE", "[48, 48]", (48, 48)),
        ("INPUT.PIXEL_STD", "(1, 2, 3)", [1, 2, 3]),
        ("TRAINER.STACK", "CoOpOOD", ("CoOpOOD",)),
        ("TRAINER.STACK", "", ()),
        ("OUTPUT_DIR", "2024_01", "2024_01"),
        ("OUTPUT_DIR", "1e5", "1e5"),
        ("DATASET.ROOT", 7, "7"),
        ("DATASET.ROOT", None, ""),
        ("DATASET.ROOT", "None", ""),
        ("DATASET.TEMPLATE", "{}", "{}"),
        ("DATASET.TEMPLATE", "a {} {{[]}}", "a {} {{[]}}"),
        ("TEST.NO_TEST", "True", True),
    ],
)
def test_values_take_the_type_of_the_default(key: str, raw: object, value: object) -> None:
    cfg = get_cfg_default()
    set_key(cfg, key, raw, "here")
    assert leaves(cfg)[key] == value
    assert type(leaves(cfg)[key]) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("OPTIM: {LRR: 1}", ["unknown config key 'OPTIM.LRR'", "did you mean 'OPTIM.LR'?"]),
        ("TRAINER: {COOP: {NCTX: 4}}", ["'TRAINER.COOP.NCTX'", "did you mean 'TRAINER.COOP.N_CTX'?"]),
        ("optim: {lr: 1}", ["'optim.lr'", "did you mean 'OPTIM.LR'?"]),
        ("ZZZ: 1", ["unknown config key 'ZZZ'", "docs/config.md"]),
        ("DATASET: {STRIPES: {N: 1}}", ["'DATASET.STRIPES.N': a key of a file of your own needs --import FILE"]),
        ("TRAINER: {COOPOD: {ALPHA: 1}}", ["did you mean 'TRAINER.COOPOOD.ALPHA'? (a key of a file of your own"]),
        ("OPTIM: {LR: {A: 1}}", ["'OPTIM.LR.A'"]),
        ("OPTIM: 3", ["'OPTIM' is a section, not a key"]),
        ("DATALOADER: {TRAIN_X: [1]}", ["'DATALOADER.TRAIN_X' is a section"]),
        ("OPTIM: {MAX_EPOCH: 1.5}", ["OPTIM.MAX_EPOCH takes a value of type int", "default 10", "1.5"]),
        ("OPTIM: {LR: fast}", ["OPTIM.LR takes a value of type float", "'fast'"]),
        ("TEST: {NO_TEST: 1}", ["TEST.NO_TEST takes a value of type bool"]),
        ("DATASET: {NAME: [a]}", ["DATASET.NAME takes a value of type str"]),
        ("OPTIM: [", ["not valid yaml", "line"]),
        ("a: b: c", ["not valid yaml"]),
        ("- 1\n- 2", ["must be a mapping", "list"]),
        ("\x00", ["not valid yaml"]),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = yaml_file(tmp_path / "bad.yaml", text)
    with pytest.raises(UserError) as error:
        merge_file(get_cfg_default(), path)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    yaml_file(tmp_path / "there.yaml", "")
    merge_file(get_cfg_default(), tmp_path / "there.yaml")
    with pytest.raises(UserError, match=r"no config file at .*gone\.yaml.*there\.yaml"):
        merge_file(get_cfg_default(), tmp_path / "gone.yaml")


def test_bad_pairs_are_named() -> None:
    with pytest.raises(UserError, match="command line: KEY VALUE pairs expected, but 'SEED' stands alone"):
        merge_opts(get_cfg_default(), ["OPTIM.LR", "1", "SEED"])
    with pytest.raises(UserError, match=r"command line: unknown config key 'OPTIM.LRR'.*'OPTIM.LR'"):
        merge_opts(get_cfg_default(), ["OPTIM.LRR", "1"])


def test_seed_zero_counts_and_a_negative_seed_is_drawn_once(tmp_path: Path) -> None:
    assert cfg_of("--seed", 0, "--output-dir", tmp_path).SEED == 0
    drawn = cfg_of("--seed", -5, "--output-dir", tmp_path)
    assert drawn.SEED > 0
    for seed in (drawn.SEED, 0):  # a later run in the same folder takes the seed of the first
        drawn.defrost()
        drawn.SEED = seed
        (tmp_path / "config.yaml").write_text(drawn.dump())
        assert seed == cfg_of("--output-dir", tmp_path).SEED
        assert seed == cfg_of("--output-dir", tmp_path / "new", "--resume", tmp_path).SEED
    assert cfg_of("--output-dir", tmp_path / "new").SEED == 1, "the same command again goes on"
    assert cfg_of("--output-dir", tmp_path / "new", "SEED", "-1").SEED > 1


def test_flags_with_several_words_leave_the_pairs_alone() -> None:
    argv = "--output-dir o --transforms random_flip normalize OPTIM.LR 0.1 --seed 2 --source-domains art"
    cfg = cfg_of(*argv.split(), "TRAINER.COOP.CSC", "True")
    assert cfg.INPUT.TRANSFORMS == ("random_flip", "normalize")
    assert cfg.DATASET.SOURCE_DOMAINS == ("art",)
    assert (cfg.OPTIM.LR, cfg.TRAINER.COOP.CSC, cfg.SEED) == (0.1, True, 2)


def test_flags_may_follow_pairs() -> None:
    cfg = cfg_of("OPTIM.LR", "0.1", "--seed", 7, "--output-dir", "o", "DATASET.NUM_SHOTS", "-1", "--trainer", "CoOp")
    assert (cfg.OPTIM.LR, cfg.SEED, cfg.DATASET.NUM_SHOTS, cfg.TRAINER.NAME) == (0.1, 7, -1, "CoOp")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--trianer", "CoOp"], "unrecognized arguments: --trianer.*did you mean '--trainer'"),
        (["--seed", "one"], "--seed.*'one'.*--help"),
    ],
)
def test_bad_flags_are_one_line(argv: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        build_parser().parse_intermixed_args(argv)
    assert re.search(words, str(error.value))
    assert "\n" not in str(error.value)


def test_dump_feeds_back(tmp_path: Path) -> None:
    pairs = ["INPUT.SIZE", "(48, 48)", "DATASET.TEMPLATE", "{}", "TRAINER.STACK", "('A', '1')", "OPTIM.LR", "1e-7"]
    cfg = cfg_of("--seed", 0, "--output-dir", "1_0", "--root", 'it\'s: "new" é', *pairs)
    path = tmp_path / "config.yaml"
    path.write_bytes(cfg.dump().encode())
    again = cfg_of("--config-file", path)
    assert leaves(again) == leaves(cfg)
    assert {k: type(v) for k, v in leaves(again).items()} == {k: type(v) for k, v in leaves(cfg).items()}
    assert cfg_of("--config-file", yaml_file(path, again.dump())) == cfg
