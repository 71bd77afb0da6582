"""When each rank was in which phase of a save or load: read from traces or from reports.

Traces have times: ranks lie on one line of time, gaps and what goes on behind an asynchronous save
included.  A report has how long each phase took, in order, and nothing about when it began: its
phases are laid one after another from 0, and what no phase took comes last.

Of a trace the phases are those of reports: what the calling thread went through, an inner phase
interrupting the outer one, and of a background save ``write``, ``publish`` and ``settle``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .._trace_merge import events_of, merged_events
from .output import CommandError
from .units import count_text, natural_order, seconds_text

_CORE_STEPS = {
    "write files": "write",
    "publish": "publish",
    "fill the arena": "stage",
    "read with the group": "read",
}
"""The core's own steps: of the calling thread they lie within phases; behind it they are phases."""

Span = tuple[str, float, float]
"""A phase, when it began and when it ended, in seconds since the first rank began the call."""


@dataclasses.dataclass
class Lane:
    """One rank's part of a call."""

    rank: int
    begin_s: float
    end_s: float
    spans: list[Span]
    returned_s: float | None = None
    """When the program could go on, of a call that goes on behind it."""

    def earlier(self, by_s: float) -> Lane:
        return Lane(
            self.rank, self.begin_s - by_s, self.end_s - by_s,
            [(name, begin - by_s, end - by_s) for name, begin, end in self.spans],
            None if self.returned_s is None else self.returned_s - by_s,
        )  # fmt: skip

    def by_phase(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, begin_s, end_s in self.spans:
            found[name] = found.get(name, 0.0) + end_s - begin_s
        return found


@dataclasses.dataclass
class Call:
    """One save or load of all ranks of which something is known; lanes by rank."""

    kind: str
    directory: str
    has_times: bool
    lanes: list[Lane]

    @property
    def total_s(self) -> float:
        return max(lane.end_s for lane in self.lanes)

    def longest(self) -> dict[str, tuple[float, int]]:
        """Of each phase the longest time that a rank was in it, and which; the longest first."""
        found: dict[str, tuple[float, int]] = {}
        for lane in self.lanes:
            for name, took_s in lane.by_phase().items():
                if name not in found or took_s > found[name][0]:
                    found[name] = took_s, lane.rank
        return dict(sorted(found.items(), key=lambda item: -item[1][0]))

    def facts(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "directory": self.directory,
            "ranks": len(self.lanes),
            "total_ns": round(self.total_s * 1e9),
            "phases": {
                name: {"longest_ns": round(took_s * 1e9), "rank": rank}
                for name, (took_s, rank) in self.longest().items()
            },
        }


def summary(call: Call) -> list[str]:
    """``save of run/step-100: 4 ranks, 1.2 s``, ``longest phase: write, 0.9 s on rank 2``."""
    texts = [f"{call.kind.replace('_', ' ')} of {call.directory}: "
             f"{count_text(len(call.lanes), 'rank')}, {seconds_text(call.total_s)}"]  # fmt: skip
    for name, (took_s, rank) in call.longest().items():
        texts.append(f"longest phase: {name}, {seconds_text(took_s)} on rank {rank}")
        break
    return texts


def calls_of(source: Path) -> list[Call]:
    """The saves and loads that a trace (a directory of them, one file, a merged one) or reports (a
    file, a directory of them) tell of, in order."""
    try:
        found = _from_directory(source) if source.is_dir() else _from_file(source)
    except (KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"{source}: neither a trace nor a report: {error!r}") from None
    if not found:
        raise CommandError(f"{source} tells of no save or load that has ended", 1)
    return found


def _from_directory(directory: Path) -> list[Call]:
    try:
        return _from_events(merged_events(directory))
    except FileNotFoundError:
        pass
    paths = sorted(directory.glob("*.json"), key=lambda path: natural_order(path.name))
    if not paths:
        raise CommandError(f"{directory} has neither traces nor reports (*.json)")
    return _from_reports([report for path in paths for report in _reports(path, _parse(path))])


def _from_file(path: Path) -> list[Call]:
    if (events := events_of(path)) is not None:
        return _from_events(events)
    content = _parse(path)
    if isinstance(content, dict) and "traceEvents" in content:
        return _from_events(content["traceEvents"])
    return _from_reports(_reports(path, content))


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CommandError(f"{path} is not whole JSON: {error}") from None


# ---- reports ----


def _reports(path: Path, content: Any) -> list[dict[str, Any]]:
    """A file holds one report or a list of them."""
    reports = content if isinstance(content, list) else [content]
    for report in reports:
        if not isinstance(report, dict) or "kind" not in report or "total_ns" not in report:
            raise CommandError(f"{path} holds no report: json.dump(dict(dcp.last_report()), file)")
    return reports


def _from_reports(reports: list[dict[str, Any]]) -> list[Call]:
    joined = _Joined(has_times=False)
    for report in reports:
        total_s, at_s = report["total_ns"] / 1e9, 0.0
        spans: list[Span] = []
        for name, ns in report.get("phases", {}).items():
            spans.append((name, at_s, at_s + ns / 1e9))
            at_s += ns / 1e9
        lane = Lane(report.get("rank", 0), 0.0, max(total_s, at_s), spans)
        joined.add(report["kind"], report.get("directory", "?"), lane)
    return joined.calls()


@dataclasses.dataclass
class _Part:
    """What is known of a call so far."""

    kind: str
    directory: str
    begin_s: float
    end_s: float
    lanes: dict[int, Lane]

    def takes(self, lane: Lane) -> bool:
        overlaps = lane.begin_s <= self.end_s and self.begin_s <= lane.end_s
        return overlaps and lane.rank not in self.lanes


class _Joined:
    """Lanes joined to calls: a lane belongs to the first call of its kind and directory that has
    none of its rank and that it overlaps; without times all overlap."""

    def __init__(self, *, has_times: bool) -> None:
        self.has_times = has_times
        self._parts: list[_Part] = []
        self._alike: dict[tuple[str, str], list[_Part]] = {}

    def add(self, kind: str, directory: str, lane: Lane) -> None:
        alike = self._alike.setdefault((kind, directory), [])
        part = next((part for part in alike if part.takes(lane)), None)
        if part is None:
            part = _Part(kind, directory, lane.begin_s, lane.end_s, {})
            alike.append(part)
            self._parts.append(part)
        part.lanes[lane.rank] = lane
        part.begin_s, part.end_s = min(part.begin_s, lane.begin_s), max(part.end_s, lane.end_s)

    def calls(self) -> list[Call]:
        """By their begin, or as they were added; each begins at 0."""
        return [
            Call(
                part.kind, part.directory, self.has_times,
                [part.lanes[rank].earlier(part.begin_s) for rank in sorted(part.lanes)],
            )
            for part in sorted(self._parts, key=lambda part: part.begin_s)
        ]  # fmt: skip


# ---- traces ----


@dataclasses.dataclass
class _Process:
    """What a process's trace says about calls and phases; microseconds."""

    rank: int = 0
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    phases: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    begins: dict[str, float] = dataclasses.field(default_factory=dict)
    outcomes: dict[float, float] = dataclasses.field(default_factory=dict)
    """When what went on behind a call had ended, by the call's begin."""


def _from_events(events: Iterable[dict[str, Any]]) -> list[Call]:
    processes: dict[int, _Process] = {}
    for event in events:
        process = processes.setdefault(event["pid"], _Process(rank=event["pid"]))
        if event["name"] == "process_name" and event["ph"] == "M":
            if found := re.match(r"rank ([0-9]+)", event["args"]["name"]):
                process.rank = int(found[1])
        elif event.get("cat") == "phase" and event["ph"] == "X":
            process.phases.append(event)
        elif event.get("cat") == "call":
            _add_call(process, event)
    parts = [part for process in processes.values() for part in _parts(process)]
    joined = _Joined(has_times=True)
    for kind, directory, lane in sorted(parts, key=lambda part: part[2].begin_s):
        joined.add(kind, directory, lane)
    return joined.calls()


def _add_call(process: _Process, event: dict[str, Any]) -> None:
    if event["ph"] == "X":
        process.calls.append(event)
    elif event["ph"] == "b":
        process.begins[event["id2"]["local"]] = event["ts"]
    elif event["ph"] == "e" and event["id2"]["local"] in process.begins:
        process.outcomes[process.begins[event["id2"]["local"]]] = event["ts"]


def _parts(process: _Process) -> Iterator[tuple[str, str, Lane]]:
    """The process's part of each of its calls, with the call's kind and directory."""
    for call in process.calls:
        returned = call["ts"] + call["dur"]
        spans = [
            (phase["name"], phase["ts"], phase["ts"] + phase["dur"])
            for phase in process.phases
            if phase["tid"] == call["tid"] and call["ts"] <= phase["ts"] <= returned
            and phase["name"] not in _CORE_STEPS
        ]  # fmt: skip
        end = process.outcomes.get(call["ts"], returned)
        if end > returned:
            spans += _behind(process, call, spans, end)
        in_s = [(name, begin / 1e6, end / 1e6) for name, begin, end in _innermost(spans)]
        lane = Lane(process.rank, call["ts"] / 1e6, end / 1e6, in_s)
        lane.returned_s = returned / 1e6 if end > returned else None
        yield call["name"], call["args"]["directory"], lane


def _behind(
    process: _Process, call: dict[str, Any], spans: list[Span], end: float
) -> Iterator[Span]:
    """What went on behind a call until its outcome; not what it waited for, the call before it."""
    begin = max((till for name, _, till in spans if name == "wait"), default=call["ts"])
    written = call["ts"] + call["dur"]
    for phase in process.phases:
        till = phase["ts"] + phase["dur"]
        name = _CORE_STEPS.get(phase["name"])
        if phase["tid"] != call["tid"] and name is not None and begin <= phase["ts"] <= till <= end:
            yield name, phase["ts"], till
            written = max(written, till) if name == "write" else written
    if written < end:
        yield "settle", written, end


def _innermost(spans: list[Span]) -> list[Span]:
    """Spans that nest as spans that do not: at any time the one that began last."""
    edges = sorted({edge for _, begin, end in spans for edge in (begin, end)})
    spans = sorted(spans, key=lambda span: (span[1], -span[2]))
    found: list[Span] = []
    open_spans: list[Span] = []
    taken = 0
    for begin, end in itertools.pairwise(edges):
        while taken < len(spans) and spans[taken][1] <= begin:
            open_spans.append(spans[taken])
            taken += 1
        open_spans = [span for span in open_spans if span[2] > begin]
        if not open_spans:
            continue
        name = open_spans[-1][0]
        if found and found[-1][0] == name and found[-1][2] == begin:
            found[-1] = (name, found[-1][1], end)
        else:
            found.append((name, begin, end))
    return found
