"""Keys that may differ between two runs that compute the same: the one list of them."""

from __future__ import annotations

# Keys that say where a run is kept and how its data are read, not what it computes.
FREE_KEYS = (
    "OUTPUT_DIR",
    "RESUME",
    "VERBOSE",
    "DATASET.ROOT",
    "DATALOADER.CACHE_DIR",
    "DATALOADER.CACHE_LIMIT_GIB",
    "DATALOADER.CACHE_MEMORY_MIB",
    "DATALOADER.CACHE_SECONDS",
    "DATALOADER.IMAGE_CACHE_MIB",
    "DATALOADER.NUM_WORKERS",
    "TRAIN.PRINT_FREQ",
    "TRAIN.TRACKERS",
)


# Keys that may differ between a run and the run that resumes it: they do not change what is computed.
FREE_WHEN_RESUMED = (
    *FREE_KEYS,
    "USE_CUDA",  # what counts is the precision in force, which is compared by itself
    "DATALOADER.TRAIN_X.BATCH_SIZE",  # what counts is the batch of all processes, which is compared by itself
    "DATALOADER.TEST.BATCH_SIZE",
    "TRAIN.ACTIVATION_GIB",
    "TRAIN.DETERMINISTIC",  # in which order sums are made, no more
    "TRAIN.CHECKPOINT_FREQ",
    "TRAIN.COMPILE",
    "TRAIN.VAL_FREQ",
    "TEST.SPLIT",
    "TEST.PER_CLASS_RESULT",
    "TEST.COMPUTE_CMAT",
    "TEST.NO_TEST",
)
