"""The traces of all ranks as one file, on one line of time.  Needs neither torch nor the core.

Processes of one boot of a host share its monotonic clock, so their files are aligned exactly.
Hosts are aligned by their wall clocks, as they were when the first file of each was begun: as good
as NTP or PTP keeps them.

What killed processes and full disks leave is merged as far as it goes, line by line: a damaged file
costs its damaged lines, one that is no trace is left out, and both are named.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["MergedTraces", "events_of", "merge_traces", "merged_events"]

_HEAD = "dcp_native"
"""Name of a file's first event (_trace.py)."""
_FACTS = {"rank": int, "host": str, "pid": int, "boot_id": str,
          "start_monotonic_ns": int, "start_unix_ns": int}  # fmt: skip
_MOST_HEAD_CHARS = 1 << 16
_MOST_RANKS = 1 << 20


@dataclasses.dataclass
class MergedTraces:
    """What :func:`merge_traces` found in a directory.

    Attributes:
        files: names of the files that were merged, by rank.
        damaged: of these, how many lines were no whole events and are missing: the last one of a
            process that was killed while it wrote, or blocks that a failed machine lost.
        left_out: names of the others, and why.
        missing_ranks: of the job, those that left no file.
    """

    files: list[str] = dataclasses.field(default_factory=list)
    damaged: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    missing_ranks: list[int] = dataclasses.field(default_factory=list)


class _NoTrace(Exception):
    """Why a file is left out."""


def merge_traces(
    directory: str | os.PathLike, output: str | os.PathLike, *, ranks: set[int] | None = None
) -> MergedTraces:
    """Merge the files of ``Config.trace``.

    Args:
        directory: where they are.  Those of running and of killed processes are merged as far as
            they go; files that are no traces are left out.
        output: a new file for https://ui.perfetto.dev or chrome://tracing.
        ranks: only these.

    Returns:
        What was merged, and what was not.  The output has it too, in ``otherData``.

    Raises:
        FileNotFoundError: there is no trace in ``directory``.
    """
    target = Path(output)
    found = MergedTraces()
    files = _aligned(Path(directory), ranks, found, target)
    part = target.with_name(f"{target.name}.part")
    with open(part, "w") as out:
        out.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        before = ""
        for event in _merged(files, found):
            out.write(before + json.dumps(event, separators=(",", ":")))
            before = ",\n"
        out.write(f'\n],"otherData":{json.dumps(dataclasses.asdict(found))}}}\n')
    os.replace(part, target)
    return found


def merged_events(directory: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """What :func:`merge_traces` would write."""
    found = MergedTraces()
    return _merged(_aligned(Path(directory), None, found, None), found)


def events_of(path: Path) -> list[dict[str, Any]] | None:
    """The whole events of one process's file; None where it is no trace of ours."""
    try:
        _facts_of(path)
    except _NoTrace:
        return None
    return [event for event in _events(path) if event is not None]


def _aligned(
    directory: Path, ranks: set[int] | None, found: MergedTraces, output: Path | None
) -> list[tuple[Path, float]]:
    """The files by rank, and how many microseconds after the first each was begun."""
    files: list[tuple[Path, dict[str, Any]]] = []
    for path in sorted(directory.glob("*.json")):
        if output is not None and path.resolve() == output.resolve():
            continue
        try:
            files.append((path, _facts_of(path)))
        except _NoTrace as reason:
            found.left_out[path.name] = str(reason)
    job = range(min(max((facts.get("ranks_count", 0) for _, facts in files), default=0),
                    _MOST_RANKS))  # fmt: skip
    present = {facts["rank"] for _, facts in files}
    found.missing_ranks = [
        rank for rank in sorted(job if ranks is None else ranks) if rank not in present
    ]
    files = [file for file in files if ranks is None or file[1]["rank"] in ranks]
    if not files:
        why = "".join(f"; {name}: {reason}" for name, reason in found.left_out.items())
        raise FileNotFoundError(f"there is no trace of dcp_native in {os.fspath(directory)}{why}")
    files.sort(key=lambda file: (file[1]["rank"], file[1]["start_unix_ns"]))
    found.files = [path.name for path, _ in files]
    starts = _starts_ns([facts for _, facts in files])
    first_ns = min(starts)
    return [(path, (start_ns - first_ns) / 1000)
            for (path, _), start_ns in zip(files, starts, strict=True)]  # fmt: skip


def _merged(files: list[tuple[Path, float]], found: MergedTraces) -> Iterator[dict[str, Any]]:
    for pid, (path, later_us) in enumerate(files):
        for event in _events(path):
            if event is None:
                found.damaged[path.name] = found.damaged.get(path.name, 0) + 1
                continue
            event["pid"] = pid  # two processes may have had one rank
            if "ts" in event:
                event["ts"] += later_us
            yield event


def _events(path: Path) -> Iterator[dict[str, Any] | None]:
    """One for each line; None for one that is no whole event."""
    with open(path, errors="replace") as file:
        for line in file:
            text = line.strip().rstrip(",")
            if text not in ("", "[", "]"):
                yield _event(text)


def _event(text: str) -> dict[str, Any] | None:
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(event, dict) and isinstance(event.get("ph"), str) and "name" in event
    times = whole and all(isinstance(event.get(key, 0), (int, float)) for key in ("ts", "dur"))
    return event if times else None


def _facts_of(path: Path) -> dict[str, Any]:
    """What a trace of ours says about its process."""
    try:
        with open(path, errors="replace") as file:
            begin, line = file.readline(4), file.readline(_MOST_HEAD_CHARS)
    except OSError as error:
        raise _NoTrace(f"it can not be read: {error.strerror}") from None
    if begin == "":
        raise _NoTrace("it is empty")
    if begin != "[\n":
        raise _NoTrace("it is no trace of dcp_native")
    head = _event(line.strip().rstrip(","))
    if head is None:
        raise _NoTrace("it ends before the first event does")
    facts = head.get("args")
    if head["name"] != _HEAD or not isinstance(facts, dict):
        raise _NoTrace("it is no trace of dcp_native")
    wrong = [key for key, kind in _FACTS.items() if not isinstance(facts.get(key), kind)]
    if wrong or not isinstance(facts.get("ranks_count", 0), int):
        raise _NoTrace(f"its first event does not say {wrong or 'ranks_count'}")
    return facts


def _starts_ns(files: list[dict[str, Any]]) -> list[int]:
    """When each file was begun, by the wall clock of the first file of its host."""
    offsets: dict[str, int] = {}
    starts = []
    for facts in files:
        clock = facts["boot_id"] or f"{facts['host']} {facts['pid']}"
        offset = facts["start_unix_ns"] - facts["start_monotonic_ns"]
        starts.append(facts["start_monotonic_ns"] + offsets.setdefault(clock, offset))
    return starts
