"""From keywords to config keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import oodprompt
from oodprompt.errors import UserError
from oodprompt.library.keywords import keys_of, plain

METHODS, DATA = ["CoOpOOD", "CoOp"], "ShapesOnScenes"


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("anchor", "TRAINER.COOPOOD.ANCHOR"),
        ("coopood_anchor", "TRAINER.COOPOOD.ANCHOR"),
        ("trainer_coopood_anchor", "TRAINER.COOPOOD.ANCHOR"),
        ("n_ctx", "TRAINER.COOP.N_CTX"),
        ("attribute_names", "DATASET.ATTRIBUTE_NAMES"),
        ("correlation", "DATASET.SHAPES.CORRELATION"),
        ("epochs", "OPTIM.MAX_EPOCH"),
        ("seed", "SEED"),
        ("batch_size", "DATALOADER.TRAIN_X.BATCH_SIZE"),
        ("test_batch_size", "DATALOADER.TEST.BATCH_SIZE"),
        ("optim_lr", "OPTIM.LR"),
        ("optim_name", "OPTIM.NAME"),
        ("coop_prec", "TRAINER.COOP.PREC"),
        ("trainer_prec", "TRAINER.PREC"),
        ("grid", "REGIONS.GRID"),
        ("threshold", "DISCOVERY.THRESHOLD"),
        ("group_sources_ssa_threshold", "TRAINER.GROUP_SOURCES.SSA.THRESHOLD"),
    ],
)
def test_keywords(word: str, key: str) -> None:
    assert keys_of({word: 1}, METHODS, DATA) == {key: 1}


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("lr", "lr= may mean several keys: give optim_lr= for OPTIM.LR or coopood_lr= for TRAINER.COOPOOD.LR"),
        ("alpha", "give coop_alpha= for TRAINER.COOP.ALPHA or coopood_alpha= for TRAINER.COOPOOD.ALPHA"),
        ("prec", "trainer_prec= for TRAINER.PREC"),
        ("anchr", "unknown keyword anchr=: did you mean 'anchor'?"),
        ("epoch", "unknown keyword epoch=: did you mean 'epochs'?"),
        ("xyzzy", r"unknown keyword xyzzy=: docs/config\.md has all keys"),
        ("step_size", "step_size= is TRAINER.GROUPDRO.STEP_SIZE, which this run does not use; take it out"),
        ("csv_file", r"csv_file= is DATASET\.CSV\.FILE, which this run does not use"),
        ("trainer_base", "TRAINER.BASE is given by base="),
        ("output_dir", "OUTPUT_DIR is given by output="),
    ],
)
def test_keywords_that_mean_nothing_or_too_much(word: str, error: str) -> None:
    with pytest.raises(UserError, match=error) as raised:
        keys_of({word: 1}, METHODS, DATA)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


def test_methods_that_read_the_section_of_another() -> None:
    for method, word, key in (
        ("KgCoOp", "n_ctx", "TRAINER.COOP.N_CTX"),
        ("ProGrad", "ctx_init", "TRAINER.COOP.CTX_INIT"),
        ("FineTune", "templates", "TRAINER.ZEROSHOT.TEMPLATES"),
    ):
        assert keys_of({word: 1}, [method], DATA) == {key: 1}


def test_values_are_plain() -> None:
    found = [plain(value) for value in (np.float32(0.5), np.arange(2), Path("a"), ["b", np.int64(1)], "c")]
    assert found == [0.5, [0, 1], "a", ["b", 1], "c"] and type(found[0]) is float
    assert keys_of({"anchor": None}, METHODS, DATA) == {}


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: oodprompt.train("CoOpOD"), "unknown method 'CoOpOD': did you mean 'CoOpOOD'"),
        (lambda: oodprompt.train(oodprompt), "the method is a name, as 'CoOpOOD', not a module"),
        (
            lambda: oodprompt.train("CoOp", keys={"OPTIM.LRR": 1}),
            "unknown config key 'OPTIM.LRR': did you mean 'OPTIM.LR'",
        ),
        (
            lambda: oodprompt.train("CoOp", backbone="tiny", epochs="many"),
            r"OPTIM\.MAX_EPOCH takes a value of type int",
        ),
        (lambda: oodprompt.train("CoOp", backbone="tinny", data="ShapesOnScenes"), "unknown backbone 'tinny'"),
        (lambda: oodprompt.train("CoOpOOD", base="DebiasedPT", backbone="tiny"), "DebiasedPT is a debiaser"),
        (lambda: oodprompt.train("CoOp", backbone="tiny"), "no data set is named"),
        (lambda: oodprompt.train("CoOp", data="ShapesOnScenes"), "no backbone is named"),
        (lambda: oodprompt.train("CoOp", keys=["OPTIM.LR"]), "keys= is a dict of config keys"),
        (lambda: oodprompt.load(".", epoch="best"), "epoch= is a whole number, or None"),
        (lambda: oodprompt.train("CoOp", config_file="no.yaml"), "no config file at no.yaml"),
        (
            lambda: oodprompt.train("CoOp", keys={"OPTIM.MAX_EPOCH": 3}, epochs=5),
            "keys=: OPTIM.MAX_EPOCH is 3 there and 5 by a keyword; leave one out",
        ),
        (
            lambda: oodprompt.train("CoOp", keys={"TRAINER.NAME": "VPT"}),
            "keys=: TRAINER.NAME is 'VPT' there and 'CoOp' by method=; leave one out",
        ),
        (
            lambda: oodprompt.train("CoOp", data="ShapesOnScenes", keys={"DATASET.NAME": "CSV"}),
            "keys=: DATASET.NAME is 'CSV' there and 'ShapesOnScenes' by data=",
        ),
        (
            lambda: oodprompt.train("CoOp", epochs=3, max_epoch=4),
            r"epochs= and max_epoch= both give OPTIM\.MAX_EPOCH; leave one out",
        ),
        (lambda: oodprompt.train("CoOp", imports=["no.py"]), "imports=: there is no file .*no.py"),
    ],
)
def test_arguments_that_cannot_be(call, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=error) as raised:
        call()
    assert "\n" not in str(raised.value) and list(tmp_path.iterdir()) == []
