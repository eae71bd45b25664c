import os

import torch


def save_checkpoint(state, save_dir, is_best=False, remove_module_from_keys=True, model_name=""):
    os.makedirs(save_dir, exist_ok=True)
    file = os.path.join(save_dir, model_name or f"model.pth.tar-{state['epoch']}")
    torch.save(state, file)
    with open(os.path.join(save_dir, "checkpoint"), "w") as pointer:
        pointer.write(os.path.basename(file) + "\n")


def load_checkpoint(fpath):
    return torch.load(fpath, map_location=None if torch.cuda.is_available() else "cpu")


def resume_from_checkpoint(fdir, model, optimizer=None, scheduler=None):
    with open(os.path.join(fdir, "checkpoint")) as pointer:
        state = load_checkpoint(os.path.join(fdir, pointer.readline().strip()))
    model.load_state_dict(state["state_dict"])
    for part, key in ((optimizer, "optimizer"), (scheduler, "scheduler")):
        if part is not None:
            part.load_state_dict(state[key])
    return state["epoch"]
