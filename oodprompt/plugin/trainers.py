"""Our debiasers as trainers of Dassl's, over any trainer that is registered there.

``TRAINER.BASE`` names a trainer of the checkout (CoOp, CoCoOp, MaPLe, KgCoOp, PromptSRC, ...). A class is made that
inherits from it, unedited, and its own ``forward_backward`` runs. Within a step one thing is exchanged: where it takes
the cross-entropy of its logits,

    CE(logits, y)   becomes   mean(weights * (CE(prediction, y) + per-sample losses)) + penalties,

the objective of our engine. Whatever else the method adds to its loss, and how it steps (scaler, clipping, averages),
stays its own. Features are seen by hooks on ``model.image_encoder`` and ``model.text_encoder``; that they are those of
the logits is checked at every step. A debiaser that adds nothing leaves the losses as they were.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from dassl.config import defaults
from dassl.engine import TRAINER_REGISTRY as DASSL_TRAINERS
from dassl.optim import build_lr_scheduler
from dassl.utils import load_checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from yacs.config import CfgNode

from oodprompt.backbones import CLIP, load_backbone
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.data import seeding
from oodprompt.engine import checkpoint
from oodprompt.engine.evaluation import Evaluation, report_groups, report_other_predictions
from oodprompt.errors import UserError, nearest
from oodprompt.log import logger
from oodprompt.methods.contracts import Alignment, Debiaser
from oodprompt.plugin.adapters import Watch, adapter_of, call_adapter
from oodprompt.plugin.companion import Companion, frozen_copy, isolated_rng
from oodprompt.plugin.keys import extend_cfg, own_cfg

# The names in Dassl's registry that are ours.
OURS: set[str] = set()
# What cross_entropy is called with, where it is the mean over the batch and nothing else.
_PLAIN = {"size_average": None, "reduce": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}


class CrossEntropyInstead(TorchFunctionMode):
    """While active, ``cross_entropy(input, target, ...)`` gives what ``replace(input, target, **rest)`` gives, unless None.

    However it is called: by name, by ``F.`` or by ``nn.CrossEntropyLoss``.
    """

    def __init__(self, replace: Callable[..., Tensor | None]) -> None:
        super().__init__()
        self.replace = replace

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.cross_entropy:
            instead = self.replace(*args, **kwargs)
            if instead is not None:
                return instead
        return function(*args, **kwargs)


if TYPE_CHECKING:
    from dassl.engine import TrainerX as _Base
else:
    _Base = object  # the trainer that it goes before is known at run time


class DebiasedTrainer(_Base):
    """Goes before a trainer of Dassl's in the bases of a class: ``class X(DebiasedTrainer, CoOp)``."""

    base_name = ""
    companion: Companion
    model: Any

    # --- building ----------------------------------------------------------------------------------------------

    def build_model(self) -> None:
        self._add_template()
        with _watched_clip() as seen:
            super().build_model()
        if isinstance(self.model, nn.DataParallel):
            logger.info("Several GPUs: one is used, as features cannot be gathered from the copies of nn.DataParallel")
            self.model = self.model.module
        clip = seen[0] if seen else load_backbone(self.cfg.MODEL.BACKBONE.NAME)
        if getattr(self.model, "dtype", None) == torch.float32:
            self.model.float()  # MaPLe leaves one layer in half precision whatever PREC says
        self._adapter: Any = adapter_of(self.base_name)
        self._watch: Any = None if self._adapter else Watch(self.model, self.base_name)
        self._evaluation: Evaluation | None = None
        self._test_batch: dict[str, Any] = {}
        cfg = own_cfg(self.cfg)
        with isolated_rng(cfg.SEED), self._evaluating():
            self.companion = Companion(
                cfg, self.dm.dataset, clip, self._foreign_alignment, self._models, self.base_name, self.device
            )
        self._register(self.companion)

    def _add_template(self) -> None:
        """The hand-written prompt of a data set that the method's table does not know."""
        for cls in type(self).__mro__:
            templates = getattr(sys.modules.get(cls.__module__), "CUSTOM_TEMPLATES", None)
            if isinstance(templates, dict):
                template = self.cfg.DATASET.get("TEMPLATE") or getattr(self.dm.dataset, "template", "a photo of a {}.")
                templates.setdefault(self.cfg.DATASET.NAME, template)

    def _register(self, companion: Companion) -> None:
        """Debiasers beside the model, for checkpoints and modes; their parameters join its optimiser as groups."""
        owner = next((name for name, optim in self._optims.items() if optim is not None), None)
        if owner is None:
            raise UserError(f"TRAINER.BASE {self.base_name}: it has no optimiser, so nothing would be trained")
        groups = []
        for debiaser in companion.debiasers:
            debiaser.register_load_state_dict_pre_hook(_leave_what_does_not_fit)
            self.register_model(debiaser.model_name, debiaser, None, None)
            parameters = [p for p in debiaser.parameters() if p.requires_grad]
            if parameters:
                groups.append({"params": parameters, "lr": debiaser.learning_rate(companion.cfg)})
        if not groups:
            return
        optim, before = self._optims[owner], self._scheds[owner]
        for group in optim.param_groups:
            group["lr"] = group.pop("initial_lr", group["lr"])
        for group in groups:
            optim.add_param_group(group)
        self._scheds[owner] = build_lr_scheduler(optim, self.cfg.OPTIM)
        if getattr(self, "sched", None) is before:
            self.sched = self._scheds[owner]

    # --- features ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Registered models as in evaluation; afterwards as before."""
        training = [model.training for model in self._models.values()]
        self.set_model_mode("eval")
        try:
            yield
        finally:
            for model, mode in zip(list(self._models.values()), training, strict=False):
                model.train(mode)

    def _foreign_alignment(self, batch: dict[str, Any]) -> Alignment:
        """What the base makes of a batch in evaluation."""
        batch = {key: batch[key].to(self.device) if key in ("img", "label") else batch[key] for key in batch}
        if self._adapter:
            return call_adapter(self._adapter, self.model, batch)[0]
        self._watch.clear()
        logits = super().model_inference(batch["img"])
        alignment = self._watch.alignment(logits) if isinstance(logits, Tensor) and logits.ndim == 2 else None
        self._watch.clear()
        if alignment is None:
            raise self._watch.error(
                "its logits are not those of its image features and text features, scale * <image, text>"
            )
        return alignment

    # --- training ----------------------------------------------------------------------------------------------

    def resume_model_if_exist(self, directory: str) -> int:
        """Dassl's, from an epoch that all models have: a run that is killed while it saves has the newest of some alone."""
        folders = [Path(directory) / name for name in self._models]
        if not any(folder.exists() for folder in folders):
            return super().resume_model_if_exist(directory)
        epochs = [epoch for epoch in map(self._saved_epoch, folders) if epoch is not None]
        if len(epochs) < len(folders) or len(set(epochs)) > 1:
            # What was written after the pointer may be cut short.
            newest = 0 if len(epochs) < len(folders) else min(epochs)
            saved = [[file for file in folder.glob("model.pth.tar-*") if _epoch(file) <= newest] for folder in folders]
            common = sorted(set.intersection(*({file.name for file in files} for files in saved)), key=_epoch)
            if not common:
                logger.info(f"{directory} has no epoch that all of {', '.join(self._models)} have, train from scratch")
                return 0
            logger.info(f"{directory}: going back to {common[-1]}, the newest that all models have")
            for folder in folders:
                checkpoint.write_pointer(folder / common[-1])
        return super().resume_model_if_exist(directory)

    @staticmethod
    def _saved_epoch(folder: Path) -> int | None:
        """The epoch of the file that Dassl's pointer names, which may be model-best; None where there is none."""
        pointer = folder / "checkpoint"
        file = folder / pointer.read_text().strip() if pointer.is_file() else folder
        return load_checkpoint(str(file))["epoch"] if file.is_file() else None

    def before_train(self) -> None:
        super().before_train()
        companion = self.companion
        companion.run.start_epoch = self.start_epoch
        if self.start_epoch < self.max_epoch:
            with isolated_rng(seeding.derive_seed(companion.cfg.SEED, seeding.EPOCH, 0)):
                companion.objective.check()
                companion.objective.before_train()

    def before_epoch(self) -> None:
        super().before_epoch()
        with isolated_rng(seeding.derive_seed(self.companion.cfg.SEED, seeding.EPOCH, self.epoch)):
            self.companion.objective.before_epoch(self.epoch)

    def after_epoch(self) -> None:
        self.companion.objective.after_epoch(self.epoch)
        super().after_epoch()

    def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
        if self._adapter:
            return self._adapted_step(batch)
        self._watch.clear()
        ours: dict[str, float] = {}

        def replace(input: Tensor, target: Tensor, weight: Tensor | None = None, **rest: Any) -> Tensor | None:
            alignment = self._watch.alignment(input) if input.ndim == 2 else None
            if alignment is None:
                return None
            label = batch["label"].to(target.device)
            if target.shape != label.shape or not torch.equal(target, label):
                raise self._watch.error("its cross-entropy has other targets than the labels of the batch")
            if weight is not None or any(value != _PLAIN[name] for name, value in rest.items()):
                raise self._watch.error("its cross-entropy has class weights, label smoothing or is no mean")
            if ours:
                return None
            with torch.autocast(self.device.type, enabled=False):
                loss, summary = self.companion.step(alignment, batch)
            ours.update(summary)
            return loss

        with CrossEntropyInstead(replace):
            summary = super().forward_backward(batch)
        self._watch.clear()
        if not ours:
            raise self._watch.error("it takes no cross-entropy of logits = scale * <image, text> in a step")
        return {**summary, **{name: value for name, value in ours.items() if name != "loss"}}

    def _adapted_step(self, batch: dict[str, Any]) -> dict[str, float]:
        """A step of the engine's, on the features that the adapter gives."""
        image, label = self.parse_batch_train(batch)[:2]
        alignment, own = call_adapter(self._adapter, self.model, {**batch, "img": image, "label": label})
        loss, summary = self.companion.step(alignment, batch)
        loss = loss if own is None else loss + own
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {**summary, "loss": loss.item()}

    # --- evaluation --------------------------------------------------------------------------------------------

    def model_inference(self, input: Tensor) -> Tensor:
        alignment = self._foreign_alignment({**self._test_batch, "img": input})
        if self._evaluation is None or "index" not in self._test_batch:
            return self.companion.objective.predict(alignment)
        predictions = self.companion.objective.predictions(alignment)
        index, label = (self._test_batch[key].to(self.device) for key in ("index", "label"))
        attribute = self.companion.attributes[self._tested][index]
        self._evaluation.process(predictions, label, attribute, index)
        return predictions[""]

    def parse_batch_test(self, batch: dict[str, Any]) -> Any:
        self._test_batch = batch
        return super().parse_batch_test(batch)

    def test(self, split: str | None = None) -> float:
        choice = split or self.cfg.TEST.SPLIT
        self._tested = "val" if choice == "val" and self.val_loader is not None else "test"
        self._evaluation = self.companion.evaluation()
        try:
            result = super().test(split)
            self._report(self._evaluation.metrics(self.companion.dataset.train_x))
        finally:
            self._evaluation, self._test_batch = None, {}
        return result

    def _report(self, metrics: dict[str, Any]) -> None:
        """Worst-group accuracy and the groups, where every image has an attribute; and the other predictions."""
        report_groups(metrics)
        report_other_predictions(metrics)
        for tag in ("worst_group_accuracy", "gap"):
            if metrics[tag] is not None:
                self.write_scalar(f"{self._tested}/{tag}", metrics[tag], self.epoch)


@contextlib.contextmanager
def _watched_clip() -> Iterator[list[CLIP]]:
    """Fills the list with a frozen copy of the first CLIP that the checkout's ``clip.build_model`` builds."""
    seen: list[CLIP] = []
    module: Any = sys.modules.get("clip.clip")
    build = getattr(module, "build_model", None)
    if build is None:
        yield seen
        return

    def watched(*args: Any, **kwargs: Any) -> nn.Module:
        model = build(*args, **kwargs)
        if not seen:
            seen.append(frozen_copy(model.state_dict()))
        return model

    module.build_model = watched
    try:
        yield seen
    finally:
        module.build_model = build


def _epoch(file: Path | str) -> int:
    """That of a file model.pth.tar-<epoch>."""
    return int(str(file).rsplit("-", 1)[1])


def _leave_what_does_not_fit(module: Debiaser, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """What counts for the classes of training only is left where there are other classes.

    Of a debiaser that predicts, its ``not_loaded``; of any other, which has no part in evaluation, everything.
    """
    own = module.state_dict()
    for name in getattr(module, "not_loaded", ()) if module.predicts else own:
        key = prefix + name
        if key in state_dict and name in own and state_dict[key].shape != own[name].shape:
            state_dict[key] = own[name]


def debiased(name: str, base: type) -> type:
    """The class that trains ``base``, a trainer class of Dassl's, under the debiaser of our trainer ``name``."""
    return type(f"{name}Over{base.__name__}", (DebiasedTrainer, base), {"base_name": base.__name__})


def base_trainer(cfg: CfgNode) -> type:
    """The trainer class that TRAINER.BASE names (empty: the debiaser's own choice); ``UserError`` if there is none."""
    base = cfg.TRAINER.get("BASE") or TRAINER_REGISTRY.get(cfg.TRAINER.NAME).debiaser_class.default_base(own_cfg(cfg))
    known = [name for name in DASSL_TRAINERS.registered_names() if name not in OURS]
    if base not in known:
        raise UserError(
            f"TRAINER.BASE: no trainer {base!r} is registered with Dassl here ({nearest(base, known)}); does train.py "
            "import the file that registers it?"
        )
    return DASSL_TRAINERS.get(base)


def register_debiaser(name: str) -> None:
    """Put a debiaser of our registry, as one of your own, into Dassl's registry of trainers under the same name."""
    if not TRAINER_REGISTRY.get(name, "register_debiaser").debiaser_class:
        raise UserError(f"register_debiaser: {name} is no debiaser; Dassl's registry has prompt learners of its own")

    def make(cfg: CfgNode) -> Any:
        cfg = cfg.clone()
        cfg.defrost()
        extend_cfg(cfg)
        cfg.freeze()
        return debiased(name, base_trainer(cfg))(cfg)

    extend_cfg(defaults._C)  # with the keys of a method that was imported later than the plugin
    make.__name__ = make.__qualname__ = name
    make.__doc__ = TRAINER_REGISTRY.get(name).__doc__
    DASSL_TRAINERS.register(make, force=True)
    OURS.add(name)
