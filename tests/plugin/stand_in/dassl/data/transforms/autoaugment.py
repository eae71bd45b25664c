import numpy as np


def posterize():
    return np.round(np.linspace(8, 4, 10), 0).astype(np.int)
