"""Resharding across ranks: any number of them saves, any number loads, in torch and in ours.

Placements, meshes, shapes and values follow from one seed, so that all ranks agree on them.  What
each rank gets is compared bit for bit with what torch gives it, and with the value itself.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, gather_all, mesh_of, shard, sizes, value
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import dcp_native as dcp

ROUNDS = 400 if os.environ.get("DCP_NATIVE_SLOW_TESTS") else 12
MODULES = (torch_dcp, dcp)


# ---- groups and meshes, made once: every rank takes part in making each ----


@functools.cache
def group_of(ranks: tuple[int, ...]) -> Any:
    if ranks == tuple(range(dist.get_world_size())):
        return dist.group.WORLD
    return dist.new_group(list(ranks))


@functools.cache
def mesh_over(ranks: tuple[int, ...], shape: tuple[int, ...]) -> DeviceMesh:
    return DeviceMesh("cpu", torch.tensor(ranks).reshape(shape))


def layouts(size: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ranks and the shape of their mesh."""
    all_ranks = tuple(range(size))
    found = [(all_ranks[:n], (n,)) for n in range(1, size + 1)]
    found += [((size - 1,), (1,)), (all_ranks[1:], (size - 1,))]  # groups without rank 0
    if size == 4:
        found += [(all_ranks, (2, 2)), (all_ranks, (4, 1)), (all_ranks, (1, 4)), ((1, 3), (2, 1))]
    return found


def placements_on(choose: random.Random, mesh_shape: tuple[int, ...], ndim: int) -> list[Any]:
    """For a tensor of `ndim` dims."""

    def one() -> Any:
        return Shard(choose.randrange(ndim)) if ndim and choose.random() < 0.75 else Replicate()

    if len(mesh_shape) == 2 and ndim and choose.random() < 0.25:
        dim = choose.randrange(ndim)
        return [_StridedShard(dim, split_factor=mesh_shape[1]), Shard(dim)]
    return [one() for _ in mesh_shape]


def shapes(choose: random.Random) -> tuple[int, ...]:
    """Uneven, smaller than the mesh, empty, without dims."""
    return tuple(choose.choice([0, 1, 2, 3, 5, 7, 8, 12]) for _ in range(choose.randrange(4)))


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64]


def specs(choose: random.Random) -> dict[str, tuple]:
    """Name -> shape and dtype."""
    found = {f"t{i}": (shapes(choose), choose.choice(DTYPES)) for i in range(8)}
    found["large"] = ((choose.randrange(300, 500), choose.randrange(900, 1100)), torch.float32)
    return found


def state_on(
    choose: random.Random, ranks: tuple[int, ...], shape: tuple[int, ...], wanted: dict, blank: bool
) -> dict[str, Any]:
    """Plain tensors and DTensors; `blank`: targets, some of another dtype, some requiring grad."""
    mesh, state = mesh_over(ranks, shape), {}
    for name, (extents, dtype) in wanted.items():
        placements = placements_on(choose, shape, len(extents))
        plain, other, grad = choose.random() < 0.15, choose.random() < 0.2, choose.random() < 0.3
        full = value(name, extents, dtype)
        if blank:
            into = torch.float64 if other and dtype in (torch.float32, torch.int64) else dtype
            full = torch.ones(extents, dtype=into)
        tensor = full if plain else distribute_tensor(full, mesh, placements, src_data_rank=None)
        if blank and grad and tensor.dtype.is_floating_point:
            tensor = torch.nn.Parameter(tensor)
        state[name] = tensor
    state["step"] = None if blank else 7
    return state


def local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def expected(target: Any, name: str, spec: tuple) -> torch.Tensor:
    full = value(name, *spec)
    if isinstance(target, DTensor):
        full = distribute_tensor(
            full, target.device_mesh, list(target.placements), src_data_rank=None
        ).to_local()
    return full.to(target.dtype)


def reshard_once(ctx, seed: int) -> None:
    choose = random.Random(seed)
    wanted, known = specs(choose), layouts(ctx.size)
    saved_by, loaded_by = choose.choice(known), choose.choice(known)
    writer, path = choose.choice(MODULES), ctx.dir / str(seed)
    options = choose.choice([{}, {}, {"thread_count": 3}, {"single_file_per_rank": False}])
    for ranks, shape in (saved_by, loaded_by):
        group_of(ranks), mesh_over(ranks, shape)
    order, targets_seed = choose.random(), choose.random()
    source = state_on(random.Random(order), *saved_by, wanted, blank=False)
    if ctx.rank in saved_by[0]:
        writer.save(
            source,
            storage_writer=writer.FileSystemWriter(path, **options),
            process_group=group_of(saved_by[0]),
        )
    ctx.barrier()
    what = f"seed {seed}: {writer.__name__} by {saved_by}, loaded by {loaded_by}"
    targets = [
        state_on(random.Random(targets_seed), *loaded_by, wanted, blank=True) for _ in MODULES
    ]
    if ctx.rank in loaded_by[0]:
        for module, target in zip(MODULES, targets, strict=True):
            before = {n: local(target[n]).data_ptr() for n in wanted}
            module.load(target, checkpoint_id=path, process_group=group_of(loaded_by[0]))
            assert before == {n: local(target[n]).data_ptr() for n in wanted}, what
            assert target["step"] == 7, what
        assert dcp.last_report()["path"] == "native", what
        for name in wanted:
            torchs, ours = (local(target[name]).detach() for target in targets)
            assert_equal(ours, torchs, f"{what}: {name} {wanted[name]} {targets[1][name]}")
            assert_equal(ours, expected(targets[1][name], name, wanted[name]), f"{what}: {name}")
    ctx.barrier()


def case_any_number_of_ranks_loads_what_any_number_saved(ctx):
    for round_ in range(ROUNDS):
        reshard_once(ctx, 1000 * ctx.size + round_)


def case_every_pair_of_world_sizes(ctx):
    """Uneven rows and columns, from each number of ranks to each other one."""
    full = value("pair", (7, 5))
    for before in range(1, ctx.size + 1):
        for after in range(1, ctx.size + 1):
            ranks = [tuple(range(n)) for n in (before, after)]
            meshes = [mesh_over(r, (len(r),)) for r in ranks]
            groups = [group_of(r) for r in ranks]
            path = ctx.dir / f"{before}-{after}"
            if ctx.rank < before:
                writer = MODULES[(before + after) % 2]
                sd = {"w": shard(full, meshes[0], Shard(0))}
                writer.save(sd, checkpoint_id=path, process_group=groups[0])
            ctx.barrier()
            if ctx.rank < after:
                for dim in (0, 1):
                    target = {"w": shard(torch.zeros_like(full), meshes[1], Shard(dim))}
                    dcp.load(target, checkpoint_id=path, process_group=groups[1])
                    want = full.chunk(after, dim)
                    empty = full.narrow(dim, 0, 0)
                    want = want[ctx.rank] if ctx.rank < len(want) else empty
                    assert_equal(target["w"].to_local(), want, f"{before} -> {after}, dim {dim}")


# ---- what ranks may differ in ----


def both(ctx, make: Any, **options: Any) -> list[Any]:
    """The outcome of the same load in torch and in ours: the state, or the failures."""
    seen = []
    for module in MODULES:
        target = make()
        try:
            module.load(target, checkpoint_id=ctx.dir, **options)
        except torch_dcp.CheckpointException as error:
            causes = {r: (type(e), str(e)) for r, (e, _) in error.failures.items()}
            seen.append((error.args[0], causes))
        else:
            seen.append({k: local(v) for k, v in target.items()})
    if isinstance(seen[0], dict):
        assert_equal(seen[1], seen[0])
    else:
        assert seen[0] == seen[1], seen
    return seen


def saved_simply(ctx):
    mesh = mesh_of(ctx.size)
    sd = {f"w{i}": shard(value(f"w{i}", (5, 6 + i)), mesh, Shard(i % 2)) for i in range(6)}
    sd |= {"plain": value("plain", (9,)), "step": 3}
    dcp.save(sd, checkpoint_id=ctx.dir)
    ctx.barrier()
    return sd


def case_ranks_may_want_different_keys(ctx):
    """Plain tensors and objects: nothing makes ranks want the same."""
    saved_simply(ctx)

    def make():
        wanted = {f"w{i}": torch.zeros(5, 6 + i) for i in range(6) if i % ctx.size == ctx.rank}
        return wanted | ({"step": None} if ctx.rank == 0 else {"plain": torch.zeros(9)})

    for seen in both(ctx, make):
        for name, tensor in seen.items():
            if name.startswith("w"):
                assert_equal(tensor, value(name, tuple(tensor.shape)), name)


def case_a_rank_may_want_nothing(ctx):
    saved_simply(ctx)
    for idle in range(ctx.size):
        seen = both(ctx, lambda idle=idle: {} if ctx.rank == idle else {"plain": torch.zeros(9)})
        assert seen[1] == {} or ctx.rank != idle
    assert both(ctx, dict)[1] == {}


def case_failures_of_planning_are_torchs_on_every_rank(ctx):
    """One rank, or several, each with its own mistake."""
    saved_simply(ctx)
    mistakes = [
        lambda: {"w0": torch.zeros(6, 5)},
        lambda: {"absent": torch.zeros(1), "plain": torch.zeros(9)},
        lambda: {"plain": "an object"},
        lambda: {"plain": torch.zeros(9), "also absent": 5},
    ]
    for first in range(len(mistakes)):
        for culprits in (1, ctx.size):

            def make(first=first, culprits=culprits):
                if ctx.size - ctx.rank <= culprits:
                    return mistakes[(first + ctx.rank) % len(mistakes)]()
                return {"plain": torch.zeros(9)}

            seen = both(ctx, make)
            assert seen[0][0] == "plan" and len(seen[0][1]) == culprits, seen
    for seen in both(ctx, lambda: {"w1": shard(torch.zeros(4, 4), mesh_of(ctx.size), Shard(0))}):
        assert "Size mismatch between saved" in seen[1][0][1], seen


def case_a_failed_load_leaves_the_group_whole(ctx):
    sd = saved_simply(ctx)
    for _ in range(3):
        both(ctx, lambda: {"absent": 1} if ctx.rank == ctx.size - 1 else {"step": None})
        target = {"w3": shard(torch.zeros(5, 9), mesh_of(ctx.size), Shard(0))}
        dcp.load(target, checkpoint_id=ctx.dir)
        assert_equal(target["w3"].full_tensor(), sd["w3"].full_tensor())


def case_meta_tensors_get_memory_and_values(ctx):
    saved_simply(ctx)
    mesh = mesh_of(ctx.size)

    def make():
        with torch.device("meta"):
            plain, full = torch.empty(9), torch.empty(5, 6)
        stride = {"shape": full.shape, "stride": full.stride()}
        extents = [len(c) for c in torch.arange(5).chunk(ctx.size)]
        rows = extents[ctx.rank] if ctx.rank < len(extents) else 0
        block = torch.empty(rows, 6, device="meta")
        tensor = DTensor.from_local(block, mesh, [Shard(0)], run_check=False, **stride)
        return {"plain": plain, "w0": tensor, "step": None}

    seen = both(ctx, make)
    assert not seen[1]["plain"].is_meta and not seen[1]["w0"].is_meta
    assert_equal(seen[1]["plain"], value("plain", (9,)))


def case_one_process_loads_all_files_of_a_job(ctx):
    """no_dist, while the others do something else."""
    mesh = mesh_of(ctx.size)
    full = value("all", (2 * ctx.size + 1, 3))
    for writer in MODULES:
        path = ctx.dir / writer.__name__
        sd = {"w": shard(full, mesh, Shard(0)), "mine": {str(ctx.rank): value("mine", (4,))}}
        writer.save(sd, storage_writer=writer.FileSystemWriter(path, thread_count=2))
        ctx.barrier()
        if ctx.rank == ctx.size - 1:
            for module in MODULES:
                target = {
                    "w": torch.zeros_like(full),
                    "mine": {str(r): torch.zeros(4) for r in range(ctx.size)},
                }
                module.load(target, checkpoint_id=path, no_dist=True)
                assert_equal(target["w"], full)
                assert all(t.equal(value("mine", (4,))) for t in target["mine"].values())
        ctx.barrier()


def case_a_subgroup_has_its_own_coordinator(ctx):
    """Its rank 0 is not the job's; also its last rank."""
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict as torch_load

    from dcp_native.state_dict_loader import _load_state_dict

    ranks = tuple(range(1, ctx.size))
    group, mesh = group_of(ranks), mesh_over(ranks, (len(ranks),))
    full = value("sub", (5, 4))
    if ctx.rank > 0:
        sd = {"w": shard(full, mesh, Shard(1)), "step": 2}
        dcp.save(sd, checkpoint_id=ctx.dir, process_group=group)
        for coordinator in (0, len(ranks) - 1):
            for load in (torch_load, _load_state_dict):
                target = {"w": shard(torch.zeros_like(full), mesh, Shard(0)), "step": None}
                load(target, dcp.FileSystemReader(ctx.dir), group, coordinator)
                assert_equal(target["w"].full_tensor(), full)
                assert target["step"] == 2
            for load in (torch_load, _load_state_dict):
                target = {"absent": 1} if ctx.rank == ctx.size - 1 else {"step": None}
                try:
                    load(target, dcp.FileSystemReader(ctx.dir), group, coordinator)
                except torch_dcp.CheckpointException as error:
                    assert set(error.failures) == {len(ranks) - 1}, error.failures
                else:
                    raise AssertionError("an absent key was loaded")


@sizes(2, 4)
def case_sharded_tensors_of_any_kind(ctx):
    """The pre-DTensor class, with shards in no order, into others of other sizes and DTensors."""
    from torch.distributed._shard.sharded_tensor import Shard as LocalShard
    from torch.distributed._shard.sharded_tensor import init_from_local_shards

    full = value("st", (6 * ctx.size, 5))

    def sharded(source: torch.Tensor, cuts: list[int], shift: int) -> Any:
        spans = list(itertools.pairwise(cuts))
        mine = [s for i, s in enumerate(spans) if (i * 7 + shift) % ctx.size == ctx.rank]
        shards = [
            LocalShard.from_tensor_and_offsets(source[a:b].clone(), [a, 0], ctx.rank)
            for a, b in mine
        ]
        return init_from_local_shards(shards, *source.shape)

    rows = full.shape[0]
    before = [*range(0, rows, 3), rows]
    afters = [[*range(0, rows, 2), rows], [0, 1, *range(4, rows, 5), rows]]
    blank = torch.zeros_like(full)
    for index, writer in enumerate(MODULES):
        path = ctx.dir / str(index)
        writer.save({"st": sharded(full, before, 0)}, checkpoint_id=path)
        ctx.barrier()
        for shift, cuts in enumerate(afters):
            targets = [{"st": sharded(blank, cuts, shift)} for _ in MODULES]
            for module, target in zip(MODULES, targets, strict=True):
                module.load(target, checkpoint_id=path)
            for torchs, ours in zip(*(t["st"].local_shards() for t in targets), strict=True):
                start, length = ours.metadata.shard_offsets[0], ours.metadata.shard_sizes[0]
                assert_equal(ours.tensor, full[start : start + length])
                assert_equal(ours.tensor, torchs.tensor)
        for placement in (Shard(0), Shard(1), Replicate()):
            target = {"st": shard(blank, mesh_of(ctx.size), placement)}
            dcp.load(target, checkpoint_id=path)
            assert_equal(target["st"].full_tensor(), full)


def case_all_ranks_end_with_the_same_replicas(ctx):
    """Large enough to be shared, wanted in part and in other dtypes by some."""
    full = value("replica", (700, 1024))
    dcp.save({"r": full, "s": value("s", (11,))}, checkpoint_id=ctx.dir)
    ctx.barrier()
    for verify in (True, "strict", False):
        dcp.configure(verify=verify)
        try:
            into = torch.float64 if ctx.rank == 1 else torch.float32
            turned = ctx.rank == ctx.size - 1
            target = torch.zeros((1024, 700), dtype=into).t() if turned else None
            target = torch.zeros(full.shape, dtype=into) if target is None else target
            state = {"r": target, "s": torch.zeros(11)}
            dcp.load(state, checkpoint_id=ctx.dir)
            assert_equal(state["r"], full.to(into))
            assert_equal(state["s"], value("s", (11,)))
        finally:
            dcp.configure(verify=True)
    assert len(gather_all(ctx.rank)) == ctx.size
