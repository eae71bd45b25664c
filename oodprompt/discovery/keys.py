"""The keys of discovery."""

from __future__ import annotations

from oodprompt.config.keys import Key, declare


def _is_k_range(ends: tuple[int, ...]) -> bool:
    return not ends or (len(ends) == 2 and all(type(k) is int for k in ends) and 2 <= ends[0] <= ends[1])


declare(
    "DISCOVERY",
    {
        "FROM": (
            "",
            "Folder that scripts/discover.py wrote, whose clusters are taken; empty: the base is trained alone first, and "
            "discovery runs on that.",
        ),
        "EPOCHS": Key(0, "Epochs of that first training; 0: OPTIM.MAX_EPOCH.", at_least=0),
        "SPLIT": Key(
            "val",
            "Labelled images that discovery looks at. They should be free of the correlation.",
            choices=("val", "test"),
            error="{key}: unknown split {value!r}: {known}",
        ),
        "K_RANGE": Key(
            (),
            "First and last number of clusters to try, as (20, 49); empty: 2 C to 5 C - 1 for C classes.",
            test=_is_k_range,
            error="{key}: give the first and the last number of clusters, as (20, 49), not {value}",
        ),
        "THRESHOLD": (0.25, "Clusters with less influence H_c are dropped."),
        "BOTH_SIGNS": (True, "Clusters must help a class and hurt another (in the authors' code, not in the paper)."),
        "TEMPERATURE": Key(0.07, "Of the scores of regions.", above=0),
        "CLUSTERS": Key(1, "How many of the surviving clusters, best first, count as spurious.", at_least=1),
        "PLANTED": ("", "Name of the regions that are known to be spurious, to report Precision@10; for studies."),
    },
)
