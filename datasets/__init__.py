"""One file per data set; importing this package registers them all."""

from oodprompt.datasets import shapes_on_scenes

__all__ = ["shapes_on_scenes"]
