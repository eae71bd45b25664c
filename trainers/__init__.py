"""One file per method; importing this package registers them all."""

from oodprompt.trainers import coop, coop_ood, zeroshot

__all__ = ["coop", "coop_ood", "zeroshot"]
