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

from .._trace_merge import merged_events
from .output import CommandError
from .units import count_text, seconds_text

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


def summary(call: Call) -> str:
    """``save of run/step-100: 4 ranks, 1.2 s; longest phase: write, 0.9 s on rank 2``."""
    text = (f"{call.kind.replace('_', ' ')} of {call.directory}: "
            f"{count_text(len(call.lanes), 'rank')}, {seconds_text(call.total_s)}")  # fmt: skip
    for name, (took_s, rank) in call.longest().items():
        return f"{text}; longest phase: {name}, {seconds_text(took_s)} on rank {rank}"
    return text


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
    paths = sorted(directory.glob("*.json"), key=lambda path: _natural(path.name))
    if not paths:
        raise CommandError(f"{directory} has neither traces nor reports (*.json)")
    return _from_reports([report for path in paths for report in _reports(path, _parse(path))])


def _from_file(path: Path) -> list[Call]:
    content = _parse(path)
    if isinstance(content, dict) and "traceEvents" in content:
        return _from_events(content["traceEvents"])
    return _from_reports(_reports(path, content))


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CommandError(f"{path} is not whole JSON: {error}") from None


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


# ---- reports ----


def _reports(path: Path, content: Any) -> list[dict[str, Any]]:
    """A file holds one report or a list of them."""
    reports = content if isinstance(content, list) else [content]
    for report in reports:
        if not isinstance(report, dict) or "kind" not in report or "total_ns" not in report:
            raise CommandError(f"{path} holds no report: json.dump(dict(dcp.last_report()), file)")
    return reports


def _from_reports(reports: list[dict[str, Any]]) -> list[Call]:
    calls: list[Call] = []
    for report in reports:
        total_s, at_s = report["total_ns"] / 1e9, 0.0
        spans: list[Span] = []
        for name, ns in report.get("phases", {}).items():
            spans.append((name, at_s, at_s + ns / 1e9))
            at_s += ns / 1e9
        lane = Lane(report.get("rank", 0), 0.0, max(total_s, at_s), spans)
        _same_call(calls, Call(report["kind"], report.get("directory", "?"), False, [lane]))
    return _in_order(calls)


def _same_call(calls: list[Call], of_rank: Call) -> None:
    """Adds a rank's part to the first call of that kind and directory that lacks it; parts that
    have times are of one call if they overlap."""
    (lane,) = of_rank.lanes
    for call in calls:
        if (call.kind, call.directory) != (of_rank.kind, of_rank.directory):
            continue
        if any(other.rank == lane.rank for other in call.lanes):
            continue
        first_s = min(other.begin_s for other in call.lanes)
        if lane.begin_s <= call.total_s and first_s <= lane.end_s:
            call.lanes.append(lane)
            return
    calls.append(of_rank)


def _in_order(calls: list[Call]) -> list[Call]:
    """By their begin, which becomes 0."""
    calls.sort(key=lambda call: min(lane.begin_s for lane in call.lanes))
    for call in calls:
        zero_s = min(lane.begin_s for lane in call.lanes)
        call.lanes = [
            Lane(
                lane.rank, lane.begin_s - zero_s, lane.end_s - zero_s,
                [(name, begin - zero_s, end - zero_s) for name, begin, end in lane.spans],
                None if lane.returned_s is None else lane.returned_s - zero_s,
            )
            for lane in sorted(call.lanes, key=lambda lane: lane.rank)
        ]  # fmt: skip
    return calls


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
    calls: list[Call] = []
    for part in sorted(parts, key=lambda part: part.lanes[0].begin_s):
        _same_call(calls, part)
    return _in_order(calls)


def _add_call(process: _Process, event: dict[str, Any]) -> None:
    if event["ph"] == "X":
        process.calls.append(event)
    elif event["ph"] == "b":
        process.begins[event["id2"]["local"]] = event["ts"]
    elif event["ph"] == "e" and event["id2"]["local"] in process.begins:
        process.outcomes[process.begins[event["id2"]["local"]]] = event["ts"]


def _parts(process: _Process) -> Iterator[Call]:
    """The process's part of each of its calls."""
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
        yield Call(call["name"], call["args"]["directory"], True, [lane])


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
