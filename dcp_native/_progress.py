"""How far an operation has come: for a callback, or as a bar on a terminal.

The core counts bytes as they go by; a thread of Python looks at the count four times a second.
Between its looks it sleeps without the GIL, and it ends before the call returns, unless a callback
does not return: that one is left behind.  What a callback saves or loads itself is not watched.
Nothing is asked of other ranks: a bar shows this rank's bytes, says so, and names the sum of all
where this rank planned for all.  Where nobody would see anything there is no thread.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from ._cli.units import bytes_text, seconds_text
from ._config import config

__all__ = ["Counted", "Progress", "unwatched"]

LOOK_S = 0.25
"""Between two looks."""
BAR_AFTER_S = 2.0
"""Shorter operations show no bar."""
LINE_EVERY_S = 10.0
"""Between two lines where standard error is no terminal (``progress="on"``)."""
END_S = 1.0
"""How long a callback that does not return holds up the call, or the future, that it watches."""

_this_thread = threading.local()
"""``watches``: it is a thread of ours, maybe in a callback, or at work for what is watched."""


class _Bar(Protocol):
    def show(self, done: int, total: int, took_s: float) -> None: ...
    def close(self) -> None: ...


class Progress:
    """Watches one operation, from ``with`` to its end.

    Args:
        kind: what people and callbacks see it named.
        look: gives (bytes done, bytes in all); 0 in all: not known yet.
        rank, ranks_count: of the group.
        ranks_bytes: what all its ranks write together, or 0: not known.
        begin_ns: of the operation, which began earlier than what is counted.
        foreground: the caller waits for it.
    """

    def __init__(
        self,
        kind: str,
        look: Callable[[], tuple[int, int]],
        *,
        rank: int = 0,
        ranks_count: int = 1,
        ranks_bytes: int = 0,
        begin_ns: int = 0,
        foreground: bool = True,
    ) -> None:
        self._kind = kind
        self._look = look
        self._begin_s = begin_ns / 1e9 or time.monotonic()
        self._title = kind.replace("_", " ")
        if ranks_count > 1:
            self._title += f", rank {rank}"
            self._title += f" (all: {bytes_text(ranks_bytes)})" if ranks_bytes else ""
        self._end = threading.Event()
        self._end_by_s = 0.0
        self._thread: threading.Thread | None = None
        self._run: Callable[[], None]
        wanted = config().progress
        if getattr(_this_thread, "watches", False):
            self._run = _nothing
        elif callable(wanted):
            self._run = lambda: self._call(wanted)
        elif foreground and (wanted == "on" or _on_terminal(wanted)) and _is_first(rank):
            self._run = self._draw
        else:
            self._run = _nothing

    def __enter__(self) -> Progress:
        if self._run is not _nothing:
            self._thread = threading.Thread(
                target=self._run, name="dcp_native-progress", daemon=True
            )
            try:
                self._thread.start()
            except RuntimeError:  # no thread is to be had; that must not harm what is watched
                self._thread = None
        return self

    def __exit__(self, *unused: object) -> None:
        self.end()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(END_S)
            self.is_over()

    def end(self) -> None:
        """What is watched has ended.  Waits for nothing, unlike leaving ``with``."""
        if self._end_by_s == 0.0:
            self._end_by_s = time.monotonic() + END_S
            self._end.set()

    def is_over(self) -> bool:
        """After :meth:`end`: the callback has heard of the end, or had its time."""
        if self._thread is None:
            return True
        if self._thread.is_alive():
            if time.monotonic() < self._end_by_s:
                return False
            _logger().warning(
                "a progress callback did not return for %g s; the %s does not wait for it",
                END_S, self._kind,
            )  # fmt: skip
        self._thread = None
        return True

    def _counts(self) -> tuple[int, int]:
        done, total = self._look()  # objects are counted with their records, of unknown length
        return min(done, total) if total > 0 else done, total

    def _call(self, callback: Callable[[str, int, int, float], object]) -> None:
        _this_thread.watches = True
        start_s = time.monotonic()
        try:
            ended = False
            while not ended:
                ended = self._end.wait(LOOK_S)
                done, total = self._counts()
                rate = done / max(time.monotonic() - start_s, 1e-9)
                callback(self._kind, done, total, rate)
        except BaseException:  # it must not harm what it watches
            _logger().warning(
                "a progress callback raised; it is not called any more for this %s", self._kind,
                exc_info=True,
            )  # fmt: skip

    def _draw(self) -> None:
        if self._end.wait(max(0.0, self._begin_s + BAR_AFTER_S - time.monotonic())):
            return
        try:
            bar = _bar(self._title)
            try:
                while not self._end.wait(LOOK_S):
                    done, total = self._counts()
                    bar.show(done, total, time.monotonic() - self._begin_s)
            finally:
                bar.close()
        except BaseException as error:  # a terminal that went away
            _logger().debug("no progress is shown any more: %r", error)


class Counted(Progress):
    """The same of what the core counts in ``counter`` while it works.

    Args:
        total: bytes in all, or what gives them: asked once, by whoever looks first.
    """

    def __init__(self, kind: str, total: int | Callable[[], int], **options: Any) -> None:
        self.counter = array("Q", [0])
        self._total = total
        super().__init__(kind, self._count, **options)

    def _count(self) -> tuple[int, int]:
        if callable(self._total):
            self._total = self._total()
        return self.counter[0], self._total


@contextmanager
def unwatched() -> Iterator[None]:
    """For what an operation that is watched does on this thread by others of its kind."""
    before = getattr(_this_thread, "watches", False)
    _this_thread.watches = True
    try:
        yield
    finally:
        _this_thread.watches = before


def _nothing() -> None:
    """Watches nothing."""


def _logger() -> Any:
    from ._report import logger

    return logger


def _on_terminal(wanted: object) -> bool:
    return wanted == "auto" and sys.stderr is not None and sys.stderr.isatty()


def _is_first(rank: int) -> bool:
    """Whether this is the process whose bar is shown: not one for each group of ranks."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return rank == 0


def _bar(title: str) -> _Bar:
    stream = sys.stderr
    return _Line(stream, title) if stream.isatty() else _Lines(stream, title)


class _Line:
    """One line that is written over, without escape codes."""

    def __init__(self, stream: TextIO, title: str) -> None:
        self._stream = stream
        self._title = title
        self._width = 0

    def show(self, done: int, total: int, took_s: float) -> None:
        room = _columns(self._stream) - 1
        self._write(_text(self._title, done, total, took_s)[:room])

    def _write(self, text: str) -> None:
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def close(self) -> None:
        self._write("")
        self._stream.write("\r")
        self._stream.flush()


class _Lines:
    """Whole lines, seldom: for logs."""

    def __init__(self, stream: TextIO, title: str) -> None:
        self._stream = stream
        self._title = title
        self._next_s = 0.0

    def show(self, done: int, total: int, took_s: float) -> None:
        if took_s >= self._next_s:
            self._stream.write(_text(self._title, done, total, took_s) + "\n")
            self._stream.flush()
            self._next_s = took_s + LINE_EVERY_S

    def close(self) -> None:
        self._stream.flush()


def _columns(stream: TextIO) -> int:
    """Those of old where a terminal does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _text(title: str, done: int, total: int, took_s: float) -> str:
    """``save: 3.10 of 12.4 GB (25%), 2.94 GB/s, 3.2 s left``."""
    rate = done / took_s
    if total <= 0:
        return f"{title}: {bytes_text(done)}, {bytes_text(rate)}/s"
    text = f"{title}: {bytes_text(done)} of {bytes_text(total)} ({100 * done // total}%)"
    if done >= total:
        return f"{text}, waiting for the disk and the other ranks"
    left = f", {seconds_text((total - done) / rate)} left" if done > 0 else ""
    return f"{text}, {bytes_text(rate)}/s{left}"
