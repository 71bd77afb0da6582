"""A report as one line for people: what, where, how much, how fast, in which phases, which way."""

from __future__ import annotations

from typing import Any

from ._cli.units import bytes_text, seconds_text

__all__ = ["summary_of"]

_LEAST_SHARE = 0.02
"""Phases below this share of the time are left out."""


def summary_of(report: dict[str, Any]) -> str:
    kind = report.get("kind", "?").replace("_", " ")
    moved, took_ns = _moved_bytes(report), report.get("total_ns")
    text = f"{kind} {report.get('directory', '')}".rstrip()
    if moved is not None:
        text += f": {bytes_text(moved)}"
    if took_ns:
        text += f"{' in' if moved is not None else ':'} {seconds_text(took_ns / 1e9)}"
        if moved:
            text += f" ({bytes_text(moved * 1e9 / took_ns)}/s)"
    parts = [_phases(report), *_ways(report), _rank(report)]
    return "; ".join([text, *filter(None, parts)])


def _moved_bytes(report: dict[str, Any]) -> int | None:
    return report.get("wanted_bytes" if report.get("kind") == "load" else "file_bytes")


def _phases(report: dict[str, Any]) -> str:
    phases, total_ns = report.get("phases", {}), report.get("total_ns", 0)
    return ", ".join(
        f"{name.replace('_', ' ')} {seconds_text(ns / 1e9)}"
        for name, ns in phases.items()
        if ns >= _LEAST_SHARE * total_ns
    )


def _ways(report: dict[str, Any]) -> list[str]:
    """Fast or slow plan, native or torch's path, direct or not, what was not written or read."""
    ways = []
    if report.get("path") != "native":
        ways.append(f"by torch's implementation, because {report.get('reason')}")
    else:
        ways += [f"{role} in {where}" for role, where in _roles_elsewhere(report)]
    if "fast" in report:
        ways.append("plan of the save before" if report["fast"] else "planned anew")
    if files := report.get("files_count"):
        direct = report.get("direct_files_count", 0)
        hot = report.get("hot_files_count", 0)
        how = [f"{direct} direct"] if direct else []
        how += [f"{hot} from the page cache"] if hot else []
        ways.append(f"{files} file{'s' if files > 1 else ''} ({', '.join(how) or 'buffered'})")
    for key, what in (
        ("reused_bytes", "taken over from the base"),
        ("dropped_bytes", "of replicas not written twice"),
        ("shared_bytes", "read by other ranks"),
    ):
        if report.get(key):
            ways.append(f"{bytes_text(report[key])} {what}")
    return ways


def _roles_elsewhere(report: dict[str, Any]) -> list[tuple[str, str]]:
    roles = ((role, report.get(role, "native")) for role in ("writer", "reader", "planner"))
    return [(role, where) for role, where in roles if where != "native"]


def _rank(report: dict[str, Any]) -> str:
    count = report.get("ranks_count", 1)
    return f"rank {report['rank']} of {count}" if count > 1 else ""
