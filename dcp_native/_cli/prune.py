"""prune: remove old checkpoints of a run, so that a crash never leaves half of one.

Of each, the metadata goes first, of all its parts, and the directories are synced: what a crash
leaves then is no checkpoint to anybody.  Then the data files, then the directory, if nothing else
is in it.  Only files that checkpoints are made of are removed, unless the whole directory is asked
for.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from pathlib import Path
from typing import Any

from .._config import configure
from .checkpoint import METADATA
from .output import Column, CommandError, Output
from .steps import Step, in_flight, lacking_part, none_in, steps_in, written_ns
from .units import bytes_text, count_text, positive

_OURS = re.compile(
    r"\.metadata(\.tmp)?|__[0-9]+\.metadata(\.tmp)?|__[0-9]+_[0-9]+\.distcp"
    r"|\.dcp_native-(claim|export)-.*"
)
"""Names of files that saves make, ours and stock torch's."""
_RANK_METADATA = re.compile(r"__[0-9]+\.metadata")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "prune",
        help="remove old checkpoints of a run",
        description="Removes all but the newest checkpoints of a directory. Without --delete it "
        "only says what it would do. Damaged checkpoints do not count as kept, and are left alone, "
        "as are directories into which a save is in flight.",
    )
    parser.add_argument("parent", type=Path, help="a directory of checkpoints")
    parser.add_argument(
        "--keep-last", type=positive, metavar="N", help="keep the N newest whole ones (1)"
    )
    parser.add_argument(
        "--keep-every", type=positive, metavar="M", help="keep steps that M divides, too"
    )
    parser.add_argument("--pattern", help="only children whose names match it, such as 'step-*'")
    parser.add_argument("--delete", action="store_true", help="do it")
    parser.add_argument(
        "--whole-directory", action="store_true", help="with files in them that no save made"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    configure(allow_unsafe_objects=False)
    if args.keep_last is None and args.keep_every is None:
        raise CommandError("say what to keep: --keep-last N, --keep-every M, or both")
    plan = _plan(steps_in(args.parent, args.pattern), args.keep_last or 1, args.keep_every)
    rows, failures = [], 0
    for step, why in plan:
        row = {"path": str(step.path), "step": step.number, "bytes": _size(step.path)}
        row |= {"action": "keep", "why": why, "left": []}
        if why is None:
            row |= {"action": "remove", "why": "", "left": _left(step, args.whole_directory)}
            if args.delete:
                failures += not _removed(step, args.whole_directory, row)
        rows.append(row)
    _show(rows, args, out)
    out.json({"deleted": args.delete, "checkpoints": rows})
    return 1 if failures else 0


def _plan(steps: list[Step], last: int, every: int | None) -> list[tuple[Step, str | None]]:
    """Each checkpoint, the oldest first, and why it is kept; None: it goes."""
    planned: list[tuple[Step, str | None]] = []
    whole = 0
    for at, step in enumerate(steps):
        why = None
        if in_flight(step):
            why = "a save into it is in flight, or was stopped"
        elif step.path.is_symlink():
            why = "a link"
        elif lacking := lacking_part(step, steps[at + 1 :]):
            why = f"not whole, left alone: it has no {lacking}, as an older one has"
        elif not (result := step.check("complete")):
            why = f"damaged, left alone: {result.problems[0]}"
        else:
            whole += 1
            if whole <= last:
                why = "the newest" if last == 1 else f"newest {last}"
            elif every is not None and step.number is not None and step.number % every == 0:
                why = f"step {step.number:,} is one of every {every:,}"
            elif link := _link_to(step):
                why = f"{link} links to it"
        planned.append((step, why))
    planned.reverse()
    return planned


def _link_to(step: Step) -> str:
    """The name of a link beside a checkpoint that leads into it: somebody relies on it."""
    real = os.path.join(os.path.realpath(step.path), "")
    with os.scandir(step.path.parent) as entries:
        links = (entry for entry in entries if entry.is_symlink())
        into = (link for link in links if os.path.join(os.path.realpath(link), "").startswith(real))
        return next((link.name for link in into), "")


def _size(path: Path) -> int:
    """Bytes of files below a directory."""
    return sum(
        os.lstat(os.path.join(directory, name)).st_size
        for directory, _, names in os.walk(path)
        for name in names
        if os.path.lexists(os.path.join(directory, name))
    )


def _left(step: Step, everything: bool) -> list[str]:
    """Names, relative to the checkpoint, of what no save made."""
    if everything:
        return []
    found = []
    for directory, names, files in os.walk(step.path):
        is_part = Path(directory) in step.parts
        found += [os.path.join(directory, n) for n in files if not (is_part and _OURS.fullmatch(n))]
        found += [
            os.path.join(directory, n) for n in names if os.path.islink(os.path.join(directory, n))
        ]
    return sorted(os.path.relpath(name, step.path) for name in found)


def _removed(step: Step, everything: bool, row: dict[str, Any]) -> bool:
    try:
        if in_flight(step) or written_ns(step.parts) != step.written_ns:
            row |= {"action": "keep", "why": "a save into it has begun meanwhile", "left": []}
            return True
        remove(step, everything)
        row["action"] = "removed"
        return True
    except OSError as error:
        row["action"] = "failed"
        row["why"] = f"{os.fsdecode(error.filename or '')}: {error.strerror}"
        return False


def remove(step: Step, everything: bool) -> None:
    """Remove a checkpoint; at every moment it is a whole one or none.

    Args:
        everything: also what no save made.

    Raises:
        OSError: something could not be removed; what is left is no checkpoint.
    """
    for part in step.parts:
        for name in _metadata_in_order(part):
            os.unlink(part / name)
            _sync(part)
    for part in step.parts:
        for name in sorted(os.listdir(part)):
            if _OURS.fullmatch(name) and not os.path.isdir(part / name):
                os.unlink(part / name)
    if everything:
        shutil.rmtree(step.path)
    else:
        for directory in dict.fromkeys((*step.parts, step.path)):
            if not os.listdir(directory):
                os.rmdir(directory)
    _sync(step.path.parent)


def _metadata_in_order(part: Path) -> list[str]:
    """What speaks for all goes first where it is what readers look at, else last.

    Beside a ``.metadata`` nobody looks at metadata of single ranks; without it they look for that
    of rank 0.
    """
    ranks = sorted(name for name in os.listdir(part) if _RANK_METADATA.fullmatch(name))
    if (part / METADATA).exists():
        return [*ranks, METADATA]
    return sorted(ranks, key=lambda name: name != "__0.metadata")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _show(rows: list[dict[str, Any]], args: argparse.Namespace, out: Output) -> None:
    if not rows:
        out.line(none_in(args.parent))
        return
    titles = (Column("checkpoint"), Column("step", True), Column("size", True))
    out.table(
        (*titles, Column("what"), Column("why")),
        [
            (
                Path(row["path"]).name,
                "" if row["step"] is None else f"{row['step']:,}",
                bytes_text(row["bytes"]),
                row["action"],
                row["why"] or _leaves(row["left"]),
            )
            for row in rows
        ],
    )
    gone = [row for row in rows if row["action"] in ("remove", "removed")]
    size = bytes_text(sum(row["bytes"] for row in gone))
    out.line()
    if args.delete:
        out.line(f"removed {count_text(len(gone), 'checkpoint')}, {size}")
    elif gone:
        out.line(f"would remove {count_text(len(gone), 'checkpoint')}, {size}: --delete does it")
    else:
        out.line("nothing to remove")


def _leaves(names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"leaves {count_text(len(names), 'file')} that no save made: {shown}"
