"""du: what a checkpoint takes on the disk, and of what."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, rank_of
from .inspect import rank_totals, select
from .output import Column, Output
from .units import bytes_text, count_text, positive


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "du",
        help="bytes by prefix of keys, by file",
        description="What a checkpoint takes: by prefix of its keys, the largest first, and by "
        "data file (what lies on the disk, and how much of that the metadata refers to).",
    )
    parser.add_argument("dir", type=Path, help="the checkpoint's directory")
    parser.add_argument("key", nargs="*", help="only these keys, prefixes or shell patterns")
    parser.add_argument(
        "--depth", type=positive, default=2, metavar="N", help="parts of a key that count (2)"
    )
    parser.add_argument("--files", action="store_true", help="each data file, too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    checkpoint = Checkpoint(args.dir)
    groups = _by_prefix(checkpoint, args.key, args.depth)
    whole = sum(size for _, size, _ in groups.values())
    files = _files(checkpoint)
    missing = [file["name"] for file in files if file["file_bytes"] is None]
    short = [
        file["name"]
        for file in files
        if file["file_bytes"] is not None and file["file_bytes"] < file["end_bytes"]
    ]
    on_disk = sum(file["file_bytes"] or 0 for file in files) + checkpoint.metadata_bytes
    rows = sorted(groups.items(), key=lambda item: -item[1][1])
    if out.as_json:
        out.json({
            "path": str(checkpoint.path),
            "disk_bytes": on_disk,
            "metadata_bytes": checkpoint.metadata_bytes,
            "prefixes": [
                {"prefix": prefix, "keys": keys, "bytes": size, "stored_bytes": stored}
                for prefix, (keys, size, stored) in rows
            ],
            "ranks": rank_totals(checkpoint),
            "files": files,
        })  # fmt: skip
        return 1 if missing or short else 0
    out.table(
        (
            Column("size", True), Column("share", True), Column("keys", True),
            Column("stored", True), Column("prefix"),
        ),
        [
            (
                bytes_text(size), f"{100 * size / whole:.1f}%" if whole else "", f"{keys:,}",
                bytes_text(stored), prefix,
            )
            for prefix, (keys, size, stored) in rows
        ],
    )  # fmt: skip
    if args.files:
        out.line()
        out.table(
            (
                Column("file"), Column("rank", True), Column("records", True),
                Column("in records", True), Column("on disk", True),
            ),
            [
                (
                    file["name"], "" if file["rank"] is None else str(file["rank"]),
                    f"{file['records']:,}", bytes_text(file["record_bytes"]),
                    "missing" if file["file_bytes"] is None else bytes_text(file["file_bytes"]),
                )
                for file in files
            ],
        )  # fmt: skip
    out.line()
    out.line(
        f"{bytes_text(on_disk)} on the disk: {count_text(len(files) - len(missing), 'data file')} "
        f"and {bytes_text(checkpoint.metadata_bytes)} of metadata"
    )
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        out.line(f"missing: {count_text(len(missing), 'data file')} ({names})", style="bold red")
    if short:
        names = ", ".join(short[:5]) + (", ..." if len(short) > 5 else "")
        out.line(f"cut short: {count_text(len(short), 'data file')} ({names})", style="bold red")
    return 1 if missing or short else 0


def _by_prefix(
    checkpoint: Checkpoint, wanted: list[str], depth: int
) -> dict[str, tuple[int, int, int]]:
    """Keys, bytes of values and bytes of records by the first parts of the keys."""
    groups: dict[str, tuple[int, int, int]] = {}
    chosen = select(checkpoint, wanted)
    if wanted and not chosen:
        checkpoint.entry(wanted[0])  # raises, with a hint
    for entry in chosen:
        parts = entry.key.split(".")
        prefix = ".".join(parts[:depth])
        keys, size, stored = groups.get(prefix, (0, 0, 0))
        groups[prefix] = (
            keys + 1,
            size + entry.size_bytes,
            stored + entry.stored_bytes,
        )
    return groups


def _files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    found = []
    ends = checkpoint.ends_by_file()
    for (name, (size, records)), end in zip(
        zip(checkpoint.files, checkpoint.bytes_by_file(), strict=True), ends, strict=True
    ):
        try:
            on_disk = (checkpoint.path / name).stat().st_size
        except OSError:
            on_disk = None
        found.append({
            "name": name, "rank": rank_of(name), "records": records, "record_bytes": size,
            "file_bytes": on_disk, "end_bytes": end,
        })  # fmt: skip
    return found
