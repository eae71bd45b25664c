"""Learning rates against a simulation of Dassl's schedulers by torch's own, and optimisers by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from yacs.config import CfgNode

from oodprompt.config.keys import get_cfg_default
from oodprompt.engine import optim
from oodprompt.engine.optim import LRScheduler, build_optimizer, learning_rate
from oodprompt.errors import UserError

BASE = 0.02
EPOCHS = 20


def optim_cfg(**keys: object) -> CfgNode:
    cfg = get_cfg_default().OPTIM
    cfg.update({"MAX_EPOCH": EPOCHS, "LR": BASE} | keys)
    return cfg


def dassl_rates(cfg: CfgNode) -> list[float]:
    """The rate of every epoch as Dassl's warm-up around torch's scheduler gives it.

    The warm-up sets rates below WARMUP_EPOCH, takes over what the wrapped scheduler holds at WARMUP_EPOCH, and steps
    that one from then on; without WARMUP_RECOUNT the wrapped one's counter is put to WARMUP_EPOCH beforehand.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], cfg.LR)
    wrapped = {
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, float(cfg.MAX_EPOCH)),
        "single_step": lambda: lr_scheduler.StepLR(
            optimizer, cfg.STEPSIZE[-1] if cfg.STEPSIZE[-1] > 0 else cfg.MAX_EPOCH, cfg.GAMMA
        ),
        "multi_step": lambda: lr_scheduler.MultiStepLR(optimizer, cfg.STEPSIZE, cfg.GAMMA),
    }[cfg.LR_SCHEDULER]()
    warmup = max(cfg.WARMUP_EPOCH, 0)
    if warmup and not cfg.WARMUP_RECOUNT:
        wrapped.last_epoch = warmup
    rates = []
    for epoch in range(cfg.MAX_EPOCH):
        optimizer.step()
        if epoch < warmup:
            linear = cfg.WARMUP_MIN_LR if epoch == 0 else cfg.LR * epoch / warmup
            rates.append(cfg.WARMUP_CONS_LR if cfg.WARMUP_TYPE == "constant" else linear)
            continue
        if epoch > warmup:
            optimizer.param_groups[0]["lr"] = rates[-1]
            wrapped.step()
        rates.append(wrapped.get_last_lr()[0])
    return rates


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ("cosine", (-1,)),
        ("single_step", (-1,)),
        ("single_step", (2, 3)),
        ("multi_step", (4, 4, 9)),
        ("multi_step", (-1,)),
    ],
)
@pytest.mark.parametrize("warmup", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["constant", "linear"])
@pytest.mark.parametrize("recount", [True, False])
def test_rates_are_dassls(schedule: str, steps: tuple[int, ...], warmup: int, kind: str, recount: bool) -> None:
    cfg = optim_cfg(
        LR_SCHEDULER=schedule, STEPSIZE=steps, WARMUP_EPOCH=warmup, WARMUP_TYPE=kind, WARMUP_RECOUNT=recount
    )
    assert [learning_rate(epoch, BASE, cfg) for epoch in range(EPOCHS)] == pytest.approx(dassl_rates(cfg), rel=1e-9)


def test_cosine_with_coops_warmup_by_hand() -> None:
    cfg = optim_cfg(LR_SCHEDULER="cosine", MAX_EPOCH=4, WARMUP_EPOCH=1, WARMUP_TYPE="constant")
    rates = [learning_rate(epoch, 1.0, cfg) for epoch in range(4)]
    assert rates == pytest.approx([1e-5, 1.0, (1 + 0.5**0.5) / 2, 0.5])


@pytest.mark.parametrize("schedule", ["cosine", "single_step", "multi_step"])
def test_no_epochs_and_no_steps_are_possible(schedule: str) -> None:
    assert learning_rate(0, BASE, optim_cfg(LR_SCHEDULER=schedule, MAX_EPOCH=0, STEPSIZE=())) == BASE


def test_scheduler_sets_every_group_and_goes_on_from_its_state() -> None:
    cfg = optim_cfg(LR_SCHEDULER="cosine", WARMUP_EPOCH=2, WARMUP_TYPE="linear")

    def build() -> tuple[torch.optim.Optimizer, LRScheduler]:
        groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (BASE, 5 * BASE)]
        optimizer = torch.optim.SGD(groups, BASE)
        return optimizer, LRScheduler(optimizer, cfg)

    def rates(optimizer: torch.optim.Optimizer) -> list[float]:
        return [group["lr"] for group in optimizer.param_groups]

    whole, scheduler = build()
    for epoch in range(EPOCHS):
        assert rates(whole) == [learning_rate(epoch, lr, cfg) for lr in (BASE, 5 * BASE)]
        resumed, other = build()
        other.load_state_dict(scheduler.state_dict())
        assert rates(resumed) == rates(whole)
        scheduler.step()
        other.step()
        assert rates(resumed) == rates(whole)


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "dampening": 0.0, "nesterov": True}),
        ("adam", torch.optim.Adam, {"betas": (0.7, 0.9), "amsgrad": False}),
        ("amsgrad", torch.optim.Adam, {"betas": (0.7, 0.9), "amsgrad": True}),
        ("adamw", torch.optim.AdamW, {"betas": (0.7, 0.9)}),
        ("radam", torch.optim.RAdam, {"betas": (0.7, 0.9)}),
        ("rmsprop", torch.optim.RMSprop, {"momentum": 0.8, "alpha": 0.6}),
    ],
)
def test_optimisers_by_name(name: str, kind: type, options: dict[str, object]) -> None:
    cfg = optim_cfg(
        NAME=name, WEIGHT_DECAY=0.01, MOMENTUM=0.8, SGD_NESTEROV=True, RMSPROP_ALPHA=0.6, ADAM_BETA1=0.7, ADAM_BETA2=0.9
    )
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).requires_grad_(False)
    model[0].weight.requires_grad_(True)
    optimizer = build_optimizer(model, cfg, lr=0.3)
    (group,) = optimizer.param_groups
    assert type(optimizer) is kind
    assert group["params"] == [model[0].weight]
    wanted = options | {"lr": 0.3, "weight_decay": 0.01}
    assert {key: group[key] for key in wanted} == wanted
    assert build_optimizer(model.parameters(), cfg).param_groups[0]["lr"] == BASE


def test_staged_rates_slow_the_old_layers() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 1), "body": nn.Linear(2, 2), "frozen": nn.Linear(1, 1)})
    model["frozen"].requires_grad_(False)
    cfg = optim_cfg(STAGED_LR=True, NEW_LAYERS=("head",), BASE_LR_MULT=0.5)
    new, old = build_optimizer(model, cfg, lr=0.2).param_groups
    assert (new["lr"], new["params"]) == (0.2, list(model["head"].parameters()))
    assert (old["lr"], old["params"]) == (0.1, list(model["body"].parameters()))
    with pytest.raises(UserError, match=r"OPTIM\.STAGED_LR"):
        build_optimizer(model.parameters(), cfg)


FUSED = {
    "sgd": {"NAME": "sgd", "MOMENTUM": 0.9},
    "sgd without momentum": {"NAME": "sgd", "MOMENTUM": 0.0},
    "nesterov": {"NAME": "sgd", "MOMENTUM": 0.9, "SGD_NESTEROV": True},
    "dampened": {"NAME": "sgd", "MOMENTUM": 0.9, "SGD_DAMPNING": 0.3},
    "adam": {"NAME": "adam"},
    "amsgrad": {"NAME": "amsgrad"},
    "adamw": {"NAME": "adamw"},
    "radam": {"NAME": "radam"},
    "rmsprop": {"NAME": "rmsprop"},
}
Training = tuple[list[nn.Parameter], torch.optim.Optimizer, torch.amp.GradScaler]


def training(keys: dict[str, object], on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> Training:
    """Three parameters with their optimiser, as on a GPU or not; the fused kernels are there on a CPU too."""
    monkeypatch.setattr(optim, "_are_on_gpu", lambda trained: on_gpu)
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size, dtype=torch.double)) for size in (3, 40, 7)]
    optimizer = build_optimizer(parameters, optim_cfg(WEIGHT_DECAY=0.01, **keys), lr=0.1)
    return parameters, optimizer, torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)


def some_steps(training: Training, steps: range) -> None:
    """Steps in turn on the first two parameters and on the last two; the first overflows and is left out."""
    parameters, optimizer, scaler = training
    for step in steps:
        optimizer.zero_grad(set_to_none=True)
        loss = sum(((step + 1) * p).sin().sum() for p in (parameters[:2], parameters[1:])[step % 2])
        scaler.scale(loss * (torch.inf if step == 0 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_are_the_steps_of_plain_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = (training(FUSED[name], on_gpu, monkeypatch) for on_gpu in (False, True))
    has_fused = name not in ("dampened", "radam", "rmsprop")
    assert bool(fused[1].param_groups[0].get("fused")) == has_fused and not plain[1].param_groups[0].get("fused")
    start = [p.detach().clone() for p in plain[0]]
    for steps in (range(1), range(1, 2), range(2, 7)):  # after the one that is left out, after the first, and later
        for one in (plain, fused):
            some_steps(one, steps)
        torch.testing.assert_close(fused[0], plain[0], rtol=1e-9, atol=1e-12)
        moved = [not torch.equal(p, q) for p, q in zip(plain[0], start, strict=True)]
        assert moved == {1: [False] * 3, 2: [False, True, True]}.get(steps.stop, [True] * 3)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("to_gpu", [True, False])
def test_a_state_goes_on_with_the_kernels_of_the_device(
    name: str, to_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, before, after = (training(FUSED[name], on_gpu, monkeypatch) for on_gpu in (to_gpu, not to_gpu, to_gpu))
    for one in (unbroken, before):
        some_steps(one, range(5))
    flags = {key: after[1].param_groups[0].get(key) for key in ("fused", "foreach", "capturable")}
    after[1].load_state_dict(before[1].state_dict())
    assert {key: after[1].param_groups[0].get(key) for key in flags} == flags
    with torch.no_grad():
        for p, q in zip(after[0], before[0], strict=True):
            p.copy_(q)
    for one in (unbroken, after):
        some_steps(one, range(5, 9))
    torch.testing.assert_close(after[0], unbroken[0], rtol=1e-9, atol=1e-12)


def test_a_state_of_other_groups_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer, _ = training({"NAME": "sgd"}, False, monkeypatch)
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="number of parameter groups"):
        optimizer.load_state_dict({**state, "param_groups": state["param_groups"] * 2})
