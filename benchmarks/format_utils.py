"""format_utils.py: conversions between checkpoints and torch.save files, and what they cost.

    python benchmarks/format_utils.py            # about 3 minutes, 7 GB of disk
    python benchmarks/format_utils.py --quick    # the test suite runs this

Each conversion runs in a process of its own, cold: what it reads is not in the page cache, what it
writes is on the disk when the clock stops (torch's output is synced for it, ours syncs its own).
The limit reads as many bytes and then writes as many, with direct I/O and nothing between. Extra
memory: the peak of the resident set above what was there before, pages of mapped files included.
Exits with 1 if a result was wrong; a missed target is only shown.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
from typing import Any

from limits import Limits
from program import ROOT, BenchError, main_of_parts, row, say, seconds, times

PARTS = ("dcp_to_torch_save", "torch_save_to_dcp")
TENSORS, TENSOR_BYTES = 64, 32 << 20
QUICK_TENSOR_BYTES = 256 << 10
RATIO = 4
EXTRA_BYTES = 64 << 20
TIMEOUT_S = 300

WORKER = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
who, part, source, target, warm = sys.argv[1:]
if who == "dcp_native":
    from dcp_native import format_utils
else:
    from torch.distributed.checkpoint import format_utils
sys.path.insert(0, "benchmarks")
from limits import restart_peak, status_bytes
convert = getattr(format_utils, part)
convert(warm, target + "-warm")
if who == "dcp_native":
    from dcp_native import _native
    _native.trim()  # or the buffers of the warm-up would not count
restart_peak()
before = status_bytes("VmRSS")
start = time.monotonic()
convert(source, target)
descriptor = os.open(target, os.O_RDONLY)
os.fsync(descriptor)
if who == "torch" and os.path.isdir(target):
    os.sync()
print(json.dumps({"wall_s": time.monotonic() - start, "cpu_s": sum(os.times()[:2]),
                  "extra_bytes": status_bytes("VmHWM") - before}))
"""

MAKE = """
import sys, torch
import torch.distributed.checkpoint as dcp
import dcp_native
count, size, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
for name, count in (("warm", 1), ("full", count)):
    model = {f"layer.{i}": torch.full((size // 4096, 1024), i + 0.5) for i in range(count)}
    state = {"model": model}
    dcp_native.save(state, checkpoint_id=f"{out}/{name}", no_dist=True)
    torch.save(state, f"{out}/{name}.pt")
"""

CHECK = """
import sys, torch
from torch.distributed.checkpoint import format_utils
path, part, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
if part == "torch_save_to_dcp":
    format_utils.dcp_to_torch_save(path, path + ".pt")
    path += ".pt"
model = torch.load(path, mmap=True)["model"]
assert list(model) == [f"layer.{i}" for i in range(count)]
for i in range(count):
    assert bool((model[f"layer.{i}"] == i + 0.5).all()), i
"""


def run_python(program: str, *arguments: object) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    argv = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(
        argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    if done.returncode != 0:
        raise BenchError(done.stderr)
    return done.stdout


def forget(path: pathlib.Path) -> None:
    """Drops a file, or a directory's files, from the page cache."""
    for file in path.iterdir() if path.is_dir() else (path,):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Run:
    """The figures so far: rows, details, and what was wrong."""

    def __init__(self, args: argparse.Namespace, disk: pathlib.Path) -> None:
        self.args, self.disk = args, disk
        self.tensor_bytes = QUICK_TENSOR_BYTES if args.quick else TENSOR_BYTES
        self.total_bytes = TENSORS * self.tensor_bytes
        self.rows: list[dict] = []
        self.details: dict[str, object] = {}
        self.wrong: list[str] = []

    def all(self) -> None:
        say("making the inputs ...")
        run_python(MAKE, TENSORS, self.tensor_bytes, self.disk)
        limits = Limits(self.total_bytes)
        for part in self.args.only:
            say(f"{part} ...")
            self.part(part, limits)

    def part(self, part: str, limits: Limits) -> None:
        suffix = "" if part == "dcp_to_torch_save" else ".pt"
        source, warm = (self.disk / f"{name}{suffix}" for name in ("full", "warm"))
        found: dict[str, list[dict[str, Any]]] = {"dcp_native": [], "torch": [], "limit": []}
        for turn in range(self.args.repeats):
            for who in ("dcp_native", "torch") if turn % 2 == 0 else ("torch", "dcp_native"):
                target = self.disk / f"{who}-out"
                forget(source)
                found[who].append(json.loads(run_python(WORKER, who, part, source, target, warm)))
                if turn == 0:
                    self.check(who, part, target)
                for path in (target, pathlib.Path(f"{target}-warm"), pathlib.Path(f"{target}.pt")):
                    remove(path)
            plain = self.disk / "limit"
            wrote_s = limits.write(str(plain), self.total_bytes)
            read_s = limits.read(str(plain), self.total_bytes)
            remove(plain)
            found["limit"].append({"wall_s": wrote_s + read_s, "write_s": wrote_s})
        self.details[part] = found
        self.figures(part, found)

    def check(self, who: str, part: str, target: pathlib.Path) -> None:
        try:
            run_python(CHECK, target, part, TENSORS)
        except BenchError as error:
            self.wrong.append(f"{part} by {who}: {error}")

    def figures(self, part: str, found: dict[str, list[dict[str, Any]]]) -> None:
        def median(who: str, what: str) -> float:
            return statistics.median(sample[what] for sample in found[who])

        ours, theirs = median("dcp_native", "wall_s"), median("torch", "wall_s")
        self.rows.append(
            row(
                f"{part} of {self.total_bytes / 1e9:.3g} GB, cold",
                seconds(ours),
                f"{seconds(theirs)} ({times(theirs, ours)})",
                f"{seconds(median('limit', 'wall_s'))}, direct read, then direct write"
                f" ({seconds(median('limit', 'write_s'))})",
                f">= {RATIO}x",
                theirs >= RATIO * ours,
            )
        )
        extra = max(sample["extra_bytes"] for sample in found["dcp_native"])
        most = self.tensor_bytes + EXTRA_BYTES
        self.rows.append(
            row(
                "- extra memory",
                f"{extra / 2**20:.0f} MiB",
                f"{median('torch', 'extra_bytes') / 2**20:.0f} MiB",
                target=f"<= {most >> 20} MiB",
                met=extra <= most,
            )
        )


def main(argv: list[str] | None = None) -> int:
    return main_of_parts(
        "format_utils", __doc__, PARTS, lambda args, disk, *_: Run(args, disk), argv
    )


if __name__ == "__main__":
    sys.exit(main())
