"""The checkpoints of a run: which are written, which stay, and whether a folder's are those of this run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config import extensions
from oodprompt.config.free_keys import FREE_WHEN_RESUMED
from oodprompt.config.keys import leaves
from oodprompt.data.dataset import DatasetBase, digest
from oodprompt.engine import checkpoint
from oodprompt.engine.evaluation import CRITERIA
from oodprompt.engine.loop import RunState
from oodprompt.engine.moved import are_in_run
from oodprompt.engine.optim import TrainedModels, scales_losses
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.log import logger
from oodprompt.methods.contracts import PromptLearner

_KINDS = {"cpu": "the CPU", "cuda": "a GPU"}
_NOTED = ("MODEL.", "TRAINER.", "INPUT.")  # sections whose changed keys are noted when a model is evaluated


class RunIdentity:
    """What makes two runs the same run: the keys that change what is computed, the data, the batch of all processes.

    So does ``precision``, the one in force; keys of precision count by it alone. ``device`` is the kind of device.
    """

    def __init__(
        self, cfg: CfgNode, dataset: DatasetBase, whole_batch: int, precision: str = "fp32", device: str = "cpu"
    ) -> None:
        self.config, self._dataset, self._root, self.whole_batch = leaves(cfg), dataset, cfg.DATASET.ROOT, whole_batch
        self.precision, self.device = precision, device

    @cached_property
    def data(self) -> str:
        """Digest of the training and validation data."""
        return digest(self._root, self._dataset.train_x, self._dataset.val)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        config = {key: value for key, value in self.config.items() if key not in FREE_WHEN_RESUMED}
        return {
            "config": config,
            "whole_batch": self.whole_batch,
            "data": self.data,
            "imports": extensions.digests(),
            "precision": self.precision,
            "device": self.device,
        }

    def changed_keys(self, old: dict[str, Any]) -> dict[str, str]:
        """Key -> its values then and now, in words, of those that differ, but for data in the run's folder that moved."""
        new, folder = self.config, self.config["OUTPUT_DIR"]
        keys = [key for key in old if key in new and old[key] != new[key]]
        keys = [key for key in keys if not are_in_run(key, old[key], new[key], folder)]
        return {key: f"{key} was {old[key]!r}, now {new[key]!r}" for key in keys}

    def check(self, facts: dict[str, Any], path: Path) -> None:
        """``UserError`` where the checkpoint at ``path``, which holds ``facts``, is of another run."""
        changed = [
            text
            for key, text in self.changed_keys(facts["config"]).items()
            if key not in FREE_WHEN_RESUMED and not (key.endswith(".PREC") and "precision" in facts)
        ]
        if precision := self._other_precision(facts):
            changed.append(precision)
        if facts["whole_batch"] != self.whole_batch:
            changed.append(f"images per step of all processes were {facts['whole_batch']}, now {self.whole_batch}")
        if facts.get("data", self.data) != self.data:
            changed.append("the training or validation data are others (images, labels or attributes)")
        for name, was in facts.get("imports", {}).items():
            if extensions.digests().get(name, was) != was:
                logger.info(
                    f"Note: {name} has changed since this run was trained; delete {path.parents[1]} to train anew"
                )
        if changed:
            raise UserError(
                f"{path} is of another run: {'; '.join(changed[:3])}"
                + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
                + ". Choose another --output-dir, or delete the folder to train anew"
                + (self._how_to_go_on(facts, path) if len(changed) == 1 else "")
            )

    def precision_of(self, facts: dict[str, Any]) -> str:
        """The precision in force when the checkpoint with ``facts`` was written.

        Older checkpoints do not say; whether their losses were scaled tells fp16 from the others.
        """
        if "precision" in facts or "scaler" not in facts:
            return facts.get("precision", self.precision)
        scaled = bool(facts["scaler"])
        return self.precision if scaled == scales_losses(self.precision) else "fp16" if scaled else "fp32"

    def _other_precision(self, facts: dict[str, Any]) -> str:
        """In words, how the precision in force differs; "" where it does not, amp and fp16 being two names of one."""
        then, now = self.precision_of(facts), self.precision
        if then == now or scales_losses(then) and scales_losses(now):
            return ""
        on = f" (on {_KINDS[facts['device']]})" if facts.get("device", self.device) != self.device else ""
        return f"it was trained in {then}{on}, and {_KINDS[self.device]} would go on in {now} now"

    def note_other_device(self, facts: dict[str, Any]) -> None:
        """Say so where the epochs so far were trained on another kind of device, which rounds sums in its own way."""
        if (then := facts.get("device", self.device)) != self.device:
            logger.info(
                f"Note: the epochs so far were trained on {_KINDS[then]}, the others are on {_KINDS[self.device]}; the last "
                "digits are those of neither"
            )

    def _how_to_go_on(self, facts: dict[str, Any], path: Path) -> str:
        """What to add to the command to train the model at ``path`` in its precision, or for more epochs than it had."""
        if self._other_precision(facts):
            then = self.precision_of(facts)
            if scales_losses(then) and self.device == "cpu":
                return f". To go on with it, use a GPU, which computes in {then}"
            return f". To go on with it here, add TRAINER.PREC {then}"
        old, key = facts["config"], "OPTIM.MAX_EPOCH"
        more = self.config[key] - old.get(key, self.config[key])
        if more <= 0:
            return ""
        folder = f"{path.parents[1]}-{self.config[key]}"
        words = ["--output-dir", folder, "MODEL.INIT_WEIGHTS", str(path), key, str(more)]
        without = ", without --resume" if self.config["RESUME"] else ""
        return (
            ". The learning rates of all epochs depend on their number, so a finished run has no next epoch. To train its "
            f"model for {more} more, with rates of their own, end the command in{without}: {shlex.join(words)}"
        )


class Checkpoints:
    """Saves, prunes, resumes and loads the models of a run, in Dassl's layout under ``folder``.

    ``keep_every``: epochs between checkpoints that are kept; 0: the newest alone. ``remedy`` says what to do where a
    model is no longer finite.
    """

    def __init__(
        self, folder: Path, trained: TrainedModels, identity: RunIdentity, keep_every: int = 0, remedy: str = ""
    ) -> None:
        self.folder, self.trained, self.identity = folder, trained, identity
        self.keep_every, self.remedy = keep_every, remedy

    def files(self, epoch: int | str | None) -> list[Path]:
        """The files of all models after ``epoch`` epochs; of the best ones for None or a criterion."""
        return [checkpoint.file_of(self.folder, name, epoch) for name in self.trained.models]

    def newest_epoch(self, directory: str | Path) -> int | None:
        """The newest epoch of which ``directory`` has all models; None if there is none."""
        return checkpoint.newest_epoch(directory, list(self.trained.models))

    def save(self, state: RunState, epoch: int, slots: Sequence[str | None] = ()) -> None:
        """Write the checkpoint after ``epoch`` epochs; the previous one goes unless ``keep_every`` keeps it.

        It is also written as the best one of every slot in ``slots``. All files of an epoch are written before any
        pointer names them and before any older file goes, so that a kill at any moment leaves one whole checkpoint of
        all models. ``UserError`` where a model is no longer finite.
        """
        self._check_finite(epoch)
        engine = {
            **self.identity.facts(),
            "history": state.history,
            "best": state.best,
            "train_seconds": state.train_seconds,
            "step_ms_median": state.step_ms_median,
            "groups_by": state.groups_by,
            "scaler": self.trained.scaler.state_dict(),
        }
        val_result = state.history[-1].get("val_accuracy")
        for name, model in self.trained.models.items():
            optim, sched = self.trained.optims[name], self.trained.scheds[name]
            content = {
                "state_dict": model.state_dict(),
                "epoch": epoch,
                "optimizer": optim.state_dict() if optim else None,
                "scheduler": sched.state_dict() if sched else None,
                "val_result": None if val_result is None else 100 * val_result,
                "oodprompt": engine,
            }
            checkpoint.save(content, checkpoint.file_of(self.folder, name, epoch))
            for slot in slots:
                checkpoint.save(content, checkpoint.file_of(self.folder, name, slot))
        previous = self.newest_epoch(self.folder)
        for file in self.files(epoch):
            checkpoint.write_pointer(file)
        if previous is not None and previous < epoch:
            self._prune(previous)

    def _prune(self, epoch: int) -> None:
        """Delete the checkpoint after ``epoch`` epochs, unless it is one to keep."""
        if self.keep_every <= 0 or epoch % self.keep_every:
            for file in self.files(epoch):
                file.unlink(missing_ok=True)

    def _check_finite(self, epoch: int) -> None:
        for name, model in self.trained.models.items():
            for key, value in model.state_dict().items():
                if not torch.isfinite(value).all():
                    raise UserError(
                        f"{name}.{key} is no longer finite after epoch {epoch}; this epoch is not saved, the one before "
                        f"it is. {self.remedy}"
                    )

    def resume(self, directory: str | Path, state: RunState, is_main_process: bool = True) -> int:
        """Load the newest whole checkpoint under ``directory``; returns the number of finished epochs (0: none).

        ``UserError`` when that checkpoint is of another run.
        """
        epoch = self.newest_epoch(directory)
        if epoch is None:
            return 0
        engine: dict[str, Any] = {}
        for name, model in self.trained.models.items():
            path = checkpoint.file_of(directory, name, epoch)
            content = checkpoint.load(path)
            if "oodprompt" not in content:
                raise UserError(
                    f"{path} was not written by OODPrompt; evaluate it with --eval-only --model-dir {directory}"
                )
            engine = content["oodprompt"]
            self.identity.check(engine, path)
            checkpoint.load_weights(model, content["state_dict"], path)
            optim, sched = self.trained.optims[name], self.trained.scheds[name]
            if optim is not None and sched is not None:
                optim.load_state_dict(content["optimizer"])
                sched.load_state_dict(content["scheduler"])
        state.history, state.best = engine["history"], engine["best"]
        state.train_seconds, state.loaded_step_ms = engine["train_seconds"], engine["step_ms_median"]
        state.groups_by = engine.get("groups_by")
        self.trained.scaler.load_state_dict(engine["scaler"])
        self.identity.note_other_device(engine)
        logger.info(f"Found checkpoint at {directory}: resuming after epoch {epoch} of {state.max_epoch}")
        if is_main_process and Path(directory).resolve() != self.folder.resolve():
            self._take_over(Path(directory), epoch)
        elif is_main_process:
            self._prune(epoch - 1)  # where the run was killed ahead of that
        return epoch

    def _take_over(self, directory: Path, epoch: int) -> None:
        """Copy the newest and the best checkpoints of the run that is resumed into this run's folder."""
        for name in self.trained.models:
            for source in (checkpoint.file_of(directory, name, e) for e in (epoch, None, *CRITERIA)):
                if source.is_file():
                    write_atomically(self.folder / name / source.name, source.read_bytes())
        for file in self.files(epoch):
            checkpoint.write_pointer(file)

    def load_slot(self, slot: int | str | None) -> None:
        """Load all models of this run as they were after an epoch, or the best ones of a slot."""
        for name, model in self.trained.models.items():
            path = checkpoint.file_of(self.folder, name, slot)
            checkpoint.load_weights(model, checkpoint.load(path)["state_dict"], path)

    def load_trained(
        self,
        directory: str | Path,
        epoch: int | None,
        state: RunState,
        clip: CLIP,
        trainer_name: str,
    ) -> str:
        """Load every trained model from ``directory``, trained by us or by upstream.

        The one of ``epoch`` is loaded, else the best, else the newest. Returns the path of the first file; "" where
        nothing is trained. ``UserError`` where a file does not fit its model, or was trained with other towers than
        those of ``clip``.
        """
        first = ""
        for name, model in self.trained.models.items():
            if self.trained.optims[name] is None:
                continue
            if not (Path(directory) / name).is_dir():
                raise UserError(
                    f"--model-dir: {directory} has no folder {name}, which {trainer_name} needs; "
                    "was it trained with another --trainer, --base or TRAINER.STACK?"
                )
            path = checkpoint.file_of(directory, name, epoch)
            if epoch is None and not path.is_file():
                path = checkpoint.file_of(directory, name, checkpoint.newest_epoch(directory, [name]))
            content = checkpoint.load(path)
            if isinstance(model, PromptLearner):
                checkpoint.check_towers(clip, content["state_dict"], path)
            skip, foreign = getattr(model, "not_loaded", ()), getattr(model, "foreign", "")
            checkpoint.load_weights(model, content["state_dict"], path, skip, foreign)
            first = first or str(path)
            if engine := content.get("oodprompt"):
                if not state.history:  # not the best model of this very run
                    state.train_seconds, state.loaded_step_ms = engine["train_seconds"], engine["step_ms_median"]
                for key, text in self.identity.changed_keys(engine["config"]).items():
                    if key.startswith(_NOTED):
                        logger.info(f"Note: {text}")
                if (then := self.identity.precision_of(engine)) != self.identity.precision:
                    logger.info(
                        f"Note: {name} was trained in {then}, and this run computes in {self.identity.precision}"
                    )
            logger.info(f"Loaded {name} from {path} (epoch {content['epoch']})")
        return first
