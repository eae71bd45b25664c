import numpy as np


def levels(image):
    return np.array(image).astype(np.int)
