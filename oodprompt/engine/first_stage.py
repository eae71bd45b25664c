"""What debiasers may ask of the engine beside a step: a model trained alone ahead, and outputs on a whole split."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones.devices import queues_work
from oodprompt.data import seeding
from oodprompt.data.loading import Batch
from oodprompt.engine.loop import LossCheck, RunState, fit_epoch, memory_in_training, remedy
from oodprompt.engine.objective import Objective
from oodprompt.engine.optim import TrainedModels, scales_losses
from oodprompt.features.encoder import Encoder, evaluating, gathered
from oodprompt.log import progress
from oodprompt.methods.contracts import Alignment, PromptLearner
from oodprompt.methods.splits import Split

_STAGE = " of the first stage"


class FirstStage:
    """Trains another learner ahead of the run, and computes outputs of the run's model as it stands.

    ``build_learner(cfg)`` makes a learner of the run's kind at its initial values. ``models()`` are the run's models,
    ``predict`` is its prediction, and ``base_name`` is the registered name of its learner.
    """

    def __init__(
        self,
        cfg: CfgNode,
        encoder: Encoder,
        build_learner: Callable[[CfgNode], PromptLearner],
        models: Callable[[], Sequence[nn.Module]],
        predict: Callable[[Alignment], Tensor],
        base_name: str,
    ) -> None:
        self.cfg, self.encoder, self._build_learner = cfg, encoder, build_learner
        self._models, self._predict, self._base_name = models, predict, base_name
        self._fitted: dict[int, tuple[PromptLearner, Tensor]] = {}

    def outputs(self, split: Split, learner: PromptLearner | None = None) -> tuple[Tensor, Tensor]:
        """Image features [N, d] and logits [N, C] of the model as it stands, in the split's order, not augmented.

        ``learner``: of this one, which ``fit`` returned.
        """
        if learner is None:
            with evaluating(*self._models()):
                return self.encoder.outputs(split.name, self.encoder.learner, self._predict)
        with evaluating(*self._models(), learner):
            return self.encoder.outputs(split.name, learner, lambda alignment: alignment.logits)

    def fit(self, epochs: int, choose: Tensor | None = None) -> tuple[PromptLearner, Tensor]:
        """Another learner of the run's kind, trained by cross-entropy alone, and its logits [N, C] on the training split.

        It starts where the run's own learner started. It takes the run's optimiser and schedule, run through in
        ``epochs`` epochs, on the training images ``choose`` [n] (None: all). Debiasers have no part in it. What was trained
        on all images is there for the next who asks, until ``forget``.
        """
        if choose is not None:
            return self._fit(epochs, choose)
        if epochs not in self._fitted:
            self._fitted[epochs] = self._fit(epochs, None)
        return self._fitted[epochs]

    def adopt(self, epochs: int) -> None:
        """Let the run's own learner as it stands be what ``fit(epochs)`` returns: it was trained by cross-entropy alone."""
        learner = self.encoder.learner
        with evaluating(*self._models()):
            self._fitted[epochs] = (
                learner,
                self.encoder.outputs("train", learner, lambda alignment: alignment.logits)[1],
            )

    def forget(self) -> None:
        """Free the memory of the learners that were trained."""
        self._fitted.clear()

    def _fit(self, epochs: int, choose: Tensor | None) -> tuple[PromptLearner, Tensor]:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.OPTIM.MAX_EPOCH = epochs
        learner = self._build_learner(cfg).to(self.encoder.device)
        device = self.encoder.device.type
        trained = TrainedModels(torch.amp.GradScaler(device, enabled=scales_losses(self.encoder.precision)))
        trained.add(learner.model_name, learner, cfg.OPTIM)
        if trained.are_trained:
            self._train(learner, trained, epochs, choose)
        with evaluating(*self._models(), learner):
            return learner, self.encoder.outputs("train", learner, lambda alignment: alignment.logits)[1]

    def _train(self, learner: PromptLearner, trained: TrainedModels, epochs: int, choose: Tensor | None) -> None:
        encoder, objective, state = self.encoder, Objective(learner, base_name=self._base_name), RunState(epochs)
        check = LossCheck(encoder.device, remedy(self.cfg, encoder.precision), _STAGE)
        batches = encoder.batches("train")
        # Without ``choose`` the sampler's order, not that of a debiaser beside the one that asks.
        indices = None if choose is None else choose.cpu().numpy()
        order = None if indices is None else (lambda epoch, rng: rng.permutation(indices))
        with (
            batches.batches.ordered_by(order),
            progress(epochs * len(batches), "First stage", "step", encoder.show_progress) as bar,
        ):
            steps = len(batches)  # once: an order of its own is drawn to count it

            def step(number: int, batch: Batch) -> dict[str, Tensor]:
                alignment = gathered(encoder.align(batch, learner), batch)
                loss, scalars = objective(alignment, batch)
                check(loss, state.epoch, number, number + 1 == steps)
                trained.update(lambda scale: learner.backward(loss, alignment, scale))
                bar.update()
                return scalars

            for state.epoch in range(epochs):
                seeding.set_random_seed(seeding.derive_seed(self.cfg.SEED, seeding.FIRST_STAGE, state.epoch))
                learner.train()
                with memory_in_training(self.cfg, state, encoder.precision, encoder.device, _STAGE):
                    fit_epoch(batches, state, step, queues_work=queues_work(encoder.device))
                learner.after_epoch(state.epoch)
                trained.step_schedules()
