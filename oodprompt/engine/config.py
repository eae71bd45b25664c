"""The import path of ``declare`` for files written before ``oodprompt.config`` existed."""

from oodprompt.config.keys import Key, declare

__all__ = ["Key", "declare"]
