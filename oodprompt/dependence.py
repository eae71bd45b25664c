"""How much two features depend on each other: penalties that are zero (up to sampling noise) for independent ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def within_classes(
    dependence: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    label: Tensor,
    min_per_class: int = 4,
    reduction: str = "mean",
) -> Tensor:
    """Conditional dependence given the class: ``dependence`` of x [B, p] and y [B, q] within each class of the batch.

    Classes with fewer than ``min_per_class`` images are left out; zero when none is left. ``reduction``: mean or sum
    over classes.
    """
    values = []
    for c in label.unique():
        mine = label == c
        if mine.sum() >= min_per_class:
            values.append(dependence(x[mine], y[mine]))
    if not values:
        return (x.sum() + y.sum()) * 0.0
    return torch.stack(values).mean() if reduction == "mean" else torch.stack(values).sum()


def cross_covariance(x: Tensor, y: Tensor) -> Tensor:
    """Squared Frobenius norm of the cross-covariance, || (x - mean x)^T (y - mean y) / n ||_F^2; x [n, p], y [n, q]."""
    return (((x - x.mean(0)).T @ (y - y.mean(0)) / len(x)) ** 2).sum()


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Biased HSIC, tr(K H L H) / n^2, with RBF kernels of median-heuristic width; x [n, p], y [n, q].

    Source: Gretton et al., "Measuring Statistical Dependence with Hilbert-Schmidt Norms", ALT 2005.
    """
    k, l = _rbf(x), _rbf(y)  # noqa: E741  (the paper's names)
    k = k - k.mean(0, keepdim=True) - k.mean(1, keepdim=True) + k.mean()
    return (k * l).mean()


def _rbf(x: Tensor) -> Tensor:
    """exp(-|x_i - x_j|^2 / m) with m the median of the squared distances between different points."""
    squares = (x * x).sum(1)
    distances = (squares[:, None] + squares[None] - 2 * x @ x.T).clamp(min=0)
    off_diagonal = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    median = distances.detach()[off_diagonal].median().clamp(min=1e-8)
    return torch.exp(-distances / median)


class Club(nn.Module):
    """CLUB, an upper bound of the mutual information I(x; y) by a Gaussian net q(y | x), x and y of one width.

    bound = mean_i [ log q(y_i | x_i) - mean_j log q(y_j | x_i) ]; the net itself is fitted by maximum likelihood on
    detached features, in the same backward pass.

    Source: Cheng et al., "CLUB: A Contrastive Log-ratio Upper Bound of Mutual Information", ICML 2020.
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 2 * width))

    def _log_density(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        """log q(y_j | x_i) without constants, [n, n]."""
        mean, log_variance = torch.func.functional_call(self.net, parameters, x).chunk(2, dim=1)
        log_variance = log_variance.tanh()
        errors = (y[None] - mean[:, None]) ** 2 / log_variance.exp()[:, None]
        return -0.5 * (errors + log_variance[:, None]).mean(dim=2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The bound (gradients for the features) with the value of the fit's gradient added (gradients for the net)."""
        fixed = {name: p.detach() for name, p in self.net.named_parameters()}
        density = self._log_density(fixed, x, y)
        bound = density.diagonal().mean() - density.mean()
        fit = -self._log_density(dict(self.net.named_parameters()), x.detach(), y.detach()).diagonal().mean()
        return bound + fit - fit.detach()
