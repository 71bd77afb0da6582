"""inspect: what is in a checkpoint, and which rank's file holds which part of a tensor."""

from __future__ import annotations

import argparse
import collections
import fnmatch
import itertools
import math
import operator
import time
from pathlib import Path
from typing import Any

from . import tree
from .checkpoint import Checkpoint, Entry, add_rank, rank_of
from .objects import describe_object
from .output import Column, CommandError, Output
from .units import box_text, bytes_text, count_text, shape_text

_MOST_ROWS = 400
_MOST_RANKS = 16
_MOST_PREFIXES = 16


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="what is in a checkpoint",
        description="Shows the keys of a checkpoint as a tree, with types, shapes and sizes, and "
        "totals by type, prefix and rank. With KEY: that tensor's chunks, and which rank's file "
        "holds which box of it; an object's value; or the keys below a prefix.",
    )
    parser.add_argument("dir", type=Path, help="the checkpoint's directory")
    parser.add_argument("key", nargs="*", help="key, prefix of keys, or shell pattern")
    parser.add_argument("--all", action="store_true", help="every key, also where layers are alike")
    add_rank(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    checkpoint = Checkpoint(args.dir, args.rank)
    exact, below = _select(checkpoint, args.key)
    if out.as_json:
        out.json(_document(checkpoint, exact, below, bool(args.key)))
        return 0
    if not args.key:
        _head(checkpoint, out)
    for entry in exact:
        _detail(checkpoint, entry, out)
    if below:
        _tree(checkpoint, below, args.all, out)
    if not args.key:
        _totals(checkpoint, out)
    return 0


def _select(checkpoint: Checkpoint, wanted: list[str]) -> tuple[list[Entry], list[Entry]]:
    """Entries that are named, and those that prefixes and patterns select."""
    if not wanted:
        return [], checkpoint.entries
    by_key = {entry.key: entry for entry in checkpoint.entries}
    exact: dict[str, Entry] = {}
    below: dict[str, Entry] = {}
    for text in wanted:
        if text in by_key:
            exact[text] = by_key[text]
            continue
        found = select(checkpoint, [text])
        if not found:
            checkpoint.entry(text)  # raises, with a hint
        below.update((entry.key, entry) for entry in found)
    return list(exact.values()), list(below.values())


def select(checkpoint: Checkpoint, wanted: list[str] | None) -> list[Entry]:
    """Entries whose keys are, begin with (up to a dot) or match one of the texts; None: all."""
    if not wanted:
        return checkpoint.entries
    keys, prefixes = set(wanted), tuple(f"{text.rstrip('.')}." for text in wanted)
    patterns = [text for text in wanted if set(text) & set("*?[")]
    return [
        entry
        for entry in checkpoint.entries
        if entry.key in keys
        or entry.key.startswith(prefixes)
        or any(fnmatch.fnmatchcase(entry.key, pattern) for pattern in patterns)
    ]


def _head(checkpoint: Checkpoint, out: Output) -> None:
    tensors = sum(entry.is_tensor for entry in checkpoint.entries)
    stored = sum(checkpoint.length)
    written = max((checkpoint.path / name).stat().st_mtime for name in checkpoint.images)
    out.line(str(checkpoint.path), style="bold")
    objects = count_text(len(checkpoint.entries) - tensors, "object")
    out.line(
        f"  {bytes_text(stored)} in {count_text(len(checkpoint.files), 'file')}: "
        f"{count_text(tensors, 'tensor')}, {objects}, {count_text(len(checkpoint.file), 'record')}"
    )
    by = "dcp_native" if checkpoint.native else "torch"
    save = f", save {checkpoint.save_id}" if checkpoint.save_id else ""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written))
    out.line(f"  written by {by}, {when}{save}; metadata {bytes_text(checkpoint.metadata_bytes)}")
    if not checkpoint.is_whole:
        out.line(f"  of {count_text(len(checkpoint.images), 'rank')} that saved apart")
    if checkpoint.linked_saves:
        out.line(f"  with files of {count_text(checkpoint.linked_saves, 'earlier save')}")
    if checkpoint.foreign:
        out.line(f"  only Python can rebuild {checkpoint.foreign}")
    out.line()


def _tree(checkpoint: Checkpoint, entries: list[Entry], every: bool, out: Output) -> None:
    root = tree.build(entries, every=every)
    rows = list(itertools.islice(tree.rows(checkpoint, root), None if every else _MOST_ROWS))
    out.table(tree.COLUMNS, rows)
    hidden = root.below_count - len(rows)
    if hidden:
        out.line(f"... and {count_text(hidden, 'more line')}: name a prefix, or give --all")
    out.line()


def _by_dtype(entries: list[Entry]) -> list[tuple[str, int, int]]:
    return _sums(entries, ["object" if e.shape is None else e.dtype or "?" for e in entries])


def _by_prefix(entries: list[Entry]) -> list[tuple[str, int, int]]:
    """By the first part of the key."""
    return _sums(entries, [e.key.partition(".")[0] for e in entries])


def _sums(entries: list[Entry], groups: list[str]) -> list[tuple[str, int, int]]:
    """Of each group its name, keys and bytes, the largest first; ``groups`` names that of each."""
    sizes: dict[str, int] = collections.defaultdict(int)
    for name, entry in zip(groups, entries, strict=True):
        sizes[name] += entry.size_bytes
    counts = collections.Counter(groups)
    sums = [(name, counts[name], size) for name, size in sizes.items()]
    return sorted(sums, key=operator.itemgetter(2), reverse=True)


def rank_totals(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What each rank wrote; rank None: files of another naming."""
    ranks: dict[int | None, list[int]] = {}
    for file, (size, records) in zip(checkpoint.files, checkpoint.bytes_by_file(), strict=True):
        group = ranks.setdefault(rank_of(file), [0, 0, 0])
        for i, count in enumerate((1, records, size)):
            group[i] += count
    return [
        {"rank": rank, "files": f, "records": r, "stored_bytes": b}
        for rank, (f, r, b) in sorted(
            ranks.items(), key=lambda item: -1 if item[0] is None else item[0]
        )
    ]


def _totals(checkpoint: Checkpoint, out: Output) -> None:
    dtypes, prefixes = _by_dtype(checkpoint.entries), _by_prefix(checkpoint.entries)
    whole = sum(size for _, _, size in dtypes)
    tables = [("type", dtypes, len(dtypes))]
    if len(prefixes) < len(checkpoint.entries):  # else the tree has said that
        tables.append(("prefix", prefixes, _MOST_PREFIXES))
    for title, sums, most in tables:
        shown, rest = sums[:most], sums[most:]
        if rest:
            keys, size = (sum(row[i] for row in rest) for i in (1, 2))
            shown.append((f"{len(rest):,} more", keys, size))
        out.table(
            (
                Column(f"by {title}"), Column("keys", True), Column("size", True),
                Column("share", True),
            ),
            [
                (name, f"{keys:,}", bytes_text(size), f"{100 * size / whole:.1f}%" if whole else "")
                for name, keys, size in shown
            ],
        )  # fmt: skip
        out.line()
    ranks = rank_totals(checkpoint)
    out.table(
        (Column("by rank"), Column("files", True), Column("records", True), Column("bytes", True)),
        [
            (
                "other" if row["rank"] is None else f"rank {row['rank']}",
                f"{row['files']:,}", f"{row['records']:,}", bytes_text(row["stored_bytes"]),
            )
            for row in ranks[:_MOST_RANKS]
        ],
    )  # fmt: skip
    if len(ranks) > _MOST_RANKS:
        sizes = [row["stored_bytes"] for row in ranks]
        mean = sum(sizes) / len(sizes)
        out.line(
            f"... {len(ranks)} ranks in all: least {bytes_text(min(sizes))}, mean "
            f"{bytes_text(mean)}, most {bytes_text(max(sizes))}"
        )


def _detail(checkpoint: Checkpoint, entry: Entry, out: Output) -> None:
    out.line(entry.key, style="bold")
    if not entry.is_tensor:
        out.line(f"  object, record of {bytes_text(entry.stored_bytes)}")
        for chunk in checkpoint.chunks(entry):
            out.line(f"  {chunk.file or 'no record'}, byte {chunk.offset_bytes:,}")
        out.line(f"  value: {describe_object(checkpoint, entry)}")
        out.line()
        return
    shape = entry.shape or ()
    size = bytes_text(entry.size_bytes)
    out.line(f"  {entry.dtype or 'unknown type'} {shape_text(shape)}, {size}")
    rows = []
    for chunk in checkpoint.chunks(entry):
        rank = None if chunk.file is None else rank_of(chunk.file)
        rows.append((
            "?" if rank is None else f"{rank}",
            box_text(chunk.offsets, chunk.sizes) if shape else "all",
            bytes_text(math.prod(chunk.sizes) * entry.item_bytes),
            chunk.file or "no record", f"{chunk.offset_bytes:,}", f"{chunk.length_bytes:,}",
            "transformed" if chunk.transformed else "",
        ))  # fmt: skip
    rows.sort(key=lambda row: int(row[0]) if row[0] != "?" else -1)
    titles = (("rank", True), ("box", False), ("size", True), ("file", False))
    more = (("at byte", True), ("record bytes", True), ("note", False))
    out.table([Column(*title) for title in titles + more], rows)
    out.line()


def _document(
    checkpoint: Checkpoint, exact: list[Entry], below: list[Entry], detailed: bool
) -> dict[str, Any]:
    entries = [_entry_document(checkpoint, entry, detailed) for entry in (*exact, *below)]
    return {
        "path": str(checkpoint.path),
        "native": checkpoint.native,
        "save_id": checkpoint.save_id,
        "metadata_bytes": checkpoint.metadata_bytes,
        "stored_bytes": sum(checkpoint.length),
        "records": len(checkpoint.length),
        "rank_local": not checkpoint.is_whole,
        "foreign": checkpoint.foreign,
        "totals": {
            "dtypes": [
                {"dtype": name, "keys": keys, "bytes": size}
                for name, keys, size in _by_dtype(checkpoint.entries)
            ],
            "prefixes": [
                {"prefix": name, "keys": keys, "bytes": size}
                for name, keys, size in _by_prefix(checkpoint.entries)
            ],
            "ranks": rank_totals(checkpoint),
        },
        "files": [
            {"name": name, "rank": rank_of(name), "records": records, "record_bytes": size}
            for name, (size, records) in zip(
                checkpoint.files, checkpoint.bytes_by_file(), strict=True
            )
        ],
        "entries": entries,
    }


def _entry_document(checkpoint: Checkpoint, entry: Entry, detailed: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "key": entry.key,
        "kind": "tensor" if entry.is_tensor else "object",
        "dtype": entry.dtype,
        "shape": entry.shape,
        "bytes": entry.size_bytes,
        "stored_bytes": entry.stored_bytes,
        "chunks": entry.chunks_count,
        "files": checkpoint.files_count(entry),
    }
    if detailed:
        if not entry.is_tensor:
            found["value"] = describe_object(checkpoint, entry)
        found["records"] = [
            {
                "rank": None if chunk.file is None else rank_of(chunk.file),
                "offsets": chunk.offsets,
                "sizes": chunk.sizes,
                "file": chunk.file,
                "offset_bytes": chunk.offset_bytes,
                "length_bytes": chunk.length_bytes,
                "transformed": chunk.transformed,
            }
            for chunk in checkpoint.chunks(entry)
        ]
    return found


__all__ = ["CommandError", "add", "rank_totals", "run", "select"]
