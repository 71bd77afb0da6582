"""Random changes of a state dict, and what torch's planner says of whether its plan changed."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
import torch.distributed as dist
from common import gather_all, shard, value
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from dcp_native import _groups

LONG = 2000
"""Characters of a text that needs another slot than a short one."""
DTYPES = (torch.float32, torch.int32, torch.bfloat16, torch.float64)
STEPS = (
    "values", "leaf", "new", "removed", "renamed", "order", "grad", "nested", "one-rank", "options",
    "abort", "restart",
)  # fmt: skip
SHAPES = ((6, 4), (4, 6), (24,), (2, 3, 4))


class Oracle:
    """Knows what the last installed plan was made of, by torch's own local plan of every rank."""

    def __init__(self) -> None:
        self._last: list[Any] | None = None

    def expects_fast(self, sd: dict[str, Any], options: dict[str, Any]) -> bool:
        return self._last == signatures(sd, options)

    def installed(self, sd: dict[str, Any], options: dict[str, Any]) -> None:
        self._last = signatures(sd, options)

    def forget(self) -> None:
        self._last = None


def signatures(sd: dict[str, Any], options: dict[str, Any]) -> list[Any]:
    """Of every rank: torch's plan, the slots of objects, the options that lay out files."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(sd, is_coordinator=True)
    plan = planner.create_local_plan()
    items = [repr(dataclasses.astuple(item)) for item in plan.items]
    long = [key for key, leaf in sd.items() if isinstance(leaf, str) and len(leaf) >= LONG]
    return gather_all((items, repr(plan.planner_data), long, sorted(options.items())))


def random_tensor(rng: random.Random, name: str, mesh: DeviceMesh) -> torch.Tensor:
    tensor = value(name, rng.choice(SHAPES), rng.choice(DTYPES))
    placement = rng.choice((None, Shard(0), Replicate()))
    return tensor if placement is None else shard(tensor, mesh, placement)


def random_leaf(rng: random.Random, name: str, mesh: DeviceMesh) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randrange(100)
    if kind == 1:
        return "t" * rng.choice((1, 20, LONG))
    return random_tensor(rng, name, mesh)


def random_state(rng: random.Random, mesh: DeviceMesh) -> dict[str, Any]:
    return {f"key{i}": random_leaf(rng, f"key{i}", mesh) for i in range(8)}


def random_step(
    rng: random.Random,
    step: str,
    sd: dict[str, Any],
    options: dict[str, Any],
    mesh: DeviceMesh,
    ctx: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One change, the same on every rank but for ``one-rank``; the old state dict stays as it is.

    ``abort`` is the caller's to do; ``restart`` drops one rank's group.
    """
    common = [name for name in sd if name != "only"]
    sd, key = dict(sd), rng.choice(common)
    if step == "values":
        sd = {k: v + 1 if isinstance(v, (int, torch.Tensor)) else v for k, v in sd.items()}
    elif step == "new":
        name = f"new{rng.randrange(10**6)}"
        sd[name] = random_leaf(rng, name, mesh)
    elif step == "removed" and len(common) > 3:
        del sd[key]
    elif step == "renamed":
        sd = {(k + "x" if k == key else k): v for k, v in sd.items()}
    elif step == "order":
        sd[key] = sd.pop(key)
    elif step == "leaf":
        sd[key] = random_leaf(rng, key, mesh)
    elif step == "grad":
        sd[key] = value(key, (6, 4)).requires_grad_(rng.random() < 0.5)
    elif step == "nested":
        sd[key] = rng.choice(([value(key, (4,))], {"0": value(key, (4,))}))
    elif step == "one-rank":
        mine = value(key, rng.choice(SHAPES), rng.choice(DTYPES))
        if ctx.rank == ctx.size - 1:
            sd["only"] = mine
    elif step == "options":
        options = {"thread_count": rng.choice((1, 2)), "single_file_per_rank": rng.random() < 0.5}
    elif step == "restart" and ctx.rank == 0:
        _groups._groups.pop(dist.distributed_c10d._get_default_group(), None)
    return sd, options
