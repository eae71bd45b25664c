"""One file per data set; importing this package registers them all."""

from oodprompt.datasets import (
    celeba,
    csv_file,
    folders,
    metashift,
    nicopp,
    shapes_on_scenes,
    spawrious,
    urbancars,
    waterbirds,
)

__all__ = [
    "celeba",
    "csv_file",
    "folders",
    "metashift",
    "nicopp",
    "shapes_on_scenes",
    "spawrious",
    "urbancars",
    "waterbirds",
]
