import os
from collections import OrderedDict

import torch

from dassl.data import DataManager
from dassl.evaluation import Classification
from dassl.utils import Registry, load_checkpoint, resume_from_checkpoint, save_checkpoint

TRAINER_REGISTRY = Registry("TRAINER")


def build_trainer(cfg):
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME)(cfg)


class TrainerX:
    def __init__(self, cfg):
        self._models, self._optims, self._scheds = OrderedDict(), OrderedDict(), OrderedDict()
        self.cfg, self.device, self.output_dir = cfg, torch.device("cpu"), cfg.OUTPUT_DIR
        self.start_epoch, self.epoch, self.max_epoch = 0, 0, cfg.OPTIM.MAX_EPOCH
        self.history, self.scalars = [], {}
        self.dm = DataManager(cfg)
        self.train_loader_x, self.val_loader = self.dm.train_loader_x, self.dm.val_loader
        self.test_loader, self.lab2cname = self.dm.test_loader, self.dm.lab2cname
        self.build_model()
        self.evaluator = Classification(cfg, lab2cname=self.lab2cname)

    def register_model(self, name="model", model=None, optim=None, sched=None):
        assert name not in self._models
        self._models[name], self._optims[name], self._scheds[name] = model, optim, sched

    def set_model_mode(self, mode="train"):
        for model in self._models.values():
            model.train(mode == "train")

    def train(self):
        self.before_train()
        for self.epoch in range(self.start_epoch, self.max_epoch):  # noqa: B020
            self.before_epoch()
            self.run_epoch()
            self.after_epoch()
        self.test()

    def before_train(self):
        self.start_epoch = self.resume_model_if_exist(self.output_dir)

    def resume_model_if_exist(self, directory):
        places = {name: os.path.join(directory, name) for name in self._models}
        epoch = 0
        if all(os.path.exists(place) for place in places.values()):
            for name, place in places.items():
                parts = (self._models[name], self._optims[name], self._scheds[name])
                epoch = resume_from_checkpoint(place, *parts)
        return epoch

    def before_epoch(self):
        pass

    def run_epoch(self):
        self.set_model_mode("train")
        self.num_batches = len(self.train_loader_x)
        for self.batch_idx, batch in enumerate(self.train_loader_x):  # noqa: B020
            self.history.append(self.forward_backward(batch))

    def after_epoch(self):
        if self.epoch + 1 == self.max_epoch:
            self.save_model(self.epoch, self.output_dir)

    def save_model(self, epoch, directory, is_best=False, val_result=None, model_name=""):
        for name, model in self._models.items():
            optim, sched = self._optims[name], self._scheds[name]
            state = {
                "state_dict": model.state_dict(),
                "epoch": epoch + 1,
                "optimizer": optim.state_dict() if optim else None,
                "scheduler": sched.state_dict() if sched else None,
                "val_result": val_result,
            }
            save_checkpoint(state, os.path.join(directory, name), is_best, model_name=model_name)

    def load_model(self, directory, epoch=None):
        for name, model in self._models.items():
            state = load_checkpoint(os.path.join(directory, name, f"model.pth.tar-{epoch}"))
            print(f"Load {name} (epoch={state['epoch']}, val_result={state['val_result']:.1f})")
            model.load_state_dict(state["state_dict"], strict=False)

    def update_lr(self):
        for sched in self._scheds.values():
            if sched is not None:
                sched.step()

    def model_backward_and_update(self, loss, names=None):
        optims = [optim for optim in self._optims.values() if optim is not None]
        for optim in optims:
            optim.zero_grad()
        loss.backward()
        for optim in optims:
            optim.step()

    def write_scalar(self, tag, scalar_value, global_step=None):
        self.scalars[tag] = scalar_value

    @torch.no_grad()
    def test(self, split=None):
        self.set_model_mode("eval")
        self.evaluator.reset()
        split = split or self.cfg.TEST.SPLIT
        loader = self.val_loader if split == "val" and self.val_loader is not None else self.test_loader
        for batch in loader:
            image, label = self.parse_batch_test(batch)
            self.evaluator.process(self.model_inference(image), label)
        return next(iter(self.evaluator.evaluate().values()))

    def parse_batch_test(self, batch):
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def model_inference(self, input):
        return self.model(input)
