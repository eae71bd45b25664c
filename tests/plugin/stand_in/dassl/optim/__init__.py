import torch

from dassl.optim.lr_scheduler import build_lr_scheduler  # noqa: F401


def build_optimizer(model, optim_cfg):
    parameters = model.parameters()
    return torch.optim.SGD(
        parameters, lr=optim_cfg.LR, momentum=optim_cfg.MOMENTUM, weight_decay=optim_cfg.WEIGHT_DECAY
    )
