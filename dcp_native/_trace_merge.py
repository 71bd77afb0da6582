"""The traces of all ranks as one file, on one line of time.  Needs neither torch nor the core.

Processes of one boot of a host share its monotonic clock, so their files are aligned exactly.
Hosts are aligned by their wall clocks, as they were when the first file of each was begun: as good
as NTP or PTP keeps them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["merge_traces"]


def merge_traces(
    directory: str | os.PathLike, output: str | os.PathLike, *, ranks: set[int] | None = None
) -> int:
    """Merge the files of ``Config.trace``.

    Args:
        directory: where they are; other files in it are left alone.
        output: a new file for https://ui.perfetto.dev or chrome://tracing.
        ranks: only these.

    Returns:
        How many files were merged.

    Raises:
        FileNotFoundError: there is no trace in ``directory``.
        ValueError: a file that begins as a trace of ours is no JSON (its process was killed while
            it wrote).
    """
    files = _aligned(Path(directory), ranks)
    target = Path(output)
    part = target.with_name(f"{target.name}.part")
    with open(part, "w") as out:
        out.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        before = ""
        for event in _merged(files):
            out.write(before + json.dumps(event, separators=(",", ":")))
            before = ",\n"
        out.write("\n]}\n")
    os.replace(part, target)
    return len(files)


def merged_events(directory: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """What :func:`merge_traces` would write."""
    return _merged(_aligned(Path(directory), None))


def _aligned(directory: Path, ranks: set[int] | None) -> list[tuple[Path, float]]:
    """The files by rank, and how many microseconds after the first each was begun."""
    files = [(path, facts) for path, facts in _traces(directory)
             if ranks is None or facts["rank"] in ranks]  # fmt: skip
    if not files:
        raise FileNotFoundError(f"there is no trace of dcp_native in {os.fspath(directory)}")
    files.sort(key=lambda file: (file[1]["rank"], file[1]["start_unix_ns"]))
    starts = _starts_ns([facts for _, facts in files])
    first_ns = min(starts)
    return [(path, (start_ns - first_ns) / 1000)
            for (path, _), start_ns in zip(files, starts, strict=True)]  # fmt: skip


def _merged(files: list[tuple[Path, float]]) -> Iterator[dict[str, Any]]:
    for pid, (path, later_us) in enumerate(files):
        for event in _events(path):
            event["pid"] = pid  # two processes may have had one rank
            if "ts" in event:
                event["ts"] += later_us
            yield event


def _traces(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Files of ours, with what they say about themselves."""
    for path in sorted(directory.glob("*.json")):
        with open(path, errors="replace") as file:
            head = file.readline()
        if '"written_by": "dcp_native"' in head:
            yield path, _parse(path, head.rstrip() + "]}")["otherData"]


def _events(path: Path) -> list[dict[str, Any]]:
    return _parse(path, path.read_text())["traceEvents"]


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not whole: {error}") from None


def _starts_ns(files: list[dict[str, Any]]) -> list[int]:
    """When each file was begun, by the wall clock of the first file of its host."""
    offsets: dict[str, int] = {}
    starts = []
    for facts in files:
        clock = facts["boot_id"] or f"{facts['host']} {facts['pid']}"
        offset = facts["start_unix_ns"] - facts["start_monotonic_ns"]
        starts.append(facts["start_monotonic_ns"] + offsets.setdefault(clock, offset))
    return starts
