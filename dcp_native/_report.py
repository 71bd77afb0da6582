"""What the last save and load of this process did, for people and for tests."""

from __future__ import annotations

import logging
from typing import Any

from ._fork import fork_safe

__all__ = ["last_report", "note_path", "set_report"]

logger = logging.getLogger("dcp_native")

_lock = fork_safe()
_last: dict[str, Any] | None = None


def set_report(report: dict[str, Any]) -> None:
    """Keep ``report`` as the last one."""
    global _last
    with _lock():
        _last = report


def last_report() -> dict[str, Any] | None:
    """Facts about this process's last finished save or load, or None before the first.

    ``kind`` is ``"save"``, ``"async_save"`` or ``"load"``; ``path`` is ``"native"`` or ``"torch"``
    with the ``reason``; ``*_ns`` are nanoseconds, ``*_bytes`` bytes of this rank.
    """
    with _lock():
        return None if _last is None else dict(_last)


def note_path(kind: str, reason: str | None) -> None:
    """Log which implementation runs; ``reason`` says why it is not the native one."""
    if reason is None:
        logger.debug("%s: native path", kind)
    else:
        logger.debug("%s: torch's path, because %s", kind, reason)
        set_report({"kind": kind, "path": "torch", "reason": reason})
