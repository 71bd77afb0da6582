"""Keys as a tree: what is alike is shown once, so that a model of a hundred layers fits a screen.

``layers.0`` to ``layers.31`` become one branch where the keys below them agree in names, types and
shapes; chains of single children become one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    children: dict[str, Node | Entry] = field(default_factory=dict)
    """By name; where many are merged, by that of the first.  What nothing is below stays an entry:
    there may be 256k of them."""
    bytes_count: int = 0
    """Of it and all below it."""
    keys_count: int = 0
    alike: int = 1
    """How many it stands for; its children are those of the first."""


def build(entries: Iterable[Entry]) -> Node:
    """The tree of some keys."""
    root = Node("")
    known: dict[str, Node] = {}
    for entry in entries:
        path, dot, name = entry.key.rpartition(".")
        parent = (known.get(path) or _inner(root, known, path)) if dot else root
        there = parent.children.setdefault(name, entry)
        if isinstance(there, Node):
            there.entry = entry
    _count(root)
    return root


def _inner(root: Node, known: dict[str, Node], path: str) -> Node:
    """The node of what a key begins with; ``known`` has all that were made."""
    above, dot, name = path.rpartition(".")
    parent = (known.get(above) or _inner(root, known, above)) if dot else root
    node = known[path] = Node(name, parent.children.get(name))
    parent.children[name] = node
    return node


def _as_node(name: str, child: Node | Entry) -> Node:
    if isinstance(child, Node):
        return child
    return Node(name, child, {}, child.size_bytes, 1)


def _count(node: Node) -> None:
    """Sets the counts of a node and of all nodes below it."""
    if node.entry is not None:
        node.bytes_count, node.keys_count = node.entry.size_bytes, 1
    for child in node.children.values():
        if isinstance(child, Node):
            _count(child)
            node.bytes_count += child.bytes_count
            node.keys_count += child.keys_count
        else:
            node.bytes_count += child.size_bytes
            node.keys_count += 1


def merge_alike(node: Node) -> None:
    """Merge children that have numbers for names and are alike, everywhere below a node."""
    _merge(node, {})


def _merge(node: Node, looks: _Looks) -> int:
    """The number of the node's look; equal numbers are alike, but for the node's own name."""
    look: list[Any] = [] if node.entry is None else [node.entry.dtype, node.entry.shape]
    groups: dict[int, list[str]] = {}
    for name, child in node.children.items():
        if isinstance(child, Node):
            inner = _merge(child, looks)
        else:
            inner = looks.setdefault((child.dtype, child.shape), len(looks))
        look += name, inner
        if name.isdecimal():
            groups.setdefault(inner, []).append(name)
    for names in groups.values():
        if len(names) > 1:
            _join(node.children, names)
    return looks.setdefault(tuple(look), len(looks))


def _join(children: dict[str, Node | Entry], names: list[str]) -> None:
    """Make one of the children with these names, where the first of them is."""
    group = [_as_node(name, children[name]) for name in names]
    children[names[0]] = Node(
        _ranges(sorted(map(int, names))), group[0].entry, group[0].children,
        sum(node.bytes_count for node in group), sum(node.keys_count for node in group),
        len(group),
    )  # fmt: skip
    for name in names[1:]:
        del children[name]


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
        if isinstance(child, Node):
            count += count_rows(child)
            count += child.entry is not None or len(child.children) != 1
        else:
            count += 1
    return count


def _rows(checkpoint: Checkpoint, node: Node, indent: str, top: bool) -> Iterator[tuple[str, ...]]:
    last = len(node.children) - 1
    for i, (name, child) in enumerate(node.children.items()):
        branch, below = ("", "") if top else ("└─ ", "   ") if i == last else ("├─ ", "│  ")
        chain = [_as_node(name, child)]
        while chain[-1].entry is None and len(chain[-1].children) == 1:
            chain += (_as_node(*only) for only in chain[-1].children.items())
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
