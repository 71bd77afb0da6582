"""Traces: what saves and loads of this process did when, in a file that Perfetto draws.

``Config.trace`` names a directory.  Every process writes one file there: an array of events, one a
line, that only ever grows.  Threads of the core record into memory (csrc/core/trace.c), calls of
Python into a queue of ours; a thread of ours writes both down twice a second.  So a process
that is killed leaves what it had done up to the last writing (viewers do without the closing
bracket), a file system that does not answer holds nobody up but that thread, and what finds no room
meanwhile is dropped and counted.

Ranks need not agree on anything for it: a file says what the wall clock and the monotonic clock
showed when it was begun, and _trace_merge.py puts the files on one line by that.

Threads: `_lock` guards what is current, and taking: it is never held across a file operation.  It
may be taken again by a signal handler that saves.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from . import _native
from ._config import config
from ._fork import fork_safe

__all__ = ["end", "flush", "follow_config", "span", "stop"]

HEAD = "dcp_native"
"""Name of a file's first event, whose args are facts about the process."""
WRITE_S = 0.5
"""Between two writings."""
END_S = 5.0
"""How long the end of the interpreter waits for the last one."""
_MOST_SPANS = 10_000
"""Spans of Python that are kept until they are written."""
_END = b"\n]\n"
_quoted = json.encoder.encode_basestring_ascii

_lock = fork_safe(threading.RLock)
_recording: _Recording | None = None
_spans: deque[tuple[str, str, int, int, int, dict[str, Any]]] = deque()
"""Kind of event, category and name, begin, end, thread, more fields."""
_lost_spans = 0
_unfinished: list[_Recording] = []
"""Those that may still have something to write."""


def _start_anew_after_fork() -> None:
    global _recording
    _recording = None
    _unfinished.clear()
    _spans.clear()
    _native.trace_switch(False)
    _native.trace_forget()


os.register_at_fork(after_in_child=_start_anew_after_fork)


class _Recording:
    """One process's file, and the thread that writes it."""

    def __init__(self, directory: str, rank: int, ranks_count: int) -> None:
        self.directory = directory
        self.rank = rank
        self.ranks_count = ranks_count
        self.start_ns = time.monotonic_ns()
        self.start_unix_ns = time.time_ns()
        self.written_count = 0
        """Writings so far."""
        self.gave_up = False
        """Nobody takes what is recorded."""
        self._dropped = _native.trace_dropped() + _lost_spans
        self._rest: bytes | None = None
        """When it has ended: the last events."""
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dcp_native-trace", daemon=True)
        try:
            self._thread.start()
            _unfinished.append(self)
            _native.trace_switch(True)
        except RuntimeError as error:  # no thread is to be had
            self._give_up(error)

    def is_over(self) -> bool:
        """Nothing is written any more: it has ended, or it failed."""
        return not self._thread.is_alive()

    def wake(self) -> None:
        self._wake.set()

    def end(self) -> None:
        """What is recorded from now on belongs to another one."""
        _native.trace_switch(False)
        pieces = list(iter(self._take, b""))
        self._rest = b"".join(pieces)
        self._wake.set()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            with self._new_file() as file:
                while self._rest is None:
                    self._wake.wait(WRITE_S)
                    self._wake.clear()
                    self._write(file)
                _write_all(file, self._rest + _END)
        except Exception as error:
            self._give_up(error)

    def _write(self, file: io.FileIO) -> None:
        while True:
            with _lock():
                events = b"" if self._rest is not None else self._take()
            if not events:
                break
            _write_all(file, events)
        self.written_count += 1

    def _new_file(self) -> io.FileIO:
        """One that was not there: a trace that is switched on again does not replace the one
        before."""
        host, pid = socket.gethostname(), os.getpid()
        facts = {
            "written_by": "dcp_native",
            "rank": self.rank,
            "ranks_count": self.ranks_count,
            "host": host,
            "pid": pid,
            "boot_id": _boot_id(),
            "start_monotonic_ns": self.start_ns,
            "start_unix_ns": self.start_unix_ns,
        }
        head = [
            {"name": HEAD, "args": facts},
            {"name": "process_name", "args": {"name": f"rank {self.rank} ({host}, pid {pid})"}},
            {"name": "process_sort_index", "args": {"sort_index": self.rank}},
        ]
        lines = [json.dumps({"ph": "M", "pid": self.rank, "tid": 0, **event}) for event in head]
        file = _create(Path(self.directory), f"rank{self.rank:05d}-{host}-{pid}")
        _write_all(file, ("[\n" + ",\n".join(lines)).encode())
        return file

    def _take(self) -> bytes:
        """Some of what was recorded; nothing when that is all.  The caller has the lock."""
        events = [_native.trace_take(self.start_ns, self.rank)]
        while _spans:
            events.append(self._line(*_spans.popleft()))
        if (dropped := _native.trace_dropped() + _lost_spans) > self._dropped:
            text = f"{dropped - self._dropped} events found no room"
            now_ns = time.monotonic_ns()
            events.append(self._line("i", "trace", text, now_ns, now_ns, 0, {"s": "p"}))
            self._dropped = dropped
        return b"".join(events)

    def _line(
        self, kind: str, category: str, name: str, begin_ns: int, end_ns: int, thread: int,
        more: dict[str, Any],
    ) -> bytes:  # fmt: skip
        # Put together by hand: a small save has as many spans of Python as of C.
        text = f',\n{{"ph":"{kind}","pid":{self.rank},"tid":{thread},"name":{_quoted(name)}'
        if kind != "M":
            text += f',"cat":"{category}","ts":{(begin_ns - self.start_ns) / 1000:.3f}'
        if kind == "X":
            text += f',"dur":{(end_ns - begin_ns) / 1000:.3f}'
        for key, value in more.items():
            text += f',"{key}":{json.dumps(value)}'
        return (text + "}").encode()

    def _give_up(self, error: BaseException) -> None:
        from ._report import logger

        self.gave_up = True
        with _lock():
            if _recording is self or _recording is None:
                _native.trace_switch(False)
                while self._take():
                    pass
        logger.warning("no trace is written to %s any more: %s", self.directory, error)


def _create(directory: Path, stem: str) -> io.FileIO:
    directory.mkdir(parents=True, exist_ok=True)
    path, number = directory / f"{stem}.json", 1
    while True:
        try:
            return io.FileIO(path, "xb")
        except FileExistsError:
            number += 1
            path = directory / f"{stem}-{number}.json"


def _write_all(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _boot_id() -> str:
    """Names the monotonic clock that processes of one host share until it is started again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def follow_config(rank: int) -> None:
    """Begin, end or change the file as ``Config.trace`` says now.  Never raises.

    One that could not be written stays what is current, and is not tried again.
    """
    global _recording
    directory = config().trace
    if directory == (None if _recording is None else _recording.directory):
        return
    with _lock():
        _end_current()
        if _recording is not None:  # a signal handler's, meanwhile
            _native.trace_switch(True)
        elif directory is not None:
            name = {"name": f"Python: {threading.current_thread().name}"}
            _spans.append(("M", "", "thread_name", 0, 0, threading.get_native_id(), {"args": name}))
            _recording = _Recording(directory, *_world(rank))


def _end_current() -> None:
    """The caller has the lock."""
    global _recording
    last, _recording = _recording, None
    _unfinished[:] = [recording for recording in _unfinished if not recording.is_over()]
    if last is not None:
        last.end()


def _world(rank: int) -> tuple[int, int]:
    """The rank in the job, and how many there are."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return rank, 1


def _add(*span: Any) -> None:
    global _lost_spans
    if _recording is None or _recording.gave_up:
        return
    if len(_spans) < _MOST_SPANS:
        _spans.append(span)
    else:
        _lost_spans += 1


def span(category: str, name: str, begin_ns: int, end_ns: int, **args: Any) -> None:
    """Something that the calling thread did, in time.monotonic_ns()."""
    if _recording is None:  # nearly always
        return
    more = {"args": args} if args else {}
    _add("X", category, name, begin_ns, end_ns, threading.get_native_id(), more)


def end(kind: str, directory: str, begin_ns: int, *, background: bool = False) -> None:
    """A save or load has ended.  Never raises."""
    if _recording is None:
        return
    end_ns = time.monotonic_ns()
    if not background:
        span("call", kind, begin_ns, end_ns, directory=directory)
        return
    # Others overlap it.
    name, more = f"{kind}, to its outcome", {"id2": {"local": f"{kind} {begin_ns}"}}
    thread = os.getpid()
    _add("b", "call", name, begin_ns, begin_ns, thread, more | {"args": {"directory": directory}})
    _add("e", "call", name, end_ns, end_ns, thread, more)


def flush(timeout_s: float = END_S) -> bool:
    """Have what was recorded so far written now; whether it was, in time."""
    recording = _recording
    if recording is None:
        return True
    wanted = recording.written_count + 2  # one may be at it
    end_s = time.monotonic() + timeout_s
    while recording.written_count < wanted and not recording.is_over():
        if time.monotonic() > end_s:
            return False
        recording.wake()
        time.sleep(0.001)
    return not recording.is_over()


def stop(timeout_s: float = END_S) -> None:
    """End the file, and wait until it is written."""
    end_s = time.monotonic() + timeout_s
    with _lock():
        _end_current()
        unfinished = _unfinished[:]
    for recording in unfinished:
        recording.join(max(0.0, end_s - time.monotonic()))


atexit.register(stop)
