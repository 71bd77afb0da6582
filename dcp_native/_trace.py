"""Traces: what saves and loads of this process did when, in a file that Perfetto draws.

``Config.trace`` names a directory.  Every process writes one file there, whole JSON after every
save and load.  Threads of the core record into memory (csrc/core/trace.c); here are the files.

Ranks need not agree on anything for it: a file says what the wall clock and the monotonic clock
showed when it was begun, and _trace_merge.py puts the files on one line by that.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from . import _native
from ._config import config
from ._fork import fork_safe

__all__ = ["end", "flush", "follow_config", "span"]

_TAIL = b"\n]}\n"
_MOST_SPANS = 10_000
"""Spans of Python that are kept until they are written."""

_lock = fork_safe()
_file: _TraceFile | None = None
_spans: list[dict[str, Any]] = []
_failed: str | None = None
"""A directory that could not be written to: it is not tried again."""


def _start_anew_after_fork() -> None:
    global _file
    if _file is not None:
        _file = None
        _spans.clear()
        _native.trace_forget()


os.register_at_fork(after_in_child=_start_anew_after_fork)


class _TraceFile:
    """One process's file: valid JSON whenever nobody is writing to it."""

    def __init__(self, directory: str, rank: int) -> None:
        self.directory = directory
        self.rank = rank
        self.dropped = _native.trace_dropped()
        host = socket.gethostname()
        self.start_ns = time.monotonic_ns()
        facts = {
            "written_by": "dcp_native",
            "rank": rank,
            "host": host,
            "pid": os.getpid(),
            "boot_id": _boot_id(),
            "start_monotonic_ns": self.start_ns,
            "start_unix_ns": time.time_ns(),
        }
        name = {"ph": "M", "name": "process_name", "pid": rank, "tid": 0,
                "args": {"name": f"rank {rank} ({host}, pid {os.getpid()})"}}  # fmt: skip
        order = {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0,
                 "args": {"sort_index": rank}}  # fmt: skip
        head = f'{{"displayTimeUnit":"ms","otherData":{json.dumps(facts)},"traceEvents":[\n'
        text = f"{head}{json.dumps(name)},\n{json.dumps(order)}"
        self.path = _new_file(Path(directory), f"rank{rank:05d}-{host}-{os.getpid()}")
        self.path.write_bytes(text.encode() + _TAIL)

    def append(self, spans: list[dict[str, Any]]) -> None:
        events = _native.trace_take(self.start_ns, self.rank)
        if (dropped := _native.trace_dropped()) > self.dropped:
            spans.append(_instant(f"{dropped - self.dropped} events found no room"))
            self.dropped = dropped
        for event in spans:
            event["pid"] = self.rank
            for key in ("ts", "dur"):
                if key in event:
                    event[key] = (event[key] - (self.start_ns if key == "ts" else 0)) / 1000
            events += b",\n" + json.dumps(event).encode()
        with open(self.path, "r+b") as file:
            file.seek(-len(_TAIL), os.SEEK_END)
            file.write(events + _TAIL)


def _new_file(directory: Path, stem: str) -> Path:
    """One that was not there: a trace that is switched on again does not replace the one before."""
    directory.mkdir(parents=True, exist_ok=True)
    path, number = directory / f"{stem}.json", 1
    while True:
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1
            path = directory / f"{stem}-{number}.json"


def _boot_id() -> str:
    """Names the monotonic clock that processes of one host share until it is started again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _instant(text: str) -> dict[str, Any]:
    return {"ph": "i", "s": "p", "cat": "trace", "name": text, "ts": time.monotonic_ns(),
            "tid": threading.get_native_id()}  # fmt: skip


def follow_config(rank: int) -> None:
    """Begin, end or change the file as ``Config.trace`` says now.  Never raises."""
    global _file, _failed
    wanted = config().trace
    directory = None if wanted is None else os.path.abspath(os.fspath(wanted))
    if directory == (None if _file is None else _file.directory):
        return
    if directory is not None and directory == _failed:
        return
    with _lock():
        _native.trace_switch(False)
        if _file is not None:
            _write(_file)
        _file, _failed = None, None
        if directory is None:
            return
        try:
            _file = _TraceFile(directory, _world_rank(rank))
        except OSError as error:
            _give_up(directory, error)
            return
        _native.trace_switch(True)
        _spans.append(
            {"ph": "M", "name": "thread_name", "tid": threading.get_native_id(),
             "args": {"name": f"Python: {threading.current_thread().name}"}}
        )  # fmt: skip


def _world_rank(rank: int) -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else rank


def span(category: str, name: str, begin_ns: int, end_ns: int, **args: Any) -> None:
    """Something that the calling thread did, in time.monotonic_ns()."""
    if _file is None or len(_spans) >= _MOST_SPANS:
        return
    _spans.append(
        {"ph": "X", "cat": category, "name": name, "ts": begin_ns, "dur": end_ns - begin_ns,
         "tid": threading.get_native_id(), **({"args": args} if args else {})}
    )  # fmt: skip


def end(kind: str, directory: str, begin_ns: int, *, background: bool = False) -> None:
    """A save or load has ended: write what was recorded.  Never raises."""
    if _file is None:
        return
    end_ns = time.monotonic_ns()
    if background:  # others overlap it
        common = {"cat": "call", "name": f"{kind}, to its outcome", "tid": os.getpid(),
                  "id2": {"local": f"{kind} {begin_ns}"}}  # fmt: skip
        _spans.append({"ph": "b", "ts": begin_ns, "args": {"directory": directory}, **common})
        _spans.append({"ph": "e", "ts": end_ns, **common})
    else:
        span("call", kind, begin_ns, end_ns, directory=directory)
    flush()


def flush() -> None:
    """Write what was recorded so far.  Never raises."""
    if _file is None:
        return
    with _lock():
        if _file is not None:
            _write(_file)


def _write(file: _TraceFile) -> None:
    taken = _spans[:]
    del _spans[: len(taken)]
    try:
        file.append(taken)
    except (OSError, MemoryError) as error:
        _give_up(file.directory, error)


def _give_up(directory: str, error: BaseException) -> None:
    from ._report import logger

    global _file, _failed
    _native.trace_switch(False)
    _file, _failed = None, directory
    logger.warning("no trace is written to %s any more: %s", directory, error)
