"""How much two features depend on each other: penalties that are zero (up to sampling noise) for independent ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodprompt.errors import UserError


def within_classes(
    dependence: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, label: Tensor, min_per_class: int = 4
) -> Tensor:
    """Mean over classes of ``dependence`` of x [B, p] and y [B, q] within the class.

    Classes with fewer than ``min_per_class`` images are left out; zero when none is left.
    """
    classes = [label == c for c in label.unique()]
    values = [dependence(x[mine], y[mine]) for mine in classes if mine.sum() >= min_per_class]
    return torch.stack(values).mean() if values else 0.0 * (x.sum() + y.sum())


def centred_within(x: Tensor, label: Tensor) -> Tensor:
    """x [N, d] minus the mean of its class."""
    result = x.clone()
    for c in label.unique():
        result[label == c] -= x[label == c].mean(dim=0)
    return result


def standardise_within(values: Tensor, label: Tensor) -> Tensor:
    """Values [N, A] with mean 0 and variance 1 within each class, column by column; constant columns become 0."""
    result = torch.zeros_like(values)
    for c in label.unique():
        mine = values[label == c]
        deviation = mine.std(dim=0, correction=0)
        result[label == c] = torch.where(deviation > 1e-6, (mine - mine.mean(dim=0)) / deviation.clamp(min=1e-6), 0)
    return result


def within_class_moments(x: Tensor, q: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments within classes of x [N, d] and q [N, A], each centred in its class.

    Returns cross [C', d, A], sqrt(n_c / N) times the cross-covariance in each class present, and covariance [d, d],
    the pooled covariance of x.
    """
    cross, covariance = [], x.new_zeros(x.shape[1], x.shape[1])
    x, q = centred_within(x, label), centred_within(q, label)
    for c in label.unique():
        centred, target = x[label == c], q[label == c]
        cross.append(centred.T @ target / (len(x) * len(target)) ** 0.5)
        covariance = covariance + centred.T @ centred / len(x)
    return torch.stack(cross), covariance


def explained_share(cross: Tensor, covariance: Tensor, weight: Tensor | None = None) -> Tensor:
    """Share of the within-class variance of ``weight @ x`` that standardised attributes q explain, a scalar.

    sum_c n_c || W Cov_c(x, q) ||_F^2 / (A N tr(W Cov(x) W^T)), from ``within_class_moments`` of x and q; W is the
    identity when it is not given. In [0, 1] for one attribute and its complement; free of W's scale.
    """
    if weight is not None:
        cross, covariance = weight @ cross, weight @ covariance @ weight.T
    return (cross**2).sum() / (cross.shape[-1] * covariance.diagonal().sum().clamp(min=1e-12))


def eraser(x: Tensor, q: Tensor, label: Tensor) -> Tensor:
    """The linear map W [d, d] that leaves q [N, A] no linear trace in x [N, d] within classes and moves x least.

    W = I - S^(1/2) P S^(-1/2), with S the covariance of x within classes and P the orthogonal projection onto the
    columns of S^(-1/2) Cov_c(x, q). Then W Cov_c(x, q) = 0 in every class c, and E |x - W x|^2 over centred x is the
    smallest possible. S is shrunk towards a multiple of the identity as far as the number of images asks for (Ledoit
    and Wolf 2004), which costs some of "least" and none of "no trace".

    Raises ``UserError`` where the classes times attribute values are so many that more than half of the dimensions would
    go, most of them by chance.

    Source: Belrose et al., "LEACE: Perfect linear concept erasure in closed form", NeurIPS 2023, within classes here.
    """
    cross, covariance = (moment.double() for moment in within_class_moments(x.double(), q.double(), label))
    if covariance.diagonal().mean() < 1e-12:  # all images of a class are the same
        return torch.eye(len(covariance)).to(x)
    from sklearn.covariance import ledoit_wolf_shrinkage  # here: it takes most of a second

    share = max(ledoit_wolf_shrinkage(centred_within(x, label).cpu().numpy(), assume_centered=True), 1e-6)
    identity = torch.eye(len(covariance)).to(covariance)
    values, vectors = torch.linalg.eigh((1 - share) * covariance + share * covariance.diagonal().mean() * identity)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    columns = inverse @ cross.permute(1, 0, 2).flatten(1)  # [d, C A]
    left, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    basis = left[:, sizes > 1e-4 * sizes.max().clamp(min=1e-12)]
    if basis.shape[1] > len(covariance) / 2:
        raise UserError(
            f"erasing the attribute in every class would take {basis.shape[1]} of {len(covariance)} dimensions; with so many "
            "classes use TRAINER.COOPOOD.ANCHOR_START identity"
        )
    return (identity - root @ basis @ basis.T @ inverse).to(x.dtype)


class RunningShare(nn.Module):
    """``explained_share`` of batches, from sums over the batches so far, which fade by ``momentum`` per batch.

    A batch of n images alone overstates the share by some 1 / n and pulls the features towards chance; about
    n / (1 - momentum) images take part here. The value is that of the sums; its gradient reaches the last batch,
    at the size that it would have if all images had been in it.
    """

    cross: Tensor  # [C, d, A]
    variance: Tensor
    count: Tensor  # [C]

    def __init__(self, classes: int, width: int, attributes: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("cross", torch.zeros(classes, width, attributes))
        self.register_buffer("variance", torch.zeros(()))
        self.register_buffer("count", torch.zeros(classes))

    def forward(self, x: Tensor, q: Tensor, label: Tensor) -> Tensor:
        """x [B, d], q [B, A] standardised within classes over the training set, ``label`` [B] -> a scalar."""
        member = F.one_hot(label, len(self.count)).to(x.dtype)  # [B, C]
        present = member.sum(dim=0)
        mean = member.T @ x / present.clamp(min=1).unsqueeze(1)
        centred = x - mean[label]
        batch = torch.einsum("bc,bd,ba->cda", member, centred, q)
        cross = self.momentum * self.cross + batch
        variance = self.momentum * self.variance + (centred**2).sum()
        count = self.momentum * self.count + present
        share = ((cross**2).sum(dim=(1, 2)) / count.clamp(min=1)).sum() / (q.shape[1] * variance.clamp(min=1e-12))
        if self.training:
            self.cross, self.variance, self.count = cross.detach(), variance.detach(), count.detach()
        return share.detach() + (share - share.detach()) * (count.sum() / len(x))


def cross_covariance(x: Tensor, y: Tensor) -> Tensor:
    """Squared Frobenius norm of the cross-covariance, || (x - mean x)^T (y - mean y) / n ||_F^2; x [n, p], y [n, q]."""
    return (((x - x.mean(0)).T @ (y - y.mean(0)) / len(x)) ** 2).sum()


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Biased HSIC, tr(K H L H) / n^2, with RBF kernels of median-heuristic width; x [n, p], y [n, q].

    Source: Gretton et al., "Measuring Statistical Dependence with Hilbert-Schmidt Norms", ALT 2005.
    """
    k, l = _rbf(x), _rbf(y)
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
