"""Sources of groups by clusters within each class: George (``clusters``) and SPARE (``spare``). No labels, no names.

Every class is clustered by itself, on its training images; other images take the cluster that they lie in. The silhouette
chooses how many clusters a class has. A value is the number of a cluster in its class, by size: 0 is the largest. So the
same value of two classes need not mean the same attribute, and K_MAX values are the most that a class has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import GROUP_SOURCE_REGISTRY
from oodprompt.data.seeding import GROUP_SOURCE, derive_seed
from oodprompt.log import logger
from oodprompt.methods.clusters import best_clusters
from oodprompt.methods.contracts import Context, GroupSource
from oodprompt.methods.sources.first_model import first_logits, first_model
from oodprompt.methods.splits import Split

_JUDGED = 5000  # images of a class whose silhouettes choose K: they take the square of their number in time
_K_MAX = Key(10, "Most clusters of a class; the silhouette chooses among 2 and this.", at_least=2)
declare(
    "TRAINER.GROUP_SOURCES.CLUSTERS",
    {
        "FEATURES": Key(
            "first",
            "Image features that are clustered: of the first model (first), or of CLIP as it was released (frozen). Both "
            "are the same over prompt learners that leave the image tower alone, and then no first model is trained.",
            choices=("first", "frozen"),
        ),
        "FIRST_EPOCHS": Key(0, "Epochs of the first model; 0: OPTIM.MAX_EPOCH.", at_least=0),
        "COMPONENTS": Key(2, "Principal components of a class's features that are clustered.", at_least=1),
        "K_MAX": _K_MAX,
    },
)
declare(
    "TRAINER.GROUP_SOURCES.SPARE",
    {
        "FIRST_EPOCHS": Key(
            0, "T: epochs after which the outputs of the first model are clustered; 0: OPTIM.MAX_EPOCH.", at_least=0
        ),
        "K_MAX": _K_MAX,
    },
)


class _ClassClusters(GroupSource):
    """Clusters of the points of each class; ``_points`` says what a point is, and ``_fit`` how they are clustered."""

    is_computed = True
    may_be_fewer = True
    section: str
    by_cluster = True

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.keys = cfg.TRAINER.GROUP_SOURCES[self.section]
        self.names = tuple(f"cluster {k}" for k in range(self.keys.K_MAX))
        self._of_class: dict[int, Callable[[np.ndarray], np.ndarray]] | None = None

    def _points(self, split: Split) -> np.ndarray:
        raise NotImplementedError

    def _fit(self, points: np.ndarray, k: int) -> tuple[np.ndarray, Any]:
        """The cluster of every point [n], and what predicts those of others."""
        raise NotImplementedError

    def _reduced(self, points: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """The map from the points of a class to those that are clustered, fitted on ``points``."""
        return lambda p: p

    def of(self, split: Split) -> Tensor:
        if self._of_class is None:
            self._of_class = self._fitted(self.context.data.train)
        points, label = self._points(split), split.label.cpu().numpy()
        value = np.full(len(label), -1)
        for y, cluster_of in self._of_class.items():
            inside = label == y
            if inside.any():
                value[inside] = cluster_of(points[inside])
        return torch.from_numpy(value).to(split.label.device)

    def _fitted(self, train: Split) -> dict[int, Callable[[np.ndarray], np.ndarray]]:
        points, label = self._points(train), train.label.cpu().numpy()
        found: dict[int, Callable[[np.ndarray], np.ndarray]] = {}
        numbers = []
        for y in np.unique(label).tolist():
            found[y], number = self._clusters(points[label == y], y)
            numbers.append(f"{number} in {self.context.data.classnames[y]}")
        logger.info(f"TRAINER.GROUPS {self.cfg.TRAINER.GROUPS}: clusters: {', '.join(numbers)}")
        return found

    def _clusters(self, points: np.ndarray, y: int) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
        """The cluster of points of class ``y`` as a function of them, and how many clusters there are."""
        reduce = self._reduced(points)
        points = reduce(points)
        rng = np.random.default_rng(derive_seed(self.cfg.SEED, GROUP_SOURCE, y))
        judged = np.sort(rng.permutation(len(points))[:_JUDGED])
        best = best_clusters(
            points, lambda k: self._fit(points, k), self.keys.K_MAX, by_cluster=self.by_cluster, judged=judged
        )
        if best is None:  # one image, or images that are all alike
            return lambda p: np.zeros(len(p), dtype=np.int64), 1
        labels, fitted = best
        size = np.bincount(labels, minlength=self.keys.K_MAX)
        rank = np.argsort(np.argsort(-size, kind="stable"), kind="stable")
        return lambda p: rank[fitted.predict(reduce(p))], int((size > 0).sum())

    @property
    def _seed(self) -> int:
        return derive_seed(self.cfg.SEED, GROUP_SOURCE) % 2**31


@GROUP_SOURCE_REGISTRY.register(name="clusters")
class FeatureClusters(_ClassClusters):
    """Clusters of the image features of each class (George); neither labels nor names.

        z        image features of a first model, trained by cross-entropy alone for FIRST_EPOCHS epochs, [d]
        r_y(z)   the first COMPONENTS principal components of class y's training features
        a_i    = argmax_k P_y(k | r_{y_i}(z_i)),  a Gaussian mixture of class y with K_y parts

    K_y in 2 ... K_MAX has the highest mean over clusters of their mean silhouette.

    Source: Sohoni, Dunnmon, Angus, Gu, Re, "No Subclass Left Behind: Fine-Grained Robustness in Coarse-Grained
    Classification Problems", NeurIPS 2020, and the authors' code: features of a trained model, reduction, mixtures, the
    silhouette and K up to 10. Ours: PCA in place of UMAP, and no second clustering within large clusters.
    """

    section = "CLUSTERS"

    def _points(self, split: Split) -> np.ndarray:
        keys, context = self.keys, self.context
        if keys.FEATURES == "frozen" or context.features_are_frozen:
            z = split.features()
        else:
            learner, _ = first_model(self, keys.FIRST_EPOCHS)
            z, _ = context.first_stage.outputs(split, learner)
        return z.double().cpu().numpy()

    def _reduced(self, points: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        from sklearn.decomposition import PCA  # here: it takes more than a second

        return PCA(min(self.keys.COMPONENTS, *points.shape), svd_solver="full").fit(points).transform

    def _fit(self, points: np.ndarray, k: int) -> tuple[np.ndarray, Any]:
        from sklearn.mixture import GaussianMixture

        mixture = GaussianMixture(k, n_init=3, random_state=self._seed).fit(points)
        return mixture.predict(points), mixture


@GROUP_SOURCE_REGISTRY.register(name="spare")
class EarlyOutputClusters(_ClassClusters):
    """Clusters of what a model outputs early in its training, within each class (SPARE); neither labels nor names.

        p_i = softmax(f_T(x_i))  of a first model after T = FIRST_EPOCHS epochs of cross-entropy alone, [C]
        a_i = argmin_k || p_i - mu_{y_i, k} ||,  K-means on the training images of class y, K_y clusters

    K_y in 2 ... K_MAX has the highest mean silhouette. A shortcut is learned first, so that early outputs tell images
    with it from images without.

    Source: Yang, Gan, Karolina Dziugaite, Mirzasoleiman, "Identifying Spurious Biases Early in Training through the Lens
    of Simplicity Bias", AISTATS 2024 (arXiv 2305.18761), and its authors' library: probabilities, K-means and the
    silhouette. Its sampling by powers of the clusters' sizes is left to the debiaser. Ours: K up to 10, and T, which is 1
    or 2 there on Waterbirds. Prompts start from zero-shot CLIP and are slow to take to a shortcut, so that T is as many
    epochs as the run has.
    """

    section = "SPARE"
    by_cluster = False

    def _points(self, split: Split) -> np.ndarray:
        logits = first_logits(self, self.keys.FIRST_EPOCHS, split)
        return logits.double().softmax(dim=1).cpu().numpy()

    def _fit(self, points: np.ndarray, k: int) -> tuple[np.ndarray, Any]:
        from sklearn.cluster import KMeans

        means = KMeans(k, n_init=10, random_state=self._seed).fit(points)
        return means.labels_, means
