"""Calls from Python: ``oodprompt.train``, ``oodprompt.load``, ``Run`` and ``Results`` (docs/library.md)."""

import warnings

with warnings.catch_warnings():
    # Accelerate imports tqdm.auto, which complains in a notebook without ipywidgets; our bars are plain text.
    warnings.filterwarnings("ignore", message="IProgress not found")
    import tqdm.auto  # noqa: F401
