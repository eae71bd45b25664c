"""Calls from Python: ``oodprompt.train``, ``oodprompt.load``, ``Run`` and ``Results`` (docs/library.md)."""
