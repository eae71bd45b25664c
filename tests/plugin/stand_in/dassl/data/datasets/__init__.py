from dassl.utils import Registry

DATASET_REGISTRY = Registry("DATASET")

from dassl.data.datasets.base_dataset import DatasetBase, Datum  # noqa: E402, F401
from dassl.data.datasets.dg import *  # noqa: E402, F403
