"""From a model of another repository to an ``Alignment``: by what it is made of, or by a function that is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodprompt.errors import UserError
from oodprompt.methods.contracts import Alignment

# (model, batch) -> the alignment of the batch, and perhaps a further loss of the method's own. ``batch`` is Dassl's,
# with "img" and "label" on the model's device.
Adapter = Callable[[nn.Module, dict[str, Any]], Alignment | tuple[Alignment, Tensor]]

_ADAPTERS: dict[str, Adapter] = {}
_PARTS = ("image_encoder", "text_encoder", "logit_scale")
_EXAMPLE = """
    import torch.nn.functional as F
    from oodprompt.contracts import Alignment
    from oodprompt.plugin import register_adapter

    @register_adapter("{name}")
    def features(model, batch):
        image = model.encode_image(batch["img"])   # [B, d], with gradients
        text = model.class_features()              # [C, d], or [B, C, d]
        scale = model.scale.exp()                  # logits = scale * image @ text.T
        return Alignment(F.normalize(image, dim=-1), F.normalize(text, dim=-1), scale)
"""


def register_adapter(trainer: str, adapter: Adapter | None = None) -> Any:
    """Say how features are got from the model of a trainer, by its registered name; also as a decorator.

    The step is then the engine's: the objective of the alignment, plus the further loss if the adapter returns one; the
    trainer's own ``forward_backward`` is not called.
    """

    def add(adapter: Adapter) -> Adapter:
        _ADAPTERS[trainer] = adapter
        return adapter

    return add if adapter is None else add(adapter)


def adapter_of(trainer: str) -> Adapter | None:
    """The adapter that was registered for a trainer, if any."""
    return _ADAPTERS.get(trainer)


def call_adapter(adapter: Adapter, model: nn.Module, batch: dict[str, Any]) -> tuple[Alignment, Tensor | None]:
    """What an adapter returns, as a pair; its tensors in fp32."""
    result = adapter(model, batch)
    alignment, own = result if isinstance(result, tuple) else (result, None)
    parts = (alignment.image_features, alignment.text_features, alignment.logit_scale)
    return Alignment(*(part.float() for part in parts)), own


@dataclass(frozen=True)
class _Seen(Alignment):
    """An alignment whose logits are those that the model itself computed from it."""

    given: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        return super().logits if self.given is None else self.given.float()


class Watch:
    """Hooks on ``model.image_encoder`` and ``model.text_encoder`` that keep what the last forward pass gave.

    Raises ``UserError`` that names what the model of the trainer ``name`` lacks, with the adapter to write.
    """

    def __init__(self, model: Any, name: str) -> None:  # an nn.Module with the three parts
        self.model, self.name = model, name
        self.image: list[Any] = []
        self.text: list[Any] = []
        missing = [part for part in _PARTS if not hasattr(model, part)]
        if missing:
            raise self.error(f"its model, {type(model).__name__}, has no {', '.join(missing)}")
        model.image_encoder.register_forward_hook(lambda module, args, output: self.image.append(output))
        model.text_encoder.register_forward_hook(lambda module, args, output: self.text.append(output))

    def error(self, what: str) -> UserError:
        """What is in the way, and the way round it."""
        return UserError(
            f"TRAINER.BASE {self.name}: {what}, so its features cannot be seen from outside; register an adapter:\n"
            + _EXAMPLE.format(name=self.name)
        )

    def clear(self) -> None:
        self.image.clear()
        self.text.clear()

    def alignment(self, logits: Tensor) -> Alignment | None:
        """The alignment whose logits [B, C] these are; None where what was seen does not give them.

        The text encoder may be called once, or once per image (prompts that depend on the image).
        """
        tensors = [*self.image, *self.text]
        if not self.image or not self.text or not all(isinstance(x, Tensor) and x.ndim == 2 for x in tensors):
            return None
        image, scale = F.normalize(self.image[0].float(), dim=-1), self.model.logit_scale.exp().float()
        text = torch.stack(self.text) if len(self.text) == len(image) > 1 else self.text[0]
        text = F.normalize(text.float(), dim=-1)
        fits = len(image) == len(logits) and text.shape[-2] == logits.shape[1] and text.shape[-1] == image.shape[1]
        if not fits:
            return None
        seen = _Seen(image, text, scale, given=logits)
        # Upstream multiplies in the precision of its towers.
        tolerance = 1e-3 if logits.dtype == self.image[0].dtype and logits.element_size() == 4 else 2e-2
        if (seen.compare(image) - logits).abs().max() > tolerance * scale:
            return None
        return seen
