"""The time of a save or load, divided among its phases.

A phase that runs within another one interrupts it, so the phases of a call add up to at most its
time.  Each is also a span of the trace (_trace.py), there with what runs within it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from . import _trace

__all__ = ["Clock", "phase"]

_Method = TypeVar("_Method", bound=Callable[..., Any])


class Clock:
    """Of one call, from when this is made to :meth:`end`.  Of the calling thread alone."""

    def __init__(self, kind: str, directory: str, rank: int, ranks_count: int) -> None:
        _trace.follow_config(rank)
        self.kind = kind
        self.directory = directory
        self.rank = rank
        self.ranks_count = ranks_count
        self.begin_ns = time.monotonic_ns()
        self.phases_ns: dict[str, int] = {}
        """Nanoseconds by phase, in the order of their begins."""
        self._open: list[tuple[str, int]] = []

    def facts(self) -> dict[str, Any]:
        """What a report has of the call from its begin on."""
        return {
            "kind": self.kind,
            "directory": self.directory,
            "rank": self.rank,
            "ranks_count": self.ranks_count,
        }

    @property
    def total_ns(self) -> int:
        """Since the begin of the call."""
        return time.monotonic_ns() - self.begin_ns

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin_ns = time.monotonic_ns()
        self._pause(begin_ns)
        self.phases_ns.setdefault(name, 0)
        self._open.append((name, begin_ns))
        try:
            yield
        finally:
            now_ns = time.monotonic_ns()
            self._pause(now_ns)
            self._open.pop()
            if self._open:
                self._open[-1] = (self._open[-1][0], now_ns)
            _trace.span("phase", name, begin_ns, now_ns)

    def _pause(self, now_ns: int) -> None:
        if self._open:
            name, since_ns = self._open[-1]
            self.phases_ns[name] += now_ns - since_ns
            self._open[-1] = (name, now_ns)

    def end(self, *, background: bool = False) -> None:
        """The call, or what went on behind it, has ended in whatever way: its trace is written."""
        _trace.end(self.kind, self.directory, self.begin_ns, background=background)


def phase(name: str) -> Callable[[_Method], _Method]:
    """A method of an object with a ``clock`` is a phase of it."""

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self.clock(name):
                return method(self, *args, **kwargs)

        return timed  # type: ignore[return-value]

    return decorate
