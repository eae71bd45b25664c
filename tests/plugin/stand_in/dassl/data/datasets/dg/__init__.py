from dassl.data.datasets.dg.wilds import *  # noqa: F403
