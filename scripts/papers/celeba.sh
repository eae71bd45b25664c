#!/usr/bin/env bash
# CelebA, hair colour and gender, with CLIP: every learner and debiaser, in a table beside published numbers.
#   bash scripts/papers/celeba.sh DATA [--backbones RN50 ViT-L/14] [--seeds 1 2 3] [--learners CoOp] [--debiasers GroupDRO] [--gpus 0 1] [--dry-run]
# DATA: the folder that holds CelebA as its authors, Kaggle or WILDS unpack it. All flags: --help. What is published and what is ours: docs/papers.md.
. "$(dirname "$0")/common.sh"
reproduce celeba "$@"
