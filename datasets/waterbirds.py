"""Waterbirds: birds cut out and put before other backgrounds (Sagawa et al., ICLR 2020)."""

from __future__ import annotations

from oodprompt.datasets.file_lists import FilesDataset
from oodprompt.datasets.metadata import read_metadata
from yacs.config import CfgNode

from oodprompt.config.registry import DATASET_REGISTRY


@DATASET_REGISTRY.register()
class Waterbirds(FilesDataset):
    """Landbird or waterbird (class) on land or water (spurious attribute).

    In training 95 % of the birds are on their own background; validation and test images of a class are half on land,
    half on water. Source: Sagawa, Koh, Hashimoto, Liang, "Distributionally Robust Neural Networks for Group Shifts",
    ICLR 2020; the archive and WILDS' copy of it are read. Attribute prompts start from debias_vl (Chuang et al. 2023,
    discriminative/main.py).
    """

    dataset_dir = "waterbirds"
    places = (
        "waterbirds/waterbird_complete95_forest2water2",  # SubpopBench
        "waterbird_complete95_forest2water2",
        "waterbirds",
        "waterbirds_v1.0",  # WILDS
        "cub/data/waterbird_complete95_forest2water2",  # GroupDRO
    )
    tree = """
        ROOT/waterbirds/waterbird_complete95_forest2water2/
          metadata.csv                   img_id,img_filename,y,split,place,place_filename
          001.Black_footed_Albatross/*.jpg
          ...
    """
    address = "https://nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz"
    attribute_names = ("land", "water")
    attribute_prompts = (
        (
            "a land background.",
            "a picture of a forest.",
            "a picture of a mountain.",
            "a picture of a wood.",
            "a photo of land.",
        ),
        (
            "a water background.",
            "a picture of an ocean.",
            "a picture of a beach.",
            "a picture of a port.",
            "a photo of water.",
        ),
    )

    def __init__(self, cfg: CfgNode) -> None:
        folder = self.folder(cfg, "metadata.csv")
        super().__init__(cfg, *read_metadata(folder / "metadata.csv", folder, ("landbird", "waterbird"), attributes=2))
