"""trace: what the ranks of a job recorded, as one file for a viewer."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from .._trace_merge import merge_traces
from .output import Output
from .units import bytes_text, count_text


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "trace",
        help="merge the traces of all ranks",
        description="Saves and loads record what they do when DCP_NATIVE_TRACE (or "
        "dcp_native.configure(trace=...)) names a directory: one file for each process. "
        "'merge' makes one of them, for https://ui.perfetto.dev or chrome://tracing.",
    )
    parser.add_argument("action", choices=["merge"], help="merge: all files of a directory as one")
    parser.add_argument("directory", type=Path, help="where the processes wrote their traces")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write")
    parser.add_argument("--ranks", type=_ranks, help="only these, such as 0,8-15")
    parser.set_defaults(run=run)


def _ranks(text: str) -> set[int]:
    ranks: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,7})(?:-([0-9]{1,7}))?", part.strip())
        if found is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of ranks (0,8-15)")
        ranks.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return ranks


def run(args: argparse.Namespace, out: Output) -> int:
    found = merge_traces(args.directory, args.output, ranks=args.ranks)
    size = args.output.stat().st_size
    out.line(f"{args.output}: {count_text(len(found.files), 'trace')}, {bytes_text(size)}")
    for name, lines in found.damaged.items():
        out.line(f"{name}: {count_text(lines, 'line')} left out that are no whole events: its "
                 "process was killed, or is still writing")  # fmt: skip
    for name, reason in found.left_out.items():
        out.line(f"{name}: left out, {reason}")
    if found.missing_ranks:
        out.line(f"no trace of {_ranks_text(found.missing_ranks)}")
    out.json({"path": str(args.output), "traces": len(found.files), "bytes": size,
              "damaged": found.damaged, "left_out": found.left_out,
              "missing_ranks": found.missing_ranks})  # fmt: skip
    return 0


def _ranks_text(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 0, 8-15``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
