"""gpu_planning.py: what ranks need to agree before a save writes its first byte, for gpu.py.

Planning is all that a save does before it writes: of ours the whole call but for the phases from
`write` on, of torch the time until its writer is given a plan.  Of a round it is that of the
slowest rank.  It is the steady state that is measured: the plan of the save before holds, and
torch's planner may cache, too.
"""

from __future__ import annotations

import itertools
import pathlib
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from gpu_measure import Sample, WrongValueError, by_turns, figure
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import dcp_native as dcp

TENSORS = 100
AIM_S, AIM_RANKS = 0.05, 1024


class StampingWriter(FileSystemWriter):
    """Knows when it was given a plan."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        self.planned_at = time.perf_counter()
        return super().write_data(plan, planner)


def slowest(value_s: float) -> float:
    value = torch.tensor(value_s, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def together() -> None:
    """All ranks begin at the same time, with nothing under way."""
    torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1))


def of_ours(state: dict, path: pathlib.Path, group: dist.ProcessGroup) -> Sample:
    together()
    whole_s = _whole_s(lambda: dcp.save(state, checkpoint_id=path, process_group=group))
    report = dcp.last_report()
    after = itertools.dropwhile(lambda phase: phase[0] != "write", report["phases"].items())
    return {
        "plan_s": slowest(whole_s - sum(ns for _, ns in after) / 1e9),
        "vote_s": slowest(report["vote_ns"] / 1e9),
        "whole_s": slowest(whole_s),
        "steady": float(report["fast"]),
    }


def of_torch(state: dict, path: pathlib.Path, group: dist.ProcessGroup) -> Sample:
    writer = StampingWriter(path)
    planner = DefaultSavePlanner(enable_plan_caching=True)
    together()
    begin = time.perf_counter()
    torch_dcp.save(state, storage_writer=writer, planner=planner, process_group=group)
    whole_s = time.perf_counter() - begin
    return {"plan_s": slowest(writer.planned_at - begin), "whole_s": slowest(whole_s)}


def of_one_reduction(group: dist.ProcessGroup, device: str) -> Sample:
    """The least that an agreement can cost: 8 bytes, and the host knows the outcome."""
    value = torch.zeros(1, dtype=torch.int64, device=device)
    together()
    begin = time.perf_counter()
    dist.all_reduce(value, group=group)
    value.item()
    return {"plan_s": slowest(time.perf_counter() - begin)}


def _whole_s(run: Any) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def planning(rounds: int, path: pathlib.Path) -> None:
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cuda", (ranks,))
    whole = torch.zeros(ranks * 8, 8, device="cuda")
    state = {f"w{i}": distribute_tensor(whole, mesh, [Shard(0)]) for i in range(TENSORS)}
    local = [tensor.to_local() for tensor in state.values()]
    if dist.get_rank() == 0:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {ranks} ranks, ", end="")
        print(f"medians of {rounds}")
    for comm, device in (("nccl", "cuda"), ("cpu", "cpu")):
        group = dist.new_group()
        dist.barrier(group)
        dcp.configure(comm=comm)
        found = by_turns(
            rounds, lambda: torch._foreach_add_(local, 1.0),
            ours=lambda group=group, comm=comm: of_ours(state, path / f"ours-{comm}", group),
            torch=lambda group=group, comm=comm: of_torch(state, path / f"torch-{comm}", group),
            limit=lambda group=group, device=device: of_one_reduction(group, device),
        )  # fmt: skip
        ours, steady = found["ours"], found["ours"]["steady"] == 1.0
        figure(
            f"planned over {dcp.last_report()['comm']}, {ranks} ranks", ours["plan_s"],
            found["torch"]["plan_s"], found["limit"]["plan_s"],
            f"below {AIM_S * 1e3:.0f} ms with {AIM_RANKS} ranks, here {ranks}",
            ours["plan_s"] < AIM_S,
            f"limit: one all_reduce; vote {ours['vote_s'] * 1e3:.3f} ms; the whole save "
            f"{ours['whole_s'] * 1e3:.3f} ms, torch's {found['torch']['whole_s'] * 1e3:.3f} ms"
            + ("" if steady else "; NOT the steady state: plans differed"),
        )  # fmt: skip
        came_back(state, path / f"ours-{comm}", group)
    dcp.configure(comm="auto")


def came_back(state: dict, path: pathlib.Path, group: dist.ProcessGroup) -> None:
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(target, checkpoint_id=path, process_group=group)
    for name, tensor in state.items():
        if not torch.equal(target[name].to_local().cpu(), tensor.to_local().cpu()):
            raise WrongValueError(f"planning: {name} differs from what was saved")
