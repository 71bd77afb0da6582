"""What the last save and load of this process did, for people and for tests."""

from __future__ import annotations

import copy
import logging
from typing import Any

from ._fork import fork_safe
from ._reports import LoadReport, Report, SaveReport

__all__ = [
    "LISTED_NAMES",
    "LoadReport",
    "Report",
    "SaveReport",
    "last_report",
    "names_of",
    "note_path",
    "report_of",
    "role_report",
    "set_report",
    "tell",
]

logger = logging.getLogger("dcp_native")

LISTED_NAMES = 1000
"""Most names in a list of a report (csrc/py/load_report.c)."""

_lock = fork_safe()
_last: dict[str, Any] | None = None


def set_report(report: dict[str, Any]) -> None:
    """Keep ``report`` as the last one."""
    global _last
    with _lock():
        _last = report


def names_of(packed: bytes) -> list[str]:
    """Names that the C side packed: a length in 4 bytes, little endian, and UTF-8, each."""
    names, at = [], 0
    while at < len(packed):
        end = at + 4 + int.from_bytes(packed[at : at + 4], "little")
        names.append(packed[at + 4 : end].decode(errors="replace"))
        at = end
    return names


def _prefixes_of(packed: bytes) -> dict[str, int]:
    """Counted names: a count in 8 bytes before each; the same name may come again."""
    counts: dict[str, int] = {}
    at = 0
    while at < len(packed):
        end = at + 12 + int.from_bytes(packed[at + 8 : at + 12], "little")
        (name,) = names_of(packed[at + 8 : end])
        counts[name] = counts.get(name, 0) + int.from_bytes(packed[at : at + 8], "little")
        at = end
    return counts


def _unpacked(key: str, value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    return _prefixes_of(value) if key == "unexpected_prefixes" else names_of(value)


def last_report() -> Report | None:
    """Facts about this process's last finished save or load, or None before the first.

    A :class:`SaveReport` or a :class:`LoadReport`, which say what every field means: dicts, and a
    copy each time.  Long lists of names become Python strings only here.
    """
    global _last
    with _lock():
        if _last is None:
            return None
        _last = {key: _unpacked(key, value) for key, value in _last.items()}
        return report_of(copy.deepcopy(_last))


def report_of(facts: dict[str, Any]) -> Report:
    """``facts`` as a report of their kind."""
    return LoadReport(facts) if facts.get("kind") == "load" else SaveReport(facts)


def tell(facts: dict[str, Any]) -> None:
    """Log, for people, what a save or load did that has not failed."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s", report_of(facts))


def note_path(kind: str, reason: str | None, roles: dict[str, str] | None = None) -> None:
    """Log which implementation runs; ``reason`` says why it is not the native one."""
    told = "".join(f"; {role}: {where}" for role, where in (roles or {}).items())
    if reason is None:
        logger.debug("%s: native path%s", kind, told)
    else:
        logger.debug("%s: torch's path, because %s%s", kind, reason, told)
        set_report({"kind": kind, "path": "torch", "reason": reason, **(roles or {})})


def role_report(
    writer_reason: str | None, planner_reason: str | None, planned_outside: bool = False
) -> dict[str, str]:
    """Where each role of a save runs, and why not in the core.

    Args:
        writer_reason, planner_reason: why it can not run natively, or None.
        planned_outside: a rank of the group has a planner of its own.
    """
    if planner_reason is not None:
        planner = f"python: {planner_reason}"
    elif writer_reason is not None:
        planner = "torch: the writer is not native"
    else:
        planner = "torch: another rank's planner is not native" if planned_outside else "native"
    return {
        "writer": "native" if writer_reason is None else f"torch: {writer_reason}",
        "planner": planner,
    }
