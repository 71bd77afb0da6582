"""gpu_saving.py: background and blocking saves, and loads, of one state on a device, for gpu.py.

Staging is measured as a trainer sees it: from the call of async_save until staging_completion is
done, planning included.  The stall is how long the call takes.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
from typing import Any

import torch
import torch.distributed.checkpoint as torch_dcp
from gpu_measure import (
    Machine,
    Sample,
    State,
    by_turns,
    compare,
    figure,
    on_host,
    seconds,
    size_bytes,
    step_as_a_trainer,
)
from limits import drop_page_cache, settle
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import dcp_native as dcp

STALL = 0.01
"""Of the staging time."""
RATE = 0.9
"""Of a copy's."""
WITHOUT = ((), ("use_shared_memory",), ("use_shared_memory", "use_pinned_memory"))
"""What torch's stager is asked to do without, one after another, until it works."""


class Saver:
    """Background saves of one state by one package to one directory."""

    def __init__(
        self, module: Any, state: dict, path: pathlib.Path, without: tuple[str, ...] = ()
    ) -> None:
        self.module, self.state, self.path, self.without = module, state, path, without
        self._stager = DefaultStager(StagingOptions(**dict.fromkeys(without, False)))

    def start(self) -> Any:
        return self.module.async_save(
            self.state, checkpoint_id=self.path, async_stager=self._stager
        )

    def run(self) -> Sample:
        """Seconds until the call returned, until all was in host memory, until it was durable."""
        settle(str(self.path.parent))
        torch.cuda.synchronize()
        begin = time.perf_counter()
        response = self.start()
        call_s = time.perf_counter() - begin
        response.staging_completion.result()
        staged_s = time.perf_counter() - begin
        response.upload_completion.result()
        whole_s = time.perf_counter() - begin
        report = getattr(response.upload_completion, "report", {})
        copied_s = report.get("stage_ns", 0) / 1e9
        return {"call_s": call_s, "staged_s": staged_s, "whole_s": whole_s, "copied_s": copied_s}

    def close(self) -> None:
        self._stager.close()


def torch_saver(state: dict, path: pathlib.Path) -> Saver:
    """Torch's, with all that its stager can do with this state on this machine.

    Raises:
        What it raises without shared and pinned memory.
    """
    for without in WITHOUT:
        saver = Saver(torch_dcp, state, path, without)
        try:
            saver.run()
        except (OSError, RuntimeError):
            saver.close()
            if without == WITHOUT[-1]:
                raise
        else:
            return saver
    raise AssertionError


@contextlib.contextmanager
def savers(state: dict, path: pathlib.Path):
    with contextlib.ExitStack() as stack:
        ours = Saver(dcp, state, path / "ours")
        stack.callback(ours.close)
        theirs = torch_saver(state, path / "torch")
        stack.callback(theirs.close)
        yield ours, theirs


def staging(
    machine: Machine,
    name: str,
    state: State,
    rounds: int,
    *,
    rate: bool = False,
    most_times: float | None = None,
) -> None:
    """Background saves of `state`.

    Args:
        rate: the aim is a rate of the device's copies, else the time of `most_times` copies, else
            to be quicker than torch.
    """
    machine.reserve(size_bytes(state))
    with savers(state, machine.path) as (ours, theirs):
        found = by_turns(
            rounds, lambda: step_as_a_trainer(state),
            ours=ours.run, torch=theirs.run, copy=machine.to_host,
        )  # fmt: skip
        ours_s, torch_s, copy = found["ours"], found["torch"], found["copy"]
        note = f"from the agreed plan {ours_s['copied_s'] * 1e3:.3f} ms"
        if theirs.without:
            note += "; torch's stager does not work here with " + ", ".join(theirs.without)
        speed = copy["copy_s"] / ours_s["staged_s"]
        if rate:
            note += f"; {size_bytes(state) / ours_s['staged_s'] / 1e9:.1f} GB/s"
            aim, met = f"{RATE:.0%} of the copy's rate", speed >= RATE
        elif most_times is not None:
            aim, met = f"at most {most_times} copies", speed * most_times >= 1
        else:
            aim, met = "quicker than torch", ours_s["staged_s"] < torch_s["staged_s"]
        figure(
            f"{name}: staged", ours_s["staged_s"], torch_s["staged_s"], copy["copy_s"],
            aim, met, note,
        )  # fmt: skip
        part = ours_s["call_s"] / ours_s["staged_s"]
        figure(
            f"{name}: stall, async_save returns", ours_s["call_s"], torch_s["call_s"],
            copy["call_s"], f"below {STALL:.0%} of the staging time", part < STALL, f"{part:.2%}",
        )  # fmt: skip
        came_back(name, ours)
    machine.release()


def came_back(name: str, ours: Saver) -> None:
    """The values of the call are saved, whatever the trainer does once staging is done."""
    step_as_a_trainer(ours.state)
    want = on_host(ours.state)
    response = ours.start()
    response.staging_completion.result()
    step_as_a_trainer(ours.state)
    response.upload_completion.result()
    target = {name: torch.zeros_like(tensor) for name, tensor in ours.state.items()}
    dcp.load(target, checkpoint_id=ours.path)
    compare(name, target, want)


def blocking(machine: Machine, name: str, state: State, rounds: int) -> None:
    """Saves and cold loads, each of its own checkpoint, into tensors on the device."""
    machine.reserve(size_bytes(state))
    ours, theirs = machine.path / "ours", machine.path / "torch"

    def save(module: Any, path: pathlib.Path) -> Sample:
        settle(str(machine.path))
        return {"whole_s": seconds(lambda: module.save(state, checkpoint_id=path))}

    total_bytes = size_bytes(state)
    found = by_turns(
        rounds, lambda: step_as_a_trainer(state),
        ours=lambda: save(dcp, ours), torch=lambda: save(torch_dcp, theirs),
        limit=lambda: machine.save(total_bytes),
    )  # fmt: skip
    lines = {"save": found}
    want = on_host(state)
    targets = {key: torch.zeros_like(tensor) for key, tensor in state.items()}

    def load(module: Any, path: pathlib.Path) -> Sample:
        drop_page_cache(str(path))
        return {"whole_s": seconds(lambda: module.load(targets, checkpoint_id=path))}

    lines["load"] = by_turns(
        rounds, lambda: step_as_a_trainer(targets),
        ours=lambda: load(dcp, ours), torch=lambda: load(torch_dcp, theirs),
        limit=lambda: machine.load(total_bytes),
    )  # fmt: skip
    step_as_a_trainer(targets)
    load(dcp, ours)
    compare(f"{name}: load", targets, want)
    for what, line in lines.items():
        ours_s, torch_s, limit_s = (line[c]["whole_s"] for c in ("ours", "torch", "limit"))
        figure(f"{name}: {what}", ours_s, torch_s, limit_s, "quicker than torch", ours_s < torch_s)
    machine.release()
