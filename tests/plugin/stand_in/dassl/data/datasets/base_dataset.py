import os

import gdown


class Datum:
    def __init__(self, impath="", label=0, domain=0, classname=""):
        assert os.path.isfile(impath)
        self.impath, self.label, self.domain, self.classname = impath, label, domain, classname


class DatasetBase:
    def __init__(self, train_x=None, train_u=None, val=None, test=None):
        self.train_x, self.train_u, self.val, self.test = train_x, train_u, val, test
        self.lab2cname = {d.label: d.classname for d in train_x}
        self.num_classes = max(self.lab2cname) + 1
        self.classnames = [self.lab2cname[label] for label in sorted(self.lab2cname)]

    def download_data(self, url, dst):
        gdown.download(url, dst, quiet=False)
