"""How much two features depend on each other: penalties that are zero (up to sampling noise) for independent ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oodprompt.errors import UserError


@dataclass(frozen=True)
class Classes:
    """Which images of a batch share a class, in shapes that depend on the batch's size B alone.

    Sums over classes are products with [B, B] matrices, so that a step needs no look at the labels on the host, and as
    many calls with a thousand classes as with two. ``label`` [B]; ``same`` [B, B] bool; ``number`` [B], the images of the
    own class; ``mean`` [B, B], which takes values [B, p] to the means of their classes; ``weight`` [B], with which values
    [B] sum up to the mean over classes of their means within each class. Classes with fewer than ``min_per_class`` images
    weigh nothing.
    """

    label: Tensor
    same: Tensor
    number: Tensor
    mean: Tensor
    weight: Tensor

    @classmethod
    def of(cls, label: Tensor, dtype: torch.dtype, min_per_class: int = 1) -> Classes:
        """The classes of a batch; ``mean`` and ``weight`` are of ``dtype``."""
        same = label.unsqueeze(1) == label
        number = same.sum(dim=1)
        mean = same.to(dtype) / number.unsqueeze(1)
        share = mean.diagonal() * (number >= min_per_class)
        return cls(label, same, number, mean, share / share.sum().clamp(min=0.5))  # 0 where no class is left

    @classmethod
    def one(cls, x: Tensor) -> Classes:
        """All rows of x [n, p] are of one class."""
        return cls.of(torch.zeros(len(x), dtype=torch.long, device=x.device), x.dtype)

    def centred(self, x: Tensor) -> Tensor:
        """x [B, p] minus the mean of its class."""
        return torch.addmm(x, self.mean, x, alpha=-1)

    def medians(self, distances: Tensor) -> Tensor:
        """The median within each class of distances [k, B, B] between different images, [k, B]: that of the own class.

        The lower one of two in the middle, as ``torch.median``. Of a class of one image it is some distance or other.
        """
        last = torch.iinfo(torch.long).max
        pairs = torch.where(self.same, self.label, last).fill_diagonal_(last)
        values, order = distances.flatten(1).sort(dim=1)
        by_class = pairs.flatten()[order].sort(dim=1, stable=True).indices
        others = self.number - 1
        first = ((self.label < self.label.unsqueeze(1)) * others).sum(dim=1)  # where the pairs of a class begin
        place = (first + (self.number * others - 1) // 2).clamp(min=0)
        return values.gather(1, by_class[:, place])


def within_classes(
    dependence: Callable[[Tensor, Tensor, Classes], Tensor], x: Tensor, y: Tensor, label: Tensor, min_per_class: int = 4
) -> Tensor:
    """Mean over classes of ``dependence`` of x [B, p] and y [B, q] within the class.

    Classes with fewer than ``min_per_class`` images are left out; zero when none is left.
    """
    return dependence(x, y, Classes.of(label, x.dtype, min_per_class))


def _members(label: Tensor) -> tuple[Tensor, ...]:
    """The rows of each class that is present, in rising order. For use ahead of training, as the host waits for it."""
    order = label.argsort(stable=True)
    return order.split(label[order].unique_consecutive(return_counts=True)[1].tolist())


def centred_within(x: Tensor, label: Tensor) -> Tensor:
    """x [N, d] minus the mean of its class."""
    result = torch.empty_like(x)
    for mine in _members(label):
        result[mine] = x[mine] - x[mine].mean(dim=0)
    return result


def standardise_within(values: Tensor, label: Tensor) -> Tensor:
    """Values [N, A] with mean 0 and variance 1 within each class, column by column; constant columns become 0."""
    result = torch.empty_like(values)
    for rows in _members(label):
        mine = values[rows]
        deviation = mine.std(dim=0, correction=0)
        result[rows] = torch.where(deviation > 1e-6, (mine - mine.mean(dim=0)) / deviation.clamp(min=1e-6), 0)
    return result


def within_class_moments(x: Tensor, q: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments within classes of x [N, d] and q [N, A], each centred in its class.

    Returns cross [C', d, A], sqrt(n_c / N) times the cross-covariance in each class present, and covariance [d, d],
    the pooled covariance of x. For use ahead of training; ``batch_share`` is for a step.
    """
    cross, covariance = [], x.new_zeros(x.shape[1], x.shape[1])
    x, q = centred_within(x, label), centred_within(q, label)
    for mine in _members(label):
        centred, target = x[mine], q[mine]
        cross.append(centred.T @ target / (len(x) * len(target)) ** 0.5)
        covariance = covariance + centred.T @ centred / len(x)
    return torch.stack(cross, dim=1).transpose(0, 1), covariance  # in the order in which ``explained_share`` takes it


def explained_share(cross: Tensor, covariance: Tensor, weight: Tensor | None = None) -> Tensor:
    """Share of the within-class variance of ``weight @ x`` that standardised attributes q explain, a scalar.

    sum_c n_c || W Cov_c(x, q) ||_F^2 / (A N tr(W Cov(x) W^T)), from ``within_class_moments`` of x and q; W is the
    identity when it is not given. In [0, 1] for one attribute and its complement; free of W's scale.
    """
    columns, attributes = cross.transpose(0, 1).flatten(1), cross.shape[-1]  # [d, C' A]
    if weight is None:
        variance = covariance.diagonal().sum()
    else:
        columns, variance = weight @ columns, (weight @ covariance * weight).sum()
    return (columns**2).sum() / (attributes * variance.clamp(min=1e-12))


def batch_share(x: Tensor, q: Tensor, label: Tensor) -> Tensor:
    """``explained_share`` of a batch x [B, d], q [B, A], a scalar.

    With x and q centred in their classes, || sum_i x_i q_i^T ||_F^2 = sum_ij <x_i, x_j> <q_i, q_j>, so that no matrix for
    each class is needed.
    """
    classes = Classes.of(label, x.dtype)
    x, q = classes.centred(x), classes.centred(q)
    explained = (classes.mean * (x @ x.T) * (q @ q.T)).sum()
    return explained / (q.shape[1] * (x**2).sum().clamp(min=1e-12 * len(x)))


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
        classes = torch.arange(len(self.count), device=label.device)
        member = (label.unsqueeze(1) == classes).to(x.dtype)  # [B, C]
        present = member.sum(dim=0)
        mean = member.T @ x / present.clamp(min=1).unsqueeze(1)
        centred = x - mean[label]
        columns = (member.unsqueeze(2) * q.unsqueeze(1)).flatten(1)  # [B, C A]
        batch = (columns.T @ centred).view(len(self.count), q.shape[1], -1).transpose(1, 2)
        cross = self.momentum * self.cross + batch
        variance = self.momentum * self.variance + (centred**2).sum()
        count = self.momentum * self.count + present
        share = ((cross**2).sum(dim=(1, 2)) / count.clamp(min=1)).sum() / (q.shape[1] * variance.clamp(min=1e-12))
        if self.training:
            self.cross, self.variance, self.count = cross.detach(), variance.detach(), count.detach()
        return share.detach() + (share - share.detach()) * (count.sum() / len(x))


def cross_covariance(x: Tensor, y: Tensor, classes: Classes | None = None) -> Tensor:
    """Squared Frobenius norm of the cross-covariance, || (x - mean x)^T (y - mean y) / n ||_F^2; x [n, p], y [n, q].

    With ``classes`` the mean over them of the norm within each. As sum_ij <x_i, x_j> <y_i, y_j> / n^2 of centred x and y
    it needs no matrix [p, q] for each class.
    """
    classes = classes or Classes.one(x)
    x, y = classes.centred(x), classes.centred(y)
    return classes.weight @ (classes.mean * (x @ x.T) * (y @ y.T)).sum(dim=1)


def hsic(x: Tensor, y: Tensor, classes: Classes | None = None) -> Tensor:
    """Biased HSIC, tr(K H L H) / n^2, with RBF kernels of median-heuristic width; x [n, p], y [n, q].

    With ``classes`` the mean over them of HSIC within each, each with widths of its own.

    Source: Gretton et al., "Measuring Statistical Dependence with Hilbert-Schmidt Norms", ALT 2005.
    """
    classes = classes or Classes.one(x)
    if x.shape == y.shape:
        distances = _squared_distances(torch.stack([x, y]))
    else:
        distances = torch.stack([_squared_distances(x), _squared_distances(y)])
    kernels = _rbf(distances, classes)
    k, l = torch.baddbmm(kernels, classes.mean.expand_as(kernels), kernels, alpha=-1)  # H K and H L
    return classes.weight @ (classes.mean * k * l.T).sum(dim=1)


def mutual_information(p: Tensor, q: Tensor, classes: Classes | None = None) -> Tensor:
    """Mutual information in nats of two labels, drawn for each image from p [n, C] and q [n, C], a scalar.

    I = sum_ab P_ab log(P_ab / (P_a. P_.b)) with the joint distribution P = mean_i p_i q_i^T. With ``classes`` the mean over
    them of I within each. P is computed for as many classes as can have enough images, at most n / 2: [n / 2, C, C].

    Source: as in Ji et al., "Invariant Information Clustering", ICCV 2019, which maximises it.
    """
    classes = classes or Classes.one(p)
    n = len(p)
    first = ~(classes.same.tril(-1).any(dim=1)) & (classes.weight > 0)  # an image for each class that counts
    counts, rows = first.to(p.dtype).topk(max(n // 2, 1))
    joint = torch.einsum("kn,na,nb->kab", classes.mean[rows], p, q)
    independent = joint.sum(dim=2, keepdim=True) * joint.sum(dim=1, keepdim=True)
    tiny = torch.finfo(p.dtype).tiny
    information = (joint * (joint.clamp(min=tiny).log() - independent.clamp(min=tiny).log())).sum(dim=(1, 2))
    return (counts * information).sum() / counts.sum().clamp(min=1)


def _squared_distances(x: Tensor) -> Tensor:
    """|x_i - x_j|^2 of x [..., n, p], [..., n, n]."""
    products = x @ x.transpose(-1, -2)
    squares = products.diagonal(dim1=-2, dim2=-1)
    return torch.sub(squares.unsqueeze(-1) + squares.unsqueeze(-2), products, alpha=2).clamp(min=0)


def _rbf(distances: Tensor, classes: Classes) -> Tensor:
    """exp(-|x_i - x_j|^2 / m) within classes and 0 between them, [k, n, n] as the squared distances are.

    m is the median of those between different points of the class.
    """
    medians = classes.medians(distances.detach()).clamp(min=1e-8)
    return torch.exp(-distances / medians.unsqueeze(2)) * classes.same


class Club(nn.Module):
    """CLUB, an upper bound of the mutual information I(x; y) by a Gaussian net q(y | x), x and y of one width.

    bound = mean_i [ log q(y_i | x_i) - mean_j log q(y_j | x_i) ]; the net itself is fitted by maximum likelihood on
    detached features, in the same backward pass.

    Source: Cheng et al., "CLUB: A Contrastive Log-ratio Upper Bound of Mutual Information", ICML 2020.
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 2 * width))

    def _gaussian(self, parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of y given x [n, p], each [n, p]."""
        mean, log_variance = torch.func.functional_call(self.net, parameters, x).chunk(2, dim=1)
        return mean, log_variance.tanh()

    def forward(self, x: Tensor, y: Tensor, classes: Classes | None = None) -> Tensor:
        """The bound (gradients for the features) with the value of the fit's gradient added (gradients for the net).

        With ``classes`` the mean over them of both within each. The mean over j of a Gaussian's log density needs no more
        than mean and variance of the y_j, as mean_j (y_j - m)^2 = Var(y) + (mean y - m)^2.
        """
        classes = classes or Classes.one(x)
        m, log_variance = self._gaussian({name: p.detach() for name, p in self.net.named_parameters()}, x)
        centre = classes.mean @ y
        spread = classes.mean @ (y - centre) ** 2
        errors = (y - centre) * (y + centre - 2 * m) - spread  # (y_i - m)^2 - mean_j (y_j - m)^2
        bound = classes.weight @ (-0.5 * (errors / log_variance.exp()).mean(dim=1))
        m, log_variance = self._gaussian(dict(self.net.named_parameters()), x.detach())
        surprise = 0.5 * ((y.detach() - m) ** 2 / log_variance.exp() + log_variance).mean(dim=1)
        fit = classes.weight @ surprise
        return bound + fit - fit.detach()
