"""The import path of ``declare`` for files written before ``oodprompt.config`` existed."""

from oodprompt.config.keys import declare

__all__ = ["declare"]
