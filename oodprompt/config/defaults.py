"""Dassl's keys and those of our engine, with their defaults and values.

Bounds of Dassl's keys refuse only what cannot run, as files of other repositories may hold anything else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from oodprompt.config.keys import Key, declare

_NOT_OFFERED = "DATALOADER.K_TRANSFORMS and RETURN_IMG0 are not offered here; leave them at 1 and False"
_SAMPLERS = ("RandomSampler", "SequentialSampler", "RandomClassSampler", "RandomDomainSampler")
PRECISIONS = ("fp32", "bf16", "amp", "fp16")


def is_range(value: Sequence[Any]) -> bool:
    """Whether ``value`` is empty or two finite numbers, the lower first."""
    numbers = all(type(end) in (int, float) and math.isfinite(end) for end in value)
    return numbers and (len(value) == 0 or (len(value) == 2 and value[0] < value[1]))


declare(
    "",
    {
        "VERSION": (1, "Version of the configuration tree (Dassl's)."),
        "OUTPUT_DIR": ("", "Folder of this run; empty: output/<data set>/<trainer>[-<base>]/<config name>/seed<seed>."),
        "RESUME": ("", "Folder of the run to go on with; empty: OUTPUT_DIR, where it holds a checkpoint."),
        "SEED": (
            -1,
            "Seed of everything (0 counts); negative: drawn at random and written to config.yaml. Where nothing is given "
            "train.py takes 1.",
        ),
        "USE_CUDA": (True, "Use a GPU when there is one."),
        "VERBOSE": (True, "Print the config and a summary of the data set."),
    },
)
declare(
    "INPUT",
    {
        "SIZE": Key(
            (224, 224),
            "Height and width that the backbone takes, in pixels; tiny: (48, 48), tiny-photo: (64, 64).",
            at_least=1,
        ),
        "INTERPOLATION": Key(
            "bilinear",
            "How images are resized; bicubic is CLIP's own.",
            choices=("bilinear", "bicubic", "nearest"),
            error="{key}: unknown mode: {known}",
        ),
        "RESIZE": Key(
            "shortest",
            "How test images get SIZE. shortest: the short edge is resized, then the centre is cut; squash: stretched; "
            "longest: the long edge is resized, then the rest is black.",
            choices=("shortest", "squash", "longest"),
            error="{key}: unknown mode: {known}",
        ),
        "MAX_PIXELS": Key(
            250_000_000,
            "Largest width times height of an image that is decoded, which takes 4 bytes a pixel; 0: no limit.",
            at_least=0,
        ),
        "IMAGE_RANGE": Key(
            (),
            "Values of grey images with more than 8 bits that become black and white, as (0, 4095); empty: by the file.",
            test=is_range,
            error='{key}: {value} is no range; give two numbers, the lower first, as "(0, 4095)", or "()"',
        ),
        "TRANSFORMS": Key(
            (),
            "Names of transforms in training; 'normalize' and 'instance_norm' among them count for testing too.",
            choices=(
                *("random_crop", "random_resized_crop", "center_crop", "random_flip", "imagenet_policy"),
                *("cifar10_policy", "svhn_policy", "randaugment", "colorjitter", "randomgrayscale", "gaussian_blur"),
                *("cutout", "normalize", "gaussian_noise", "instance_norm"),
            ),
            error="{key}: unknown transform {value!r}: {known}",
        ),
        "NO_TRANSFORM": (False, "Apply none of the transforms but resizing and conversion to a tensor."),
        "PIXEL_MEAN": (
            [0.485, 0.456, 0.406],
            "Mean of 'normalize' (Dassl's default is ImageNet's; configs set CLIP's).",
        ),
        "PIXEL_STD": Key([0.229, 0.224, 0.225], "Standard deviation of 'normalize'.", above=0),
        "CROP_PADDING": Key(4, "random_crop: padding in pixels.", at_least=0),
        "RRCROP_SCALE": Key((0.08, 1.0), "random_resized_crop: range of the area kept.", at_least=0),
        "COLORJITTER_B": Key(0.4, "colorjitter: brightness.", at_least=0),
        "COLORJITTER_C": Key(0.4, "colorjitter: contrast.", at_least=0),
        "COLORJITTER_S": Key(0.4, "colorjitter: saturation.", at_least=0),
        "COLORJITTER_H": Key(0.1, "colorjitter: hue.", at_least=0, at_most=0.5),
        "RGS_P": Key(0.2, "randomgrayscale: probability.", at_least=0, at_most=1),
        "GB_P": Key(0.5, "gaussian_blur: probability.", at_least=0, at_most=1),
        "GB_K": Key(
            21,
            "gaussian_blur: kernel size, an odd number.",
            test=lambda size: size > 0 and size % 2 == 1,
            error="{key}: {value} is not possible; give an odd number above 0",
        ),
        "GN_MEAN": (0.0, "gaussian_noise: mean, on normalised pixels."),
        "GN_STD": Key(0.15, "gaussian_noise: standard deviation.", at_least=0),
        "CUTOUT_N": Key(1, "cutout: number of holes.", at_least=0),
        "CUTOUT_LEN": Key(16, "cutout: side of a hole in pixels.", at_least=0),
        "RANDAUGMENT_N": Key(2, "randaugment: operations per image.", at_least=0),
        "RANDAUGMENT_M": Key(10, "randaugment: magnitude.", at_least=0, at_most=30),
        "VIEWS": Key(
            0,
            "Views of each training image that the feature cache keeps: 1 = the test transform (the training transform if nothing in it is random), K > 1 = K draws of the "
            "training transform, 0 = one if the training transform has nothing random, else no cache.",
            at_least=0,
        ),
    },
)
declare(
    "DATASET",
    {
        "ROOT": ("", "Folder that holds the data sets; empty: ./data for data sets that make themselves."),
        "NAME": ("", "Registered name of the data set."),
        "SOURCE_DOMAINS": (
            (),
            "Domains to train on, for data sets that have domains; empty: all but TARGET_DOMAINS.",
        ),
        "TARGET_DOMAINS": (
            (),
            "Domains to test on; empty: all but SOURCE_DOMAINS, or the last one where both are empty.",
        ),
        "NUM_LABELED": (-1, "Labelled instances in total, for semi-supervised data sets."),
        "NUM_SHOTS": (-1, "Training images per class, drawn with SEED; -1: all. Validation and test stay whole."),
        "VAL_PERCENT": Key(
            0.1,
            "Share of validation data, for data sets that split themselves.",
            at_least=0,
            below=1,
            error="{key} is a share from 0 to below 1, not {value}",
        ),
        "SUBSAMPLE_CLASSES": Key(
            "all",
            "Which classes: all, base (the first half) or new (the rest).",
            choices=("all", "base", "new"),
            error="{key}: {value!r} is none of all, base, new",
        ),
        "TEMPLATE": ("", "Prompt of zero-shot classification, with {} for the class name; empty: the data set's."),
        "ATTRIBUTE_NAMES": (
            (),
            "Names of the spurious attribute's values; empty: the data set's; auto: those that an audit of the training images proposes first.",
        ),
        "ATTRIBUTE_PROMPTS": (
            (),
            "One entry per attribute value, prompts separated by '|', whose text features are averaged; "
            "empty: the data set's.",
        ),
    },
)
declare(
    "DATALOADER",
    {
        "NUM_WORKERS": (4, "Processes that read images; 0: the main process."),
        "FEATURE_CACHE": Key(
            "auto",
            "Keep image features instead of encoding images at every step, where the image tower is not trained: "
            "memory or disk (insist), off, or auto (where it changes nothing, see INPUT.VIEWS; on disk what took longer than "
            "CACHE_SECONDS or is larger than CACHE_MEMORY_MIB). Evaluation uses it too.",
            choices=("auto", "memory", "disk", "off"),
        ),
        "CACHE_DIR": (
            "",
            "Folder of the features on disk, which runs share; empty: ~/.cache/oodprompt/features (with XDG_CACHE_HOME: below that). What is deleted there "
            "is computed anew. `python -m oodprompt.cache` lists and prunes it.",
        ),
        "CACHE_SECONDS": Key(
            3.0,
            "FEATURE_CACHE auto: features of a split that take more seconds than this to compute go to disk, so that they "
            "outlive the run.",
            at_least=0,
        ),
        "CACHE_MEMORY_MIB": Key(
            64.0,
            "FEATURE_CACHE auto: features of a split that take more MiB than this go to disk, from where batches are read.",
            at_least=0,
        ),
        "CACHE_LIMIT_GIB": Key(
            0.0,
            "Most GiB that CACHE_DIR may hold; before more is written, the features that were used longest ago are "
            "removed. 0: no limit.",
            at_least=0,
        ),
        "IMAGE_CACHE_MIB": Key(
            1024.0,
            "Where images themselves are read at every step (the image tower is trained) and without random transforms: how "
            "many MiB of transformed images of a split are kept in memory, which all its workers share. An image of 224 x 224 "
            "takes 0.14 MiB, and 0.57 with instance_norm.",
            at_least=0,
        ),
        "K_TRANSFORMS": Key(
            1,
            "Kept for Dassl's files: transformed copies of each training image.",
            choices=(1,),
            error=_NOT_OFFERED,
        ),
        "RETURN_IMG0": Key(
            False, "Kept for Dassl's files: the untransformed image beside.", choices=(False,), error=_NOT_OFFERED
        ),
        "TRAIN_X.SAMPLER": Key(
            "RandomSampler",
            "Order of training images.",
            choices=_SAMPLERS,
            error="{key}: unknown sampler {value!r}: {known}",
        ),
        "TRAIN_X.BATCH_SIZE": Key(32, "Images per step and process.", at_least=1),
        "TRAIN_X.N_DOMAIN": (0, "RandomDomainSampler: domains per batch; 0: all."),
        "TRAIN_X.N_INS": Key(16, "RandomClassSampler: images per class in a batch.", at_least=1),
        "TRAIN_U.SAME_AS_X": (True, "Kept for Dassl's files: no method here takes unlabelled images."),
        "TRAIN_U.SAMPLER": ("RandomSampler", "Kept for Dassl's files."),
        "TRAIN_U.BATCH_SIZE": (32, "Kept for Dassl's files."),
        "TRAIN_U.N_DOMAIN": (0, "Kept for Dassl's files."),
        "TRAIN_U.N_INS": (16, "Kept for Dassl's files."),
        "TEST.SAMPLER": Key(
            "SequentialSampler",
            "Order of test images, of which evaluation must meet every one once.",
            choices=("SequentialSampler", "RandomSampler"),
            error="{key}: unknown sampler {value!r}: {known}",
        ),
        "TEST.BATCH_SIZE": Key(32, "Images per batch in evaluation and feature extraction.", at_least=1),
    },
)
declare(
    "MODEL",
    {
        "INIT_WEIGHTS": ("", "Checkpoint of the prompt learner to start from."),
        "BACKBONE.NAME": (
            "",
            "tiny, tiny-photo, one of OpenAI's (RN50, RN101, RN50x4, RN50x16, RN50x64, ViT-B/32, ViT-B/16, ViT-L/14, "
            "ViT-L/14@336px), open_clip:ARCH/TAG, open_clip:FOLDER, hf:REPOSITORY or hf:FOLDER (docs/backbones.md).",
        ),
        "BACKBONE.PATH": (
            "",
            "A file of weights in OpenAI's layout (OpenAI's archive, a state dict, .safetensors); wins over NAME. With "
            "open_clip:ARCH a file of weights of that architecture.",
        ),
        "BACKBONE.ACTIVATION": Key(
            "auto",
            "Activation that the weights of PATH were trained with: quick_gelu (OpenAI's), gelu (most of OpenCLIP's), or "
            "auto (quick_gelu).",
            choices=("auto", "quick_gelu", "gelu"),
        ),
        "BACKBONE.PRETRAINED": (True, "Kept for Dassl's files; CLIP is always pretrained."),
        "HEAD.NAME": ("", "Kept for Dassl's command line; CLIP has no head."),
    },
)
declare(
    "OPTIM",
    {
        "NAME": Key(
            "adam",
            "Optimiser.",
            choices=("sgd", "adam", "adamw", "amsgrad", "rmsprop", "radam"),
            error="{key}: unknown optimiser {value!r}: {known}",
        ),
        "LR": Key(0.0003, "Learning rate of the prompt learner.", at_least=0),
        "WEIGHT_DECAY": Key(5e-4, "Weight decay.", at_least=0),
        "MOMENTUM": Key(0.9, "sgd, rmsprop: momentum.", at_least=0),
        "SGD_DAMPNING": (0.0, "sgd: dampening (Dassl's spelling)."),
        "SGD_NESTEROV": (False, "sgd: Nesterov momentum."),
        "RMSPROP_ALPHA": Key(0.99, "rmsprop: smoothing.", at_least=0),
        "ADAM_BETA1": Key(0.9, "adam and its kin: beta 1.", at_least=0, below=1),
        "ADAM_BETA2": Key(0.999, "adam and its kin: beta 2.", at_least=0, below=1),
        "STAGED_LR": (False, "Give parameters outside NEW_LAYERS the rate LR * BASE_LR_MULT."),
        "NEW_LAYERS": ((), "STAGED_LR: names of a model's parts that take the full LR."),
        "BASE_LR_MULT": Key(0.1, "STAGED_LR: factor of all other parts.", at_least=0),
        "LR_SCHEDULER": Key(
            "single_step",
            "Schedule of the learning rate, stepped once per epoch.",
            choices=("single_step", "multi_step", "cosine"),
            error="{key}: unknown schedule {value!r}: {known}",
        ),
        "STEPSIZE": ((-1,), "Epochs of the steps; -1: no step before MAX_EPOCH."),
        "GAMMA": Key(0.1, "Factor of each step.", at_least=0),
        "MAX_EPOCH": Key(10, "Epochs of training.", at_least=0),
        "WARMUP_EPOCH": (-1, "Epochs of warm-up; -1: none."),
        "WARMUP_TYPE": Key(
            "linear",
            "Learning rate during the warm-up.",
            choices=("constant", "linear"),
            error="{key}: {value!r} is neither constant nor linear",
        ),
        "WARMUP_CONS_LR": Key(1e-5, "Learning rate of constant warm-up.", at_least=0),
        "WARMUP_MIN_LR": Key(1e-5, "Learning rate of the first epoch of linear warm-up.", at_least=0),
        "WARMUP_RECOUNT": (True, "After the warm-up the schedule starts at its own epoch 0 (else at WARMUP_EPOCH)."),
    },
)
declare(
    "TRAIN",
    {
        "CHECKPOINT_FREQ": (
            0,
            "Epochs between checkpoints that are kept; 0: the last one. The newest is always there to resume from.",
        ),
        "ACTIVATION_GIB": Key(
            4.0,
            "Activations of the text tower, in GiB, that are kept for the backward pass; what would take more is "
            "computed a second time.",
            at_least=0,
            below=math.inf,
        ),
        "COMPILE": Key(
            "auto",
            "On a GPU, whether a tower's forward and backward pass is launched as one CUDA graph where only prompts learn: "
            "graphs (from the second step on), auto (from step 21 on, so that short runs do not pay for the recording) or off.",
            choices=("off", "auto", "graphs"),
        ),
        "DETERMINISTIC": (
            False,
            "On a GPU: take kernels that give the same bits every time, which are slower; an operation that has none is an "
            "error. The CPU does so anyway.",
        ),
        "TF32": Key(
            "convolutions",
            "On a GPU: what is computed in TF32 (fp32 rounded to 10 bits of the mantissa) where it would be in fp32: "
            "convolutions (torch's default), all (matrix products too, faster), or none.",
            choices=("convolutions", "all", "none"),
        ),
        "PRINT_FREQ": (10, "Steps between printed lines; 0: one line per epoch."),
        "TRACKERS": Key(
            ("tensorboard",),
            "Where curves of the training also go: tensorboard, wandb (pip install 'oodprompt[wandb]'), mlflow ('[mlflow]'); empty: "
            "nowhere. A run goes on when one of them fails.",
            choices=("tensorboard", "wandb", "mlflow"),
        ),
        "COUNT_ITER": ("train_x", "Kept for Dassl's files."),
        "VAL_FREQ": Key(
            0,
            "Epochs between passes over validation data for training.png; 0: only where best_val needs them.",
            at_least=0,
        ),
    },
)
declare(
    "TEST",
    {
        "EVALUATOR": ("Classification", "Registered name of the evaluator."),
        "PER_CLASS_RESULT": (False, "Print accuracy per class."),
        "COMPUTE_CMAT": (False, "Write the row-normalised confusion matrix to cmat.pt."),
        "NO_TEST": (False, "Do not test after training."),
        "SPLIT": Key("test", "Split of the final evaluation.", choices=("test", "val")),
        "FINAL_MODEL": Key("last_step", "Which model is tested after training.", choices=("last_step", "best_val")),
        "SELECTION": Key(
            "auto",
            "What best_val maximises: accuracy, worst_group_accuracy (needs attributes in validation data), "
            "worst_pseudo_group_accuracy (needs names of the attribute only), or auto: worst_group_accuracy where "
            "validation data have attributes, else accuracy. What the others would have chosen is reported beside.",
            choices=("auto", "accuracy", "worst_group_accuracy", "worst_pseudo_group_accuracy"),
        ),
    },
)
declare(
    "TRAINER",
    {
        "NAME": ("", "Registered name of the trainer: a prompt learner, or a debiaser over BASE."),
        "BASE": (
            "",
            "Prompt learner that a debiaser wraps; empty: the debiaser's own choice, CoOp, or ZeroshotCLIP for those that "
            "train nothing.",
        ),
        "STACK": ((), "Debiasers to add to the trainer's own."),
        "GROUPS": Key(
            "pseudo",
            "Registered source of the groups (class, attribute) of methods that take groups: true (attribute labels of "
            "the data set), pseudo (what zero-shot CLIP sees of the named attribute; no labels), denoised (the same, corrected "
            "by a predictor), audit (what it sees of names that an audit proposes), regions (whether an image has a region "
            "that discovery found in the base trained alone; neither labels nor names), csv (a column of a file), ssa (from a few labels), errors, eiil, spare (from a "
            "first model), clusters (of image features), or one of your own. docs/groups.md compares them.",
            parse=lambda value: str(value).lower() if isinstance(value, bool) else value,
        ),
        "PSEUDO_NAMES": Key(
            (),
            "Names of the values that pseudo-attributes have, where they are not those of the attribute labels, as an audit "
            "proposes them; empty: DATASET.ATTRIBUTE_NAMES.",
            test=lambda names: len(names) != 1 and all(isinstance(name, str) and name for name in names),
            error="{key} are two names or more, not {value}",
        ),
        "PSEUDO_NOISE": Key(
            0.0,
            "Share of images whose pseudo-attribute is moved to another value at random, to study wrong ones.",
            at_least=0,
            at_most=1,
            error="{key} is a share between 0 and 1, not {value}",
        ),
        "PREC": Key(
            "",
            "fp32, bf16, amp or fp16 (both: fp16 autocast with loss scaling); empty: the base's own PREC key.",
            choices=("", *PRECISIONS),
            error="{key}: unknown precision {value!r}: {known}",
        ),
    },
)


def precision_key(default: str = "fp16") -> Key:
    """The key PREC of a prompt learner."""
    return Key(
        default,
        "Precision of the towers; fp16 and amp are fp16 autocast with loss scaling, and fp32 on a CPU.",
        choices=PRECISIONS,
        error="{key}: unknown precision {value!r}: {known}",
    )
