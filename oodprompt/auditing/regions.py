"""Suspected shortcuts by region: RaVL's discovery, each cluster named by the words that are nearest to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from oodprompt.auditing.looking import Looked
from oodprompt.discovery.region_features import RegionFeatures
from oodprompt.engine.discovery import RunDiscovery
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.reports.discovery import read_discovery

_CLUSTERS, _WORDS, _EXAMPLES = 8, 5, 6


@torch.no_grad()
def region_suspects(trainer: PromptTrainer, looked: Looked, title: str, folder: Path) -> dict[str, Any]:
    """Discovery in the model of ``trainer``, on DISCOVERY.SPLIT; its own files go to ``folder``.

    The words of a cluster are those whose direction has the largest cosine with the mean feature of its regions. The mean
    direction of all words and the mean feature of all regions are subtracted first.
    """
    cfg, encoder = trainer.cfg, looked.readable.encoder
    region_features = RegionFeatures(cfg, encoder)
    discovery = RunDiscovery(
        cfg,
        encoder,
        region_features,
        trainer.discovery.first_stage,
        trainer.run,
        trainer.models,
        folder,
        trainer.base_name,
        writes=True,
    )
    discovery.discover(trainer.learner, trainer.objective.predict, title, folder)
    content = read_discovery(folder)
    features = region_features.of(cfg.DISCOVERY.SPLIT, trainer.learner).cpu().float()
    assignment = torch.tensor(content["clustering"]["assignment"])
    words = F.normalize(looked.words.direction - looked.words.direction.mean(dim=0), dim=-1)
    centre = features.mean(dim=0)
    clusters = []
    for cluster in content["clusters"][:_CLUSTERS]:
        own = F.normalize(features[assignment == cluster["index"]].mean(dim=0) - centre, dim=0)
        nearest = (words @ own).topk(min(_WORDS, len(words))).indices.tolist()
        clusters.append(
            {
                "words": [looked.words.words[i] for i in nearest],
                **{
                    key: cluster[key] for key in ("index", "survives", "reason", "score", "influence", "helps", "hurts")
                },
                **{key: cluster[key] for key in ("num_regions", "num_images")},
                "rows": [
                    {key: row[key] for key in ("index", "image", "box", "true", "predicted")}
                    for row in cluster["regions"][:_EXAMPLES]
                ],
            }
        )
    survive = sum(cluster["survives"] for cluster in content["clusters"])
    return {"split": cfg.DISCOVERY.SPLIT, "survive": survive, "of": len(content["clusters"]), "clusters": clusters}
