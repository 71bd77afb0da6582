"""coordinator.py: what the coordinator of a large save pays, beside stock torch's own steps.

    python benchmarks/coordinator.py                    # 256 ranks x 1000 tensors: about 3 minutes
    python benchmarks/coordinator.py --quick            # seconds; the test suite runs this

Both sides plan the same synthetic job, changed plans, all steps: plans in, dedup, global plan,
validation, answers out, `.metadata` written and synced in memory. Ours is save_scaling.c, whose
coordinator is one of as many simulated ranks; torch's is torch_coordinator.py. Figures are CPU
seconds of the coordinator's thread: in one process the ranks compete for cores, and a transport
would cost what copying costs. Ours is its round behind a change of every rank's plan: the ranks had
saved with one tensor less. plan_scaling.c splits our steps.

The two `.metadata` must hold the same. Then ours alone grows to 4096 ranks; the exponent is the
slope of log(time) over log(items): 1 is linear, and n log n is 1.07 here.
"""

import argparse
import math
import pathlib
import statistics
import sys
import tempfile

from program import c_program, finish, options, row, say, seconds, times
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch_coordinator import TorchCoordinator

FULL = {"ranks": 256, "tensors": 1000}
QUICK = {"ranks": 8, "tensors": 100}
SWEEP = ((64, 1000), (256, 1000), (1024, 1000), (1024, 2000), (4096, 1000))
QUICK_SWEEP = ((4, 64), (8, 64), (16, 64))
TARGET_RATIO = 100
SPLIT = {  # torch's steps and the figures of plan_scaling that do the same
    "plans in": (("unpickle plans",), ("decode",)),
    "dedup": (("dedup",), ("names alone", "dedup alone")),
    "global plan, plans out, results in": (
        ("global plan", "merge of paths", "pickle final plans", "unpickle results"),
        ("grouping", "layouts alone"),
    ),
    "validate": (("validate",), ("validation alone",)),
    "metadata": (("write .metadata", "pickle metadata for all"), ("metadata",)),
}


def same_metadata(ours: Metadata, theirs: Metadata) -> list[str]:
    """What differs between the checkpoints that two `.metadata` describe."""
    fields = ("state_dict_metadata", "planner_data", "storage_data", "version")
    return [f"{f} differs" for f in fields if getattr(ours, f) != getattr(theirs, f)]


def ours_once(directory: pathlib.Path, ranks: int, tensors: int) -> dict:
    """The SLOW round after a change: the ranks saved `tensors` - 1 tensors before."""
    directory.mkdir(exist_ok=True)
    _, changed = c_program("save_scaling", ranks, tensors - 1, 1, 0, directory / ".metadata")
    return changed


def split_ours(ranks: int, tensors: int) -> dict[str, float]:
    """Seconds by step of plan_scaling; what dedup, validation and layouts leave is grouping."""
    [figures] = c_program("plan_scaling", ranks, tensors, "fsdp")
    steps = {k: v / 1e9 for k, v in figures.items() if isinstance(v, int)}
    parts = sum(steps[k] for k in ("names alone", "dedup alone", "validation alone"))
    steps["grouping"] = max(0.0, steps["global plan"] - parts - steps["layouts alone"])
    return steps


def compare(files: pathlib.Path, ranks: int, tensors: int, repeats: int) -> tuple[dict, list[str]]:
    """Both sides in turn; leaves ours/.metadata and torch/.metadata in `files`."""
    ours, theirs, split, wrong = [], [], [], []
    ours_once(files / "ours", ranks, tensors)
    (files / "torch").mkdir(exist_ok=True)
    stored = FileSystemReader(files / "ours").read_metadata().storage_data
    say(f"coordinator: {ranks} ranks x {tensors}: torch's plans ...")
    torch_side = TorchCoordinator(ranks, tensors, stored)
    for turn in range(repeats):
        ours.append(ours_once(files / "ours", ranks, tensors))
        written = torch_side.run(str(files / "torch"))
        theirs.append(dict(torch_side.steps_s))
        split.append(split_ours(ranks, tensors))
        if turn == 0:
            read = FileSystemReader(files / "ours").read_metadata()
            wrong = [f"coordinator: {w}" for w in same_metadata(read, written)]
        del written
        say(f"  round {turn + 1} of {repeats} done")
    steps = {step: statistics.median(t[step] for t in theirs) for step in theirs[0]}
    return {
        "ranks": ranks,
        "tensors": tensors,
        "ours_cpu_s": statistics.median(o["cpu_ns"] for o in ours) / 1e9,
        "ours_steps_cpu_s": {
            step: statistics.median(o["steps_cpu_ns"][step] for o in ours) / 1e9
            for step in ours[0]["steps_cpu_ns"]
        },
        "ours_split_s": {k: statistics.median(s[k] for s in split) for k in split[0]},
        "torch_cpu_s": statistics.median(sum(t.values()) for t in theirs),
        "torch_steps_cpu_s": steps,
    }, wrong


def exponent(points: list[dict]) -> float:
    """The least-squares slope of log(CPU time) over log(items)."""
    x = [math.log(p["ranks"] * p["tensors"]) for p in points]
    y = [math.log(p["cpu_ns"]) for p in points]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def sweep(sizes: tuple[tuple[int, int], ...], repeats: int) -> dict:
    """Ours from few ranks to many, medians by CPU time."""
    points = []
    for ranks, tensors in sizes:
        say(f"coordinator: {ranks} ranks x {tensors} ...")
        runs = [c_program("save_scaling", ranks, tensors - 1, 1)[1] for _ in range(repeats)]
        points.append(sorted(runs, key=lambda r: r["cpu_ns"])[len(runs) // 2])
    first, last = (p["ranks"] * p["tensors"] for p in (points[0], points[-1]))
    linear_log = 1 + math.log(math.log2(last) / math.log2(first)) / math.log(last / first)
    return {"points": points, "exponent": exponent(points), "linear_log_exponent": linear_log}


def rows_of(compared: dict, swept: dict) -> list[dict]:
    ours, theirs = compared["ours_cpu_s"], compared["torch_cpu_s"]
    size = f"{compared['ranks']} x {compared['tensors']}"
    rows = [
        row(
            f"coordinator, {size}, all steps, plan changed, CPU",
            seconds(ours),
            f"{seconds(theirs)} ({times(theirs, ours)})",
            target=f">= {TARGET_RATIO}x",
            met=theirs / ours >= TARGET_RATIO,
        )
    ]
    for name, (torch_steps, our_steps) in SPLIT.items():
        t = sum(compared["torch_steps_cpu_s"][s] for s in torch_steps)
        o = sum(compared["ours_split_s"][s] for s in our_steps)
        rows.append(row(f"- {name}", seconds(o), f"{seconds(t)} ({times(t, o)})"))
    for p in swept["points"]:
        items = p["ranks"] * p["tensors"]
        rows.append(
            row(
                f"coordinator, {p['ranks']} x {p['tensors']} simulated",
                f"{seconds(p['cpu_ns'] / 1e9)}, {p['cpu_ns'] / items:.0f} ns and"
                f" {p['coordinator_bytes'] / items:.0f} B an item (a rank's plan"
                f" {p['plans_bytes'] / items:.0f} B, layout {p['layouts_bytes'] / items:.0f} B)",
                target="finishes",
                met=True,
            )
        )
    slope, limit = swept["exponent"], swept["linear_log_exponent"]
    rows.append(
        row(
            "coordinator, growth: time ~ items^k",
            f"k = {slope:.2f}",
            limit=f"n log n: k = {limit:.2f}",
            target="linear-log",
            met=slope <= limit + 0.1,
        )
    )
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = options(__doc__, repeats=3)
    p.add_argument("--files", type=pathlib.Path, help="leave both `.metadata` here")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="dcp-bench-", dir="/dev/shm") as scratch:
        files = args.files or pathlib.Path(scratch)
        files.mkdir(parents=True, exist_ok=True)
        compared, wrong = compare(files, **(QUICK if args.quick else FULL), repeats=args.repeats)
        swept = sweep(QUICK_SWEEP if args.quick else SWEEP, 1 if args.quick else 3)
    details = {"compared": compared, "sweep": swept}
    return finish(args, rows_of(compared, swept), details, wrong)


if __name__ == "__main__":
    sys.exit(main())
