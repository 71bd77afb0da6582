"""Keys as a tree: what is alike is shown once, so that a model of a hundred layers fits a screen.

``layers.0`` to ``layers.31`` become one branch where the keys below them agree in names, types and
shapes; chains of single children become one name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .checkpoint import Checkpoint, Entry
from .output import Column
from .units import bytes_text, shape_text

COLUMNS = (
    Column("key"),
    Column("dtype"),
    Column("shape"),
    Column("size", right=True),
    Column("chunks", right=True),
    Column("files", right=True),
)
_Looks = dict[tuple[Any, ...], int]


@dataclass(slots=True)
class Node:
    """A part of keys, between dots."""

    name: str
    entry: Entry | None = None
    children: dict[str, Node] = field(default_factory=dict)
    bytes_count: int = 0
    """Of it and all below it."""
    keys_count: int = 0
    alike: int = 1
    """How many it stands for; its children are those of the first."""


def build(entries: Sequence[Entry]) -> Node:
    """The tree of some keys."""
    root = Node("")
    for entry in entries:
        size = entry.size_bytes
        node = root
        for name in entry.key.split("."):
            node.bytes_count += size
            node.keys_count += 1
            child = node.children.get(name)
            if child is None:
                child = node.children[name] = Node(name)
            node = child
        node.bytes_count += size
        node.keys_count += 1
        node.entry = entry
    return root


def merge_alike(node: Node) -> None:
    """Merge children that have numbers for names and are alike, everywhere below a node."""
    _merge(node, {})


def _merge(node: Node, looks: _Looks) -> int:
    """The number of the node's look; equal numbers are alike, but for the node's own name."""
    entry = node.entry
    look: list[Any] = [] if entry is None else [entry.dtype, entry.shape]
    if node.children:
        groups: dict[Any, list[Node]] = {}
        for name, child in node.children.items():
            inner = _merge(child, looks)
            look += name, inner
            groups.setdefault(inner if name.isdecimal() else name, []).append(child)
        if len(groups) < len(node.children):
            node.children = {one.name: one for one in map(_joined, groups.values())}
    return looks.setdefault(tuple(look), len(looks))


def _joined(group: list[Node]) -> Node:
    first = group[0]
    if len(group) == 1:
        return first
    return Node(
        _ranges(sorted(int(node.name) for node in group)), first.entry, first.children,
        sum(node.bytes_count for node in group), sum(node.keys_count for node in group),
        len(group),
    )  # fmt: skip


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


def rows(checkpoint: Checkpoint, root: Node) -> Iterator[tuple[str, ...]]:
    """One for each node, as COLUMNS has them."""
    yield from _rows(checkpoint, root, "", top=True)


def count_rows(node: Node) -> int:
    """How many rows there are of what is below a node, without making them."""
    count = 0
    for child in node.children.values():
        below = count_rows(child) if child.children else 0
        count += below + (child.entry is not None or len(child.children) != 1)
    return count


def _rows(checkpoint: Checkpoint, node: Node, indent: str, top: bool) -> Iterator[tuple[str, ...]]:
    last = len(node.children) - 1
    for i, child in enumerate(node.children.values()):
        branch, below = ("", "") if top else ("└─ ", "   ") if i == last else ("├─ ", "│  ")
        chain = [child]
        while chain[-1].entry is None and len(chain[-1].children) == 1:
            chain.extend(chain[-1].children.values())
        yield indent + branch + ".".join(n.name for n in chain), *_facts(checkpoint, chain)
        yield from _rows(checkpoint, chain[-1], indent + below, top=False)


def _facts(checkpoint: Checkpoint, chain: list[Node]) -> tuple[str, str, str, str, str]:
    entry, size, alike = chain[-1].entry, bytes_text(chain[0].bytes_count), 1
    for node in chain:
        alike *= node.alike
    times = f"{alike:,} alike" if alike > 1 else ""
    if entry is None:
        return "", times, size, "", ""
    files = f"{checkpoint.files_count(entry):,}"
    if entry.shape is None:
        return "object", times, size, "", files
    shape = ", ".join(filter(None, (shape_text(entry.shape), times)))
    return entry.dtype or "?", shape, size, f"{entry.chunks_count:,}", files
