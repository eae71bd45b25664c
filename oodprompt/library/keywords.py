"""From the keywords of ``oodprompt.train`` to config keys: ``anchor`` -> TRAINER.COOPOOD.ANCHOR, ``epochs`` -> OPTIM.MAX_EPOCH."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oodprompt.config.keys import declared_keys, section_of, sections_of
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.errors import UserError, nearest

# Words that everybody uses, where the key has another name.
SHORT = {
    "epochs": "OPTIM.MAX_EPOCH",
    "seed": "SEED",
    "batch_size": "DATALOADER.TRAIN_X.BATCH_SIZE",
    "shots": "DATASET.NUM_SHOTS",
    "workers": "DATALOADER.NUM_WORKERS",
}
# What the function has a parameter for.
_PARAMETERS = {
    "TRAINER.NAME": "method",
    "TRAINER.BASE": "base",
    "MODEL.BACKBONE.NAME": "backbone",
    "OUTPUT_DIR": "output",
    "DATASET.NAME": "data",
    "DATASET.ROOT": "root",
}


def keys_of(settings: Mapping[str, Any], methods: Sequence[str], data: str) -> dict[str, Any]:
    """The key of each keyword, with its value; ``UserError`` for one that means none or several.

    A keyword is a key in lower case, with "_" for "."; parts at its front may be left out (``anchor`` or
    ``coopood_anchor``). Of TRAINER count the sections of ``methods``, of DATASET that of the data set ``data``.
    """
    known = list(declared_keys())
    own = _in_use(known, methods, data)
    words = {word: _key_of(word, own, known) for word, value in settings.items() if value is not None}
    first = {key: word for word, key in reversed(words.items())}
    for word, key in words.items():
        if first[key] != word:
            raise UserError(f"{first[key]}= and {word}= both give {key}; leave one out")
    return {key: plain(settings[word]) for word, key in words.items()}


def _key_of(word: str, own: Sequence[str], known: Sequence[str]) -> str:
    if word in SHORT:
        return SHORT[word]
    found = _matches(word, own)
    if len(found) == 1:
        if found[0] in _PARAMETERS:
            raise UserError(f"{word}=: {found[0]} is given by {_PARAMETERS[found[0]]}=")
        return found[0]
    if found:
        ways = " or ".join(f"{_shortest(key, own)}= for {key}" for key in found)
        raise UserError(f"{word}= may mean several keys: give {ways}")
    if elsewhere := _matches(word, known):
        raise UserError(f"{word}= is {' or '.join(elsewhere[:3])}, which this run does not use; take it out")
    words = {_shortest(key, own): key for key in own if key not in _PARAMETERS} | SHORT
    hint = nearest(word, words).split("known:")[0].strip()
    raise UserError(f"unknown keyword {word}=: {hint or 'docs/config.md has all keys; a keyword is one in lower case'}")


def _matches(word: str, keys: Iterable[str]) -> list[str]:
    """Keys whose name, or its end after a dot, is ``word`` in lower case with underscores; the whole name wins.

    For keys of sources of groups, the word must hold GROUP_SOURCES: shorter words are those of other keys, too.
    """
    found = []
    for key in keys:
        parts = key.lower().split(".")
        if word == "_".join(parts):
            return [key]
        latest = 2 if parts[1:2] == ["group_sources"] else len(parts)
        if any(word == "_".join(parts[i:]) for i in range(1, latest)):
            found.append(key)
    return found


def _shortest(key: str, keys: Sequence[str]) -> str:
    """The shortest keyword that means this key alone."""
    parts = key.lower().split(".")
    words = ["_".join(parts[i:]) for i in reversed(range(len(parts)))]
    return next((word for word in words if _matches(word, keys) == [key] and word not in SHORT), words[-1])


def refuse_two_values(own: Mapping[str, Any], by_keywords: Mapping[str, Any], by_parameters: Mapping[str, Any]) -> None:
    """``UserError`` if ``own`` (from ``keys=``) gives a key another value than the rest of the call."""
    for given in (by_parameters, by_keywords):
        for key in own.keys() & given.keys():
            if plain(own[key]) != given[key]:
                parameter = _PARAMETERS.get(key, "data") if given is by_parameters else ""
                place = f"{parameter}=" if parameter else "a keyword"
                raise UserError(f"keys=: {key} is {own[key]!r} there and {given[key]!r} by {place}; leave one out")


def _in_use(known: Sequence[str], methods: Sequence[str], data: str) -> list[str]:
    """The keys but those in the sections of other methods and data sets."""
    of_methods = sections_of("TRAINER")
    read = {section for method in methods for section in _sections_read(method, of_methods)}
    others = {f"TRAINER.{section}" for section in of_methods - read}
    of_data = sections_of("DATASET")
    others |= {f"DATASET.{section}" for section in of_data - {section_of(data, of_data)}}
    return [key for key in known if key.count(".") < 2 or ".".join(key.split(".")[:2]) not in others]


def _sections_read(method: str, sections: Collection[str]) -> set[str]:
    """Sections of TRAINER whose keys a method reads: its own, and those that its class names."""
    found = {section_of(method, sections)}
    if method in TRAINER_REGISTRY:
        trainer = TRAINER_REGISTRY.get(method)
        found.update(*(part.sections for part in (trainer.learner_class, trainer.debiaser_class) if part))
    return found


def plain(value: Any) -> Any:
    """A value as a config takes it: no paths, no numbers of NumPy's own."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value)(plain(entry) for entry in value)
    return value
