"""One file per data set or family of data sets; importing this package registers them all."""

from oodprompt.datasets import (
    celeba,
    coop_sets,
    csv_file,
    domains,
    folders,
    imagenet,
    metashift,
    nicopp,
    shapes_on_scenes,
    spawrious,
    urbancars,
    waterbirds,
)

__all__ = [
    "celeba",
    "coop_sets",
    "csv_file",
    "domains",
    "folders",
    "imagenet",
    "metashift",
    "nicopp",
    "shapes_on_scenes",
    "spawrious",
    "urbancars",
    "waterbirds",
]
