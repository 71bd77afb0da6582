"""latest: the newest whole checkpoint of a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._config import configure
from .output import Output
from .steps import steps_in

_LEVELS = {"complete": "complete", "structure": "structure", "full": "full"}


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "latest",
        help="the newest whole checkpoint of a run",
        description="Prints the path of the newest checkpoint in a directory that is complete: "
        "committed, all its files there and long enough. Damaged ones are skipped, and named on "
        "stderr. By the numbers in the names (step-1000, epoch=3-step=300), else by time. Exit "
        "status 1: there is none.",
    )
    parser.add_argument("parent", type=Path, help="a directory of checkpoints")
    parser.add_argument("--pattern", help="only children whose names match it, such as 'step-*'")
    parser.add_argument(
        "--verify", choices=list(_LEVELS), default="complete", help="how much is checked"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    configure(allow_unsafe_objects=False)
    skipped = []
    for step in steps_in(args.parent, args.pattern):
        result = step.check(_LEVELS[args.verify])
        if result:
            out.line(str(step.path))
            out.json({"path": str(step.path), "step": step.number, "skipped": skipped})
            return 0
        skipped.append({"path": str(step.path), "why": str(result.problems[0])})
        out.remark(f"skipping {result}")
    out.json({"path": None, "step": None, "skipped": skipped})
    out.remark(f"there is no complete checkpoint in {args.parent}")
    return 1
