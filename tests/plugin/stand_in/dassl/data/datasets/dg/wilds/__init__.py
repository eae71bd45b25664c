from wilds import get_dataset  # noqa: F401
