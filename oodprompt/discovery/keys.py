"""The keys of discovery (DISCOVERY.*)."""

from oodprompt.config.keys import declare

declare(
    "DISCOVERY",
    {
        "FROM": (
            "",
            "Folder that scripts/discover.py wrote, whose clusters are taken; empty: the base is trained alone first, and "
            "discovery runs on that.",
        ),
        "EPOCHS": (0, "Epochs of that first training; 0: OPTIM.MAX_EPOCH."),
        "SPLIT": (
            "val",
            "Labelled images that discovery looks at: val or test. They should be free of the correlation.",
        ),
        "K_RANGE": ((), "First and last number of clusters to try; empty: 2 C to 5 C - 1 for C classes."),
        "THRESHOLD": (0.25, "Clusters with less influence H_c are dropped."),
        "BOTH_SIGNS": (True, "Clusters must help a class and hurt another (in the authors' code, not in the paper)."),
        "TEMPERATURE": (0.07, "Of the scores of regions."),
        "CLUSTERS": (1, "How many of the surviving clusters, best first, count as spurious."),
        "PLANTED": ("", "Name of the regions that are known to be spurious, to report Precision@10; for studies."),
    },
)
