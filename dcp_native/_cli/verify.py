"""verify: is a checkpoint whole, or every one of a run?"""

from __future__ import annotations

import argparse
import dataclasses
import os
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .._config import configure
from .._verify import Level, VerifyProblem, VerifyResult, bytes_to_read, verify_alone
from .checkpoint import metadata_names
from .output import Column, CommandError, Output
from .steps import steps_in
from .units import bytes_text, count_text, positive, seconds_text

_MOST_THREADS = 8
_LOOK_S = 0.1


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="is a checkpoint whole?",
        description="Checks checkpoints, or all that are in a directory, without loading them: "
        "the metadata, that every file is there and long enough, that chunks fill their tensors "
        "without holes and overlaps, and every byte by its checksum. Exit status 1: something is "
        "wrong.",
    )
    parser.add_argument(
        "dir", type=Path, nargs="+", help="a checkpoint, or a directory of checkpoints"
    )
    parser.add_argument("--quick", action="store_true", help="all but the bytes of the values")
    parser.add_argument(
        "--most", type=positive, default=100, metavar="N", help="list N problems at most (100)"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help=f"that read (one per core, at most {_MOST_THREADS})",
    )
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="unpickle metadata that only arbitrary code can read; for files that you trust",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    configure(allow_unsafe_objects=args.unsafe)
    level: Level = "structure" if args.quick else "full"
    paths = [path for directory in args.dir for path in _checkpoints(directory)]
    threads = args.threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    results = []
    for path in paths:
        results.append(_check(path, level, args.most, threads, out))
        _show(results[-1], out)
    if len(results) > 1:
        bad = sum(not result for result in results)
        out.line(
            f"{count_text(len(results), 'checkpoint')}: "
            + (f"{bad} damaged" if bad else "all whole")
        )
    document = [_document(result) for result in results]
    out.json(document[0] if paths == args.dir and len(paths) == 1 else document)
    return 0 if all(results) else 1


def _checkpoints(path: Path) -> list[Path]:
    """The path itself, or the checkpoints in it, the oldest first."""
    try:
        if metadata_names(path):
            return [path]
    except NotADirectoryError:
        raise CommandError(f"{path} is no directory; a checkpoint is one") from None
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None
    found = [part for step in reversed(steps_in(path)) for part in step.parts]
    return found or [path]  # which the check then says has none


def _check(path: Path, level: Level, most: int, threads: int, out: Output) -> VerifyResult:
    counters = [array("Q", [0]) for _ in range(threads)]
    total = bytes_to_read(path) if level == "full" else 0
    with out.progress(path.name or str(path), total) as update, _watched(counters, update):
        return verify_alone(path, level, most, counters)


@contextmanager
def _watched(counters: list[array], update: Callable[[int], None]) -> Iterator[None]:
    """Calls ``update`` with the sum of the counters every now and then, from another thread."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(_LOOK_S):
            update(sum(counter[0] for counter in counters))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _show(result: VerifyResult, out: Output) -> None:
    what = (
        f"{count_text(result.tensors, 'tensor')} and {count_text(result.objects, 'object')} in "
        f"{count_text(result.files, 'file')}"
    )
    seconds = result.wall_ns / 1e9
    if result.level == "full":
        rate = f", {bytes_text(result.checked_bytes / seconds)}/s" if seconds > _LOOK_S else ""
        did = f"{bytes_text(result.checked_bytes)} checked in {seconds_text(seconds)}{rate}"
    else:
        did = f"structure checked in {seconds_text(seconds)}, no values read"
    if result.ok:
        out.line(f"{result.path}: whole; {what}, {did}", style="green")
    else:
        out.line(
            f"{result.path}: {count_text(result.problems_found, 'problem')}"
            + (f"; {what}, {did}" if result.files else ""),
            style="bold red",
        )
        _list(result.problems, out)
        hidden = result.problems_found - len(result.problems)
        if hidden:
            out.line(f"... and {count_text(hidden, 'more problem')} (--most N lists more)")
    for note in _notes(result):
        out.line(f"  note: {note}")


def _list(problems: Sequence[VerifyProblem], out: Output) -> None:
    """A table, or, where the terminal is too narrow for it, two lines of each."""
    columns = (
        Column("tensor"), Column("file"), Column("at byte", True), Column("kind"), Column("what"),
    )  # fmt: skip
    rows = [_row(problem) for problem in problems]
    if out.fits(columns, rows):
        out.table(columns, rows)
        return
    for tensor, file, at, code, what in rows:
        place = f"{file} at byte {at}" if at else file
        out.line(f"  {tensor}", style="cyan")
        out.line(f"    {code}: {place}: {what}")


def _row(problem: VerifyProblem) -> tuple[str, ...]:
    at = "" if problem.offset_bytes is None else f"{problem.offset_bytes:,}"
    return problem.tensor or "-", problem.file or "-", at, problem.code, problem.what


def _notes(result: VerifyResult) -> Iterator[str]:
    if result.unverified_records:
        yield (
            f"{count_text(result.unverified_records, 'record')} of "
            f"{bytes_text(result.unverified_bytes)} have no checksum that can be compared"
        )
    if result.partial_tensors:
        yield f"{count_text(result.partial_tensors, 'tensor')} in part, of ranks that saved apart"
    if result.claims:
        yield f"{count_text(result.claims, 'save')} into it in flight, or stopped before its end"
    if result.unreferenced_files:
        yield f"{count_text(result.unreferenced_files, 'data file')} that no metadata names"


def _document(result: VerifyResult) -> dict[str, Any]:
    fields = dataclasses.asdict(result)
    return {**fields, "path": str(result.path), "ok": result.ok}
