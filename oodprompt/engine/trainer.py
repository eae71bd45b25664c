"""The engine: trains any prompt learner with any debiasers, evaluates, checkpoints, resumes.

The vocabulary is Dassl's (``register_model``, ``before_epoch``, ``forward_backward``, ``load_model``, ...). A method's
file defines a ``PromptLearner`` or a ``Debiaser`` and a two-line trainer that names it:

    @TRAINER_REGISTRY.register()
    class CoOp(PromptTrainer):
        learner_class = ContextLearner
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import platform
import resource
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from yacs.config import CfgNode

import oodprompt
from oodprompt.backbones import load_backbone
from oodprompt.backbones.weights import check_name
from oodprompt.config import extensions
from oodprompt.config.free_keys import FREE_WHEN_RESUMED
from oodprompt.config.keys import get_cfg_default, leaves, merge_file, merge_opts, set_key
from oodprompt.config.registry import EVALUATOR_REGISTRY, TRAINER_REGISTRY
from oodprompt.data import seeding
from oodprompt.data.dataset import Datum, digest
from oodprompt.data.distributed import average_gradients, gather_rows
from oodprompt.data.loading import Batch, DataManager
from oodprompt.data.transforms import is_random
from oodprompt.engine import checkpoint, discover, evaluation
from oodprompt.engine.first_stage import fit_alone, outputs
from oodprompt.engine.optim import LRScheduler, build_optimizer
from oodprompt.errors import UserError, nearest
from oodprompt.features import views as features
from oodprompt.files import write_atomically
from oodprompt.methods.attributes import DiscoveredAttributes, PseudoAttributes, prompt_features
from oodprompt.methods.contracts import Alignment, Context, Debiaser, PromptLearner, Step, StepRegions
from oodprompt.methods.groups import CHOICES, Groups, groups_of, num_values
from oodprompt.methods.resolve import resolve_methods
from oodprompt.methods.splits import Split
from oodprompt.regions.boxes import Regions, rows_of_images
from oodprompt.reports.attributes import PSEUDO_ATTRIBUTES, write_pseudo_attributes
from oodprompt.reports.curves import write_training_curves
from oodprompt.reports.results import finished_results, selections_table, write_results

_PRECISIONS = ("fp32", "bf16", "amp", "fp16")


class PromptTrainer:
    """Trains a prompt learner, alone or with debiasers: ``trainer = Cls(cfg); trainer.train()``.

    A subclass sets ``learner_class`` (it is a prompt learner, usable as ``TRAINER.BASE``) or ``debiaser_class`` (it
    goes over ``TRAINER.BASE``). Debiasers named in ``TRAINER.STACK`` are added to either. The objective is

        mean(weights * (CE(prediction, y) + sum of per-sample losses)) + sum of penalties.
    """

    learner_class: ClassVar[type[PromptLearner] | None] = None
    debiaser_class: ClassVar[type[Debiaser] | None] = None

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self._models: OrderedDict[str, nn.Module] = OrderedDict()
        self._optims: OrderedDict[str, torch.optim.Optimizer | None] = OrderedDict()
        self._scheds: OrderedDict[str, LRScheduler | None] = OrderedDict()
        self._writer: SummaryWriter | None = None
        self.base_name, self.learner_type, self.debiaser_types = resolve_methods(cfg)
        self.check_cfg(cfg)
        self.state = PartialState(cpu=not (cfg.USE_CUDA and torch.cuda.is_available()))
        self.device = self.state.device
        self.precision = self._precision()
        self.start_epoch = self.epoch = 0
        self.max_epoch = cfg.OPTIM.MAX_EPOCH
        self.output_dir = Path(cfg.OUTPUT_DIR)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, dict[str, float]] = {}  # criterion -> its best validation value and the epoch of it
        self.selections: list[dict[str, Any]] = []
        self.pseudo_accuracy: dict[str, float | None] = {}
        self.groups_by: str | None = None  # where a debiaser asked for groups
        self.evaluated_checkpoint = ""
        self.train_seconds = 0.0
        self._step_times: list[float] = []
        self._unchecked: list[tuple[int, Tensor]] = []
        self._loaded_step_ms = 0.0
        self.build_data_loader()
        self.build_model()
        self.evaluator = EVALUATOR_REGISTRY.get(cfg.TEST.EVALUATOR, "TEST.EVALUATOR")(cfg, self.dataset)

    # --- building ----------------------------------------------------------------------------------------------

    def check_cfg(self, cfg: CfgNode) -> None:
        """Refuse values that would fail later."""
        if not cfg.MODEL.BACKBONE.PATH:
            check_name(cfg.MODEL.BACKBONE.NAME)
        choices = {
            "TEST.FINAL_MODEL": (cfg.TEST.FINAL_MODEL, ("last_step", "best_val")),
            "TEST.SPLIT": (cfg.TEST.SPLIT, ("test", "val")),
            "TEST.SELECTION": (cfg.TEST.SELECTION, ("auto", *evaluation.CRITERIA)),
            "TRAINER.GROUPS": (cfg.TRAINER.GROUPS, CHOICES),
        }
        for key, (value, known) in choices.items():
            if value not in known:
                raise UserError(f"{key}: unknown choice {value!r}: {nearest(value, known)}")

    def _precision(self) -> str:
        cfg = self.cfg
        key, choice = ("TRAINER.PREC", cfg.TRAINER.PREC) if cfg.TRAINER.PREC else (
            f"PREC of {self.base_name}", self.learner_type.precision(cfg))  # fmt: skip
        if choice not in _PRECISIONS:
            raise UserError(f"{key}: unknown precision {choice!r}: {nearest(choice, _PRECISIONS)}")
        if choice in ("amp", "fp16") and self.device.type == "cpu":
            self.print(f"Precision {choice} needs a GPU; on the CPU this run computes in fp32")
            return "fp32"
        return choice

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision for the towers; losses are computed in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def build_data_loader(self) -> None:
        with self.state.main_process_first():
            self.dm = DataManager(self.cfg, self.state.process_index, self.state.num_processes)
        if self.cfg.TEST.FINAL_MODEL == "best_val" and self.dm.val_loader is None:
            raise UserError("TEST.FINAL_MODEL best_val: the data set has no validation split; use last_step")
        self.dataset, self.num_classes, self.lab2cname = self.dm.dataset, self.dm.num_classes, self.dm.lab2cname
        self.train_loader_x = self.dm.train_loader_x
        self.val_loader, self.test_loader = self.dm.val_loader, self.dm.test_loader
        if self.cfg.VERBOSE:
            for name, value in self.dm.summary():
                self.print(f"  {name:<32} {value}")

    def build_model(self) -> None:
        cfg = self.cfg
        self.print(f"Loading CLIP (backbone: {cfg.MODEL.BACKBONE.PATH or cfg.MODEL.BACKBONE.NAME})")
        with self.state.main_process_first():
            self.clip = load_backbone(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.PATH).to(self.device)
        takes = self.clip.visual.input_resolution
        if tuple(cfg.INPUT.SIZE) != (takes, takes):
            raise UserError(
                f"INPUT.SIZE is {tuple(cfg.INPUT.SIZE)}, but the backbone takes {takes} x {takes} pixels: "
                f'add INPUT.SIZE "({takes}, {takes})"'
            )
        self.clip.activation_limit = int(cfg.TRAIN.ACTIVATION_GIB * 2**30)
        self.learner = self.build_learner(cfg)
        self._register(self.learner, cfg.OPTIM.LR)
        own_encoder = not self.learner.encodes_as_clip
        views = features.views_to_cache(cfg, self.learner.trains_image_tower, own_encoder)
        self.feature_cache = features.FeatureCache(cfg, self.clip, self.precision, self.device, self.print)
        self.learner_cache = None if own_encoder else self.feature_cache
        self.caches_evaluation = cfg.DATALOADER.FEATURE_CACHE != "off" and not self.learner.trains_image_tower
        if not views and not is_random(cfg):
            self.train_loader_x.keep_images()
        for loader in (self.val_loader, self.test_loader):
            if loader is not None and not self.caches_evaluation:
                loader.keep_images()
        self._cached: dict[str, features.FeatureLoader] = {}
        self.views = views
        self._frozen: dict[str, Tensor] = {}
        self.regions: dict[str, Regions] = {}
        self.region_cache: dict[str, Tensor] = {}
        context = self.build_context()
        self.debiasers: list[Debiaser] = []
        for i, debiaser_type in enumerate(self.debiaser_types, 1):
            seeding.set_random_seed(seeding.derive_seed(cfg.SEED, seeding.INIT, i))
            debiaser = debiaser_type(cfg, context)
            self.debiasers.append(debiaser)
            self._register(debiaser, debiaser_type.learning_rate(cfg))
        self.predictor = self._only_one("predicts", "replace the prediction")
        chooser = self._only_one("chooses_images", "choose the images of an epoch")
        self._refuse_balancing_twice(chooser)
        if chooser is not None:
            self.train_loader_x.batches.order = chooser.epoch_order
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.uses_scaler)

    @property
    def debiaser_names(self) -> list[str]:
        """The trainers' names of ``debiasers``."""
        return [*([self.cfg.TRAINER.NAME] if self.debiaser_class else []), *self.cfg.TRAINER.STACK]

    def _only_one(self, what: str, does: str) -> Debiaser | None:
        """The debiaser that has the attribute ``what``, if any; ``UserError`` where several have."""
        having = {n: d for n, d in zip(self.debiaser_names, self.debiasers, strict=True) if getattr(d, what)}
        if len(having) > 1:
            raise UserError(f"TRAINER.STACK: {' and '.join(having)} each {does}; only one of a stack can")
        return next(iter(having.values()), None)

    def _refuse_balancing_twice(self, chooser: Debiaser | None) -> None:
        """``UserError`` where two debiasers make up for the sizes of groups, which turns the imbalance round."""
        named = dict(zip(self.debiaser_names, self.debiasers, strict=True))
        names = [name for name, d in named.items() if d.balances_by]
        if len(names) < 2 and chooser is not None and chooser.balances_groups:
            names = [name for name, d in named.items() if d is chooser or d.balances_by == "size"]
        if len(names) > 1:
            raise UserError(
                f"TRAINER.STACK: {' and '.join(names)} each make up for the sizes of groups, and both together turn the "
                "imbalance round; leave one out (GroupCoOp stays with TRAINER.GROUPCOOP.BALANCE False)"
            )

    @property
    def uses_scaler(self) -> bool:
        """Whether losses are scaled because gradients are computed in fp16."""
        return self.precision in ("amp", "fp16")

    def build_learner(self, cfg: CfgNode) -> PromptLearner:
        """A prompt learner at its initial values, the same at every call."""
        seeding.set_random_seed(seeding.derive_seed(cfg.SEED, seeding.INIT, 0))
        learner = self.learner_type(cfg, self.dataset.classnames, self.dataset.template, self.clip)
        if cfg.MODEL.INIT_WEIGHTS:
            path = Path(cfg.MODEL.INIT_WEIGHTS)
            if not path.is_file():
                raise UserError(f"MODEL.INIT_WEIGHTS: no file at {path}; give a checkpoint of {self.base_name}")
            state_dict = checkpoint.load(path)["state_dict"]
            checkpoint.check_towers(self.clip, state_dict, path)
            checkpoint.load_weights(learner, state_dict, path, learner.not_loaded, learner.foreign)
        return learner

    def build_context(self) -> Context:
        """What the debiasers are given."""
        cfg, data = self.cfg, self.dataset
        numbers = {"train": 0, "val": 1, "test": 2}
        self.pseudo = PseudoAttributes(
            self.clip,
            data.attribute_names,
            data.attribute_prompts,
            cfg.TRAINER.PSEUDO_NOISE,
            lambda split: np.random.default_rng(seeding.derive_seed(cfg.SEED, seeding.NOISE, numbers[split])),
        )
        self.discovered = DiscoveredAttributes(lambda: discover.find(self))
        classnames, train = self.learner.classnames, self.split("train")
        values = 1 + max(d.attribute for split in (data.train_x, data.val, data.test) for d in split)

        def groups(split: Split) -> Groups:
            self.groups_by = cfg.TRAINER.GROUPS
            return groups_of(split, cfg.TRAINER.GROUPS, classnames, values, self.pseudo, self.discovered)

        def check_groups(split: Split) -> None:
            num_values(split, cfg.TRAINER.GROUPS, values, self.pseudo)

        return Context(
            clip=self.clip,
            classnames=classnames,
            attribute_names=data.attribute_names,
            train=train,
            val=self.split("val") if self.val_loader else None,
            pseudo=self.pseudo,
            discovered=self.discovered,
            groups=groups,
            num_groups=lambda: len(classnames) * num_values(train, cfg.TRAINER.GROUPS, values, self.pseudo),
            check_groups=check_groups,
            autocast=self.autocast,
            features_are_frozen=not self.learner.trains_image_tower,
            learner=self.learner,
            fit_alone=lambda epochs, choose=None: fit_alone(self, epochs, choose),
            outputs=lambda split: outputs(self, split.name, self.learner, self.predict),
        )

    def data_of(self, split: str) -> list[Datum]:
        """The images of a split."""
        return {"train": self.dataset.train_x, "val": self.dataset.val, "test": self.dataset.test}[split]

    def split(self, name: str) -> Split:
        """Labels, attributes and frozen features of a split."""
        data = self.data_of(name)
        label, attribute = (
            torch.tensor([getattr(datum, key) for datum in data], device=self.device) for key in ("label", "attribute")
        )
        return Split(name, label, attribute, lambda: self.frozen_features_of(name))

    def _register(self, module: nn.Module, lr: float) -> None:
        module.to(self.device)
        optim = (
            build_optimizer(module, self.cfg.OPTIM, lr) if any(p.requires_grad for p in module.parameters()) else None
        )
        self.register_model(module.model_name, module, optim, LRScheduler(optim, self.cfg.OPTIM) if optim else None)

    def register_model(
        self,
        name: str = "model",
        model: nn.Module | None = None,
        optim: torch.optim.Optimizer | None = None,
        sched: LRScheduler | None = None,
    ) -> None:
        """Name a model for checkpoints, with its optimiser and schedule."""
        if name in self._models:
            raise UserError(f"two models are named {name!r}; is a debiaser given twice in TRAINER.STACK?")
        self._models[name], self._optims[name], self._scheds[name] = model, optim, sched

    def get_model_names(self) -> list[str]:
        return list(self._models)

    def models(self) -> list[nn.Module]:
        return list(self._models.values())

    # --- printing ----------------------------------------------------------------------------------------------

    def print(self, *lines: str) -> None:
        """Print on the main process only, without breaking a progress bar."""
        if self.state.is_main_process:
            for line in lines:
                tqdm.write(line, file=sys.stdout)

    # --- features and alignment --------------------------------------------------------------------------------

    def encode_image(self, images: Tensor, learner: PromptLearner | None = None) -> Tensor:
        """Normalised image features of the learner, fp32."""
        with self.autocast():
            return (learner or self.learner).encode_image(images.to(self.device, non_blocking=True)).float()

    @torch.no_grad()
    def encode_frozen(self, images: Tensor) -> Tensor:
        """Normalised image features of CLIP as it was released, fp32."""
        with self.autocast():
            z = self.clip.encode_image(images.to(self.device, non_blocking=True))
        return F.normalize(z.float(), dim=-1)

    @torch.no_grad()
    def frozen_features_of(self, split: str) -> Tensor:
        """Normalised features [N, d] of a split's images from CLIP as it was released.

        By the test transform, but for training images where nothing in the training transform is random.
        """
        if split not in self._frozen:
            own = self.learner.encodes_as_clip and (
                split in self._cached and self.views == 1 if split == "train" else self.caches_evaluation
            )
            if own:
                values = self.loader(split).features
            elif split == "train":
                values = features.train_views(self.dm, self.encode_frozen, 1, self.shows, self.feature_cache)
            else:
                images = {"val": self.val_loader, "test": self.test_loader}[split]
                values = features.evaluation_view(split, images, self.encode_frozen, self.shows, self.feature_cache)
            self._frozen[split] = features.whole(values[0], self.device)
        return self._frozen[split]

    def frozen_features(self, batch: Batch, z: Tensor) -> Tensor:
        """Normalised features [B, d] of the batch from CLIP as it was released; ``z`` are the learner's."""
        if self.learner.encodes_as_clip:
            return z
        if self.keeps_frozen_features:
            return features.rows_of(self.frozen_features_of("train"), batch["index"], self.device)
        return self.encode_frozen(batch["img"])

    @property
    def keeps_frozen_features(self) -> bool:
        """Whether frozen features are computed once, because every epoch sees the same view of an image."""
        return not is_random(self.cfg) and self.cfg.DATALOADER.FEATURE_CACHE != "off"

    @property
    def shows(self) -> bool:
        """Whether this process shows progress."""
        return self.state.is_main_process

    def loader(self, split: str) -> Any:
        """Batches of a split, from cached features where the learner allows; None when the split is empty."""
        images = {"train": self.train_loader_x, "val": self.val_loader, "test": self.test_loader}[split]
        if images is None or not (self.views if split == "train" else self.caches_evaluation):
            return images
        if split not in self._cached:
            self.learner.eval()
            if split == "train":
                values = features.train_views(self.dm, self.encode_image, self.views, self.shows, self.learner_cache)
            else:
                values = features.evaluation_view(split, images, self.encode_image, self.shows, self.learner_cache)
            self._cached[split] = features.FeatureLoader(
                values, images.dataset.data_source, images.batches, self.device
            )
        return self._cached[split]

    def align(self, batch: Batch, learner: PromptLearner | None = None) -> Alignment:
        """The alignment of a batch of images or of cached image features, by ``learner`` or the run's own."""
        learner = learner or self.learner
        z = batch["image_features"] if "image_features" in batch else self.encode_image(batch["img"], learner)
        with self.autocast():
            alignment = learner(z)
        frozen = captions = None
        if learner.needs_frozen_features and learner.training:
            frozen = self.frozen_features(batch, z)
        if learner.needs_captions and learner.training:
            captions = self.caption_features[batch["index"].to(self.device)]
        parts = (alignment.image_features, alignment.text_features, alignment.logit_scale)
        return Alignment(*(part.float() for part in parts), frozen, captions)

    @cached_property
    @torch.no_grad()
    def caption_features(self) -> Tensor:
        """Normalised text features [N, d] of the training images' captions; of the template where one has none."""
        names, template = self.learner.classnames, self.dataset.template
        captions = [d.caption or template.replace("{}", names[d.label]) for d in self.dataset.train_x]
        different = list(dict.fromkeys(captions))
        features = torch.cat([prompt_features(self.clip, part) for part in _parts(different, 1000)]).float()
        place = {caption: i for i, caption in enumerate(different)}
        return features[[place[caption] for caption in captions]]

    def predict(self, alignment: Alignment) -> Tensor:
        """Logits [B, C]: the predicting debiaser's, else the alignment's."""
        return self.predictor.predict(alignment) if self.predictor else alignment.logits

    @staticmethod
    def gathered(alignment: Alignment) -> Alignment:
        """The alignment of the batch of all processes, with gradients."""
        text, frozen, captions = (
            alignment.text_features,
            alignment.frozen_image_features,
            alignment.caption_features,
        )
        return Alignment(
            gather_rows(alignment.image_features),
            gather_rows(text) if text.ndim == 3 else text,
            alignment.logit_scale,
            None if frozen is None else gather_rows(frozen),
            None if captions is None else gather_rows(captions),
        )

    # --- training ----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train from where the output folder stands, then test."""
        self.before_train()
        for self.epoch in range(self.start_epoch, self.max_epoch):  # noqa: B020
            self.before_epoch()
            self.run_epoch()
            self.after_epoch()
        self.after_train()

    def before_train(self) -> None:
        self.trainable = any(optim is not None for optim in self._optims.values())
        if not self.trainable:
            self.max_epoch = 0
        directory = self.cfg.RESUME or self.cfg.OUTPUT_DIR
        self.start_epoch = self.resume_model_if_exist(directory)
        if not self.start_epoch:
            self._check_folder()
        if self.cfg.RESUME and not self.start_epoch:
            raise UserError(f"--resume: there is no checkpoint in {self.cfg.RESUME}")
        self.save_config()
        cached = (
            f"cache of {self.views} view{'s' if self.views > 1 else ''}" if self.views else "computed at every step"
        )
        self.print(f"Device: {self.device}, {self.state.num_processes} process(es), precision {self.precision}")
        self.print(f"Image features: {cached}")
        self.time_start = time.time()
        if self.trainable and self.dataset.test_only:
            raise UserError(
                f"{self.cfg.DATASET.NAME} has test images only; train on another data set and come back with --eval-only "
                "--model-dir OUTPUT_FOLDER"
            )
        self._note_what_does_nothing()
        if self.start_epoch < self.max_epoch:
            self._check_selection()
            for debiaser in self.debiasers:
                debiaser.check()
            self.loader("train")
            if self.learner.needs_frozen_features and self.keeps_frozen_features:
                self.frozen_features_of("train")
            for debiaser in self.debiasers:
                debiaser.before_train()
        self.report_pseudo_attributes()
        if self.state.is_main_process and self.trainable:
            steps = self.start_epoch * len(self.train_loader_x) if self.start_epoch else None
            self._writer = SummaryWriter(str(self.output_dir / "tensorboard"), purge_step=steps)
        steps = len(self.train_loader_x) if self.start_epoch < self.max_epoch else 0
        self._bar = tqdm(
            total=self.max_epoch * steps,
            initial=self.start_epoch * steps,
            desc=self.cfg.TRAINER.NAME,
            unit="step",
            disable=None if self.shows else True,
            leave=False,
        )

    def _note_what_does_nothing(self) -> None:
        names = [name for name, d in zip(self.debiaser_names, self.debiasers, strict=True) if not d.predicts]
        if names and not self.trainable:
            self.print(f"Note: nothing is trained over {self.base_name}, so {', '.join(names)} changes nothing")

    def _check_selection(self) -> None:
        """Refuse a choice of the epoch that the validation data cannot give."""
        choice = self.cfg.TEST.SELECTION
        if not self.selects or choice in ("auto", "accuracy"):
            return
        if choice == "worst_group_accuracy" and bool((self.split("val").attribute < 0).any()):
            raise UserError(
                f"TEST.SELECTION {choice}: the validation data have images without an attribute label; use accuracy, or "
                "worst_pseudo_group_accuracy, which needs names of the attribute's values only"
            )
        if choice == "worst_pseudo_group_accuracy":
            _ = self.pseudo.text

    def report_pseudo_attributes(self) -> None:
        """How far pseudo-attributes are right, where the data set knows: printed, drawn and kept for the results.

        When no epoch was left to train, what the run found then is read back.
        """
        file = self.output_dir / PSEUDO_ATTRIBUTES
        if not self.pseudo.splits:
            if self.start_epoch and file.is_file():
                splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
                self.pseudo_accuracy = {name: row["accuracy"] for name, row in splits.items()}
            return
        if set(self.pseudo.splits) == set(self.pseudo_accuracy):
            return
        rows = {
            name: evaluation.attribute_metrics(self.pseudo.of(split), split.label, split.attribute, self.dataset)
            for name, split in ((name, self.split(name)) for name in self.pseudo.splits)
        }
        if rows and self.state.is_main_process:
            new = [name for name in rows if name not in self.pseudo_accuracy]
            self.print(*write_pseudo_attributes(rows, new, self.dataset, self.pseudo.noise, self.output_dir))
        self.pseudo_accuracy = {name: row["accuracy"] for name, row in rows.items()}

    @cached_property
    def _data_digest(self) -> str:
        return digest(self.cfg.DATASET.ROOT, self.dataset.train_x, self.dataset.val)

    def _check_folder(self) -> None:
        """``UserError`` where the output folder has the results of another method or data set, which would be lost."""
        old = finished_results(self.output_dir) or {}
        cfg = self.cfg
        now = {"trainer": cfg.TRAINER.NAME, "base": self.base_name, "stack": list(cfg.TRAINER.STACK)}
        now["dataset"] = cfg.DATASET.NAME
        changed = [f"{key} {old[key]!r}, not {new!r}" for key, new in now.items() if key in old and old[key] != new]
        if changed:
            raise UserError(
                f"{self.output_dir} has the results of another run ({'; '.join(changed)}): choose another --output-dir, "
                "or delete the folder"
            )

    def save_config(self) -> None:
        """Write ``config.yaml``, which reruns the run."""
        if self.state.is_main_process:
            write_atomically(self.output_dir / "config.yaml", self.cfg.dump())

    def before_epoch(self) -> None:
        # Every random number of an epoch comes from (seed, epoch), so a resumed run draws what the unbroken one drew.
        seeding.set_random_seed(seeding.derive_seed(self.cfg.SEED, seeding.EPOCH, self.epoch))
        for model in self._models.values():
            model.train()
        for debiaser in self.debiasers:
            debiaser.before_epoch(self.epoch)

    def run_epoch(self) -> None:
        loader = self.loader("train")
        loader.set_epoch(self.epoch)
        self.num_batches = len(loader)
        sums: dict[str, Tensor] = {}
        samples = 0
        began = end = time.time()
        for self.batch_idx, batch in enumerate(loader):
            data_seconds = time.time() - end
            summary = self.forward_backward(batch)
            for key, value in summary.items():
                sums[key] = sums.get(key, 0.0) + value.detach()
            samples += 1
            self._step_times.append(time.time() - end)
            self._bar.update()
            frequency = self.cfg.TRAIN.PRINT_FREQ
            if frequency > 0 and ((self.batch_idx + 1) % frequency == 0 or self.num_batches < frequency):
                self._print_step(summary, {k: v / samples for k, v in sums.items()}, data_seconds)
            end = time.time()
        self._epoch_means = {key: float(value) / samples for key, value in sums.items()}
        seconds = time.time() - began
        self.train_seconds += seconds
        if self.device.type == "cuda":  # steps only queue their work there; reading the means has waited for it
            self._step_times[-samples:] = [seconds / samples] * samples

    def _print_step(self, now: dict[str, Tensor], mean: dict[str, Tensor], data_seconds: float) -> None:
        seconds = statistics.fmean(self._step_times[-50:])
        left = self.num_batches * (self.max_epoch - self.epoch) - self.batch_idx - 1
        values = " ".join(f"{key} {float(now[key]):.4f} ({float(mean[key]):.4f})" for key in now)
        self.print(
            f"epoch [{self.epoch + 1}/{self.max_epoch}] batch [{self.batch_idx + 1}/{self.num_batches}] "
            f"time {self._step_times[-1]:.3f} ({seconds:.3f}) data {data_seconds:.3f} {values} "
            f"lr {self.get_current_lr():.4e} eta {datetime.timedelta(seconds=int(seconds * left))}"
        )
        step = self.epoch * self.num_batches + self.batch_idx
        for key, value in now.items():
            self.write_scalar(f"train/{key}", float(value), step)
        self.write_scalar("train/lr", self.get_current_lr(), step)

    def forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """One step on one batch; returns scalars to print. The schedule advances after the epoch's last batch."""
        alignment = self.gathered(self.align(batch))
        regions = self.step_regions(batch) if any(d.takes_regions for d in self.debiasers) else None
        loss, summary = self.objective(alignment, batch, regions)
        self.detect_anomaly(loss)
        optims = [optim for optim in self._optims.values() if optim is not None]
        for optim in optims:
            optim.zero_grad(set_to_none=True)
        self.learner.backward(loss, alignment, self.scaler.scale)
        average_gradients(p for model in self._models.values() for p in model.parameters())
        for optim in optims:
            self.scaler.step(optim)
        self.scaler.update()
        if self.batch_idx + 1 == self.num_batches:
            self._last_lr = self.get_current_lr()
            self.update_lr()
        return summary

    def step_regions(self, batch: Batch) -> StepRegions:
        """The regions of the images of the batch of all processes, by the learner; with gradients where it trains."""
        regions = discover.regions_of(self, "train")
        rows, image = rows_of_images(regions, batch["index"].cpu())
        number = torch.bincount(image, minlength=len(batch["index"]))
        if discover.keeps_regions(self, self.learner):
            z = discover.region_features(self, "train", self.learner)[rows.to(self.device)]
        else:
            images, boxes = batch["img"].to(self.device, non_blocking=True), regions.boxes[rows].split(number.tolist())
            with self.autocast():
                z = self.learner.encode_regions(images, boxes, self.cfg.REGIONS.FEATURES).float()
        number, rows = (gather_rows(x.to(self.device)) for x in (number, rows))
        image = torch.repeat_interleave(torch.arange(len(number), device=self.device), number)
        return StepRegions(gather_rows(z), image, rows)

    def objective(
        self, alignment: Alignment, batch: Batch, regions: StepRegions | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """mean(weights * (ce_weight CE(prediction, y) + per-sample losses)) + penalties, and scalars to print.

        ``alignment`` and ``regions`` are those of the batch of all processes, ``batch`` the own one.
        """
        for debiaser in self.debiasers:
            debiaser.before_step()
        label, attribute, index = (
            gather_rows(batch[key].to(self.device, non_blocking=True)) for key in ("label", "attribute", "index")
        )
        logits = self.predict(alignment)
        step = Step(alignment, logits, label, attribute, index, regions)
        per_sample = self.learner.ce_weight * F.cross_entropy(logits, label, reduction="none")
        weights = torch.ones_like(per_sample)
        penalties = [p for p in [self.learner.penalty(alignment)] if p is not None]
        log: dict[str, Tensor] = {}
        for debiaser in self.debiasers:
            contribution = debiaser.contribute(step)
            if contribution.per_sample_loss is not None:
                per_sample = per_sample + contribution.per_sample_loss
            if contribution.sample_weights is not None:
                if not self.learner.ce_weight:
                    raise UserError(
                        f"{debiaser.model_name} weighs the cross-entropy of images, which has no part in the loss of "
                        f"{self.base_name}; give it one, as with TRAINER.FINETUNE.CAPTIONS 0.8"
                    )
                weights = weights * contribution.sample_weights
            if contribution.penalty is not None:
                penalties.append(contribution.penalty)
            log.update(contribution.log)
        loss = (weights * per_sample).mean() + sum(penalties)
        accuracy = 100 * (logits.argmax(1) == label).float().mean()
        return loss, {"loss": loss.detach(), "acc": accuracy, **{k: v.detach() for k, v in log.items()}}

    def detect_anomaly(self, loss: Tensor) -> None:
        """``UserError`` when a loss is not finite. On a GPU losses are looked at 20 at a time, as looking waits."""
        self._unchecked.append((self.batch_idx + 1, loss.detach()))
        if self.device.type == "cuda" and self.batch_idx + 1 < self.num_batches and len(self._unchecked) < 20:
            return
        unchecked, self._unchecked = self._unchecked, []
        for batch, value in zip(
            [b for b, _ in unchecked], torch.stack([v for _, v in unchecked]).tolist(), strict=True
        ):
            if not math.isfinite(value):
                last = f"the last whole checkpoint is of epoch {self.epoch}" if self.epoch else "no epoch was finished"
                raise UserError(
                    f"the loss became {value} in epoch {self.epoch + 1}, batch {batch}; {last}. "
                    f"Lower OPTIM.LR (now {self.cfg.OPTIM.LR}), or set TRAINER.PREC fp32 (now {self.precision})"
                )

    def update_lr(self) -> None:
        for sched in self._scheds.values():
            if sched is not None:
                sched.step()

    def get_current_lr(self) -> float:
        """Learning rate of the first model that trains."""
        optim = next((optim for optim in self._optims.values() if optim is not None), None)
        return optim.param_groups[0]["lr"] if optim else 0.0

    def write_scalar(self, tag: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, value, step)

    def after_epoch(self) -> None:
        self.learner.after_epoch(self.epoch)
        for debiaser in self.debiasers:
            debiaser.after_epoch(self.epoch)
        done = self.epoch + 1
        row: dict[str, Any] = {"epoch": done, "lr": self._last_lr, **self._epoch_means}
        every = self.cfg.TRAIN.VAL_FREQ
        improved: list[str] = []
        by_group = {name: values for d in self.debiasers for name, values in d.by_group().items()}
        if self.selects or (every > 0 and (done % every == 0 or done == self.max_epoch) and self.val_loader):
            metrics = self.evaluate("val")
            for key in evaluation.CRITERIA:
                if metrics[key] is not None or key != "worst_pseudo_group_accuracy":
                    row[f"val_{key}"] = metrics[key]
                if metrics[key] is not None:
                    self.write_scalar(f"val/{key}", metrics[key], done * self.num_batches - 1)
            if self.selects:
                improved = self._improved(metrics, done)
            if by_group and metrics["groups"]:
                by_group["validation accuracy"] = {
                    f"{g['class']} / {g['attribute']}": g["accuracy"] for g in metrics["groups"]
                }
        if by_group:
            row["by_group"] = by_group
        self.history.append(row)
        for key, value in self._epoch_means.items():
            self.write_scalar(f"train_epoch/{key}", value, done * self.num_batches - 1)
        if self.cfg.TRAIN.PRINT_FREQ <= 0:
            numbers = {k: v for k, v in row.items() if k not in ("epoch", "by_group") and v is not None}
            self.print(f"epoch [{done}/{self.max_epoch}] " + " ".join(f"{k} {v:.4g}" for k, v in numbers.items()))
        self.save_model(done, improved)

    @property
    def selects(self) -> bool:
        """Whether the epoch that is tested is chosen on validation data."""
        return self.cfg.TEST.FINAL_MODEL == "best_val"

    def _improved(self, metrics: dict[str, Any], epoch: int) -> list[str]:
        """The criteria by which ``epoch`` is the best so far, all of those that the validation data allow."""
        improved = []
        for criterion in evaluation.CRITERIA:
            value = metrics[criterion]
            if value is not None and value > self.best.get(criterion, {"value": -math.inf})["value"]:
                self.best[criterion] = {"value": value, "epoch": epoch}
                improved.append(criterion)
        return improved

    def criterion(self) -> str:
        """What best_val maximises; TEST.SELECTION auto is told by what there is a best value of."""
        choice = self.cfg.TEST.SELECTION
        if choice != "auto":
            return choice
        return "worst_group_accuracy" if "worst_group_accuracy" in self.best else "accuracy"

    @property
    def best_epoch(self) -> int:
        return self.best[self.criterion()]["epoch"] if self.best else 0

    def after_train(self) -> None:
        self._bar.close()
        self.state.wait_for_everyone()  # the main process may still be writing the checkpoint that all load next
        self.print("Finish training")
        self.report_pseudo_attributes()
        if self.history and self.state.is_main_process:
            write_training_curves(self.history, self.output_dir)
        if not self.cfg.TEST.NO_TEST:
            if self.trainable and self.selects:
                if self.best:
                    self.compare_selections()
                by = f" by {self.criterion()} on validation data" if self.best else ""
                self.print(f"Deploy the model with the best validation performance{by}")
                self.load_model(self.output_dir)
            elif self.trainable and self.max_epoch:
                self.print("Deploy the last-epoch model")
                self.evaluated_checkpoint = str(self._checkpoint_files(self.max_epoch)[0])
            self.test()
        elapsed = datetime.timedelta(seconds=round(time.time() - self.time_start))
        self.print(f"Elapsed: {elapsed}")
        if self._writer is not None:
            self._writer.close()

    def compare_selections(self) -> None:
        """What each criterion on validation data would have chosen, and the last epoch, on the tested split."""
        split = self.tested_split()
        chosen = [(criterion, int(best["epoch"]), best["value"]) for criterion, best in self.best.items()]
        metrics: dict[int, dict[str, Any]] = {}
        for criterion, epoch, value in [*chosen, ("last epoch", self.max_epoch, None)]:
            if epoch not in metrics:
                for name, model in self._models.items():
                    path = checkpoint.file_of(self.output_dir, name, epoch if value is None else self._slot(criterion))
                    checkpoint.load_weights(model, checkpoint.load(path)["state_dict"], path)
                metrics[epoch] = self.evaluate(split)
            row = {key: metrics[epoch][key] for key in ("accuracy", "worst_group_accuracy", "gap")}
            self.selections.append({"criterion": criterion, "epoch": epoch, "validation": value, **row})

    def _slot(self, criterion: str) -> str | None:
        """Which checkpoint holds the best model by ``criterion``: the best one (None) for the one that counts."""
        return None if criterion == self.criterion() else criterion

    # --- checkpoints -------------------------------------------------------------------------------------------

    def _checkpoint_files(self, epoch: int | str | None) -> list[Path]:
        return [checkpoint.file_of(self.output_dir, name, epoch) for name in self._models]

    def save_model(self, epoch: int, improved: Sequence[str] = ()) -> None:
        """Write the checkpoint after ``epoch`` epochs; the previous one goes unless CHECKPOINT_FREQ keeps it.

        It is also the best one by every criterion that ``improved`` names.

        All files of an epoch are written before any pointer names them and before any older file goes, so that a
        kill at any moment leaves one whole checkpoint of all models.
        """
        if not self.state.is_main_process:
            return
        broken = [
            f"{name}.{key}"
            for name, model in self._models.items()
            for key, value in model.state_dict().items()
            if not torch.isfinite(value).all()
        ]
        if broken:
            raise UserError(
                f"{broken[0]} is no longer finite after epoch {epoch}; this epoch is not saved, the one before it is. "
                f"Lower OPTIM.LR (now {self.cfg.OPTIM.LR}), or set TRAINER.PREC fp32 (now {self.precision})"
            )
        engine = {
            "config": {key: value for key, value in leaves(self.cfg).items() if key not in FREE_WHEN_RESUMED},
            "history": self.history,
            "best": self.best,
            "train_seconds": self.train_seconds,
            "step_ms_median": self.step_ms_median,
            "whole_batch": self.train_loader_x.batches.whole,
            "data": self._data_digest,
            "imports": extensions.digests(),
        }
        val_result = self.history[-1].get("val_accuracy")
        for name, model in self._models.items():
            optim, sched = self._optims[name], self._scheds[name]
            state = {
                "state_dict": model.state_dict(),
                "epoch": epoch,
                "optimizer": optim.state_dict() if optim else None,
                "scheduler": sched.state_dict() if sched else None,
                "val_result": None if val_result is None else 100 * val_result,
                "oodprompt": {**engine, "scaler": self.scaler.state_dict()},
            }
            checkpoint.save(state, checkpoint.file_of(self.output_dir, name, epoch))
            for criterion in improved:
                checkpoint.save(state, checkpoint.file_of(self.output_dir, name, self._slot(criterion)))
        previous = checkpoint.newest_epoch(self.output_dir, self.get_model_names())
        for file in self._checkpoint_files(epoch):
            checkpoint.write_pointer(file)
        every = self.cfg.TRAIN.CHECKPOINT_FREQ
        if previous is not None and previous < epoch and not (every > 0 and previous % every == 0):
            for file in self._checkpoint_files(previous):
                file.unlink(missing_ok=True)

    @property
    def step_ms_median(self) -> float:
        """Median time of a training step in milliseconds; of the run that was loaded when this one has trained none."""
        return 1000 * statistics.median(self._step_times) if self._step_times else self._loaded_step_ms

    def resume_model_if_exist(self, directory: str | Path) -> int:
        """Load the newest whole checkpoint under ``directory``; returns the number of finished epochs (0: none).

        Raises ``UserError`` when that checkpoint was trained with other keys.
        """
        epoch = checkpoint.newest_epoch(directory, self.get_model_names()) if self.trainable else None
        if epoch is None:
            return 0
        for name, model in self._models.items():
            path = checkpoint.file_of(directory, name, epoch)
            state = checkpoint.load(path)
            if "oodprompt" not in state:
                raise UserError(
                    f"{path} was not written by OODPrompt; evaluate it with --eval-only --model-dir {directory}"
                )
            self._check_same_run(state["oodprompt"], path)
            checkpoint.load_weights(model, state["state_dict"], path)
            if self._optims[name] is not None:
                self._optims[name].load_state_dict(state["optimizer"])
                self._scheds[name].load_state_dict(state["scheduler"])
        engine = state["oodprompt"]
        self.history = engine["history"]
        self.train_seconds, self._loaded_step_ms = engine["train_seconds"], engine["step_ms_median"]
        self.best = engine["best"]
        self.scaler.load_state_dict(engine["scaler"])
        self.print(f"Found checkpoint at {directory}: resuming after epoch {epoch} of {self.max_epoch}")
        if Path(directory).resolve() != self.output_dir.resolve() and self.state.is_main_process:
            self._take_over(Path(directory), epoch)
        return epoch

    def _take_over(self, directory: Path, epoch: int) -> None:
        """Copy the newest and the best checkpoints of the run that is resumed into this run's folder."""
        for name in self._models:
            for source in (checkpoint.file_of(directory, name, e) for e in (epoch, None, *evaluation.CRITERIA)):
                if source.is_file():
                    write_atomically(self.output_dir / name / source.name, source.read_bytes())
        for file in self._checkpoint_files(epoch):
            checkpoint.write_pointer(file)

    def _changed_keys(self, old: dict[str, Any]) -> dict[str, str]:
        new = leaves(self.cfg)
        return {key: f"{key} was {old[key]!r}, now {new[key]!r}" for key in old if key in new and old[key] != new[key]}

    def _check_same_run(self, engine: dict[str, Any], path: Path) -> None:
        changed = [text for key, text in self._changed_keys(engine["config"]).items() if key not in FREE_WHEN_RESUMED]
        if engine["whole_batch"] != self.train_loader_x.batches.whole:
            changed.append(
                f"images per step of all processes were {engine['whole_batch']}, now {self.train_loader_x.batches.whole}"
            )
        if engine.get("data", self._data_digest) != self._data_digest:
            changed.append("the training or validation data are others (images, labels or attributes)")
        for name, was in engine.get("imports", {}).items():
            if extensions.digests().get(name, was) != was:
                self.print(
                    f"Note: {name} has changed since this run was trained; delete {path.parents[1]} to train anew"
                )
        if changed:
            raise UserError(
                f"{path} is of another run: {'; '.join(changed[:3])}"
                + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
                + ". Choose another --output-dir, or delete the folder to train anew"
            )

    def load_model(self, directory: str | Path, epoch: int | None = None) -> None:
        """Load every model from ``directory``: the one of ``epoch``, else the best, else the newest."""
        if not directory:
            self.print("Note: no --model-dir is given, so the untrained model is evaluated")
            return
        for name, model in self._models.items():
            if self._optims[name] is None:
                continue
            if not (Path(directory) / name).is_dir():
                raise UserError(
                    f"--model-dir: {directory} has no folder {name}, which {self.cfg.TRAINER.NAME} needs; "
                    "was it trained with another --trainer, --base or TRAINER.STACK?"
                )
            path = checkpoint.file_of(directory, name, epoch)
            if epoch is None and not path.is_file():
                newest = checkpoint.newest_epoch(directory, [name])
                path = checkpoint.file_of(directory, name, newest)
            state = checkpoint.load(path)
            self._fill(model, state["state_dict"], path)
            self.evaluated_checkpoint = self.evaluated_checkpoint or str(path)
            if engine := state.get("oodprompt"):
                if not self.history:  # not the best model of this very run
                    self.train_seconds, self._loaded_step_ms = engine["train_seconds"], engine["step_ms_median"]
                for key, text in self._changed_keys(engine["config"]).items():
                    if key.startswith(("MODEL.", "TRAINER.", "INPUT.")):
                        self.print(f"Note: {text}")
            self.print(f"Loaded {name} from {path} (epoch {state['epoch']})")

    def _fill(self, model: nn.Module, state_dict: dict[str, Tensor], path: Path) -> None:
        """Load what was trained, by us or by upstream, for evaluation or as a start."""
        if model is self.learner:
            checkpoint.check_towers(self.clip, state_dict, path)
        skip, foreign = getattr(model, "not_loaded", ()), getattr(model, "foreign", "")
        checkpoint.load_weights(model, state_dict, path, skip, foreign)

    # --- evaluation --------------------------------------------------------------------------------------------

    @property
    def watches_pseudo_groups(self) -> bool:
        """Whether validation is also by pseudo-groups: where a choice may rest on them, or a debiaser already does."""
        return len(self.pseudo.prompts) > 1 and (self.selects or "train" in self.pseudo.splits)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, Any]:
        """Metrics of a split; other predictions of the debiasers under ``other_predictions``."""
        for model in self._models.values():
            model.eval()
        evaluators = {"": self.evaluator}
        self.evaluator.reset()
        pseudo = self.pseudo.of(self.split(split)) if split == "val" and self.watches_pseudo_groups else None
        by_pseudo = type(self.evaluator)(self.cfg, self.dataset)
        for batch in self.loader(split):
            alignment = self.align(batch)
            label, attribute = (gather_rows(batch[key].to(self.device)) for key in ("label", "attribute"))
            predictions = {"": self.predict(alignment)}
            for debiaser in self.debiasers:
                predictions.update(debiaser.other_predictions(alignment))
            for name, logits in predictions.items():
                if name not in evaluators:
                    evaluators[name] = type(self.evaluator)(self.cfg, self.dataset)
                evaluators[name].process(gather_rows(logits), label, attribute)
            if pseudo is not None:
                index = gather_rows(batch["index"].to(self.device))
                by_pseudo.process(gather_rows(predictions[""]), label, pseudo[index])
        metrics = {name: evaluator.evaluate(self.dataset.train_x) for name, evaluator in evaluators.items()}
        result = metrics.pop("")
        groups = by_pseudo.evaluate(self.dataset.train_x) if pseudo is not None else {"worst_group_accuracy": None}
        result["worst_pseudo_group_accuracy"] = groups["worst_group_accuracy"]
        keys = ("accuracy", "worst_group_accuracy", "gap")
        result["other_predictions"] = {name: {key: m[key] for key in keys} for name, m in metrics.items()}
        return result

    @torch.no_grad()
    def classify(self, paths: Sequence[str | Path]) -> Tensor:
        """Probabilities [N, C] of the classes for images that are in no split, by the test transform."""
        for model in self._models.values():
            model.eval()
        batches = self.dm.loader([Datum(str(path)) for path in paths])
        shown = tqdm(batches, "images", unit="batch", disable=None if self.shows else True)
        return torch.cat([self.predict(self.align(batch)).softmax(dim=1).cpu() for batch in shown])

    def test(self, split: str | None = None) -> float:
        """Evaluate, print, and write the results; returns the accuracy in [0, 1]."""
        split = split or self.tested_split()
        began = time.time()
        self.print(f"Evaluate on the *{split}* set")
        metrics = self.evaluate(split)
        seconds = time.time() - began
        if self.state.is_main_process:
            self.evaluator.report(metrics)
            for name, other in metrics["other_predictions"].items():
                worst = other["worst_group_accuracy"]
                worst_text = "" if worst is None else f", worst group {100 * worst:.1f}%"
                print(f"* {name}: accuracy {100 * other['accuracy']:.1f}%{worst_text}")
            if self.selections:
                print(selections_table(self.selections))
            files = write_results(self.results(metrics, split, seconds), self.output_dir)
            if self.cfg.TEST.COMPUTE_CMAT:
                files.append(self.output_dir / "cmat.pt")
                checkpoint.save(self.evaluator.confusion_matrix(), files[-1])
            if self.history:
                files.append(self.output_dir / "training.png")
                files += [p for p in [self.output_dir / "groups_by_epoch.png"] if p.is_file()]
            self.print("Wrote " + ", ".join(str(file) for file in files))
        return metrics["accuracy"]

    def tested_split(self) -> str:
        """TEST.SPLIT, or test where there are no validation data."""
        if self.cfg.TEST.SPLIT == "val" and self.val_loader is None:
            self.print("There are no validation data: the test split is evaluated")
            return "test"
        return self.cfg.TEST.SPLIT

    def results(self, metrics: dict[str, Any], split: str, test_seconds: float) -> dict[str, Any]:
        """The content of results.json."""
        cfg = self.cfg
        cuda = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() / 2**20 if cuda else _peak_memory_mib()
        keys = ("num_samples", "accuracy", "macro_f1", "worst_group_accuracy", "adjusted_average_accuracy", "gap")
        return {
            "trainer": cfg.TRAINER.NAME,
            "base": self.base_name,
            "stack": list(cfg.TRAINER.STACK),
            "dataset": cfg.DATASET.NAME,
            "backbone": cfg.MODEL.BACKBONE.PATH or cfg.MODEL.BACKBONE.NAME,
            "seed": cfg.SEED,
            "split": split,
            **{key: metrics[key] for key in keys},
            "groups": metrics["groups"],
            "classes": metrics["classes"],
            "other_predictions": metrics["other_predictions"],
            "best_epoch": self.best_epoch if self.selects else None,
            "selections": self.selections,
            "groups_by": self.groups_by,
            "pseudo_attribute_accuracy": self.pseudo_accuracy,
            "time": {
                "train_s": self.train_seconds,
                "step_ms_median": self.step_ms_median,
                "test_s": test_seconds,
            },
            "peak_memory_mib": memory,
            "environment": {
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
                "oodprompt": oodprompt.__version__,
            },
            "checkpoint": self.evaluated_checkpoint,
        }


def _parts(values: list[str], size: int) -> list[list[str]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def _peak_memory_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def build_trainer(cfg: CfgNode) -> PromptTrainer:
    """The trainer named by ``TRAINER.NAME``."""
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME, "--trainer")(cfg)


def load_run(
    directory: str | Path, epoch: int | None = None, keys: Sequence[str] = (), **values: str | None
) -> PromptTrainer:
    """The trained model of a run's output folder, with its data, ready to evaluate.

    Its config.yaml with ``keys`` (KEY VALUE words) and ``values`` (root, output_dir; None: the run's) changed; the model of
    ``epoch``, else the best, else the last. ``UserError`` where the folder is none of a run.
    """
    config = Path(directory) / "config.yaml"
    if not config.is_file():
        raise UserError(f"--model-dir: there is no {config}; give the output folder of a run of train.py")
    cfg = get_cfg_default()
    merge_file(cfg, config)
    merge_opts(cfg, keys)
    for name, key in {"root": "DATASET.ROOT", "output_dir": "OUTPUT_DIR"}.items():
        if values.get(name):
            set_key(cfg, key, values[name], f"--{name.replace('_', '-')}")
    cfg.freeze()
    trainer = build_trainer(cfg)
    trainer.load_model(directory, epoch=epoch)
    return trainer
