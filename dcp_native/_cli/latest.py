"""latest: the newest whole checkpoint of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._config import configure
from .output import Output
from .steps import Step, lacking_part, newest_first, none_in, steps_in, unfinished_in

_LEVELS = {"complete": "complete", "structure": "structure", "full": "full"}


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "latest",
        help="the newest whole checkpoint of a run",
        description="Prints the path of the newest checkpoint in a directory that would load: "
        "committed, with all the parts that older ones have, all its files there and long enough. "
        "Newer ones that are skipped are named on stderr, with what is wrong. By the numbers in "
        "the names (step-1000, epoch=3-step=300), else by time. Exit status 1: there is none.",
    )
    parser.add_argument("parent", type=Path, help="a directory of checkpoints")
    parser.add_argument("--pattern", help="only children whose names match it, such as 'step-*'")
    parser.add_argument(
        "--verify", choices=list(_LEVELS), default="complete", help="how much is checked"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    configure(allow_unsafe_objects=False)
    steps = steps_in(args.parent, args.pattern)
    skipped: list[tuple[Step, str]] = []
    newest = None
    for at, step in enumerate(steps):
        why = _wrong(step, steps[at + 1 :], _LEVELS[args.verify])
        if why is None:
            newest = step
            break
        skipped.append((step, why))
    for step in unfinished_in(args.parent, args.pattern):
        if newest is None or newest_first([newest, step])[0] is step:
            skipped.append((step, "no metadata: a save into it is in flight, or was stopped"))
    for step, why in skipped:
        out.remark(f"skipping {step.path}: {why}")
    out.json({
        "path": None if newest is None else str(newest.path),
        "step": None if newest is None else newest.number,
        "skipped": [{"path": str(step.path), "why": why} for step, why in skipped],
    })  # fmt: skip
    if newest is None:
        out.remark(none_in(args.parent))
        return 1
    out.line(str(newest.path))
    return 0


def _wrong(step: Step, older: list[Step], level: str) -> str | None:
    """Why a checkpoint would not load; None: it would."""
    lacking = lacking_part(step, older)
    if lacking:
        return f"it has no {lacking}, as an older one has"
    try:
        result = step.check(level)
    except OSError as error:
        return f"{error.strerror or error}"
    return None if result else str(result.problems[0])
