"""gpu_measure.py: what the parts of gpu.py share: rounds in turns, lines, and the machine's limits.

A device works behind the host.  So every round begins with nothing under way on the device or on
the way to the disk, a copy is timed by events on its stream, and all else ends where the host knows
that the work is done.  Not thread-safe.
"""

from __future__ import annotations

import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from limits import Limits, settle

WARM_UPS = 2
"""Rounds that are not counted: the first pins memory and plans, the second goes by that plan."""

Sample = dict[str, float]
State = dict[str, torch.Tensor]


class WrongValueError(Exception):
    """What was loaded is not what was saved."""


def by_turns(
    rounds: int, before: Callable[[], None], **contenders: Callable[[], Sample]
) -> dict[str, Sample]:
    """All contenders in every round, each time another first; medians by contender and name.

    Args:
        before: what changes the tensors, once in every round.
    """
    names = list(contenders)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for turn in range(WARM_UPS + rounds):
        before()
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            torch.cuda.synchronize()
            sample = contenders[name]()
            if turn >= WARM_UPS:
                samples[name].append(sample)
    return {
        name: {what: statistics.median(s[what] for s in taken) for what in taken[0]}
        for name, taken in samples.items()
    }


def seconds(run: Callable[[], object]) -> float:
    """Of one call, what it put on the device included."""
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def figure(
    what: str, ours_s: float, torch_s: float, limit_s: float, aim: str, met: bool, note: str = ""
) -> None:
    """One line: times, the same in units of the limit, the aim, and whether it is met."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    unit = limit_s or math.nan  # devices that are fakes measure nothing
    times = f"{ours_s * 1e3:.3f} : {torch_s * 1e3:.3f} : {limit_s * 1e3:.3f} ms"
    ratios = f"{ours_s / unit:.2f} : {torch_s / unit:.2f} : 1"
    verdict = f"{aim}: {'met' if met else 'MISSED'}"
    print(f"{what:<42} | {times:<32} | {ratios:<20} | {verdict}", end="")
    print(f" | {note}" if note else "", flush=True)


def step_as_a_trainer(state: State) -> None:
    """Every tensor of `state` changes in place."""
    with torch.no_grad():
        torch._foreach_add_(list(state.values()), 1.0)


def size_bytes(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def on_host(state: State) -> State:
    return {name: tensor.cpu() for name, tensor in state.items()}


def compare(what: str, got: State, want: State) -> None:
    """Raises:
    WrongValueError: some tensor of `got` is not that of `want`, which lies on the host.
    """
    wrong = [name for name, value in want.items() if not torch.equal(got[name].cpu(), value)]
    if wrong:
        raise WrongValueError(f"{what}: differs from what was saved: {wrong[:5]}")


class Machine:
    """What the device, its bus and the file system of `path` can do with as many bytes."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._limits = Limits()
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._here = self._there = torch.empty(0, dtype=torch.uint8)

    def reserve(self, total_bytes: int) -> None:
        """Memory for the copies of `total_bytes`: pinned, touched, and as much on the device."""
        self.release()
        self._there = torch.zeros(total_bytes, dtype=torch.uint8, device="cuda")
        self._here = torch.zeros(total_bytes, dtype=torch.uint8, pin_memory=True)

    def release(self) -> None:
        self._here = self._there = torch.empty(0, dtype=torch.uint8)
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # else pinned memory stays, in powers of two

    def _copy(self, dst: torch.Tensor, src: torch.Tensor) -> Sample:
        torch.cuda.synchronize()
        self._begin.record()
        begin = time.perf_counter()
        dst.copy_(src, non_blocking=True)
        call_s = time.perf_counter() - begin
        self._end.record()
        self._end.synchronize()
        return {"call_s": call_s, "copy_s": self._begin.elapsed_time(self._end) / 1e3}

    def to_host(self) -> Sample:
        """One cudaMemcpyAsync: how long the call took, and the copy itself on the device."""
        return self._copy(self._here, self._there)

    def save(self, total_bytes: int) -> Sample:
        """The slower of the copy to the host and one new file, written and synced."""
        file = self.path / "limit"
        settle(str(self.path))
        copy_s = self.to_host()["copy_s"]
        write_s = self._limits.write(str(file), total_bytes)
        os.unlink(file)
        return {"whole_s": max(copy_s, write_s), "copy_s": copy_s, "write_s": write_s}

    def load(self, total_bytes: int) -> Sample:
        """The slower of a cold read of one file and the copy to the device."""
        file = self.path / "limit"
        self._limits.write(str(file), total_bytes)
        settle(str(self.path))
        read_s = self._limits.read(str(file), total_bytes)
        os.unlink(file)
        copy_s = self._copy(self._there, self._here)["copy_s"]
        return {"whole_s": max(copy_s, read_s)}
