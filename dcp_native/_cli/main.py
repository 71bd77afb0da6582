"""The command line's entry: which commands there are, and how errors end.

Exit status: 0 fine; 1 something was found (damage, a difference, nothing there); 2 the command
could not do what was asked (usage, a missing path); 130 it was interrupted; 141 nobody read its
output to the end.  Bad input never ends in a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from .._config import PROGRESS, configure
from .output import CommandError, Output, one_line, printable, status_of

COMMANDS = (
    "inspect",
    "verify",
    "diff",
    "du",
    "cat",
    "convert",
    "latest",
    "prune",
    "plot",
    "bench",
    "trace",
)
"""Modules beside this one, each with ``add(subparsers)`` and ``run(args, out) -> status``."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="dcp-native",
        description="Looks at, checks and converts checkpoints of torch.distributed.checkpoint, "
        "dcp_native's and torch's own.",
        epilog="Exit status: 0 fine, 1 found something (damage, a difference), 2 could not run, "
        "130 interrupted.",
    )
    commands = found.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"{__package__}.{name}").add(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="one JSON document on stdout")
        command.add_argument(
            "--progress",
            choices=PROGRESS,
            help="of what takes over 2 s: on a terminal (auto), always, never; "
            "DCP_NATIVE_PROGRESS says it for all",
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status."""
    collects = gc.isenabled()
    gc.disable()  # a command holds what it makes to its end; of 256k keys this is half the time
    try:
        return _run(argv)
    except CommandError as error:
        return _fail(str(error), error.status)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # as of programs that the signal ends: not the result's status
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        return _fail(one_line(error), status_of(error))
    except BaseException as error:  # torch's CheckpointException is no Exception
        if not hasattr(error, "failures"):
            raise
        return _fail(one_line(error), status_of(error))
    finally:
        if collects:
            gc.enable()


def _run(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    if args.progress is not None:
        configure(progress=args.progress)
    status = args.run(args, Output(as_json=args.json))
    sys.stdout.flush()
    return status


def _fail(text: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print(f"dcp-native: {printable(text)}", file=sys.stderr)
    return status
