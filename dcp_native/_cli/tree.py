"""Keys as a tree: what is alike is shown once, so that a model of a hundred layers fits a screen.

``layers.0`` to ``layers.31`` become one branch where the keys below them agree in names, types and
shapes; chains of single children become one name.  The tree is grown in C (dcp_key_tree.h): there
may be a quarter of a million keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .. import _native
from .checkpoint import Checkpoint, Entry
from .output import Column, CommandError
from .units import bytes_text, shape_text

COLUMNS = (
    Column("key"),
    Column("dtype"),
    Column("shape"),
    Column("size", right=True),
    Column("chunks", right=True),
    Column("files", right=True),
)


class Row(NamedTuple):
    """A line of the tree."""

    parts: list[str | tuple[str, ...]]
    """Of the key, between dots; several names in place of one: it stands for all of them."""
    entry: Entry | None
    bytes_count: int
    """Of it and all below it."""
    below_count: int
    """Lines below it."""
    children: tuple[tuple, ...]
    """Those right below it, as plain tuples."""


def build(entries: Sequence[Entry], *, every: bool = False) -> Row:
    """The tree of some keys, below a row without parts; with each key, or with alike ones once."""
    try:
        children = _native.key_tree(entries, not every)
    except RecursionError:
        raise CommandError("the keys branch too often for a tree; --json lists them") from None
    below = sum(1 + Row._make(child).below_count for child in children)
    return Row([], None, 0, below, children)


def rows(checkpoint: Checkpoint, root: Row) -> Iterator[tuple[str, ...]]:
    """One for each line below a row, as COLUMNS has them."""
    yield from _rows(checkpoint, root, "", top=True)


def _rows(checkpoint: Checkpoint, row: Row, indent: str, top: bool) -> Iterator[tuple[str, ...]]:
    last = len(row.children) - 1
    for i, child in enumerate(map(Row._make, row.children)):
        branch, below = ("", "") if top else ("└─ ", "   ") if i == last else ("├─ ", "│  ")
        yield indent + branch + ".".join(map(_name, child.parts)), *_facts(checkpoint, child)
        yield from _rows(checkpoint, child, indent + below, top=False)


def _facts(checkpoint: Checkpoint, row: Row) -> tuple[str, str, str, str, str]:
    entry, size = row.entry, bytes_text(row.bytes_count)
    alike = math.prod(len(part) for part in row.parts if isinstance(part, tuple))
    times = f"{alike:,} alike" if alike > 1 else ""
    if entry is None:
        return "", times, size, "", ""
    files = f"{checkpoint.files_count(entry):,}"
    if entry.shape is None:
        return "object", times, size, "", files
    shape = ", ".join(filter(None, (shape_text(entry.shape), times)))
    return entry.dtype or "?", shape, size, f"{entry.chunks_count:,}", files


def _name(part: str | tuple[str, ...]) -> str:
    return part if isinstance(part, str) else _ranges(sorted(map(int, part)))


def _ranges(numbers: list[int]) -> str:
    """``0-3,5,7-9``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{a}-{b}" if b > a else f"{a}" for a, b in runs]
    return ",".join(texts if len(texts) <= 4 else [*texts[:3], f"..{numbers[-1]}"])
