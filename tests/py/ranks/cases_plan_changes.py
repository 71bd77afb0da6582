"""What may change between two saves: noticed by every rank on the very next one, or harmless.

Each case starts from an installed plan, changes one thing, saves, and compares with what stock
torch, which plans afresh every time, makes of the same state.
"""

from __future__ import annotations

import copy
import random

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, files_can_not_grow, gather_all, like, mesh_of, shard, sizes, value
from plan_oracle import STEPS, Oracle, random_state, random_step
from torch.distributed.tensor import Replicate, Shard

import dcp_native as dcp
from dcp_native import _groups

LONG = "x" * 3000
"""Outgrows the slot of any short object."""


def state(ctx):
    mesh = mesh_of(ctx.size)
    return {
        "model": {
            "sharded": shard(value("sharded", (12, 6)), mesh, Shard(0)),
            "replicated": shard(value("replicated", (5, 3)), mesh, Replicate()),
            "plain": value("plain", (6, 4)),
        },
        "opt": [value("momentum", (4, 2)), {"lr": 0.1}],
        "step": 1,
        "text": "adam",
    }


def was_fast():
    """Whether this rank's last save reused the installed plan."""
    report = dcp.last_report()
    assert report["kind"] == "save" and report["path"] == "native", report
    return report["fast"]


def writer(module, path, **options):
    return module.FileSystemWriter(path, **options)


def agrees_with_torch(sd, ours, path, **planner_options):
    """`ours` describes `sd` as torch's fresh plan does, and both implementations load it."""
    theirs_path = path.with_name(path.name + "-torch")
    planner = torch_dcp.DefaultSavePlanner(**planner_options)
    theirs = torch_dcp.save(sd, checkpoint_id=theirs_path, planner=planner)
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    assert set(ours.storage_data) == set(theirs.storage_data)
    assert ours.version == theirs.version
    flatten = planner_options.get("flatten_state_dict", True)
    for loader in (dcp, torch_dcp):
        if flatten or loader is dcp:  # torch drops what it loads unflattened
            target = like(sd)
            load_planner = loader.DefaultLoadPlanner(flatten_state_dict=flatten)
            loader.load(target, checkpoint_id=path, planner=load_planner)
            assert_equal(target, sd, loader.__name__)


def install(ctx, sd):
    """The plan of `sd` is in force: a second save is fast on every rank."""
    path = ctx.dir / "installed"
    dcp.save(sd, checkpoint_id=path)
    dcp.save(sd, checkpoint_id=path)
    assert was_fast()


def saves(ctx, sd, *, fast, name="changed", writer_options=(), **planner_options):
    """Saves `sd`; every rank went the expected way and the result is what torch makes of it."""
    path = ctx.dir / name
    ours = dcp.save(
        sd,
        storage_writer=writer(dcp, path, **dict(writer_options)),
        planner=dcp.DefaultSavePlanner(**planner_options),
    )
    assert gather_all(was_fast()) == [fast] * ctx.size
    agrees_with_torch(sd, ours, path, **planner_options)


def after_change(ctx, change, *, fast=False):
    """Installs the plan of `state`, lets `change` alter it in place, saves that, and once more."""
    sd = state(ctx)
    install(ctx, sd)
    change(sd)
    saves(ctx, sd, fast=fast)
    dcp.save(sd, checkpoint_id=ctx.dir / "changed")
    assert was_fast()


# ---- the state dict ----


def case_nothing_changed_but_every_value(ctx):
    def change(sd):
        for name in ("sharded", "replicated", "plain"):
            sd["model"][name] = sd["model"][name] + 1
        sd["opt"][0].mul_(3)

    after_change(ctx, change, fast=True)


def case_a_new_tensor(ctx):
    after_change(ctx, lambda sd: sd["model"].update(more=value("more", (3,))))


def case_a_new_object(ctx):
    after_change(ctx, lambda sd: sd.update(more=5))


def case_a_removed_key(ctx):
    after_change(ctx, lambda sd: sd["model"].pop("plain"))


def case_a_renamed_key(ctx):
    after_change(ctx, lambda sd: sd["model"].update(plaIn=sd["model"].pop("plain")))


def case_two_tensors_of_a_kind_swap_names(ctx):
    sd = {"a": value("a", (4,)), "b": value("b", (4,))}
    install(ctx, sd)
    saves(ctx, {"a": sd["b"], "b": sd["a"]}, fast=True)


def case_another_order_of_keys(ctx):
    after_change(ctx, lambda sd: sd.update(model=dict(reversed(sd["model"].items()))))


def case_another_nesting_with_the_same_flat_keys(ctx):
    """planner_data alone tells a list from a dict with the key "0"."""
    after_change(ctx, lambda sd: sd.update(opt={"0": sd["opt"][0], "1": sd["opt"][1]}))


def case_another_dtype_of_the_same_size(ctx):
    after_change(ctx, lambda sd: sd["model"].update(plain=sd["model"]["plain"].to(torch.int32)))


def case_another_dtype_of_a_dtensor(ctx):
    after_change(
        ctx, lambda sd: sd["model"].update(sharded=sd["model"]["sharded"].to(torch.bfloat16))
    )


def case_another_shape_of_the_same_size(ctx):
    after_change(ctx, lambda sd: sd["model"].update(plain=sd["model"]["plain"].reshape(4, 6)))


def case_another_memory_order_of_the_same_shape(ctx):
    def change(sd):
        sd["model"]["plain"] = sd["model"]["plain"].t().contiguous().t()
        sd["opt"][0] = torch.stack([sd["opt"][0]] * 2, 2)[..., 1]

    after_change(ctx, change, fast=True)


def case_a_global_shape_with_the_same_local_part_on_some_ranks(ctx):
    """Uneven shards: only the last rank's piece grows."""
    mesh = mesh_of(ctx.size)
    before = {"w": shard(value("w", (2 * ctx.size - 1, 3)), mesh, Shard(0))}
    after = {"w": shard(value("w", (2 * ctx.size, 3)), mesh, Shard(0))}
    install(ctx, before)
    saves(ctx, after, fast=False)


def case_other_placements(ctx):
    mesh, whole = mesh_of(ctx.size), value("w", (12, 6))
    forms = {
        "rows": shard(whole, mesh, Shard(0)),
        "columns": shard(whole, mesh, Shard(1)),
        "replicated": shard(whole, mesh, Replicate()),
        "plain": whole,
    }
    install(ctx, {"w": forms["rows"]})
    for name in ("columns", "replicated", "rows", "plain", "rows"):
        saves(ctx, {"w": forms[name]}, fast=False, name=name)


def case_requires_grad(ctx):
    after_change(ctx, lambda sd: sd["model"]["plain"].requires_grad_())


def case_requires_grad_of_a_dtensor(ctx):
    after_change(ctx, lambda sd: sd["model"]["sharded"].requires_grad_())


def case_a_tensor_becomes_an_object(ctx):
    after_change(ctx, lambda sd: sd["model"].update(plain=0.5))


def case_an_object_becomes_a_tensor(ctx):
    after_change(ctx, lambda sd: sd.update(step=torch.tensor(7)))


def case_an_object_changes_inside_its_slot(ctx):
    after_change(ctx, lambda sd: sd.update(step=10**9, text=17), fast=True)


def case_an_object_outgrows_its_slot(ctx):
    after_change(ctx, lambda sd: sd.update(text=LONG))


def case_an_object_shrinks_to_a_smaller_slot(ctx):
    sd = {**state(ctx), "text": LONG}
    install(ctx, sd)
    saves(ctx, {**sd, "text": "adam"}, fast=False)


# ---- one rank only ----


def case_one_rank_alone_has_a_new_key(ctx):
    sd = state(ctx)
    install(ctx, sd)
    if ctx.rank == ctx.size - 1:
        sd["mine"] = value("mine", (9,))
    saves(ctx, sd, fast=False)


def case_one_rank_alone_outgrows_a_slot(ctx):
    sd = {**state(ctx), f"rank{ctx.rank}": "short"}
    install(ctx, sd)
    if ctx.rank == 1:
        sd["rank1"] = LONG
    saves(ctx, sd, fast=False)


def case_one_rank_alone_has_another_dtype_of_its_own_key(ctx):
    sd = {**state(ctx), f"rank{ctx.rank}": value("mine", (5,))}
    install(ctx, sd)
    if ctx.rank == 0:
        sd["rank0"] = sd["rank0"].to(torch.int32)
    saves(ctx, sd, fast=False)


def case_one_rank_alone_has_other_writer_options(ctx):
    sd = state(ctx)
    install(ctx, sd)
    options = {"thread_count": 2} if ctx.rank == 1 else {}
    saves(ctx, sd, fast=False, writer_options=options)


# ---- options, directories, groups ----


def case_another_directory(ctx):
    after_change(ctx, lambda sd: None, fast=True)


def case_other_writer_options(ctx):
    sd = state(ctx)
    install(ctx, sd)
    saves(ctx, sd, fast=False, name="threads", writer_options={"thread_count": 3})
    assert len(list((ctx.dir / "threads").glob(f"__{ctx.rank}_*"))) == 3
    options = {"thread_count": 3, "single_file_per_rank": False}
    saves(ctx, sd, fast=False, name="files", writer_options=options)
    ctx.barrier()
    assert len(list((ctx.dir / "files").glob("__*.distcp"))) == ctx.size + 6  # one per item
    saves(ctx, sd, fast=False, name="one")
    saves(ctx, sd, fast=True, name="unsynced", writer_options={"sync_files": False})
    saves(ctx, sd, fast=True, name="refusing", writer_options={"overwrite": False})


def case_ranks_disagree_on_overwrite(ctx):
    sd = state(ctx)
    install(ctx, sd)
    saves(ctx, sd, fast=False, writer_options={"overwrite": ctx.rank == 0})
    saves(ctx, sd, fast=True, name="agreed")


def case_other_planner_options(ctx):
    sd = state(ctx)
    install(ctx, sd)
    saves(ctx, sd, fast=False, name="lowest", dedup_save_to_lowest_rank=True)
    saves(ctx, sd, fast=False, name="balanced")
    saves(ctx, sd, fast=True, name="sharded", flatten_sharded_tensors=False)


def case_flattening_or_not(ctx):
    """The same flat keys both ways; without flattening there is no planner_data."""
    sd = {"w": value("w", (8, 2)), "step": 3}
    install(ctx, sd)
    saves(ctx, sd, fast=False, name="whole", flatten_state_dict=False)
    saves(ctx, sd, fast=False, name="flat")


def case_without_collectives_in_between(ctx):
    """It plans for itself and leaves the group's plan alone."""
    sd = state(ctx)
    install(ctx, sd)
    dcp.save({"other": LONG}, checkpoint_id=ctx.dir / "alone", use_collectives=False)
    assert not was_fast()
    saves(ctx, sd, fast=True)


def case_a_background_save_goes_by_the_same_plan(ctx):
    sd = state(ctx)
    install(ctx, sd)
    dcp.async_save(sd, checkpoint_id=ctx.dir / "async").result()
    assert gather_all(dcp.last_report()["fast"]) == [True] * ctx.size
    sd["model"]["plain"] = sd["model"]["plain"].double()
    dcp.async_save(sd, checkpoint_id=ctx.dir / "async").result()
    assert gather_all(dcp.last_report()["fast"]) == [False] * ctx.size
    saves(ctx, sd, fast=True)


def case_another_group_of_the_same_ranks(ctx):
    sd = state(ctx)
    install(ctx, sd)
    group = dist.new_group(list(range(ctx.size)))
    for fast in (False, True):
        dcp.save(sd, checkpoint_id=ctx.dir / "group", process_group=group)
        assert gather_all(was_fast()) == [fast] * ctx.size
    saves(ctx, sd, fast=True)


@sizes(3)
def case_a_subgroup_between_two_saves_of_all(ctx):
    sd = state(ctx)
    install(ctx, sd)
    group = dist.new_group([0, 2])
    if ctx.rank != 1:
        part = {"plain": sd["model"]["plain"], "step": sd["step"]}
        ours = dcp.save(part, checkpoint_id=ctx.dir / "part", process_group=group)
        assert not was_fast()
        assert list(ours.state_dict_metadata) == ["plain", "step"]
        target = like(part)
        torch_dcp.load(target, checkpoint_id=ctx.dir / "part", process_group=group)
        assert_equal(target, part)
    saves(ctx, sd, fast=True)


def case_a_restarted_rank(ctx):
    """Its new process knows no plan; the others still hold theirs."""
    sd = state(ctx)
    install(ctx, sd)
    if ctx.rank == ctx.size - 1:
        _groups._groups.pop(dist.distributed_c10d._get_default_group())
    saves(ctx, sd, fast=False)
    saves(ctx, sd, fast=True, name="again")


# ---- a save that fails in between ----


class Unpicklable:
    """Fails when it is serialised."""

    def __reduce__(self):
        raise TypeError("not this one")


def fails(sd, path):
    try:
        dcp.save(sd, checkpoint_id=path)
    except dcp.CheckpointException:
        return
    raise AssertionError("it was saved")


def case_planning_failed_in_between(ctx):
    """The plan from before it stays in force."""
    sd = state(ctx)
    install(ctx, sd)
    broken = {**sd, "new": value("new", (4,)), "bad": Unpicklable() if ctx.rank == 1 else 1}
    fails(broken, ctx.dir / "broken")
    saves(ctx, sd, fast=True)


def case_validation_failed_in_between(ctx):
    sd = state(ctx)
    install(ctx, sd)
    rows = 12 if ctx.rank == 0 else 11
    broken = {**sd, "bad": shard(value("bad", (rows, 2)), mesh_of(ctx.size), Shard(0))}
    fails(broken, ctx.dir / "broken")
    saves(ctx, sd, fast=True)


def case_writing_a_changed_state_failed_in_between(ctx):
    """All ranks installed the plan of the save that failed, so that one is in force."""
    sd = state(ctx)
    install(ctx, sd)
    changed = {**sd, "big": shard(value("big", (1 << 12, 16)), mesh_of(ctx.size), Shard(0))}
    with files_can_not_grow(ctx.rank == 1):
        fails(changed, ctx.dir / "broken")
    saves(ctx, changed, fast=True)
    saves(ctx, sd, fast=False, name="back")


def case_writing_the_same_state_failed_in_between(ctx):
    sd = {**state(ctx), "big": shard(value("big", (1 << 12, 16)), mesh_of(ctx.size), Shard(0))}
    install(ctx, sd)
    with files_can_not_grow(ctx.rank == 1):
        fails(sd, ctx.dir / "broken")
    saves(ctx, sd, fast=True)


# ---- the plan cache of torch's planner ----


def cached_keys():
    planner = dcp.SavePlanner
    return [
        sorted(cache)
        for cache in (
            planner._cached_save_plan,
            planner._cached_final_save_plan,
            planner._cached_all_plans,
            planner._cached_global_plan,
            planner._cached_metadata,
        )
    ]


def clear_caches():
    for name in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
        getattr(dcp.SavePlanner, f"_cached_{name}").clear()


def case_torchs_plan_caches_are_filled_on_the_same_ranks(ctx):
    sd, keys = state(ctx), []
    for module in (torch_dcp, dcp):
        clear_caches()
        module.save(sd, checkpoint_id=ctx.dir / module.__name__, planner=planner(module))
        keys.append(cached_keys())
    clear_caches()
    assert keys[0] == keys[1] and keys[0][0] == ["DefaultSavePlanner"], keys


def planner(module=dcp):
    return module.DefaultSavePlanner(enable_plan_caching=True)


def case_clearing_the_plan_caches_on_one_rank_plans_again_on_all(ctx):
    sd, path = state(ctx), ctx.dir / "x"
    clear_caches()
    for fast in (False, True):
        dcp.save(sd, checkpoint_id=path, planner=planner())
        assert was_fast() == fast
    if ctx.rank == 1:
        clear_caches()
    for fast in (False, True):
        ours = dcp.save(sd, checkpoint_id=path, planner=planner())
        assert gather_all(was_fast()) == [fast] * ctx.size
    agrees_with_torch(sd, ours, path)
    clear_caches()


def case_torchs_implementation_takes_over_with_plan_caching(ctx):
    """What we leave in torch's caches never serves its planner as a plan, nor its plans us."""
    sd = state(ctx)
    clear_caches()
    for index, native in enumerate((True, False, True, False, False, True)):
        if index == 3:
            sd = {**sd, "new": value("new", (8,))}
        sd["step"] = index
        path = ctx.dir / str(index)
        dcp.configure(native=native)
        try:
            ours = dcp.save(sd, checkpoint_id=path, planner=planner())
        finally:
            dcp.configure(native=True)
        agrees_with_torch(sd, ours, path)
    clear_caches()


# ---- many changes in a row ----


def case_a_random_sequence_of_changes(ctx):
    """A plan is reused exactly when torch's own plan would be the same on every rank."""
    rng = random.Random(20260 + ctx.size)
    sd, mesh = random_state(rng, mesh_of(ctx.size)), mesh_of(ctx.size)
    oracle, options = Oracle(), {"thread_count": 1, "single_file_per_rank": True}
    steps = 2 * STEPS + ("values",) * 3
    for index, step in enumerate(rng.sample(steps, len(steps))):
        sd, options = random_step(rng, step, sd, options, mesh, ctx)
        if step == "restart":
            oracle.forget()
        fast = oracle.expects_fast(sd, options)
        path = ctx.dir / str(index % 5)
        what = f"step {index}: {step}"
        if step == "abort":
            fails({**sd, "bad": Unpicklable() if ctx.rank == 1 else 1}, path)
        metadata = dcp.save(copy.copy(sd), storage_writer=writer(dcp, path, **options))
        assert gather_all(was_fast()) == [fast] * ctx.size, what
        oracle.installed(sd, options)
        target = like(sd)
        torch_dcp.load(target, checkpoint_id=path)
        assert_equal(target, sd, what)
        plain = torch_dcp.FileSystemReader(path).read_metadata()
        plain.storage_meta.load_id = None
        assert metadata == plain, what
        ctx.barrier()
