"""What a trace costs a save and a load.

    python benchmarks/tracing.py [--quick] [--repeats 300] [--dir DIR] [--json FILE]

Calls with a trace, without, and without once more take turns, one by one; a round is one of each.
While a call is without, the trace is put aside, its thread goes on.  That thread, which writes the
trace down, is counted by the kernel's clock of it, over as many calls with a trace in a row: its
CPU seconds are a row of their own, and in the CPU of the calls with a trace, not in that of the
others.  Wall time is that of the calls.  Ratios are of means without the slowest fifth of each kind
(the disk's); the limit of a ratio is that of the calls without and without once more, which differ
by nothing but noise.  At last the trace is read: it has to hold every call that was made, and every
byte of the files in its writes.
"""

from __future__ import annotations

import logging
import pathlib
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from program import ROOT, machine, options, publish, row, seconds

import dcp_native as dcp
from dcp_native import _native, _trace
from dcp_native._trace_merge import merged_events

TARGET = 1.01
CASES = {
    "256 MiB of 4 MiB tensors": (64, 1 << 20, 3),
    "1 MiB of 1 KiB tensors": (1024, 256, 1),
}
"""Tensors, elements of each, and what part of the rounds are made."""


WAYS = ("with", "without", "again")


class Calls(NamedTuple):
    """Seconds of each, CPU seconds without those of the trace's thread."""

    wall_s: list[float]
    cpu_s: list[float]


def put_aside(recording: _trace._Recording | None, traces: str | None) -> None:
    """Record from now on, or (None) no more, without the end of the file."""
    dcp.configure(trace=traces)
    _trace._recording = recording
    _native.trace_switch(recording is not None)


def measured(call: Callable[[], None], traces: str, rounds: int) -> tuple[dict[str, Calls], float]:
    """The calls by their way, and CPU seconds of the trace's thread."""
    found = {way: Calls([], []) for way in WAYS}
    dcp.configure(trace=traces)
    call()
    _trace.flush()
    recording = _trace._recording
    assert recording is not None
    clock = time.pthread_getcpuclockid(recording._thread.ident or 0)
    start_s = time.clock_gettime(clock)
    for _ in range(rounds):
        call()
    writer_s = time.clock_gettime(clock) - start_s
    for i in range(rounds):
        for way in WAYS[i % 3 :] + WAYS[: i % 3]:
            put_aside(*((recording, traces) if way == "with" else (None, None)))
            begin_cpu_s = time.process_time() - time.clock_gettime(clock)
            begin_s = time.perf_counter()
            call()
            found[way].wall_s.append(time.perf_counter() - begin_s)
            cpu_s = time.process_time() - time.clock_gettime(clock)
            found[way].cpu_s.append(cpu_s - begin_cpu_s)
    put_aside(recording, traces)
    return found, writer_s


def mean(samples: list[float]) -> float:
    return statistics.fmean(sorted(samples)[: max(1, len(samples) * 4 // 5)])


def missing_from(traces: pathlib.Path, calls: dict[str, int], file_bytes: int) -> list[str]:
    events = list(merged_events(traces))
    wrong = []
    for kind, count in calls.items():
        found = sum(e["name"] == kind and e.get("cat") == "call" for e in events)
        if found != count:
            wrong.append(f"{found} of {count} calls of {kind} are in the trace")
    writes = [e for e in events if e["name"] == "write" and e.get("cat") == "io" and e["ph"] != "e"]
    written = sum(e["args"]["bytes"] for e in writes)
    if not file_bytes <= written <= file_bytes + 4096 * calls["save"]:
        wrong.append(f"{written} bytes of {file_bytes} are in the trace's writes")
    return wrong


class Case:
    """Saves and loads of one state dict, in a directory of their own."""

    def __init__(self, where: pathlib.Path, count: int, numel: int) -> None:
        self.path, self.traces = where / "c", where / "traces"
        self.state = {f"w{i}": torch.randn(numel) for i in range(count)}
        self.into = {key: torch.zeros_like(leaf) for key, leaf in self.state.items()}
        self.traced = {"save": 0, "load": 0}
        self.file_bytes = 0
        """Of the saves that were traced."""

    def save(self) -> None:
        dcp.save(self.state, checkpoint_id=self.path)
        traced = dcp.config().trace is not None
        self.traced["save"] += traced
        self.file_bytes += dcp.last_report()["file_bytes"] * traced

    def load(self) -> None:
        dcp.load(self.into, checkpoint_id=self.path)
        self.traced["load"] += dcp.config().trace is not None

    def wrong(self) -> list[str]:
        _trace.stop()
        differing = [k for k in self.state if not torch.equal(self.state[k], self.into[k])]
        missing = missing_from(self.traces, self.traced, self.file_bytes)
        return [*missing, *(f"{key} differs" for key in differing)]


def rows_of(what: str, calls: dict[str, Calls], writer_s: float, rounds: int) -> list[dict]:
    traced, bare, again = (calls[way] for way in WAYS)
    each_s = writer_s / rounds
    share = each_s / (mean(traced.cpu_s) + each_s)
    cpu = (mean(traced.cpu_s) + each_s) / mean(bare.cpu_s)
    wall = mean(traced.wall_s) / mean(bare.wall_s)
    return [
        row(f"{what}: {seconds(mean(bare.wall_s))}, with a trace over without", f"{wall:.3f}",
            limit=f"{mean(again.wall_s) / mean(bare.wall_s):.3f}", target=f"{TARGET}",
            met=wall <= TARGET),
        row(f"- CPU, {seconds(mean(bare.cpu_s))}", f"{cpu:.3f}",
            limit=f"{mean(again.cpu_s) / mean(bare.cpu_s):.3f}", target=f"{TARGET}",
            met=cpu <= TARGET),
        row("- CPU of the trace's thread", f"{100 * share:.2f}%"),
    ]  # fmt: skip


def main() -> int:
    parser = options(__doc__, repeats=300)
    parser.add_argument(
        "--dir", type=pathlib.Path, default=ROOT / "build", help="on the disk to measure"
    )
    args = parser.parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    about = machine()
    warnings.simplefilter("ignore")
    logging.getLogger("dcp_native").setLevel(logging.ERROR)
    rows: list[dict] = []
    details: dict[str, dict] = {}
    wrong: list[str] = []
    for name, (count, numel, share) in CASES.items():
        rounds = -(-args.repeats // share)
        with tempfile.TemporaryDirectory(prefix="dcp-bench-", dir=args.dir) as where:
            case = Case(pathlib.Path(where), 2 if args.quick else count, numel)
            for kind, call in (("save", case.save), ("load", case.load)):
                calls, writer_s = measured(call, str(case.traces), rounds)
                details[f"{kind}, {name}"] = {
                    **{way: one._asdict() for way, one in calls.items()}, "writer_s": writer_s
                }  # fmt: skip
                rows += rows_of(f"{kind}, {name}", calls, writer_s, rounds)
            wrong += case.wrong()
    return publish("tracing", args, about, rows, details, wrong)


if __name__ == "__main__":
    sys.exit(main())
