"""Methods, one per file; importing this package registers them."""

from oodprompt.trainers import (
    cocoop,
    coop,
    coop_ood,
    debiased_pt,
    ivlp,
    kgcoop,
    linear_probe,
    maple,
    prograd,
    promptsrc,
    vpt,
    zeroshot,
)

__all__ = [
    "cocoop",
    "coop",
    "coop_ood",
    "debiased_pt",
    "ivlp",
    "kgcoop",
    "linear_probe",
    "maple",
    "prograd",
    "promptsrc",
    "vpt",
    "zeroshot",
]
