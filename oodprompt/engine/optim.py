"""Optimisers and learning-rate schedules, by Dassl's names, with Dassl's values at every epoch."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.data.distributed import average_gradients
from oodprompt.errors import UserError


def build_optimizer(
    params: nn.Module | Iterable[nn.Parameter], optim_cfg: CfgNode, lr: float | None = None
) -> torch.optim.Optimizer:
    """The optimiser of ``OPTIM.NAME`` over the parameters that take gradients; ``lr`` overrides ``OPTIM.LR``.

    With ``STAGED_LR``, parameters of a module's parts named in ``NEW_LAYERS`` take ``lr``, all others
    ``lr * BASE_LR_MULT``. SGD, Adam and AdamW take torch's fused kernels where all parameters are on a GPU: one call, in
    which a step whose gradients overflow is left out without a look at the host. RAdam and RMSprop have none; with scaled
    losses each of their steps has the host wait once.
    """
    lr = optim_cfg.LR if lr is None else lr
    trained: Any = _staged(params, optim_cfg, lr) if optim_cfg.STAGED_LR else _trained(params)
    common: dict[str, Any] = {"lr": lr, "weight_decay": optim_cfg.WEIGHT_DECAY}
    kernels: dict[str, Any] = {"fused": True} if _are_on_gpu(trained) else {}
    of_adam = {**common, "betas": (optim_cfg.ADAM_BETA1, optim_cfg.ADAM_BETA2)}
    with_momentum = {**common, "momentum": optim_cfg.MOMENTUM}
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "sgd": lambda: _sgd(trained, optim_cfg, with_momentum, kernels),
        "adam": lambda: torch.optim.Adam(trained, **of_adam, **kernels),
        "amsgrad": lambda: torch.optim.Adam(trained, **of_adam, **kernels, amsgrad=True),
        "adamw": lambda: torch.optim.AdamW(trained, **of_adam, **kernels),
        "radam": lambda: torch.optim.RAdam(trained, **of_adam),
        "rmsprop": lambda: torch.optim.RMSprop(trained, **with_momentum, alpha=optim_cfg.RMSPROP_ALPHA),
    }
    try:
        optimizer = makers[optim_cfg.NAME]()
    except ValueError as error:
        raise UserError(f"OPTIM: {optim_cfg.NAME} does not take these values: {error}") from error
    optimizer.register_load_state_dict_pre_hook(_with_own_kernels)
    return optimizer


def _are_on_gpu(trained: Sequence[nn.Parameter] | Sequence[dict[str, Any]]) -> bool:
    """Whether all parameters, or all of the groups of parameters, are on a GPU."""
    parts = [part["params"] if isinstance(part, dict) else [part] for part in trained]
    return bool(parts) and all(p.is_cuda for part in parts for p in part)


def _sgd(
    trained: Any, optim_cfg: CfgNode, with_momentum: dict[str, Any], kernels: dict[str, Any]
) -> torch.optim.Optimizer:
    """SGD, whose fused kernel takes momentum of all parameters from their first step on.

    torch leaves that momentum to the kernel, which writes none where it leaves the step out, and takes no parameters that
    start later than others. Momentum of zero gives the same first step, but where the gradient is dampened.
    """
    dampening = optim_cfg.SGD_DAMPNING
    if with_momentum["momentum"] and dampening:
        kernels = {}
    sgd = torch.optim.SGD(trained, **with_momentum, **kernels, dampening=dampening, nesterov=optim_cfg.SGD_NESTEROV)
    if kernels and with_momentum["momentum"]:
        sgd.register_step_pre_hook(_momentum_from_zero)
    return sgd


def _momentum_from_zero(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def _with_own_kernels(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any] | None:
    """A state that is loaded says nothing of kernels, which are those of this device; torch would take over what it says."""
    saved, groups = state["param_groups"], optimizer.param_groups
    if len(saved) != len(groups):
        return None  # which torch refuses
    own = ("foreach", "fused", "capturable")
    merged = [old | {key: new[key] for key in own if key in new} for old, new in zip(saved, groups, strict=True)]
    return {**state, "param_groups": merged}


def _trained(params: nn.Module | Iterable[nn.Parameter]) -> list[nn.Parameter]:
    params = params.parameters() if isinstance(params, nn.Module) else params
    return [p for p in params if p.requires_grad]


def _staged(params: nn.Module | Iterable[nn.Parameter], optim_cfg: CfgNode, lr: float) -> list[dict[str, Any]]:
    if not isinstance(params, nn.Module):
        raise UserError("OPTIM.STAGED_LR needs parts with names, but this model gives a list of parameters")
    new: list[nn.Parameter] = []
    base: list[nn.Parameter] = []
    for name, p in params.named_parameters():
        if p.requires_grad:
            (new if name.split(".")[0] in optim_cfg.NEW_LAYERS else base).append(p)
    groups = [{"params": new, "lr": lr}, {"params": base, "lr": lr * optim_cfg.BASE_LR_MULT}]
    return [group for group in groups if group["params"]]


def learning_rate(epoch: int, base_lr: float, optim_cfg: CfgNode) -> float:
    """The learning rate of epoch ``epoch`` (0-based), as Dassl's schedulers give it.

    cosine: base (1 + cos(pi t / MAX_EPOCH)) / 2; single_step and multi_step: base GAMMA^(steps up to t), with t the
    epoch counted by the schedule. During the warm-up (epoch < W) the rate is WARMUP_CONS_LR, or base epoch / W with
    WARMUP_MIN_LR at epoch 0. After it t = epoch - W with WARMUP_RECOUNT; without, t = epoch and the rate is scaled
    to be ``base_lr`` at epoch W, because torch's schedulers multiply on from there.

    Source: Dassl.pytorch, dassl/optim/lr_scheduler.py.
    """
    warmup = max(optim_cfg.WARMUP_EPOCH, 0)
    if epoch < warmup:
        if optim_cfg.WARMUP_TYPE == "constant":
            return optim_cfg.WARMUP_CONS_LR
        return optim_cfg.WARMUP_MIN_LR if epoch == 0 else base_lr * epoch / warmup
    if optim_cfg.WARMUP_RECOUNT:
        return base_lr * _decay(epoch - warmup, optim_cfg)
    start = _decay(warmup, optim_cfg)
    return base_lr * _decay(epoch, optim_cfg) / start if start else 0.0


def _decay(t: int, optim_cfg: CfgNode) -> float:
    name, steps = optim_cfg.LR_SCHEDULER, tuple(optim_cfg.STEPSIZE)
    if name == "cosine":
        return (1 + math.cos(math.pi * t / max(optim_cfg.MAX_EPOCH, 1))) / 2
    if name == "single_step":
        size = steps[-1] if steps and steps[-1] > 0 else max(optim_cfg.MAX_EPOCH, 1)
        return optim_cfg.GAMMA ** (t // size)
    return optim_cfg.GAMMA ** sum(0 <= step <= t for step in steps)  # multi_step


class LRScheduler:
    """Sets the optimiser's rate to ``learning_rate(epoch)``; ``step()`` once at the end of every epoch."""

    def __init__(self, optimizer: torch.optim.Optimizer, optim_cfg: CfgNode) -> None:
        self.optimizer, self.optim_cfg, self.last_epoch = optimizer, optim_cfg, 0
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self._apply()

    def _apply(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = learning_rate(self.last_epoch, base, self.optim_cfg)

    def step(self) -> None:
        self.last_epoch += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.last_epoch = state["last_epoch"]
        self._apply()


def scales_losses(precision: str) -> bool:
    """Whether losses are scaled because gradients are computed in fp16."""
    return precision in ("amp", "fp16")


class TrainedModels:
    """Models by name, in the order in which they were added, each with its optimiser and schedule (None: not trained).

    ``scaler`` scales losses whose gradients are computed in fp16; one that is disabled does nothing.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.models: OrderedDict[str, nn.Module] = OrderedDict()
        self.optims: OrderedDict[str, torch.optim.Optimizer | None] = OrderedDict()
        self.scheds: OrderedDict[str, LRScheduler | None] = OrderedDict()

    def register(
        self,
        name: str,
        model: nn.Module,
        optim: torch.optim.Optimizer | None = None,
        sched: LRScheduler | None = None,
    ) -> None:
        """Name a model. ``UserError`` where the name is taken."""
        if name in self.models:
            raise UserError(f"two models are named {name!r}; is a debiaser given twice in TRAINER.STACK?")
        self.models[name], self.optims[name], self.scheds[name] = model, optim, sched

    def add(self, name: str, model: nn.Module, optim_cfg: CfgNode, lr: float | None = None) -> None:
        """Name a model, with the optimiser and schedule of ``optim_cfg`` where it has parameters to train."""
        trains = any(p.requires_grad for p in model.parameters())
        optim = build_optimizer(model, optim_cfg, lr) if trains else None
        self.register(name, model, optim, LRScheduler(optim, optim_cfg) if optim else None)

    @property
    def are_trained(self) -> bool:
        """Whether any model has something to train."""
        return any(optim is not None for optim in self.optims.values())

    def set_mode(self, training: bool) -> None:
        for model in self.models.values():
            model.train(training)

    def update(self, backward: Callable[[Callable[[Tensor], Tensor]], None]) -> None:
        """One step of every optimiser. ``backward(scale)`` computes the gradients of ``scale(loss)``."""
        optims = [optim for optim in self.optims.values() if optim is not None]
        for optim in optims:
            optim.zero_grad(set_to_none=True)
        backward(self.scaler.scale)
        average_gradients(p for model in self.models.values() for p in model.parameters())
        for optim in optims:
            self.scaler.step(optim)
        self.scaler.update()

    def step_schedules(self) -> None:
        """Advance every learning rate by an epoch."""
        for sched in self.scheds.values():
            if sched is not None:
                sched.step()

    @property
    def learning_rate(self) -> float:
        """That of the first model that trains; 0 where none does."""
        optim = next((optim for optim in self.optims.values() if optim is not None), None)
        return optim.param_groups[0]["lr"] if optim else 0.0
