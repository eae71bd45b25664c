"""A linear predictor of an attribute from the frozen image features, which some sources of groups train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from oodprompt.methods.splits import Split


class AttributePredictor:
    """Logistic regression of the attribute [n] on standardised features [n, d].

    All values have the same total weight. ``strength`` is C of scikit-learn: the less, the simpler the predictor. If all
    images have one value, the predictor gives it to every image.
    """

    def __init__(self, z: np.ndarray, attribute: np.ndarray, values: int, strength: float = 1.0) -> None:
        from sklearn.linear_model import LogisticRegression  # here: it takes more than a second
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self._values, self._only = values, int(attribute[0]) if len(np.unique(attribute)) == 1 else None
        if self._only is not None:
            return
        regression = LogisticRegression(C=strength, max_iter=1000, class_weight="balanced")
        self._model: Any = make_pipeline(StandardScaler(), regression)
        self._model.fit(z, attribute)

    def probabilities(self, z: np.ndarray) -> np.ndarray:
        """[n, A]; 0 for values that no label has."""
        p = np.zeros((len(z), self._values))
        if self._only is not None:
            p[:, self._only] = 1
            return p
        p[:, self._model.classes_] = self._model.predict_proba(z)
        return p


def predicted(predictors: Sequence[AttributePredictor], split: Split) -> Tensor:
    """The value with the highest mean probability for every image of a split that no predictor has seen, [N]."""
    z = as_numpy(split.features())
    values = np.mean([p.probabilities(z) for p in predictors], axis=0).argmax(axis=1)
    return torch.from_numpy(values).to(split.label.device)


def as_numpy(values: Tensor) -> np.ndarray:
    """The values on the CPU, without gradient."""
    return values.detach().cpu().numpy()
