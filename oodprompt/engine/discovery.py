"""Discovery inside a run, and for the run of another day: where clusters come from, and the files about them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.data.columns import Images
from oodprompt.data.dataset import told_apart
from oodprompt.data.images import PixelRules, read_image
from oodprompt.data.transforms import build_transform
from oodprompt.discovery.region_features import RegionFeatures
from oodprompt.discovery.run import DiscoveryRun, run_discovery
from oodprompt.engine.first_stage import FirstStage
from oodprompt.engine.loop import RunState
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder, evaluating
from oodprompt.files import write_atomically
from oodprompt.log import logger
from oodprompt.memory import memory_for
from oodprompt.methods.attributes import DiscoveredClusters
from oodprompt.methods.contracts import Alignment, PromptLearner
from oodprompt.regions.boxes import digest
from oodprompt.reports.discovery import FILE, discovery_table, read_discovery, write_discovery

CLUSTERS_FILE = "discovery.npz"


class RunDiscovery:
    """Discovers suspected shortcuts for a run, writes and reads what was found.

    ``models()`` are the run's models; ``folder`` is its output folder. Only the process that ``writes`` writes files.
    """

    def __init__(
        self,
        cfg: CfgNode,
        encoder: Encoder,
        region_features: RegionFeatures,
        first_stage: FirstStage,
        state: RunState,
        models: Callable[[], Sequence[nn.Module]],
        folder: Path,
        base_name: str,
        writes: bool,
    ) -> None:
        self.cfg, self.encoder, self.region_features = cfg, encoder, region_features
        self.first_stage, self.state, self._models = first_stage, state, models
        self.folder, self.base_name, self.writes = folder, base_name, writes

    def find(self) -> DiscoveredClusters:
        """What debiasers are given: what this run found before, what DISCOVERY.FROM holds, or a new discovery.

        A new discovery looks at the base, which is trained alone for it.
        """
        self.encoder.data.dataset.need_pixels("discovery looks at regions of images")
        if self.cfg.DISCOVERY.FROM:
            return self.read(Path(self.cfg.DISCOVERY.FROM))
        for folder in (self.folder, Path(self.cfg.RESUME)):
            if self.state.start_epoch and (folder / CLUSTERS_FILE).is_file():
                return self.read(folder)
        epochs = self.cfg.DISCOVERY.EPOCHS or self.cfg.OPTIM.MAX_EPOCH
        logger.info(f"Discovery: {self.base_name} is trained alone first, for {epochs} epochs")
        learner, _ = self.first_stage.fit(epochs)
        title = f"{self.base_name}, trained alone"
        return self.discover(learner, lambda alignment: alignment.logits, title, self.folder)

    def discover(
        self,
        learner: PromptLearner,
        predict: Callable[[Alignment], Tensor],
        title: str,
        folder: Path,
        pictures: bool = True,
    ) -> DiscoveredClusters:
        """Discovery in the model ``predict`` over ``learner``; writes its files to ``folder`` and reports the table.

        ``pictures``: whether the page and the figure are among the files.
        """
        self.encoder.data.dataset.need_pixels("discovery looks at regions of images")
        remedy = "Take fewer regions of an image (REGIONS.GRID, REGIONS.PER_IMAGE) or fewer images in DISCOVERY.SPLIT"
        with evaluating(*self._models(), learner), memory_for("in discovery", remedy):
            found = run_discovery(self.cfg, self.encoder, learner, predict, self.region_features, str(folder / FILE))
        if self.writes:
            self._write(found, title, folder, pictures)
        return found.clusters

    def _write(self, found: DiscoveryRun, title: str, folder: Path, pictures: bool) -> None:
        cfg, data = self.cfg, self.encoder.data_of(found.split)
        files = write_discovery(
            found.discovery,
            found.regions,
            list(data.impaths),
            found.label,
            found.predicted,
            told_apart(self.encoder.learner.classnames),
            as_seen(cfg, data),
            folder,
            title=f"What {title} goes by on {cfg.DATASET.NAME}",
            facts=self._facts(found, title),
            truth=found.planted,
            pictures=pictures,
            extra={"spurious_clusters": list(found.clusters.clusters)},
        )
        write_atomically(folder / CLUSTERS_FILE, self._clusters_file(found))
        logger.info(discovery_table(read_discovery(folder)))
        logger.info("Wrote " + ", ".join(str(file) for file in files))

    def _facts(self, found: DiscoveryRun, title: str) -> dict[str, str]:
        """How the result was made, for the report."""
        cfg = self.cfg
        return {
            "model": title,
            "data": f"{cfg.DATASET.NAME}, {found.split} ({len(found.label):,} images)",
            "backbone": cfg.MODEL.BACKBONE.PATH or cfg.MODEL.BACKBONE.NAME,
            "regions": found.regions.source or cfg.REGIONS.SOURCE,
            "features of regions": cfg.REGIONS.FEATURES,
            "numbers of clusters": f"{found.ks[0]} to {found.ks[-1]}",
            "influence at least": f"{cfg.DISCOVERY.THRESHOLD:g}",
            "seed": str(cfg.SEED),
        }

    def _clusters_file(self, found: DiscoveryRun) -> bytes:
        """The bytes of ``discovery.npz``: survivors, features of their medoids, the cluster of every region."""
        assignment, clustering = found.clusters.assignment, found.discovery.clustering
        arrays: dict[str, Any] = {f"assignment_{name}": value.numpy() for name, value in assignment.items()}
        arrays |= {f"digest_{name}": np.array(digest(self.region_features.regions(name))) for name in assignment}
        buffer = io.BytesIO()
        np.savez(
            buffer,
            clusters=np.array([cluster.index for cluster in found.discovery.survivors], np.int64),
            medoids=found.features.cpu().numpy()[clustering.medoids],
            **arrays,
        )
        return buffer.getvalue()

    def read(self, folder: Path) -> DiscoveredClusters:
        """What ``discover`` wrote; ``UserError`` where the regions of now are others."""
        path = folder / CLUSTERS_FILE if folder.is_dir() else folder
        if not path.is_file():
            raise UserError(
                f"DISCOVERY.FROM: there is no {path}; give the folder of a run, after: python scripts/discover.py "
                f"--model-dir {folder}"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                content = {name: file[name] for name in file.files}
            clusters = tuple(content["clusters"].tolist())
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} is not what scripts/discover.py writes ({error}); run it again") from error
        assignment, owner = {}, {}
        for name, value in content.items():
            if name.startswith("assignment_"):
                split = name.removeprefix("assignment_")
                regions = self.region_features.regions(split)
                if str(content[f"digest_{split}"]) != digest(regions):
                    raise UserError(
                        f"DISCOVERY.FROM: {path} is of other regions of the {split} images ({len(value):,}, now "
                        f"{len(regions.owner):,}); use the same data set, INPUT and REGIONS.* as in that run"
                    )
                assignment[split], owner[split] = torch.from_numpy(value).long(), regions.owner
        counted = clusters[: self.cfg.DISCOVERY.CLUSTERS]
        return DiscoveredClusters(counted, assignment, owner, str(folder / FILE))


def as_seen(cfg: CfgNode, images: Images) -> Callable[[int], Image.Image]:
    """A function that reads the ``i``-th of the ``images`` as the model sees it, but for changed pixel values.

    Boxes of regions are in fractions of this view. The function raises ``UserError`` where an image cannot be read.
    """
    plain = cfg.clone()
    plain.defrost()
    plain.INPUT.TRANSFORMS = ()
    look = build_transform(plain, is_train=False)

    def load(index: int) -> Image.Image:
        pixels = look(read_image(images.impath(index), PixelRules.of(cfg)))
        return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy())

    return load
