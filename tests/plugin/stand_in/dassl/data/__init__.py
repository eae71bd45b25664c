from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dassl.data.datasets import DATASET_REGISTRY
from dassl.data.transforms import build_transform


class DatasetWrapper(Dataset):
    def __init__(self, data_source, transform):
        self.data_source, self.transform = data_source, transform

    def __len__(self):
        return len(self.data_source)

    def __getitem__(self, index):
        datum = self.data_source[index]
        image = self.transform(Image.open(datum.impath).convert("RGB"))
        return {
            "img": image,
            "label": datum.label,
            "domain": datum.domain,
            "impath": datum.impath,
            "index": index,
        }


class DataManager:
    def __init__(self, cfg):
        self.dataset = DATASET_REGISTRY.get(cfg.DATASET.NAME)(cfg)
        data, keys = self.dataset, cfg.DATALOADER
        self.num_classes, self.lab2cname, self.num_source_domains = data.num_classes, data.lab2cname, 0
        train, test = DatasetWrapper(data.train_x, build_transform(cfg, True)), build_transform(cfg, False)
        shuffled = keys.TRAIN_X.SAMPLER == "RandomSampler"
        self.train_loader_x = DataLoader(train, keys.TRAIN_X.BATCH_SIZE, shuffle=shuffled, drop_last=True)
        self.train_loader_u = None
        self.val_loader = DataLoader(DatasetWrapper(data.val, test), keys.TEST.BATCH_SIZE) if data.val else None
        self.test_loader = DataLoader(DatasetWrapper(data.test, test), keys.TEST.BATCH_SIZE)
