"""RaVL's controlled evaluation: models that have learned a planted correlation, what finds it, and what mends it.

For every setting and seed: a CLIP is fine-tuned on the captions; the setting is valid where it has learned the correlation
with every seed; discovery and its baselines are scored by Precision@10; where RaVL's discovery found something, each
mitigation trains anew with it. Every run is an ordinary run of ``train.py`` with its folder, and finished ones are kept.

Source: Varma et al., "RaVL", NeurIPS 2024, sections 3.2 and 4, appendices B to E.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from oodprompt.discovery.result import precision_at
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.studies.digits import CAPTIONS, FEATURE, KINDS
from oodprompt.studies.metrics import ZERO_SHOT_PROMPTS, image_metrics, region_metrics, validity
from oodprompt.studies.words import teach_words

# name -> flags and keys; all but the first are told what discovery found in the first
METHODS = {
    "standard": "--trainer FineTune",
    "upsampled": "--trainer RWG --base FineTune TRAINER.GROUPS regions",
    "VL-ERM": "--trainer RWG --base FineTune TRAINER.GROUPS regions TRAINER.FINETUNE.CAPTIONS 0.8",
    "VL-GDRO": "--trainer GroupDRO --base FineTune TRAINER.GROUPS regions TRAINER.FINETUNE.CAPTIONS 0.8",
    "RaVL": "--trainer RaVL TRAINER.RAVL.TUNE image_encoder",
}


@dataclass(frozen=True)
class Plan:
    """What all runs of a grid share: ``config`` file, ``backbone`` (a checkpoint), extra ``keys``, and ``kind``."""

    kind: str
    config: str
    backbone: str
    keys: tuple[str, ...] = ()


def teach_backbone(name: str, kind: str, path: Path) -> Path:
    """The backbone ``name`` with words for the classes of ``kind`` (``teach_words``), as a checkpoint at ``path``."""
    from oodprompt.backbones import load_backbone

    if not path.is_file():
        clip = load_backbone(name, "")
        teach_words(clip, KINDS[kind].classes, [*CAPTIONS, *ZERO_SHOT_PROMPTS[kind]])
        buffer = io.BytesIO()
        torch.save(clip.state_dict(), buffer)
        write_atomically(path, buffer.getvalue())
    return path


def command(plan: Plan, setting: Path, method: str, seed: int, found: Path | None, out: Path) -> list[str]:
    """The command line of ``train.py`` of one run."""
    classes = ",".join(f"'{name}'" for name in KINDS[plan.kind].classes)
    templates = ",".join(f"'{prompt}'" for prompt in ZERO_SHOT_PROMPTS[plan.kind])
    keys: list[str] = ["DATASET.NAME", "CSV", "DATASET.CSV.FILE", str(setting / "metadata.csv")]
    keys += ["DATASET.CSV.CLASSNAMES", f"[{classes}]", "TRAINER.ZEROSHOT.TEMPLATES", f"[{templates}]"]
    keys += ["DATASET.ATTRIBUTE_NAMES", f"['no {FEATURE}','{FEATURE}']", "MODEL.BACKBONE.PATH", plan.backbone]
    keys += ["REGIONS.SOURCE", "boxes", "REGIONS.FILE", str(setting / "regions.csv"), "DISCOVERY.PLANTED", FEATURE]
    keys += ["DISCOVERY.FROM", str(found)] if found else []
    flags = ["--config-file", plan.config, "--root", str(setting), "--seed", str(seed), "--output-dir", str(out)]
    return [*flags, *shlex.split(METHODS[method]), *keys, *plan.keys]


def train(line: Sequence[str], out: Path) -> None:
    """One run, unless its folder is finished."""
    from oodprompt import cli

    if not (out / "results.json").is_file():
        with contextlib.redirect_stdout(io.StringIO()):
            cli.run(line)


def trained(line: Sequence[str], out: Path) -> Any:
    """The trainer of a finished run, with its model."""
    from oodprompt import cli
    from oodprompt.engine.trainer import build_trainer

    with contextlib.redirect_stdout(io.StringIO()):
        cfg = cli.setup_cfg(cli.build_parser().parse_intermixed_args(line))
        trainer = build_trainer(cfg)
        trainer.load_model(out)
    return trainer


@torch.no_grad()
def measure(trainer: Any, target: int) -> dict[str, Any]:
    """Validity and accuracies of a trained model on the test images of a setting."""
    from oodprompt.engine import discover
    from oodprompt.engine.first_stage import outputs

    data = trainer.data_of("test")
    label, present = (np.array([getattr(d, key) for d in data]) for key in ("label", "attribute"))
    predicted = outputs(trainer, "test", trainer.learner, trainer.predict)[1].argmax(dim=1).cpu().numpy()
    images = image_metrics(predicted, label, present)
    regions = discover.regions_of(trainer, "test")
    number = {name: i for i, name in enumerate(trainer.lab2cname.values())}
    shown = np.array([number.get(name, -1) for name in regions.names])
    scores = discover.region_scores(
        trainer, trainer.learner, trainer.predict, discover.region_features(trainer, "test", trainer.learner)
    )
    items = region_metrics(scores.argmax(dim=1).cpu().numpy(), shown)
    return {
        "eps": list(validity(predicted, label, present, target)),
        "image_overall": images.overall,
        "image_worst_group": images.worst_group,
        "region_overall": items.overall,
        "region_worst_group": items.worst_group,
    }


@torch.no_grad()
def compare_discovery(trainer: Any, target: int, out: Path) -> dict[str, Any]:
    """Precision@10 of RaVL's discovery (whose files go to ``out``) and of every variant of every baseline."""
    from oodprompt.engine import discover
    from oodprompt.engine.first_stage import outputs
    from oodprompt.reports.discovery import read_discovery
    from oodprompt.studies.baselines import BASELINE_VARIANTS, DISCOVERY_BASELINES

    with contextlib.redirect_stdout(io.StringIO()):
        found = discover.run(trainer, trainer.learner, trainer.predict, "FineTune", out, pictures=False)
    regions = discover.regions_of(trainer, "val")
    truth = np.array([name == FEATURE for name in regions.names])
    features = discover.region_features(trainer, "val", trainer.learner)
    region_scores = discover.region_scores(trainer, trainer.learner, trainer.predict, features)
    image_scores = outputs(trainer, "val", trainer.learner, trainer.predict)[1].softmax(dim=1)
    label = np.array([d.label for d in trainer.data_of("val")])
    inputs = [x.cpu().numpy() for x in (features, regions.owner, region_scores, image_scores)]
    content = read_discovery(out)
    top = content["clusters"][0]
    precision = {"RaVL": top["precision_at_10"] if found.clusters else 0.0}
    for name, rank in DISCOVERY_BASELINES.items():
        for variant in BASELINE_VARIANTS[name]:
            title = " ".join([name, *(f"({key} {value})" for key, value in variant.items())])
            precision[title] = precision_at(rank(*inputs, label, seed=trainer.cfg.SEED, **variant), truth)
    helps = top["helps"] if found.clusters else None
    return {"precision": precision, "found": bool(found.clusters), "attribute": helps, "k": content["clustering"]["k"]}


def standard(plan: Plan, setting: Path, seed: int, out: Path) -> dict[str, Any]:
    """The fine-tuned model of a setting and seed: trained, measured, and searched for what it goes by."""
    return _kept(out / "measured.json", lambda: _standard(plan, setting, seed, out))


def _standard(plan: Plan, setting: Path, seed: int, out: Path) -> dict[str, Any]:
    line = command(plan, setting, "standard", seed, None, out)
    train(line, out)
    trainer, target = trained(line, out), target_of(setting)
    return measure(trainer, target) | compare_discovery(trainer, target, out)


def mitigated(plan: Plan, setting: Path, method: str, seed: int, found: Path, out: Path) -> dict[str, Any]:
    """A mitigation, trained with what discovery found in the standard model of the same seed, and measured."""
    line = command(plan, setting, method, seed, found, out)

    def work() -> dict[str, Any]:
        train(line, out)
        return measure(trained(line, out), target_of(setting))

    return _kept(out / "measured.json", work)


def part_of_grid(function: str, *arguments: Any) -> dict[str, Any]:
    """``standard`` or ``mitigated`` in a process of its own, on one thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)  # baselines cluster regions that are all alike: empty quadrants
    return {"standard": standard, "mitigated": mitigated}[function](*arguments)


def target_of(setting: Path) -> int:
    content = json.loads((setting / "setting.json").read_text())
    return content["classes"].index(content["target"])


def _kept(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        write_atomically(path, json.dumps(work(), indent=2) + "\n")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is broken ({error}); delete it, and this part is done again") from error
