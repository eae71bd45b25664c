"""Dassl's keys and those of our engine, with their defaults."""

from __future__ import annotations

from oodprompt.config.keys import declare

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
        "SIZE": ((224, 224), "Height and width that the backbone takes, in pixels; tiny: (48, 48)."),
        "INTERPOLATION": ("bilinear", "bilinear, bicubic (CLIP's own) or nearest."),
        "TRANSFORMS": ((), "Names of transforms in training; 'normalize' among them counts for testing too."),
        "NO_TRANSFORM": (False, "Apply none of the transforms but resizing and conversion to a tensor."),
        "PIXEL_MEAN": (
            [0.485, 0.456, 0.406],
            "Mean of 'normalize' (Dassl's default is ImageNet's; configs set CLIP's).",
        ),
        "PIXEL_STD": ([0.229, 0.224, 0.225], "Standard deviation of 'normalize'."),
        "CROP_PADDING": (4, "random_crop: padding in pixels."),
        "RRCROP_SCALE": ((0.08, 1.0), "random_resized_crop: range of the area kept."),
        "COLORJITTER_B": (0.4, "colorjitter: brightness."),
        "COLORJITTER_C": (0.4, "colorjitter: contrast."),
        "COLORJITTER_S": (0.4, "colorjitter: saturation."),
        "COLORJITTER_H": (0.1, "colorjitter: hue."),
        "RGS_P": (0.2, "randomgrayscale: probability."),
        "GB_P": (0.5, "gaussian_blur: probability."),
        "GB_K": (21, "gaussian_blur: kernel size, odd."),
        "GN_MEAN": (0.0, "gaussian_noise: mean, on normalised pixels."),
        "GN_STD": (0.15, "gaussian_noise: standard deviation."),
        "CUTOUT_N": (1, "cutout: number of holes."),
        "CUTOUT_LEN": (16, "cutout: side of a hole in pixels."),
        "RANDAUGMENT_N": (2, "randaugment: operations per image."),
        "RANDAUGMENT_M": (10, "randaugment: magnitude."),
        "VIEWS": (
            0,
            "Views of each training image that the feature cache keeps: 1 = the test transform (the training transform if nothing in it is random), K > 1 = K draws of the "
            "training transform, 0 = one if the training transform has nothing random, else no cache.",
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
        "VAL_PERCENT": (0.1, "Share of validation data, for data sets that split themselves."),
        "SUBSAMPLE_CLASSES": ("all", "all, base (the first half of the classes) or new (the rest)."),
        "TEMPLATE": ("", "Prompt of zero-shot classification, with {} for the class name; empty: the data set's."),
        "ATTRIBUTE_NAMES": ((), "Names of the spurious attribute's values; empty: the data set's."),
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
        "FEATURE_CACHE": (
            "auto",
            "Keep image features instead of encoding images at every step, where the image tower is not trained: "
            "memory or disk (insist), off, or auto (where it changes nothing, see INPUT.VIEWS; on disk what is larger than "
            "CACHE_MEMORY_MIB). Evaluation uses it too.",
        ),
        "CACHE_DIR": (
            "",
            "Folder of the features on disk, which runs share; empty: ~/.cache/oodprompt/features. What is deleted there "
            "is computed anew; nothing is deleted by itself.",
        ),
        "CACHE_MEMORY_MIB": (
            64.0,
            "FEATURE_CACHE auto: features of a split that take more MiB than this go to disk; so many images take long "
            "to encode that their features should outlive the run.",
        ),
        "IMAGE_CACHE_MIB": (
            1024.0,
            "Where images themselves are read at every step (the image tower is trained), by the main process (NUM_WORKERS "
            "0) and without random transforms: how many MiB of transformed images of a split are kept in memory.",
        ),
        "K_TRANSFORMS": (1, "Kept for Dassl's files: transformed copies of each training image; only 1 is possible."),
        "RETURN_IMG0": (False, "Kept for Dassl's files: the untransformed image beside; only False is possible."),
        "TRAIN_X.SAMPLER": (
            "RandomSampler",
            "RandomSampler, SequentialSampler, RandomClassSampler or RandomDomainSampler.",
        ),
        "TRAIN_X.BATCH_SIZE": (32, "Images per step and process."),
        "TRAIN_X.N_DOMAIN": (0, "RandomDomainSampler: domains per batch; 0: all."),
        "TRAIN_X.N_INS": (16, "RandomClassSampler: images per class in a batch."),
        "TRAIN_U.SAME_AS_X": (True, "Kept for Dassl's files: no method here takes unlabelled images."),
        "TRAIN_U.SAMPLER": ("RandomSampler", "Kept for Dassl's files."),
        "TRAIN_U.BATCH_SIZE": (32, "Kept for Dassl's files."),
        "TRAIN_U.N_DOMAIN": (0, "Kept for Dassl's files."),
        "TRAIN_U.N_INS": (16, "Kept for Dassl's files."),
        "TEST.SAMPLER": ("SequentialSampler", "Order of test images: SequentialSampler or RandomSampler."),
        "TEST.BATCH_SIZE": (32, "Images per batch in evaluation and feature extraction."),
    },
)
declare(
    "MODEL",
    {
        "INIT_WEIGHTS": ("", "Checkpoint of the prompt learner to start from."),
        "BACKBONE.NAME": (
            "",
            "tiny, or one of OpenAI's: RN50, RN101, RN50x4, RN50x16, RN50x64, ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px.",
        ),
        "BACKBONE.PATH": ("", "A checkpoint file (OpenAI's archive or a plain state dict); wins over NAME."),
        "BACKBONE.PRETRAINED": (True, "Kept for Dassl's files; CLIP is always pretrained."),
        "HEAD.NAME": ("", "Kept for Dassl's command line; CLIP has no head."),
    },
)
declare(
    "OPTIM",
    {
        "NAME": ("adam", "sgd, adam, adamw, amsgrad, rmsprop or radam."),
        "LR": (0.0003, "Learning rate of the prompt learner."),
        "WEIGHT_DECAY": (5e-4, "Weight decay."),
        "MOMENTUM": (0.9, "sgd, rmsprop: momentum."),
        "SGD_DAMPNING": (0.0, "sgd: dampening (Dassl's spelling)."),
        "SGD_NESTEROV": (False, "sgd: Nesterov momentum."),
        "RMSPROP_ALPHA": (0.99, "rmsprop: smoothing."),
        "ADAM_BETA1": (0.9, "adam and its kin: beta 1."),
        "ADAM_BETA2": (0.999, "adam and its kin: beta 2."),
        "STAGED_LR": (False, "Give parameters outside NEW_LAYERS the rate LR * BASE_LR_MULT."),
        "NEW_LAYERS": ((), "STAGED_LR: names of a model's parts that take the full LR."),
        "BASE_LR_MULT": (0.1, "STAGED_LR: factor of all other parts."),
        "LR_SCHEDULER": ("single_step", "single_step, multi_step or cosine, stepped once per epoch."),
        "STEPSIZE": ((-1,), "Epochs of the steps; -1: no step before MAX_EPOCH."),
        "GAMMA": (0.1, "Factor of each step."),
        "MAX_EPOCH": (10, "Epochs of training."),
        "WARMUP_EPOCH": (-1, "Epochs of warm-up; -1: none."),
        "WARMUP_TYPE": ("linear", "constant or linear."),
        "WARMUP_CONS_LR": (1e-5, "Learning rate of constant warm-up."),
        "WARMUP_MIN_LR": (1e-5, "Learning rate of the first epoch of linear warm-up."),
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
        "ACTIVATION_GIB": (
            4.0,
            "Activations of the text tower, in GiB, that are kept for the backward pass; what would take more is "
            "computed a second time.",
        ),
        "PRINT_FREQ": (10, "Steps between printed lines; 0: one line per epoch."),
        "COUNT_ITER": ("train_x", "Kept for Dassl's files."),
        "VAL_FREQ": (
            0,
            "Epochs between passes over validation data for training.png; 0: only where best_val needs them.",
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
        "SPLIT": ("test", "Split of the final evaluation: test or val."),
        "FINAL_MODEL": ("last_step", "Which model is tested after training: last_step or best_val."),
        "SELECTION": (
            "auto",
            "What best_val maximises: accuracy, worst_group_accuracy (needs attributes in validation data), "
            "worst_pseudo_group_accuracy (needs names of the attribute only), or auto: worst_group_accuracy where "
            "validation data have attributes, else accuracy. What the others would have chosen is reported beside.",
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
        "GROUPS": (
            "pseudo",
            "Groups (class, attribute) of methods that take groups: true (attribute labels of the data set), pseudo "
            "(what zero-shot CLIP sees of the named attribute; no labels) or regions (whether an image has a region that "
            "discovery found in the base trained alone; neither labels nor names).",
        ),
        "PSEUDO_NOISE": (
            0.0,
            "Share of images whose pseudo-attribute is moved to another value at random, to study wrong ones.",
        ),
        "PREC": (
            "",
            "fp32, bf16, amp or fp16 (both: fp16 autocast with loss scaling); empty: the base's own PREC key.",
        ),
    },
)
