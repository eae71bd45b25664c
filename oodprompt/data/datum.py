"""One image and what is known of it. Names and behaviour are Dassl's; the (spurious) attribute and the caption are ours."""

from __future__ import annotations

import os

from oodprompt.errors import UserError


class Datum:
    """One image: its path, class label, domain, class name, (spurious) attribute (-1: unknown) and caption ("": none)."""

    __slots__ = ("_attribute", "_caption", "_classname", "_domain", "_impath", "_label")

    def __init__(
        self,
        impath: str = "",
        label: int = 0,
        domain: int = 0,
        classname: str = "",
        attribute: int = -1,
        caption: str = "",
    ) -> None:
        if not os.path.isfile(impath):  # four times as fast as Path, which counts where there are 200,000
            raise UserError(f"no image at {impath}; the data set's file list names it")
        self._impath, self._label, self._domain = str(impath), int(label), int(domain)
        self._classname, self._attribute, self._caption = str(classname), int(attribute), caption

    @classmethod
    def unchecked(cls, impath: str, label: int, domain: int, classname: str, attribute: int, caption: str) -> Datum:
        """A ``Datum`` whose file is not looked for: another part has done so, or does it for many at once."""
        datum = cls.__new__(cls)
        datum._impath, datum._label, datum._domain = impath, label, domain
        datum._classname, datum._attribute, datum._caption = classname, attribute, caption
        return datum

    impath = property(lambda self: self._impath)
    label = property(lambda self: self._label)
    domain = property(lambda self: self._domain)
    classname = property(lambda self: self._classname)
    attribute = property(lambda self: self._attribute)
    caption = property(lambda self: self._caption)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Datum) and all(getattr(self, key) == getattr(other, key) for key in Datum.__slots__)

    def __hash__(self) -> int:
        return hash((self._impath, self._label))

    def relabelled(self, label: int) -> Datum:
        """The same image with another label; everything else is kept."""
        return Datum.unchecked(self.impath, label, self.domain, self.classname, self.attribute, self.caption)
