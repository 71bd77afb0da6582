"""``enable_plan_caching`` of DefaultSavePlanner, on and off, under torch and under dcp_native."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, like, value
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.planner_helpers import _compare_save_plans

import dcp_native as dcp
from dcp_native._plan_cache import PlanInTheCore

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CACHES = [
    "_cached_save_plan",
    "_cached_final_save_plan",
    "_cached_all_plans",
    "_cached_global_plan",
    "_cached_metadata",
]


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch):
    for name in CACHES:
        monkeypatch.setattr(SavePlanner, name, {})


def forget():
    for name in CACHES:
        getattr(SavePlanner, name).clear()


def keys():
    return {name: sorted(getattr(SavePlanner, name)) for name in CACHES}


def state():
    return {
        "w": value("w", (6, 4)),
        "opt": {"m": [value("m", (3,)), "text"], "step": 1},
    }


def save(module, sd, path, caching=True, key=None, **options):
    planner = module.DefaultSavePlanner(enable_plan_caching=caching)
    if key is not None:
        planner._cached_plans_key = key
    return module.save(sd, checkpoint_id=path, planner=planner, **options)


def was_fast():
    report = dcp.last_report()
    assert report["kind"] == "save" and report["path"] == "native"
    return report["fast"]


# ---- what torch's cache notices, and what it does not ----

NOTICED = {
    "nothing": lambda sd: None,
    "values": lambda sd: sd["w"].add_(1),
    "new tensor": lambda sd: sd.update(more=value("more", (2,))),
    "new object": lambda sd: sd.update(more=5),
    "removed": lambda sd: sd["opt"].pop("step"),
    "renamed": lambda sd: sd.update(v=sd.pop("w")),
    "order": lambda sd: sd.update(w=sd.pop("w")),
    "shape": lambda sd: sd.update(w=sd["w"].reshape(4, 6)),
    "object": lambda sd: sd["opt"].update(step=10**6),
    "tensor to object": lambda sd: sd.update(w="gone"),
    "object to tensor": lambda sd: sd["opt"].update(step=torch.tensor(3)),
}

MISSED = {
    "dtype": lambda sd: sd.update(w=sd["w"].to(torch.int32)),
    "requires_grad": lambda sd: sd["w"].requires_grad_(),
    "nesting": lambda sd: sd["opt"].update(m=dict(zip("01", sd["opt"]["m"], strict=True))),
}


def describe(metadata):
    return (
        metadata.state_dict_metadata,
        metadata.planner_data,
        set(metadata.storage_data),
        metadata.version,
    )


def after_change(module, change, path, caching):
    sd = state()
    save(module, sd, path, caching)
    save(module, sd, path, caching)
    change(sd)
    described = describe(save(module, sd, path, caching))
    target = like(sd)
    torch_dcp.load(target, checkpoint_id=path)
    assert_equal(target, sd)
    return described


@pytest.mark.parametrize("change", NOTICED.values(), ids=NOTICED)
def test_a_change_gives_the_same_metadata_with_and_without_caching(tmp_path, change):
    seen = [
        after_change(module, change, tmp_path / f"{module.__name__}-{caching}", caching)
        for module in (torch_dcp, dcp)
        for caching in (False, True)
    ]
    assert all(one == seen[0] for one in seen)


@pytest.mark.parametrize("change", MISSED.values(), ids=MISSED)
def test_a_change_that_torchs_cache_misses_is_noticed(tmp_path, change):
    """[plan-cache]"""
    fresh = after_change(torch_dcp, change, tmp_path / "fresh", False)
    stale = after_change(torch_dcp, change, tmp_path / "stale", True)
    forget()
    ours = after_change(dcp, change, tmp_path / "ours", True)
    assert ours == fresh != stale
    assert not was_fast()


def test_every_save_has_a_metadata_of_its_own(tmp_path):
    """[plan-cache]"""
    torchs = [save(torch_dcp, state(), tmp_path / f"t{i}") for i in range(2)]
    assert torchs[0] is torchs[1]
    assert torchs[0].storage_meta.checkpoint_id == tmp_path / "t1"
    forget()
    ours = [save(dcp, state(), tmp_path / f"o{i}") for i in range(2)]
    assert [m.storage_meta.checkpoint_id for m in ours] == [tmp_path / "o0", tmp_path / "o1"]


# ---- what lies in the caches ----


def fill_once(module, path):
    save(module, state(), path)


def fill_twice_under_two_keys(module, path):
    save(module, state(), path)
    save(module, {"other": 1}, path, key="other")


def leave_them_without_caching(module, path):
    save(module, state(), path, caching=False)


def leave_them_when_planning_fails(module, path):
    with pytest.raises(module.CheckpointException):
        save(module, {"a": {"b": 1}, "a.b": 2}, path)


def fill_without_collectives(module, path):
    save(module, state(), path, use_collectives=False)
    save(module, state(), path, use_collectives=False)


@pytest.mark.parametrize(
    "program",
    [
        fill_once,
        fill_twice_under_two_keys,
        leave_them_without_caching,
        leave_them_when_planning_fails,
        fill_without_collectives,
    ],
    ids=lambda p: p.__name__,
)
def test_torchs_caches_get_entries_when_torchs_would(tmp_path, program):
    seen = []
    for module in (torch_dcp, dcp):
        forget()
        program(module, tmp_path / module.__name__)
        seen.append(keys())
    assert seen[0] == seen[1]


def test_a_stand_in_is_never_taken_for_a_plan():
    stand_in = PlanInTheCore()
    assert not _compare_save_plans(SavePlan([]), stand_in)
    assert not _compare_save_plans(stand_in, SavePlan([]))
    assert stand_in != SavePlan([]) and "dcp_native" in repr(stand_in)
    with pytest.raises(RuntimeError, match="dcp_native"):
        stand_in.items  # noqa: B018


@pytest.mark.parametrize("how", ["clear", "pop", "replace"])
@pytest.mark.parametrize("cache", CACHES)
def test_clearing_any_of_the_caches_plans_again(tmp_path, monkeypatch, cache, how):
    sd = state()
    for fast in (False, True, True):
        save(dcp, sd, tmp_path)
        assert was_fast() == fast
    if how == "clear":
        getattr(SavePlanner, cache).clear()
    elif how == "pop":
        getattr(SavePlanner, cache).pop("DefaultSavePlanner")
    else:
        monkeypatch.setattr(SavePlanner, cache, {})
    for fast in (False, True):
        metadata = save(dcp, sd, tmp_path)
        assert was_fast() == fast
    assert describe(metadata) == describe(save(torch_dcp, sd, tmp_path / "t", caching=False))


def test_another_key_plans_again(tmp_path):
    for key, fast in ((None, False), (None, True), ("mine", False), ("mine", True)):
        save(dcp, state(), tmp_path, key=key)
        assert was_fast() == fast


def test_without_caching_the_caches_decide_nothing(tmp_path):
    for fast in (False, True, True):
        save(dcp, state(), tmp_path, caching=False)
        assert was_fast() == fast
        forget()


def test_torchs_planner_and_ours_can_take_turns(tmp_path):
    """Neither goes by what the other left in the caches."""
    sd = state()
    for index, native in enumerate((True, False, False, True, False, True, True)):
        sd["opt"]["step"] = index
        if index in (2, 4, 6):
            sd[f"new{index}"] = value(f"new{index}", (index,))
        dcp.configure(native=native)
        metadata = save(dcp, sd, tmp_path / str(index))
        fresh = save(torch_dcp, sd, tmp_path / f"t{index}", caching=False)
        assert describe(metadata) == describe(fresh)
        target = like(sd)
        torch_dcp.load(target, checkpoint_id=tmp_path / str(index))
        assert_equal(target, sd)
