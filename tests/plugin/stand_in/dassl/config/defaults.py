from yacs.config import CfgNode as CN

_C = CN()
_C.OUTPUT_DIR, _C.RESUME, _C.SEED, _C.USE_CUDA, _C.VERBOSE = "./output", "", -1, True, True
_C.INPUT = CN(
    {
        "SIZE": (224, 224),
        "INTERPOLATION": "bilinear",
        "TRANSFORMS": (),
        "NO_TRANSFORM": False,
        "PIXEL_MEAN": [0.485, 0.456, 0.406],
        "PIXEL_STD": [0.229, 0.224, 0.225],
        "RRCROP_SCALE": (0.08, 1.0),
    }
)
_C.DATASET = CN({"ROOT": "", "NAME": "", "SOURCE_DOMAINS": (), "TARGET_DOMAINS": (), "NUM_SHOTS": -1})
_C.DATALOADER = CN(
    {
        "NUM_WORKERS": 0,
        "TRAIN_X": {"SAMPLER": "RandomSampler", "BATCH_SIZE": 32},
        "TEST": {"SAMPLER": "SequentialSampler", "BATCH_SIZE": 32},
    }
)
_C.MODEL = CN({"INIT_WEIGHTS": "", "BACKBONE": {"NAME": ""}})
_C.OPTIM = CN(
    {
        "LR": 0.0003,
        "MAX_EPOCH": 10,
        "MOMENTUM": 0.9,
        "WEIGHT_DECAY": 5e-4,
        "WARMUP_EPOCH": -1,
        "WARMUP_CONS_LR": 1e-5,
    }
)
_C.TEST = CN({"SPLIT": "test", "FINAL_MODEL": "last_step", "NO_TEST": False})
_C.TRAINER = CN({"NAME": ""})
