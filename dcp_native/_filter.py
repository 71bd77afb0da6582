"""Which leaves of a state dict a load fills: ``load(..., keys=...)``.

The native path asks a hash set in C (csrc/py/key_filter.c) and calls back only for patterns and
callables.  Torch's own path, for custom planners and readers, gets a state dict of nothing but the
selected leaves, in which every container is a dict, so that names are the same.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["KeyFilter", "Keys", "PrunedStateDict", "leaves_of"]

Keys = str | Iterable[str] | Callable[[str], bool]
"""What ``keys`` may be."""

_PATTERN_SIGNS = re.compile(r"[*?[]")
_MOST_SHOWN = 10
_KEYS_TEXT = "keys must be a str, an iterable of str, or a callable of a key"


class KeyFilter:
    """Compiled ``keys``; one load.

    A string selects a flattened key when it is that key or the start of it up to a dot
    (``"model.layers.0"``: ``"model.layers.0.weight"``, not ``"model.layers.01"``).  Strings with
    ``*``, ``?`` or ``[`` also match as shell patterns (fnmatch, case-sensitive, ``*`` crosses dots)
    against the key or such a start.  A callable gets each key and says yes or no.

    Attributes:
        names: all strings, as the C side looks them up.
        predicate: what has to be asked for every key besides, or None.
        touched: after the selection, the top-level keys that hold selected leaves.
    """

    def __init__(self, keys: Keys) -> None:
        self.names: tuple[str, ...] = ()
        self.predicate: Callable[[str], bool] | None = None
        self.touched: set[str] = set()
        self._wanted: frozenset[str] = frozenset()
        self._patterns: dict[str, re.Pattern[str]] = {}
        self._used: set[str] = set()
        if callable(keys):
            self.predicate = keys
            return
        if not isinstance(keys, Iterable):
            raise TypeError(f"{_KEYS_TEXT}, not {keys!r}")
        self.names = (keys,) if isinstance(keys, str) else tuple(keys)
        for name in self.names:
            if not isinstance(name, str):
                raise TypeError(f"{_KEYS_TEXT}; it holds {name!r}")
            if _PATTERN_SIGNS.search(name):
                self._patterns[name] = re.compile(fnmatch.translate(name))
        self._wanted = frozenset(self.names)
        if self._patterns:
            self.predicate = self._matches_patterns

    def settle(self, unmatched: Iterable[str], touched: Iterable[str], tops: Iterable[str]) -> None:
        """Note what was selected.

        Args:
            unmatched: strings that, as names, selected nothing.
            touched: top-level keys that hold selected leaves.
            tops: all top-level keys, for the message.

        Raises:
            ValueError: a string selected nothing.
        """
        self.touched = set(touched)
        idle = [name for name in dict.fromkeys(unmatched) if name not in self._used]
        if idle:
            raise ValueError(
                f"keys: {_shown(idle)} {'selects' if len(idle) == 1 else 'select'} nothing in the "
                f"state dict, whose top-level keys are {_shown(list(tops))}"
            )

    def prune(self, state_dict: dict[str, Any], flatten: bool = True) -> PrunedStateDict:
        """Only the selected leaves of ``state_dict``; not ``flatten``: of its top-level values."""
        pruned = PrunedStateDict()
        used: set[str] = set()
        for path, container, key in leaves_of(state_dict, flatten):
            if self._selects(".".join(path), used):
                pruned.add(path, container, key)
            else:
                pruned.skipped.append(".".join(path))
        unmatched = (name for name in self.names if name not in used)
        self.settle(unmatched, pruned.state_dict, map(str, state_dict))
        return pruned

    def _selects(self, fqn: str, used: set[str]) -> bool:
        names = self._wanted.intersection(_starts(fqn))
        used |= names
        asked = self.predicate is not None and bool(self.predicate(fqn))
        return asked or bool(names)

    def _matches_patterns(self, fqn: str) -> bool:
        starts = list(_starts(fqn))
        found = False
        for text, pattern in self._patterns.items():
            # Each pattern has to learn whether it matches anything; after that the first serves.
            if not (found and text in self._used) and any(map(pattern.match, starts)):
                found = True
                self._used.add(text)
        return found


class PrunedStateDict:
    """A nested dict of some leaves of a state dict, and the way back.

    Attributes:
        state_dict: what to load into.
        skipped: names of the other leaves.
    """

    def __init__(self) -> None:
        self.state_dict: dict[str, Any] = {}
        self.skipped: list[str] = []
        self._links: list[tuple[tuple[str, ...], Any, Any]] = []

    def add(self, path: tuple[str, ...], container: Any, key: Any) -> None:
        """Take over the leaf ``container[key]``."""
        inner = self.state_dict
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        if path[-1] in inner:
            raise ValueError(f"duplicated flatten key {'.'.join(path)}")
        inner[path[-1]] = container[key]
        self._links.append((path, container, key))

    def put_back(self) -> None:
        """Put leaves that a load replaced where they came from."""
        for path, container, key in self._links:
            inner: Any = self.state_dict
            for part in path:
                inner = inner[part]
            if inner is not container[key]:
                container[key] = inner


def leaves_of(
    state_dict: Mapping[Any, Any], flatten: bool = True
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(path, container, key) of every leaf by torch's rules; the leaf is ``container[key]``.

    Mirrors torch/distributed/checkpoint/_traverse.py.  ``flatten`` False: top-level values.
    """

    def walk(container: Any, items: Iterable[tuple[Any, Any]], path: tuple[str, ...]) -> Any:
        for key, value in items:
            inner = (*path, str(key))
            if flatten and isinstance(value, Mapping):
                yield from walk(value, value.items(), inner)
            elif flatten and isinstance(value, list) and _descends(value):
                yield from walk(value, enumerate(value), inner)
            else:
                yield inner, container, key

    yield from walk(state_dict, state_dict.items(), ())


def _descends(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(entry, torch.Tensor) or _descends(entry) for entry in value)
    return isinstance(value, Mapping)


def _starts(fqn: str) -> Iterator[str]:
    """The key, and its parts from the start to each dot."""
    at = -1
    while (at := fqn.find(".", at + 1)) >= 0:
        yield fqn[:at]
    yield fqn


def _shown(names: list[str]) -> str:
    more = len(names) - _MOST_SHOWN
    return ", ".join(map(repr, names[:_MOST_SHOWN])) + (f" and {more} more" if more > 0 else "")
