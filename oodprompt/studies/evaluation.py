"""One run of the controlled evaluation: its command line, and what is measured of its model."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oodprompt import cli
from oodprompt.backbones import load_backbone
from oodprompt.discovery.result import precision_at
from oodprompt.discovery.run import region_scores
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.engine.trainer import PromptTrainer, build_trainer
from oodprompt.errors import UserError
from oodprompt.features.encoder import evaluating
from oodprompt.files import write_atomically
from oodprompt.reports.discovery import read_discovery
from oodprompt.reports.results import finished_results
from oodprompt.runs.reading import changed_keys
from oodprompt.studies.baselines import BASELINE_VARIANTS, DISCOVERY_BASELINES
from oodprompt.studies.digits import CAPTIONS, KINDS
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
    """What all runs of a grid share: ``kind``, ``config`` file, key and value of the ``backbone``, and extra ``keys``."""

    kind: str
    config: str
    backbone: tuple[str, str]
    keys: tuple[str, ...] = ()


def teach_backbone(name: str, kind: str, path: Path) -> Path:
    """The backbone ``name`` with words for the classes of ``kind`` (``teach_words``), as a checkpoint at ``path``."""
    if not path.is_file():
        clip = load_backbone(name, "")
        teach_words(clip, KINDS[kind].classes, [*CAPTIONS, *ZERO_SHOT_PROMPTS[kind]])
        buffer = io.BytesIO()
        torch.save(clip.state_dict(), buffer)
        write_atomically(path, buffer.getvalue())
    return path


def command(plan: Plan, setting: Path, method: str, seed: int, found: Path | None, out: Path) -> list[str]:
    """The command line of ``train.py`` of one run."""
    content = setting_of(setting)
    classes, attributes = (",".join(map(repr, content[key])) for key in ("classes", "attribute_names"))
    templates = ",".join(f"'{prompt}'" for prompt in ZERO_SHOT_PROMPTS[plan.kind])
    keys: list[str] = ["DATASET.NAME", "CSV", "DATASET.CSV.FILE", str(setting / "metadata.csv")]
    keys += ["DATASET.CSV.OUTSIDE", "True"]  # settings share the images of the folder beside them
    keys += ["DATASET.CSV.CLASSNAMES", f"[{classes}]", "TRAINER.ZEROSHOT.TEMPLATES", f"[{templates}]"]
    keys += ["DATASET.ATTRIBUTE_NAMES", f"[{attributes}]", *plan.backbone]
    keys += ["REGIONS.SOURCE", "boxes", "REGIONS.FILE", str(setting / "regions.csv")]
    keys += ["DISCOVERY.PLANTED", content["feature"], *(["DISCOVERY.FROM", str(found)] if found else [])]
    flags = ["--config-file", plan.config, "--root", str(setting), "--seed", str(seed), "--output-dir", str(out)]
    return [*flags, *shlex.split(METHODS[method]), *keys, *plan.keys]


def setting_of(folder: Path) -> dict[str, Any]:
    """What setting.json of a setting says; ``target`` is the class that the feature goes with."""
    return json.loads((folder / "setting.json").read_text(encoding="utf-8"))


def trained(line: Sequence[str], out: Path) -> PromptTrainer:
    """The trainer of a run, which is trained unless its folder is finished, with its model."""
    if finished_results(out) is None:
        cli.run(line)
    elif changed := changed_keys(out, line):
        raise UserError(f"{out} is a run of another grid ({changed[0]}): delete it, or choose another --out")
    cfg = setup_cfg(build_parser().parse_intermixed_args(line))
    trainer = build_trainer(cfg)
    trainer.load_model(out)
    return trainer


@torch.no_grad()
def measure(trainer: PromptTrainer, target: int) -> dict[str, Any]:
    """Validity and accuracies of a trained model on the test images of a setting."""
    learner, predict = trainer.learner, trainer.objective.predict
    data = trainer.encoder.data_of("test")
    label, present = (np.array([getattr(d, key) for d in data]) for key in ("label", "attribute"))
    with evaluating(*trainer.models(), learner):
        predicted = trainer.encoder.outputs("test", learner, predict)[1].argmax(dim=1).cpu().numpy()
        scores = _region_scores(trainer, "test")
    images = image_metrics(predicted, label, present)
    number = {name: i for i, name in enumerate(trainer.lab2cname.values())}
    shown = np.array([number.get(name, -1) for name in trainer.region_features.regions("test").names])
    items = region_metrics(scores.argmax(dim=1).cpu().numpy(), shown)
    return {
        "eps": list(validity(predicted, label, present, target)),
        "image_overall": images.overall,
        "image_worst_group": images.worst_group,
        "region_overall": items.overall,
        "region_worst_group": items.worst_group,
    }


def _region_scores(trainer: PromptTrainer, split: str) -> torch.Tensor:
    """Probabilities of the classes for every region of a split, [r, C]."""
    features = trainer.region_features.of(split, trainer.learner)
    temperature = trainer.cfg.DISCOVERY.TEMPERATURE
    return region_scores(trainer.encoder, trainer.learner, trainer.objective.predict, features, temperature)


@torch.no_grad()
def compare_discovery(trainer: PromptTrainer, feature: str, out: Path) -> dict[str, Any]:
    """Precision@10 of RaVL's discovery (whose files go to ``out``) and of every variant of every baseline.

    A region is right where it is labelled ``feature``.
    """
    learner, predict = trainer.learner, trainer.objective.predict
    found = trainer.discovery.discover(learner, predict, "FineTune", out, pictures=False)
    regions = trainer.region_features.regions("val")
    truth = np.array([name == feature for name in regions.names])
    with evaluating(*trainer.models(), learner):
        features = trainer.region_features.of("val", learner)
        scores = _region_scores(trainer, "val")
        image_scores = trainer.encoder.outputs("val", learner, predict)[1].softmax(dim=1)
    label = np.array([d.label for d in trainer.encoder.data_of("val")])
    inputs = [x.cpu().numpy() for x in (features, regions.owner, scores, image_scores)]
    content = read_discovery(out)
    top = content["clusters"][0]
    precision = {"RaVL": top["precision_at_10"] if found.clusters else 0.0}
    for name, rank in DISCOVERY_BASELINES.items():
        for variant in BASELINE_VARIANTS[name]:
            title = " ".join([name, *(f"({key} {value})" for key, value in variant.items())])
            precision[title] = precision_at(rank(*inputs, label, seed=trainer.cfg.SEED, **variant), truth)
    helps = top["helps"] if found.clusters else None
    return {"precision": precision, "found": bool(found.clusters), "attribute": helps, "k": content["clustering"]["k"]}
