"""Dependence within classes, in shapes of the batch alone, against the formulas class by class; values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from oodprompt.methods.dependence import (
    Club,
    RunningShare,
    batch_share,
    centred_within,
    cross_covariance,
    explained_share,
    hsic,
    standardise_within,
    within_class_moments,
    within_classes,
)

# Some classes are absent, and some have fewer images than MIN_PER_CLASS.
LABELS = {
    "two": torch.arange(32) % 2,
    "uneven": torch.tensor([3] * 9 + [0] * 4 + [7] * 3 + [5] + [1] * 6 + [9] * 2 + [4] * 7),
    "one": torch.full((6,), 4),
    "none is left": torch.tensor([0, 0, 1, 1, 2, 3, 3]),
    "one image": torch.tensor([1]),
}


def plain_rbf(x: Tensor) -> Tensor:
    squares = (x * x).sum(1)
    distances = (squares[:, None] + squares[None] - 2 * x @ x.T).clamp(min=0)
    median = distances.detach()[~torch.eye(len(x), dtype=torch.bool)].median().clamp(min=1e-8)
    return torch.exp(-distances / median)


def plain_hsic(x: Tensor, y: Tensor) -> Tensor:
    k, l = plain_rbf(x), plain_rbf(y)
    k = k - k.mean(0, keepdim=True) - k.mean(1, keepdim=True) + k.mean()
    return (k * l).mean()


def plain_cross_covariance(x: Tensor, y: Tensor) -> Tensor:
    return (((x - x.mean(0)).T @ (y - y.mean(0)) / len(x)) ** 2).sum()


def plain_club(net: Club) -> Callable[[Tensor, Tensor], Tensor]:
    """mean_i [log q(y_i | x_i) - mean_j log q(y_j | x_i)], with log q for every pair."""

    def density(x: Tensor, y: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        mean, log_variance = torch.func.functional_call(net.net, parameters, x).chunk(2, dim=1)
        log_variance = log_variance.tanh()
        errors = (y[None] - mean[:, None]) ** 2 / log_variance.exp()[:, None]
        return -0.5 * (errors + log_variance[:, None]).mean(dim=2)

    def bound(x: Tensor, y: Tensor) -> Tensor:
        log_q = density(x, y, {name: p.detach() for name, p in net.net.named_parameters()})
        fit = -density(x.detach(), y.detach(), dict(net.net.named_parameters())).diagonal().mean()
        return log_q.diagonal().mean() - log_q.mean() + fit - fit.detach()

    return bound


def plain_within(
    dependence: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, label: Tensor, least: int
) -> Tensor:
    """The mean over classes, one after the other."""
    classes = [label == c for c in label.unique()]
    values = [dependence(x[mine], y[mine]) for mine in classes if mine.sum() >= least]
    return torch.stack(values).mean() if values else 0.0 * (x.sum() + y.sum())


def branches(images: int, dtype: torch.dtype, width: int = 24) -> tuple[Tensor, Tensor]:
    """Two normalised features of the same images that depend on each other."""
    torch.manual_seed(images)
    x = torch.randn(images, width, dtype=dtype)
    x, y = (torch.nn.functional.normalize(v, dim=1) for v in (x, x + torch.randn_like(x)))
    return x.requires_grad_(), y.requires_grad_()


def agree(one: Tensor, other: Tensor, dtype: torch.dtype, *inputs: Tensor) -> None:
    """Equal values and equal gradients for ``inputs``."""
    rtol = 1e-6 if dtype == torch.double else 1e-5
    torch.testing.assert_close(one, other, rtol=rtol, atol=1e-15 if dtype == torch.double else 1e-8)
    for a, b in zip(torch.autograd.grad(one, inputs), torch.autograd.grad(other, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * max(b.abs().max().item(), 1e-9))


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("measure", ["hsic", "cross_covariance", "club"])
def test_within_classes_is_the_mean_of_the_formula_over_classes(measure: str, labels: str, dtype: torch.dtype) -> None:
    label = LABELS[labels]
    x, y = branches(len(label), dtype)
    club = Club(24, hidden=8).to(dtype)
    ours, plain = {
        "hsic": (hsic, plain_hsic),
        "cross_covariance": (cross_covariance, plain_cross_covariance),
        "club": (club, plain_club(club)),
    }[measure]
    net = [*club.parameters()] if measure == "club" and labels in ("two", "uneven", "one") else []
    agree(within_classes(ours, x, y, label, 4), plain_within(plain, x, y, label, 4), dtype, x, y, *net)


@pytest.mark.parametrize("measure", [hsic, cross_covariance])
def test_images_that_are_all_the_same_give_no_dependence(measure: Callable[..., Tensor]) -> None:
    x = torch.ones(8, 3, requires_grad=True)
    value = within_classes(measure, x, x, torch.arange(8) % 2)
    value.backward()
    assert value.abs() < 1e-6 and x.grad is not None and x.grad.isfinite().all()


def test_medians_are_those_of_each_class() -> None:
    """The kernels' widths differ between classes: one feature is ten times as wide in one class."""
    label = torch.arange(20) % 2
    x, y = (v.detach() * (1 + 9 * label.unsqueeze(1)) for v in branches(20, torch.double))
    agree(
        within_classes(hsic, x.requires_grad_(), y.requires_grad_(), label),
        plain_within(plain_hsic, x, y, label, 4),
        torch.double,
        x,
        y,
    )


@pytest.mark.parametrize("dtype", [torch.double, torch.float])
@pytest.mark.parametrize("labels", LABELS)
def test_share_of_a_batch_is_that_of_the_moments(labels: str, dtype: torch.dtype) -> None:
    label = LABELS[labels]
    x, _ = branches(len(label), dtype)
    q = torch.randn(len(label), 3, dtype=dtype)
    agree(batch_share(x, q, label), explained_share(*within_class_moments(x, q, label)), dtype, x)


def plain_moments(x: Tensor, q: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    cross, covariance = [], x.new_zeros(x.shape[1], x.shape[1])
    for c in label.unique():
        centred, target = (v[label == c] - v[label == c].mean(dim=0) for v in (x, q))
        cross.append(centred.T @ target / (len(x) * len(target)) ** 0.5)
        covariance = covariance + centred.T @ centred / len(x)
    return torch.stack(cross), covariance


def test_share_of_projected_features_is_the_formula() -> None:
    label, weight = LABELS["uneven"], torch.randn(8, 8, dtype=torch.double, requires_grad=True)
    cross, covariance = plain_moments(
        branches(len(label), torch.double, width=8)[0].detach(), torch.rand(32, 2).double(), label
    )
    explained = sum(((weight @ of_class) ** 2).sum() for of_class in cross)
    plain = explained / (2 * (weight @ covariance @ weight.T).diagonal().sum())
    agree(explained_share(cross, covariance, weight), plain, torch.double, weight)


@pytest.mark.parametrize("labels", LABELS)
def test_what_is_computed_ahead_of_training_is_bit_for_bit_what_masks_give(labels: str) -> None:
    label = LABELS[labels]
    label = label[torch.randperm(len(label), generator=torch.Generator().manual_seed(0))]
    x, q = branches(len(label), torch.float, width=8)[0].detach(), torch.rand(len(label), 2)
    centred, standard = torch.empty_like(x), torch.empty_like(q)
    for c in label.unique():
        mine = q[label == c]
        deviation = mine.std(dim=0, correction=0)
        standard[label == c] = torch.where(deviation > 1e-6, (mine - mine.mean(0)) / deviation.clamp(min=1e-6), 0)
        centred[label == c] = x[label == c] - x[label == c].mean(dim=0)
    assert torch.equal(centred_within(x, label), centred)
    assert torch.equal(standardise_within(q, label), standard)
    for ours, plain in zip(within_class_moments(x, q, label), plain_moments(x, q, label), strict=True):
        assert torch.equal(ours, plain)


def test_running_share_is_the_sum_over_classes() -> None:
    torch.manual_seed(0)
    x, q, label = torch.randn(30, 6).requires_grad_(), torch.randn(30, 2), torch.arange(30) % 4
    cross, variance = torch.zeros(5, 6, 2), torch.zeros(())
    for c in range(4):
        centred = x[label == c] - x[label == c].mean(dim=0)
        cross[c], variance = centred.T @ q[label == c], variance + (centred**2).sum()
    number = torch.tensor([8, 8, 7, 7, 0])
    plain = ((cross**2).sum(dim=(1, 2)) / number.clamp(min=1)).sum() / (2 * variance)
    agree(RunningShare(5, 6, 2, 0.9)(x, q, label), plain, torch.float, x)
