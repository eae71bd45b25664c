"""Sources of groups that need no model of their own: attribute labels, pseudo-attributes, discovered regions."""

from __future__ import annotations

from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.registry import GROUP_SOURCE_REGISTRY
from oodprompt.errors import UserError
from oodprompt.methods.attributes import PseudoAttributes
from oodprompt.methods.contracts import Context, GroupSource
from oodprompt.methods.splits import Split


@GROUP_SOURCE_REGISTRY.register(name="true")
class AttributeLabels(GroupSource):
    """The data set's attribute labels. Every training image needs one; other images without are in no group."""

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.names = tuple(context.data.attribute_names)

    def num_values(self, split: Split) -> int:
        unknown, count = int((split.attribute < 0).sum()), len(split.attribute)
        if unknown and (split.name == "train" or unknown == count):
            remedy = "give them one or take them out of the list, or " if unknown < count else ""
            raise UserError(
                f"TRAINER.GROUPS true: {unknown:,} of {count:,} images of the {split.name} split have no attribute label; "
                f"{remedy}use TRAINER.GROUPS pseudo, which needs the names of its values only, or regions"
            )
        return max(len(self.names), self.context.data.num_attribute_values)

    def of(self, split: Split) -> Tensor:
        return split.attribute


@GROUP_SOURCE_REGISTRY.register(name="pseudo")
class ZeroShotAttributes(GroupSource):
    """What zero-shot CLIP sees of the named attribute; no labels."""

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.seen = self._attributes(context)
        self.names = self.seen.names

    def _attributes(self, context: Context) -> PseudoAttributes:
        return context.attributes.pseudo

    def num_values(self, split: Split) -> int:
        return len(self.seen.text)

    def of(self, split: Split) -> Tensor:
        return self.seen.of(split)


@GROUP_SOURCE_REGISTRY.register(name="audit")
class ProposedAttributes(ZeroShotAttributes):
    """What zero-shot CLIP sees of the names that an audit of the training images proposes; neither labels nor names.

    The names are those of the first proposal: words whose presence in the images goes with the class. They take the place
    of the data set's names. ``UserError`` where no word goes with the class.
    """

    def _attributes(self, context: Context) -> PseudoAttributes:
        return context.attributes.proposed


@GROUP_SOURCE_REGISTRY.register(name="regions")
class DiscoveredRegions(GroupSource):
    """Whether an image has a region that discovery found; neither labels nor names."""

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.names = context.attributes.discovered.names

    def num_values(self, split: Split) -> int:
        return len(self.names)

    def of(self, split: Split) -> Tensor:
        return self.context.attributes.discovered.of(split)
