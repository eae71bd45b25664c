"""What debiasers may ask of the engine beside a step: another learner trained alone, and outputs on a whole split."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from oodprompt.data import seeding
from oodprompt.data.distributed import average_gradients, gather_rows
from oodprompt.data.sampling import EpochBatches
from oodprompt.engine.optim import LRScheduler, build_optimizer
from oodprompt.errors import UserError
from oodprompt.features.views import FeatureLoader
from oodprompt.methods.contracts import Alignment, PromptLearner

if TYPE_CHECKING:
    from oodprompt.engine.trainer import PromptTrainer


@torch.no_grad()
def outputs(
    trainer: PromptTrainer, split: str, learner: PromptLearner, predict: Callable[[Alignment], Tensor]
) -> tuple[Tensor, Tensor]:
    """Image features [N, d] and ``predict``'s logits [N, C] of every image of a split, in its order, not augmented."""
    features, logits, index = [], [], []
    with evaluating(trainer, learner):
        for batch in _in_order(trainer, split):
            alignment = trainer.align(batch, learner)
            features.append(gather_rows(alignment.image_features))
            logits.append(gather_rows(predict(alignment)))
            index.append(gather_rows(batch["index"].to(trainer.device)))
    order = torch.cat(index).argsort()
    return torch.cat(features)[order], torch.cat(logits)[order]


@contextlib.contextmanager
def evaluating(trainer: PromptTrainer, learner: PromptLearner) -> Iterator[None]:
    """All models of the run, and ``learner``, as they are in evaluation; afterwards as before."""
    modules = [*trainer.models(), learner]
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.train(mode)


def _in_order(trainer: PromptTrainer, split: str) -> Any:
    """Batches of every image of a split, without random transforms; of cached features where there are some."""
    if split != "train":
        return trainer.loader(split)
    data = trainer.dataset.train_x
    if trainer.learner.encodes_as_clip and trainer.cfg.DATALOADER.FEATURE_CACHE != "off":
        batches = EpochBatches(trainer.cfg, data, False, trainer.state.process_index, trainer.state.num_processes)
        return FeatureLoader(trainer.frozen_features_of("train")[None], data, batches, trainer.device)
    return trainer.dm.loader(data)


def fit_alone(trainer: PromptTrainer, epochs: int, choose: Tensor | None = None) -> tuple[PromptLearner, Tensor]:
    """A fresh learner of the run's kind, trained by cross-entropy alone, and its logits [N, C] on the training split.

    It starts where the run's own learner started and takes its optimiser and schedule, run through in ``epochs``
    epochs, on the training images ``choose`` [n] (None: all). Debiasers have no part in it.
    """
    cfg = trainer.cfg.clone()
    cfg.defrost()
    cfg.OPTIM.MAX_EPOCH = epochs
    learner = trainer.build_learner(cfg).to(trainer.device)
    optim = build_optimizer(learner, cfg.OPTIM) if any(p.requires_grad for p in learner.parameters()) else None
    if optim is not None:
        _train(trainer, learner, optim, LRScheduler(optim, cfg.OPTIM), epochs, choose)
    return learner, outputs(trainer, "train", learner, lambda alignment: alignment.logits)[1]


def _train(
    trainer: PromptTrainer,
    learner: PromptLearner,
    optim: torch.optim.Optimizer,
    sched: LRScheduler,
    epochs: int,
    choose: Tensor | None,
) -> None:
    loader, scaler = trainer.loader("train"), torch.amp.GradScaler(trainer.device.type, enabled=trainer.uses_scaler)
    # Without ``choose`` the sampler's order, not that of a debiaser beside the one that asks.
    indices = None if choose is None else choose.cpu().numpy()
    order = None if indices is None else (lambda epoch, rng: rng.permutation(indices))
    hidden = None if trainer.shows else True
    with (
        loader.batches.ordered_by(order),
        tqdm(total=epochs * len(loader), desc="First training", unit="step", disable=hidden, leave=False) as bar,
    ):
        for epoch in range(epochs):
            seeding.set_random_seed(seeding.derive_seed(trainer.cfg.SEED, seeding.ALONE, epoch))
            loader.set_epoch(epoch)
            learner.train()
            for batch in loader:
                alignment = trainer.gathered(trainer.align(batch, learner))
                label = gather_rows(batch["label"].to(trainer.device))
                penalty = learner.penalty(alignment)
                ce = learner.ce_weight * F.cross_entropy(alignment.logits, label)
                loss = ce + (0 if penalty is None else penalty)
                optim.zero_grad(set_to_none=True)
                learner.backward(loss, alignment, scaler.scale)
                average_gradients(learner.parameters())
                scaler.step(optim)
                scaler.update()
                bar.update()
            if not torch.isfinite(loss):
                raise UserError(
                    f"the loss became {loss.item()} in epoch {epoch + 1} of the first training; lower OPTIM.LR "
                    f"(now {trainer.cfg.OPTIM.LR}), or set TRAINER.PREC fp32 (now {trainer.precision})"
                )
            learner.after_epoch(epoch)
            sched.step()
