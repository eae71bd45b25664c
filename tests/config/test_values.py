"""The values that keys take: choices, bounds and forms, checked once over the whole tree."""

from __future__ import annotations

import math
from typing import Any

import pytest

from oodprompt import cli
from oodprompt.config import defaults, keys
from oodprompt.config.keys import Key, check_values, declare, declared_keys, get_cfg_default, set_key
from oodprompt.data import transforms
from oodprompt.engine.evaluation import CRITERIA
from oodprompt.errors import UserError


def problem_of(key: str, value: Any) -> str:
    """The error for a tree with this value; "" where there is none."""
    cfg = get_cfg_default()
    set_key(cfg, key, value, "test")
    try:
        check_values(cfg)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "DATALOADER.FEATURE_CACHE",
            "memry",
            "DATALOADER.FEATURE_CACHE: unknown choice 'memry': did you mean 'memory'? known: auto, disk, memory, off",
        ),
        (
            "INPUT.TRANSFORMS",
            ("normalize", "random_flop"),
            "unknown transform 'random_flop': did you mean 'random_flip'?",
        ),
        ("INPUT.MAX_PIXELS", -1, "INPUT.MAX_PIXELS: -1 is not possible; give 0 or more"),
        (
            "INPUT.IMAGE_RANGE",
            (255, 0),
            'INPUT.IMAGE_RANGE: (255, 0) is no range; give two numbers, the lower first, as "(0, ',
        ),
        ("INPUT.IMAGE_RANGE", (4095,), "INPUT.IMAGE_RANGE: (4095,) is no range"),
        ("INPUT.IMAGE_RANGE", ("0", "1"), "is no range"),
        ("INPUT.IMAGE_RANGE", (0, math.inf), "is no range"),
        ("INPUT.INTERPOLATION", "bicubicc", "INPUT.INTERPOLATION: unknown mode: did you mean 'bicubic'?"),
        ("DATASET.SUBSAMPLE_CLASSES", "old", "DATASET.SUBSAMPLE_CLASSES: 'old' is none of all, base, new"),
        ("DATASET.VAL_PERCENT", 1.0, "DATASET.VAL_PERCENT is a share from 0 to below 1, not 1.0"),
        ("DATASET.VAL_PERCENT", -0.1, "DATASET.VAL_PERCENT is a share from 0 to below 1, not -0.1"),
        (
            "DATALOADER.TRAIN_X.SAMPLER",
            "RandomSampling",
            "unknown sampler 'RandomSampling': did you mean 'RandomSampler'",
        ),
        ("DATALOADER.TEST.SAMPLER", "RandomClassSampler", "DATALOADER.TEST.SAMPLER: unknown sampler"),
        ("DATALOADER.TRAIN_X.BATCH_SIZE", 0, "DATALOADER.TRAIN_X.BATCH_SIZE: 0 is not possible; give 1 or more"),
        ("DATALOADER.TEST.BATCH_SIZE", -1, "DATALOADER.TEST.BATCH_SIZE: -1 is not possible; give 1 or more"),
        ("DATALOADER.K_TRANSFORMS", 2, "K_TRANSFORMS and RETURN_IMG0 are not offered here; leave them at 1 and False"),
        ("DATALOADER.RETURN_IMG0", True, "K_TRANSFORMS and RETURN_IMG0 are not offered here"),
        ("OPTIM.NAME", "adammw", "OPTIM.NAME: unknown optimiser 'adammw': did you mean 'adamw'?"),
        ("OPTIM.LR_SCHEDULER", "cosin", "OPTIM.LR_SCHEDULER: unknown schedule 'cosin': did you mean 'cosine'?"),
        ("OPTIM.WARMUP_TYPE", "sudden", "OPTIM.WARMUP_TYPE: 'sudden' is neither constant nor linear"),
        ("TEST.SELECTION", "acuracy", "TEST.SELECTION: unknown choice 'acuracy': did you mean 'accuracy'?"),
        ("TRAINER.PREC", "fp8", "TRAINER.PREC: unknown precision 'fp8': did you mean 'fp32'? known: amp, bf16,"),
        ("TRAINER.COOP.PREC", "fp8", "TRAINER.COOP.PREC: unknown precision 'fp8'"),
        ("TRAINER.COOP.CLASS_TOKEN_POSITION", "and", "TRAINER.COOP.CLASS_TOKEN_POSITION: unknown place 'and'"),
        (
            "REGIONS.GRID",
            (2,),
            "REGIONS.GRID: rows and columns are two whole numbers of 1 or more, as (2, 2), not (2,)",
        ),
        ("REGIONS.GRID", (0, 2), "REGIONS.GRID: rows and columns"),
        ("REGIONS.OVERLAP", 1.0, "REGIONS.OVERLAP is a share from 0 to below 1, not 1.0"),
        ("DISCOVERY.K_RANGE", (2.0, 5), "DISCOVERY.K_RANGE: give the first and the last number of clusters"),
        ("DISCOVERY.TEMPERATURE", 0.0, "DISCOVERY.TEMPERATURE: 0.0 is not possible; give a number above 0"),
        ("TRAINER.AFR.GAMMA", math.inf, "TRAINER.AFR.GAMMA: inf is not possible; give 0 or more"),
        ("TRAINER.AFR.SHARE", math.nan, "TRAINER.AFR.SHARE: nan is not possible; give a number above 0 and below 1"),
        ("INPUT.PIXEL_STD", [0.2, 0, 0.2], "INPUT.PIXEL_STD: [0.2, 0, 0.2] is not possible; give numbers above 0"),
        ("INPUT.SIZE", (0, 48), "INPUT.SIZE: (0, 48) is not possible; give numbers of 1 or more"),
        ("INPUT.GB_K", 4, "INPUT.GB_K: 4 is not possible; give an odd number above 0"),
    ],
)
def test_impossible_values_are_named(key: str, value: Any, message: str) -> None:
    problem = problem_of(key, value)
    assert message in problem and key.split(".")[-1] in problem and "\n" not in problem


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("DISCOVERY.K_RANGE", ends) for ends in ((), (2, 2), (20, 49))),
        *(("INPUT.SIZE", (48,)), ("OPTIM.LR", 0), ("OPTIM.WARMUP_EPOCH", -1), ("DATASET.NUM_SHOTS", -1)),
        *(("TRAINER.FINETUNE.CAPTIONS", 0), ("TRAINER.FINETUNE.CAPTIONS", 1), ("TRAINER.IVLP.N_CTX_VISION", 0)),
        ("DATALOADER.CACHE_MEMORY_MIB", math.inf),
        *(("INPUT.IMAGE_RANGE", ()), ("INPUT.IMAGE_RANGE", (-1000, 400.5)), ("INPUT.MAX_PIXELS", 0)),
    ],
)
def test_values_at_the_ends_are_taken(key: str, value: Any) -> None:
    assert problem_of(key, value) == ""


def test_the_command_line_checks_keys_of_methods_that_are_not_in_use_too() -> None:
    args = cli.build_parser().parse_intermixed_args(["--trainer", "CoOp", "TRAINER.DFR.C", "(1, -1)"])
    with pytest.raises(UserError, match=r"^TRAINER.DFR.C: \(1, -1\) is not possible; give numbers above 0, as"):
        cli.setup_cfg(args)


def test_some_keys_alone_are_checked() -> None:
    cfg = get_cfg_default()
    cfg.OPTIM.NAME = "adammw"
    check_values(cfg, ["OPTIM.LR"])
    with pytest.raises(UserError, match="OPTIM.NAME"):
        check_values(cfg, ["OPTIM.LR", "OPTIM.NAME"])


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({}, ""),
        ({"at_least": 1}, "1 or more"),
        ({"at_least": 0, "below": math.inf}, "0 or more"),
        ({"above": 0}, "above 0"),
        ({"at_most": 3}, "up to 3"),
        ({"below": 3}, "below 3"),
        ({"at_least": 0, "at_most": 0.5}, "from 0 to 0.5"),
        ({"at_least": 0, "below": 1}, "from 0 to below 1"),
        ({"above": 0, "at_most": 1}, "above 0 and up to 1"),
        ({"above": 0, "below": 1}, "above 0 and below 1"),
        ({"choices": ("", "a", "b")}, "a, b"),
    ],
)
def test_values_in_words(bounds: dict[str, Any], words: str) -> None:
    assert Key(0.5, "A number.", **bounds).values == words


def test_declared_keys_take_a_pair_or_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_KEYS", dict(keys._KEYS))
    declare("TRAINER.MINE", {"A": (1, "A number."), "B": Key(2, "Another.", at_most=3)})
    assert declared_keys()["TRAINER.MINE.A"] == Key(1, "A number.")
    assert problem_of("TRAINER.MINE.A", -(10**9)) == ""
    assert problem_of("TRAINER.MINE.B", 4) == "TRAINER.MINE.B: 4 is not possible; give a number up to 3"


def test_a_default_that_its_key_refuses_is_an_authors_error() -> None:
    with pytest.raises(ValueError, match="the default of a key must be possible: X.A: 0 is not possible"):
        declare("X", {"A": Key(0, "A number.", at_least=1)})
    assert "X.A" not in declared_keys()


def test_choices_are_those_of_the_code_below() -> None:
    """What is declared ahead of the code that knows it: there must be a transform for each name, and so on."""
    declared = declared_keys()
    assert set(declared["INPUT.TRANSFORMS"].choices) == {*transforms._ON_IMAGE, *transforms._ON_TENSOR}
    assert set(declared["INPUT.INTERPOLATION"].choices) == set(transforms.INTERPOLATION_MODES)
    assert declared["TEST.SELECTION"].choices == ("auto", *CRITERIA)


def test_every_precision_has_the_same_choices() -> None:
    precisions = {name: key for name, key in declared_keys().items() if name.endswith(".PREC")}
    assert len(precisions) > 5
    assert all(set(key.choices) - {""} == set(defaults.PRECISIONS) for key in precisions.values())


@pytest.mark.parametrize(
    ("key", "raw", "value"),
    [
        ("TRAINER.GROUPS", True, "true"),
        ("TRAINER.GROUPS", "true", "true"),
        ("TRAINER.COOP.CTX_INIT", True, "True"),
        ("TRAINER.COOP.CTX_INIT", "False", ""),
        ("TRAINER.MAPLE.CTX_INIT", False, ""),
        ("TRAINER.VPT.CTX_INIT", "a photo of a", "a photo of a"),
    ],
)
def test_words_that_yaml_reads_as_flags(key: str, raw: Any, value: str) -> None:
    cfg = get_cfg_default()
    set_key(cfg, key, raw, "test")
    section, leaf = key.rsplit(".", 1)
    node = cfg
    for part in section.split("."):
        node = node[part]
    assert node[leaf] == value
