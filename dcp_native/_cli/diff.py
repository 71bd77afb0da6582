"""diff: what differs between two checkpoints, down to the values, in bounded memory."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import objects
from .checkpoint import Checkpoint, Entry, add_rank, rank_of
from .inspect import select
from .output import Column, CommandError, Output
from .units import count_text, shape_text

if TYPE_CHECKING:
    from .compare import Comparison

_WINDOW_BYTES = 16 << 20


@dataclasses.dataclass
class Change:
    """A key that is not the same in both."""

    key: str
    kind: str
    """``added``, ``removed``, ``type``, ``shape``, ``dtype``, ``values``, ``placement``."""
    text: str
    counts: bool = True
    """For the exit status."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "diff",
        help="what differs between two checkpoints",
        description="Compares two checkpoints: keys that were added or removed, shapes, types, "
        "placement (which rank's files hold which boxes), and values. NaNs at the same place are "
        "equal. Exit status 1: they differ; placement alone does not count.",
    )
    parser.add_argument("a", type=Path, help="a checkpoint")
    parser.add_argument("b", type=Path, help="another one, as the change of A")
    parser.add_argument("--keys", nargs="+", metavar="KEY", help="keys, prefixes, shell patterns")
    parser.add_argument("--no-values", action="store_true", help="compare metadata alone")
    parser.add_argument(
        "--threshold",
        type=_threshold,
        default=0.0,
        metavar="X",
        help="values that differ by at most X in absolute terms are equal (0)",
    )
    parser.add_argument(
        "--relative",
        type=_threshold,
        default=0.0,
        metavar="X",
        help="and those that differ by at most X times the value in A (0)",
    )
    parser.add_argument("--placement", action="store_true", help="placement counts, too")
    add_rank(parser)
    parser.set_defaults(run=run)


def _threshold(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no threshold")
    return value


def run(args: argparse.Namespace, out: Output) -> int:
    a, b = Checkpoint(args.a, args.rank), Checkpoint(args.b, args.rank)
    mine = {entry.key: entry for entry in select(a, args.keys)}
    others = {entry.key: entry for entry in select(b, args.keys)}
    if args.keys and not mine and not others:
        raise CommandError(f"neither checkpoint has a key like {' '.join(args.keys)}")
    changes = list(_keys(mine, others))
    both = [(entry, others[key]) for key, entry in mine.items() if key in others]
    same_kind = []
    for x, y in both:
        found = _facts(x, y)
        changes += found
        if not any(change.kind in ("type", "shape") for change in found):
            same_kind.append((x, y))
    changes += _placement(a, b, same_kind, args.placement)
    if not args.no_values:
        changes += _values(a, b, same_kind, args, out)
    differ = [change for change in changes if change.counts]
    if out.as_json:
        out.json({
            "a": str(args.a), "b": str(args.b), "equal": not differ, "compared_keys": len(both),
            "values_compared": not args.no_values,
            "changes": [
                {"key": c.key, "kind": c.kind, "counts": c.counts, "text": c.text, **c.facts}
                for c in changes
            ],
        })  # fmt: skip
    else:
        _show(changes, len(both), args, out)
    return 1 if differ else 0


def _keys(mine: dict[str, Entry], others: dict[str, Entry]) -> Iterator[Change]:
    for key, entry in mine.items():
        if key not in others:
            yield Change(key, "removed", _what(entry))
    for key, entry in others.items():
        if key not in mine:
            yield Change(key, "added", _what(entry))


def _what(entry: Entry) -> str:
    if entry.shape is None:
        return "object"
    return f"{entry.dtype or '?'} {shape_text(entry.shape)}"


def _facts(x: Entry, y: Entry) -> list[Change]:
    if x.is_tensor != y.is_tensor:
        return [Change(x.key, "type", f"{_what(x)} -> {_what(y)}")]
    found = []
    if x.shape is not None and y.shape is not None and x.shape != y.shape:
        text = f"{shape_text(x.shape)} -> {shape_text(y.shape)}"
        found.append(Change(x.key, "shape", text))
    if x.dtype != y.dtype:
        found.append(Change(x.key, "dtype", f"{x.dtype} -> {y.dtype}"))
    return found


def _placement(
    a: Checkpoint, b: Checkpoint, pairs: list[tuple[Entry, Entry]], counts: bool
) -> Iterator[Change]:
    for x, y in pairs:
        before, after = _boxes(a, x), _boxes(b, y)
        if before != after:
            yield Change(x.key, "placement", f"{_placed(before)} -> {_placed(after)}", counts)


def _boxes(checkpoint: Checkpoint, entry: Entry) -> list[tuple[Any, ...]]:
    """Boxes, and the ranks that wrote them."""
    return sorted(
        (chunk.offsets, chunk.sizes, -1 if rank is None else rank)
        for chunk in checkpoint.chunks(entry)
        for rank in (None if chunk.file is None else rank_of(chunk.file),)
    )


def _placed(boxes: list[tuple[Any, ...]]) -> str:
    ranks = sorted({rank for _, _, rank in boxes if rank >= 0})
    if len(ranks) > 4:
        where = f"{len(ranks)} ranks"
    else:
        where = f"rank {', '.join(map(str, ranks))}" if ranks else "other files"
    return f"{count_text(len(boxes), 'chunk')} of {where}"


# ---- values ----


def _values(
    a: Checkpoint, b: Checkpoint, pairs: list[tuple[Entry, Entry]], args: argparse.Namespace,
    out: Output,
) -> list[Change]:  # fmt: skip
    tensors = [(x, y) for x, y in pairs if x.is_tensor]
    found = [change for x, y in pairs if not x.is_tensor for change in _object(a, b, x, y)]
    if not tensors:
        return found
    from .compare import Comparer

    comparer = Comparer(a, b, args.threshold, args.relative, _WINDOW_BYTES)
    total = sum(x.size_bytes for x, _ in tensors)
    with out.progress("comparing", total) as update:
        for comparison in comparer.run(tensors, update):
            if comparison.differing:
                found.append(_changed(comparison))
    return found


def _changed(found: Comparison) -> Change:
    share = f"{found.differing:,} of {found.elements:,}"
    nans = f", NaN {found.nans_a:,} -> {found.nans_b:,}" if found.nans_a or found.nans_b else ""
    text = f"{share} differ, by {found.max_abs:.3g} at most (relative {found.max_rel:.3g}){nans}"
    return Change(found.key, "values", text, True, found.facts())


def _object(a: Checkpoint, b: Checkpoint, x: Entry, y: Entry) -> Iterator[Change]:
    first, second = objects.record_of(a, x), objects.record_of(b, y)
    contents = objects.contents_of(first)
    if first == second or (contents is not None and contents == objects.contents_of(second)):
        return
    try:
        if _equal(objects.load_object(first), objects.load_object(second)):
            return
        text = f"{objects.describe_object(a, x)} -> {objects.describe_object(b, y)}"
    except objects.Refused as error:
        text = f"bytes differ; the safe loader refuses to show them ({error})"
    yield Change(x.key, "values", text)


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # tensors inside, say
        return False


def _show(changes: list[Change], compared: int, args: argparse.Namespace, out: Output) -> None:
    order = ("removed", "added", "type", "shape", "dtype", "values", "placement")
    rows = sorted(changes, key=lambda change: order.index(change.kind))
    out.table(
        (Column("change"), Column("key"), Column("what")),
        [(change.kind, change.key, change.text) for change in rows],
    )
    if rows:
        out.line()
    counts = {kind: sum(change.kind == kind for change in changes) for kind in order}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    looked = "metadata compared" if args.no_values else "values compared"
    keys = f"{count_text(compared, 'key')} in both, {looked}"
    if any(change.counts for change in changes):
        out.line(f"different: {told} ({keys})", style="bold red")
    else:
        more = f"; {told}" if told else ""
        out.line(f"equal ({keys}){more}", style="green")
