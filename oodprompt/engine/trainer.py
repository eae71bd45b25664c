"""``PromptTrainer``: trains any prompt learner with any debiasers, evaluates, saves, resumes.

The vocabulary is Dassl's (``register_model``, ``before_epoch``, ``forward_backward``, ``load_model``, ...). A method's
file defines a ``PromptLearner`` or a ``Debiaser`` and a two-line trainer that names it:

    @TRAINER_REGISTRY.register()
    class CoOp(PromptTrainer):
        learner_class = ContextLearner
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones.devices import queues_work
from oodprompt.backbones.weights import check_name
from oodprompt.config.keys import check_values, get_cfg_default, merge_file, merge_opts, set_key
from oodprompt.config.registry import GROUP_SOURCE_REGISTRY, TRAINER_REGISTRY
from oodprompt.data import seeding
from oodprompt.data.degenerate import notes_on
from oodprompt.data.loading import Batch, DataManager
from oodprompt.discovery.region_features import RegionFeatures
from oodprompt.engine import assembly, device
from oodprompt.engine.checkpoints import Checkpoints, RunIdentity
from oodprompt.engine.dassl_names import DasslNames
from oodprompt.engine.evaluation import epoch_row
from oodprompt.engine.loop import LossCheck, RunState, StepReport, fit_epoch, memory_in_training, remedy
from oodprompt.engine.moved import find_moved_data
from oodprompt.engine.optim import TrainedModels
from oodprompt.engine.progress import Progress, announce
from oodprompt.engine.proposed_names import names_of_model, take_names_of
from oodprompt.engine.results import AttributeReports, refuse_new_start, results_of
from oodprompt.engine.selection import Selection
from oodprompt.engine.testing import Testing
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder, gathered
from oodprompt.files import write_atomically
from oodprompt.log import logger
from oodprompt.methods.contracts import Debiaser, PromptLearner
from oodprompt.methods.prompts import note_equal_classes
from oodprompt.methods.resolve import resolve_methods
from oodprompt.reports.curves import write_training_curves


class PromptTrainer(DasslNames):
    """Trains a prompt learner, alone or with debiasers: ``trainer = Cls(cfg); trainer.train()``.

    A subclass sets ``learner_class`` (it is a prompt learner, usable as ``TRAINER.BASE``) or ``debiaser_class`` (it
    goes over ``TRAINER.BASE``). Debiasers named in ``TRAINER.STACK`` are added to either.

    Its parts: ``encoder`` (batches to alignments), ``objective`` (loss and prediction), ``trained`` (models and their
    optimisers), ``run`` (where it stands), ``checkpoints``, ``selection`` (which epoch is tested).
    """

    learner_class: ClassVar[type[PromptLearner] | None] = None
    debiaser_class: ClassVar[type[Debiaser] | None] = None

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        self.base_name, self.learner_type, self.debiaser_types = resolve_methods(cfg)
        self.check_cfg(cfg)
        self.state = device.join_processes(cfg)
        self.device = self.state.device
        device.describe(cfg, self.device)
        self.precision = assembly.precision_of(cfg, self.learner_type, self.base_name, self.device)
        scaler = torch.amp.GradScaler(self.device.type, enabled=assembly.scales_losses(self.precision))
        super().__init__(TrainedModels(scaler), RunState(max_epoch=cfg.OPTIM.MAX_EPOCH))
        self.selection = Selection(cfg, self.run)
        self.output_dir = Path(cfg.OUTPUT_DIR)
        self.selections: list[dict[str, Any]] = []
        self.evaluated_checkpoint = ""
        self.build_data_loader()
        self.build_model()

    # --- building ----------------------------------------------------------------------------------------------

    def check_cfg(self, cfg: CfgNode) -> None:
        """Refuse values that would fail later."""
        check_values(cfg)
        GROUP_SOURCE_REGISTRY.get(cfg.TRAINER.GROUPS, "TRAINER.GROUPS")
        if not cfg.MODEL.BACKBONE.PATH:
            check_name(cfg.MODEL.BACKBONE.NAME)

    def build_data_loader(self) -> None:
        with self.state.main_process_first():
            self.dm = DataManager(self.cfg, self.state.process_index, self.state.num_processes, self.device)
        if self.selection.is_on and self.dm.val_loader is None:
            raise UserError("TEST.FINAL_MODEL best_val: the data set has no validation split; use last_step")
        self.notes = notes_on(self.dm.dataset)
        self.dataset, self.num_classes, self.lab2cname = self.dm.dataset, self.dm.num_classes, self.dm.lab2cname
        self.train_loader_x = self.dm.train_loader_x
        self.val_loader, self.test_loader = self.dm.val_loader, self.dm.test_loader
        if self.cfg.VERBOSE:
            for name, value in self.dm.summary():
                logger.info(f"  {name:<32} {value}")

    def build_model(self) -> None:
        cfg = self.cfg
        with self.state.main_process_first():
            self.clip = assembly.load_clip(cfg, self.device, self.precision)
        note_equal_classes(self.clip, self.dataset.classnames)
        self.learner = self.build_learner(cfg).to(self.device)
        self.trained.add(self.learner.model_name, self.learner, cfg.OPTIM)
        self.encoder = Encoder(
            cfg, self.clip, self.dm, self.learner, self.device, self.precision, self.state.is_main_process
        )
        self.region_features = RegionFeatures(cfg, self.encoder)
        self._build_debiasers()
        self.train_loader_x.batches.order = self.objective.epoch_order
        self._check_loss = LossCheck(self.device, self._remedy)
        identity = RunIdentity(cfg, self.dataset, self.train_loader_x.batches.whole, self.precision, self.device.type)
        self.checkpoints = Checkpoints(self.output_dir, self.trained, identity, cfg.TRAIN.CHECKPOINT_FREQ, self._remedy)

    def build_learner(self, cfg: CfgNode) -> PromptLearner:
        """A prompt learner at its initial values, the same at every call."""
        return assembly.build_learner(cfg, self.learner_type, self.dataset, self.clip, self.base_name)

    def _build_debiasers(self) -> None:
        parts = assembly.build_debiasing(
            self.cfg,
            self.debiaser_types,
            self.encoder,
            self.region_features,
            self.run,
            build_learner=self.build_learner,
            models=self.models,
            names=self.debiaser_names,
            base_name=self.base_name,
            writes=self.state.is_main_process,
        )
        self.objective, self.context, self.discovery = parts.objective, parts.context, parts.discovery
        self.debiasers, self.attributes = self.objective.debiasers, self.context.attributes
        for debiaser in self.debiasers:
            self.trained.add(debiaser.model_name, debiaser, self.cfg.OPTIM, debiaser.learning_rate(self.cfg))
        writes, pseudo = self.state.is_main_process, self.attributes.pseudo
        self.attribute_reports = AttributeReports(self.encoder, self.attributes, self.output_dir, writes)
        self.testing = Testing(self.cfg, self.trained, self.encoder, self.objective, pseudo, self.selection)

    @property
    def debiaser_names(self) -> list[str]:
        """The trainers' names of ``debiasers``."""
        return [*([self.cfg.TRAINER.NAME] if self.debiaser_class else []), *self.cfg.TRAINER.STACK]

    @property
    def _remedy(self) -> str:
        return remedy(self.cfg, self.precision)

    # --- training ----------------------------------------------------------------------------------------------

    @device.one_line_for_kernels()
    def train(self) -> None:
        """Train from where the output folder stands, then test."""
        with self.closing_progress():
            with self.encoder.lasting_workers():
                self.before_train()
                for self.epoch in range(self.start_epoch, self.max_epoch):  # noqa: B020
                    self.before_epoch()
                    self.run_epoch()
                    self.after_epoch()
            self.after_train()

    def before_train(self) -> None:
        device.set_torch(self.cfg, self.device)  # another run may have been built meanwhile
        device.forget_peak(self.device)
        self.trainable = self.trained.are_trained
        if not self.trainable:
            self.max_epoch = 0
        self.start_epoch = self.resume_model_if_exist(self.cfg.RESUME or self.cfg.OUTPUT_DIR)
        if not self.start_epoch:
            refuse_new_start(self.cfg, self.base_name, self.output_dir)
        self.save_config()
        announce(self.encoder, self.state.num_processes, self.notes if self.trainable else ())
        if not self.trainable:
            self.objective.note_what_does_nothing()
        self.time_start = time.time()
        if self.trainable:
            assembly.check_trained_on(self.cfg, self.dataset)
        if self.start_epoch < self.max_epoch:
            self._prepare_training()
        self.attribute_reports.update(is_resumed=bool(self.start_epoch))
        shows = self.state.is_main_process
        folder = self.output_dir if shows and self.trainable else None
        self.progress = Progress(self.cfg, self.run, len(self.train_loader_x), shows, folder)

    def _prepare_training(self) -> None:
        """What is refused is refused first; then features are computed and debiasers get ready."""
        if self.attributes.data.val is not None:
            self.selection.check(self.attributes.data.val, self.attributes.pseudo)
        self.objective.check()
        self.encoder.batches("train")
        if self.learner.needs_frozen_features and self.encoder.keeps_frozen_features:
            self.encoder.frozen_features_of("train")
        self.objective.before_train()
        self.context.first_stage.forget()

    def save_config(self) -> None:
        """Write ``config.yaml``, which reruns the run."""
        if self.state.is_main_process:
            write_atomically(self.output_dir / "config.yaml", self.cfg.dump())

    def before_epoch(self) -> None:
        # Every random number of an epoch comes from (seed, epoch), so a resumed run draws what the unbroken one drew.
        seeding.set_random_seed(seeding.derive_seed(self.cfg.SEED, seeding.EPOCH, self.epoch))
        self.trained.set_mode(training=True)
        self.objective.before_epoch(self.epoch)

    def run_epoch(self) -> None:
        batches = self.encoder.batches("train")
        self.num_batches = len(batches)
        regions = self.objective.takes_regions and not self.region_features.keeps(self.learner)
        with memory_in_training(self.cfg, self.run, self.precision, self.device, regions=regions):
            self._epoch_means = fit_epoch(
                batches, self.run, self._numbered_step, self._after_step, queues_work(self.device)
            )

    def _numbered_step(self, number: int, batch: Batch) -> dict[str, Tensor]:
        self.batch_idx = number
        return self.forward_backward(batch)

    def _after_step(self, report: StepReport) -> None:
        if self.progress is not None:
            self.progress.after_step(report, self.get_current_lr())

    def forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """One step on one batch; returns scalars to print. The schedule advances after the epoch's last batch."""
        alignment = gathered(self.encoder.align(batch), batch)
        regions = self.region_features.of_step(batch) if self.objective.takes_regions else None
        loss, scalars = self.objective(alignment, batch, regions)
        self.detect_anomaly(loss)
        self.trained.update(lambda scale: self.learner.backward(loss, alignment, scale))
        if self.batch_idx + 1 == self.num_batches:
            self._last_lr = self.get_current_lr()
            self.update_lr()
        return scalars

    def detect_anomaly(self, loss: Tensor) -> None:
        """``UserError`` when a loss is not finite."""
        self._check_loss(loss, self.epoch, self.batch_idx, self.batch_idx + 1 == self.num_batches)

    def after_epoch(self) -> None:
        self.learner.after_epoch(self.epoch)
        self.objective.after_epoch(self.epoch)
        done = self.epoch + 1
        metrics = self.evaluate("val") if self.selection.validates_after(done, self.val_loader is not None) else None
        improved = self.selection.improved(metrics, done) if metrics and self.selection.is_on else []
        self.run.groups_by = self.attributes.groups_by
        self.attribute_reports.update(is_resumed=False)  # ahead of the checkpoint, from which a killed run goes on
        row = epoch_row(done, self._last_lr, self._epoch_means, metrics, self.objective.by_group())
        self.history.append(row)
        if self.progress is not None:
            self.progress.after_epoch(row, self._epoch_means)
        self.save_model(done, improved)

    def after_train(self) -> None:
        if self.progress is not None:
            self.progress.close_bar()
        self.state.wait_for_everyone()  # the main process may still be writing the checkpoint that all load next
        logger.info("Finish training")
        self.attribute_reports.update(is_resumed=bool(self.start_epoch))
        if not self.cfg.TEST.NO_TEST:
            self._deploy()
            self.test()
        elif self.history and self.state.is_main_process:
            write_training_curves(self.history, self.output_dir)
        logger.info(f"Elapsed: {datetime.timedelta(seconds=round(time.time() - self.time_start))}")

    def _deploy(self) -> None:
        """Load the model that is tested."""
        if self.trainable and self.selection.is_on:
            if self.run.best:
                split = self.testing.tested_split()
                self.selections = self.selection.compare(self.checkpoints, lambda: self.evaluate(split))
            by = f" by {self.selection.criterion} on validation data" if self.run.best else ""
            logger.info(f"Deploy the model with the best validation performance{by}")
            self.load_model(self.output_dir)
        elif self.trainable and self.max_epoch:
            logger.info("Deploy the last-epoch model")
            self.evaluated_checkpoint = str(self.checkpoints.files(self.max_epoch)[0])

    # --- checkpoints -------------------------------------------------------------------------------------------

    def save_model(self, epoch: int, improved: Sequence[str] = ()) -> None:
        """Write the checkpoint after ``epoch`` epochs, also as the best one by the criteria ``improved``."""
        if self.state.is_main_process:
            self.checkpoints.save(self.run, epoch, [self.selection.slot(criterion) for criterion in improved])

    def resume_model_if_exist(self, directory: str | Path) -> int:
        """Load the newest whole checkpoint under ``directory``; returns the number of finished epochs (0: none).

        Raises ``UserError`` when that checkpoint was trained with other keys.
        """
        return self.checkpoints.resume(directory, self.run, self.state.is_main_process) if self.trainable else 0

    def load_model(self, directory: str | Path, epoch: int | None = None) -> None:
        """Load every model from ``directory``: the one of ``epoch``, else the best, else the newest."""
        if not directory:
            logger.info("Note: no --model-dir is given, so the untrained model is evaluated")
            return
        take_names_of(directory, self.attributes)
        first = self.checkpoints.load_trained(directory, epoch, self.run, self.clip, self.cfg.TRAINER.NAME)
        self.evaluated_checkpoint = self.evaluated_checkpoint or first

    # --- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, split: str) -> dict[str, Any]:
        """Metrics of a split; other predictions of the debiasers under ``other_predictions``."""
        return self.testing.evaluate(split)

    def classify(self, paths: Sequence[str | Path]) -> Tensor:
        """Probabilities [N, C] of the classes for images that are in no split, by the test transform."""
        return self.testing.classify(paths)

    @device.one_line_for_kernels()
    def test(self, split: str | None = None) -> float:
        """Evaluate, report, and write the results; returns the accuracy in [0, 1]."""
        split = split or self.testing.tested_split()
        began = time.time()
        logger.info(f"Evaluate on the *{split}* set")
        device.set_torch(self.cfg, self.device)
        if self.progress is None:  # without training
            device.forget_peak(self.device)
        metrics = self.evaluate(split)
        peak = device.peak_memory(self.state, self.device)
        if self.state.is_main_process:
            results = results_of(
                self.cfg,
                self.base_name,
                metrics,
                split,
                self.run,
                time.time() - began,
                peak,
                device.environment(self.cfg, self.device, self.precision),
                best_epoch=self.selection.best_epoch if self.selection.is_on else None,
                selections=self.selections,
                checkpoint=self.evaluated_checkpoint,
                notes=self.notes,
                **self.attribute_reports.in_results(self.run),
            )
            self.testing.write(metrics, results, self.output_dir, self.history)
        return metrics["accuracy"]


def build_trainer(cfg: CfgNode) -> PromptTrainer:
    """The trainer named by ``TRAINER.NAME``."""
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME, "--trainer")(cfg)


def load_run(
    directory: str | Path, epoch: int | None = None, keys: Sequence[str] = (), **values: str | None
) -> PromptTrainer:
    """The trained model of a run's output folder, with its data, ready to evaluate.

    Its config.yaml with ``keys`` (KEY VALUE words) and ``values`` (root; output_dir, which is ``directory`` by default)
    changed; the model of ``epoch``, else the best, else the last. ``UserError`` where the folder is none of a run.
    """
    config = Path(directory) / "config.yaml"
    if not config.is_file():
        raise UserError(f"--model-dir: there is no {config}; give the output folder of a run")
    cfg = get_cfg_default()
    merge_file(cfg, config)
    find_moved_data(cfg, Path(directory))
    set_key(cfg, "OUTPUT_DIR", str(directory), "--model-dir")  # the run may have been moved
    merge_opts(cfg, keys)
    for name, key in {"root": "DATASET.ROOT", "output_dir": "OUTPUT_DIR"}.items():
        if values.get(name):
            set_key(cfg, key, values[name], f"--{name.replace('_', '-')}")
    cfg.freeze()
    with names_of_model(directory):
        trainer = build_trainer(cfg)
    trainer.load_model(directory, epoch=epoch)
    return trainer
