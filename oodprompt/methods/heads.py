"""The prediction of a trained model in tensors alone, from image features to logits: what an export consists of."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """Logits [B, C] of image features z [B, d] that are L2-normalised.

        z <- l2norm(W z + b)                                   for each (W, b) of ``maps``, in order
        w <- l2norm(P w)                                       where there is a ``text_map`` P
        l_k = scale <z, w_k> + bias_k                          w_k the ``class_vectors`` [K, d]
        logits_c = log sum exp over the members k of c         or their maximum

    ``class_vectors`` is None where the text features depend on the image; ``logits`` then takes them [B, K, d]. The K
    vectors are those of C classes with ``members`` each, which stand side by side; ``aggregate`` is "sum" or "max".
    ``W`` is [d, d], ``b`` [d] or None, ``scale`` a scalar, ``bias`` [K] or None.
    """

    scale: Tensor
    class_vectors: Tensor | None
    bias: Tensor | None = None
    maps: tuple[tuple[Tensor, Tensor | None], ...] = ()
    text_map: Tensor | None = None
    members: int = 1
    aggregate: str = "sum"

    def through(self, weight: Tensor, bias: Tensor | None = None) -> Head:
        """With one more map of image features, z <- l2norm(weight z + bias)."""
        return replace(self, maps=(*self.maps, (weight, bias)))

    def with_text_map(self, projection: Tensor) -> Head:
        """With class vectors w <- l2norm(projection w)."""
        if self.class_vectors is None:
            return replace(self, text_map=projection)
        return replace(self, class_vectors=F.normalize(self.class_vectors @ projection.T, dim=-1))

    def logits(self, z: Tensor, text: Tensor | None = None) -> Tensor:
        """z [B, d] -> [B, C]; ``text`` [B, K, d] where there are no class vectors."""
        for weight, bias in self.maps:
            z = F.normalize(F.linear(z, weight, bias), dim=-1)
        if self.class_vectors is not None:
            values = self.scale * z @ self.class_vectors.T
        else:
            assert text is not None, "text features depend on the image"
            if self.text_map is not None:
                text = F.normalize(text @ self.text_map.T, dim=-1)
            values = self.scale * (text @ z.unsqueeze(-1)).squeeze(-1)
        if self.bias is not None:
            values = values + self.bias
        if self.members == 1:
            return values
        by_class = values.unflatten(1, (-1, self.members))
        return by_class.logsumexp(dim=2) if self.aggregate == "sum" else by_class.amax(dim=2)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, for a file."""
        named = {"scale": self.scale, "class_vectors": self.class_vectors, "bias": self.bias, "text_map": self.text_map}
        for i, (weight, bias) in enumerate(self.maps):
            named |= {f"maps.{i}.weight": weight, f"maps.{i}.bias": bias}
        return {name: value.detach().float() for name, value in named.items() if value is not None}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], members: int = 1, aggregate: str = "sum") -> Head:
        """The head of ``tensors()``."""
        count = sum(name.startswith("maps.") and name.endswith(".weight") for name in tensors)
        maps = tuple((tensors[f"maps.{i}.weight"], tensors.get(f"maps.{i}.bias")) for i in range(count))
        vectors, bias, text_map = (tensors.get(name) for name in ("class_vectors", "bias", "text_map"))
        return cls(tensors["scale"], vectors, bias, maps, text_map, members, aggregate)

    def to(self, device: torch.device | str) -> Head:
        """The same on another device."""
        moved = {name: value.to(device) for name, value in self.tensors().items()}
        return Head.of(moved, self.members, self.aggregate)
