"""What a trace costs a save and a load: wall time and CPU seconds with it over those without.

    python benchmarks/tracing.py [--quick] [--repeats 20] [--dir DIR] [--json FILE]

Every round runs a case with and without, now the one first and now the other, so that what else
the machine does burdens both alike; a figure is the median of the rounds' ratios.  CPU seconds are
the whole process's (getrusage), the thread that writes the trace included: what it has left to
write is waited for outside the wall time and within the CPU time.  At last the trace is read: it
has to hold every call that was made, and every byte of the files in its writes.
"""

from __future__ import annotations

import logging
import pathlib
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from program import ROOT, machine, options, publish, row

import dcp_native as dcp
from dcp_native import _trace
from dcp_native._trace_merge import merged_events

TARGET = 1.01
CASES = {
    "256 MiB of 4 MiB tensors": (64, 1 << 20, 2),
    "1 MiB of 1 KiB tensors": (1024, 256, 40),
}
"""Tensors, elements of each, and calls in a measurement."""


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measured(call: Callable[[], None], calls: int, traces: str | None) -> tuple[float, float]:
    """Wall and CPU seconds of so many calls."""
    dcp.configure(trace=traces)
    _trace.stop()
    _trace.follow_config(0)
    _trace.flush()
    begin_s, begin_cpu_s = time.perf_counter(), cpu_s()
    for _ in range(calls):
        call()
    wall_s = time.perf_counter() - begin_s
    if traces is not None and not _trace.flush():
        raise RuntimeError("the trace could not be written")
    return wall_s, cpu_s() - begin_cpu_s


def ratios(
    call: Callable[[], None], calls: int, traces: str, rounds: int
) -> tuple[list[float], list[float]]:
    """Of wall time and of CPU time, each round's."""
    walls, cpus = [], []
    measured(call, 1, traces)
    for i in range(rounds):
        ways = (traces, None) if i % 2 else (None, traces)
        took = {way: measured(call, calls, way) for way in ways}
        (wall_s, used_s), (bare_wall_s, bare_used_s) = took[traces], took[None]
        walls.append(wall_s / bare_wall_s)
        cpus.append(used_s / bare_used_s)
    return walls, cpus


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
        if dcp.config().trace is not None:
            self.traced["save"] += 1
            self.file_bytes += dcp.last_report()["file_bytes"]

    def load(self) -> None:
        dcp.load(self.into, checkpoint_id=self.path)
        self.traced["load"] += dcp.config().trace is not None

    def wrong(self) -> list[str]:
        _trace.stop()
        differing = [k for k in self.state if not torch.equal(self.state[k], self.into[k])]
        missing = missing_from(self.traces, self.traced, self.file_bytes)
        return [*missing, *(f"{key} differs" for key in differing)]


def main() -> int:
    parser = options(__doc__, repeats=20)
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
    for name, (count, numel, calls) in CASES.items():
        with tempfile.TemporaryDirectory(prefix="dcp-bench-", dir=args.dir) as where:
            case = Case(pathlib.Path(where), 2 if args.quick else count, numel)
            for kind, call in (("save", case.save), ("load", case.load)):
                what = f"{kind}, {name}"
                walls, cpus = ratios(
                    call, 1 if args.quick else calls, str(case.traces), args.repeats
                )
                details[what] = {"wall_ratios": walls, "cpu_ratios": cpus}
                for measure, found in (("CPU", cpus), ("wall", walls)):
                    ratio = statistics.median(found)
                    rows.append(
                        row(f"{what}: {measure} with a trace over without", f"{ratio:.3f}",
                            target=f"{TARGET}", met=ratio <= TARGET)
                    )  # fmt: skip
            wrong += case.wrong()
    return publish("tracing", args, about, rows, details, wrong)


if __name__ == "__main__":
    sys.exit(main())
