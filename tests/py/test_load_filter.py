"""``load(..., keys=...)``: what is selected is loaded, nothing else is touched, typos raise."""

from __future__ import annotations

import fnmatch
import pickle
import random
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, like, value
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

import dcp_native as dcp


class CustomPlanner(torch_dcp.DefaultLoadPlanner):
    """Not torch's own class: its hooks plan what the native reader reads."""


class CustomReader(torch_dcp.FileSystemReader):
    """Not torch's own class: the load runs through torch's implementation."""


HOW = ("native", "hooks", "torch")


def saved() -> dict[str, Any]:
    return {
        "model": {
            "layers": {
                str(i): {"weight": value(f"w{i}", (4, 3)), "bias": value(f"b{i}", (3,))}
                for i in (0, 1, 10)
            },
            "norm.weight": value("n", (5,)),
        },
        "optim": {
            "state": [value("m0", (2,)), {"lr": 0.5, "v": value("v", (2,))}],
            "steps": [1, 2],
        },
        "step": 7,
    }


def flat(state_dict: dict[str, Any]) -> dict[str, Any]:
    return flatten_state_dict(state_dict)[0]


def blank() -> dict[str, Any]:
    """Leaves of other values than saved ones, objects included."""
    target = like(saved())
    target["optim"]["steps"] = "before"
    target["step"] = "before"
    target["optim"]["state"][1]["lr"] = "before"
    return target


def load(path, keys: Any, how: str = "native", target: dict[str, Any] | None = None, **more: Any):
    """Loads; asserts that exactly the leaves that changed were meant to."""
    target = blank() if target is None else target
    planner = None if how == "native" else CustomPlanner()
    reader = CustomReader(path) if how == "torch" else None
    dcp.load(
        target, checkpoint_id=path, storage_reader=reader, keys=keys, planner=planner, **more
    )  # fmt: skip
    assert dcp.last_report()["path"] == ("torch" if how == "torch" else "native")
    assert dcp.last_report()["planner"].startswith("native" if how == "native" else "python: ")
    return target


def changed(target: dict[str, Any]) -> set[str]:
    """Names with the saved value; all others must have the one from before."""
    names = set()
    before, after, want = flat(blank()), flat(target), flat(saved())
    assert list(after) == list(want)
    for name, leaf in after.items():
        try:
            assert_equal(leaf, before[name])
        except AssertionError:
            assert_equal(leaf, want[name], name)
            names.add(name)
    return names


@pytest.fixture
def path(tmp_path):
    dcp.save(saved(), checkpoint_id=tmp_path / "c")
    return tmp_path / "c"


SELECTIONS: dict[str, tuple[Any, set[str]]] = {
    "one key": ("step", {"step"}),
    "whole components": (
        ["model.layers.1"],
        {"model.layers.1.weight", "model.layers.1.bias"},
    ),
    "a key with a dot in it": (["model.norm"], {"model.norm.weight"}),
    "elements of a list": ({"optim.state.0"}, {"optim.state.0"}),
    "a list that is one leaf": (("optim.steps",), {"optim.steps"}),
    "a pattern": (
        ["*.bias"],
        {"model.layers.0.bias", "model.layers.1.bias", "model.layers.10.bias"},
    ),
    "a pattern of whole components": (
        ["model.layers.[02-9]"],
        {"model.layers.0.weight", "model.layers.0.bias"},
    ),
    "a question mark is no dot-free one": (["optim?state?0", "ste?"], {"optim.state.0", "step"}),
    "overlapping": (
        ["model.layers", "model.layers.0", "*.bias", "model.layers.0.*"],
        {f"model.layers.{i}.{n}" for i in (0, 1, 10) for n in ("weight", "bias")},
    ),
    "a callable": (lambda name: name.endswith("lr"), {"optim.state.1.lr"}),
    "nothing": ([], set()),
    "a callable that wants nothing": (lambda name: 0, set()),
    "a generator": ((name for name in ("step",)), {"step"}),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", SELECTIONS)
def test_exactly_what_is_selected_is_loaded(case, how, path):
    """[keys-keyword]"""
    keys, want = SELECTIONS[case]
    if case == "a generator":
        keys = (name for name in ("step",))
    assert changed(load(path, keys, how)) == want
    report = dcp.last_report()
    assert set(report["skipped"]) == set(flat(saved())) - want
    assert report["skipped_count"] == len(report["skipped"])


def reference(keys: list[str], names: list[str]) -> set[str]:
    """The rule in its plainest words."""
    found = set()
    for name in names:
        parts = name.split(".")
        starts = [".".join(parts[: i + 1]) for i in range(len(parts))]
        if any(s == k or fnmatch.fnmatchcase(s, k) for s in starts for k in keys):
            found.add(name)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_random_keys_select_what_the_rule_says(seed, path):
    draw = random.Random(seed)
    names = list(flat(saved()))
    pool = sorted({n[: draw.randint(1, len(n))] + draw.choice(["", "*", "?"]) for n in names})
    keys = [k for k in draw.sample(pool, 5) if reference([k], names)] + [draw.choice(names)]
    want = reference(keys, names)
    for how in HOW:
        assert changed(load(path, keys, how)) == want, keys


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "keys",
    [["modle"], ["model.layers.2"], ["model.lay"], ["step", "nope.*"], ["STEP"], [""], ["step."]],
    ids=str,
)
def test_a_key_that_selects_nothing_is_an_error_by_name(keys, how, path):
    target = blank()
    with pytest.raises(dcp.CheckpointException) as caught:
        load(path, keys, how, target)
    cause = caught.value.failures[0][0]
    assert isinstance(cause, ValueError)
    assert (
        repr(keys[-1]) in str(cause)
        and "'model'" in str(cause)
        and "'step'" not in str(cause).split("selects")[0]
    )
    assert changed(target) == set()
    report = dcp.last_report()
    assert report["failed"] and repr(keys[-1]) in report["error"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("keys", [3, [b"step"], ["step", None]], ids=str)
def test_keys_of_other_types_are_refused(keys, how, path):
    with pytest.raises(TypeError, match="keys must be"):
        load(path, keys, how)
    assert dcp.last_report()["failed"]


@pytest.mark.parametrize("how", HOW)
def test_an_exception_of_the_callable_is_the_cause(how, path):
    with pytest.raises(dcp.CheckpointException) as caught:
        load(path, lambda name: 1 / 0, how)
    assert isinstance(caught.value.failures[0][0], ZeroDivisionError)


@pytest.mark.parametrize("how", HOW)
def test_what_is_not_selected_need_not_be_in_the_checkpoint(how, path):
    target = {**blank(), "new": torch.full((3,), 5.0), "other": {"object": "mine"}}
    load(path, "model", how, target)
    assert torch.equal(target.pop("new"), torch.full((3,), 5.0))
    assert target.pop("other") == {"object": "mine"}
    assert changed(target) == {n for n in flat(saved()) if n.startswith("model.")}
    with pytest.raises(dcp.CheckpointException, match="Missing key in checkpoint state_dict: new"):
        load(path, ["model", "new"], how, {**blank(), "new": torch.zeros(3)})


@pytest.mark.parametrize("how", HOW)
def test_sizes_of_what_is_not_selected_do_not_matter(how, path):
    target = blank()
    target["model"]["norm.weight"] = torch.zeros(99)
    load(path, ["step"], how, target)
    assert target["step"] == 7 and not target["model"]["norm.weight"].any()


class App:
    """A Stateful that counts what is asked of it."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        self.loaded = 0

    def state_dict(self):
        return self.state

    def load_state_dict(self, state_dict):
        assert state_dict is self.state
        self.loaded += 1


@pytest.mark.parametrize("how", HOW)
def test_a_stateful_is_only_told_when_something_of_it_was_selected(how, tmp_path):
    dcp.save({"a.b": App({"x": 1}), "a": App({"c": 2, "d": 3})}, checkpoint_id=tmp_path)
    target = {"a.b": App({"x": None}), "a": App({"c": None, "d": "mine"}), "z": 5}
    load(tmp_path, ["a.c"], how, target)
    assert (target["a.b"].loaded, target["a"].loaded) == (0, 1)
    assert target["a"].state == {"c": 2, "d": "mine"} and target["z"] == 5
    load(tmp_path, ["a.b"], how, target)
    assert (target["a.b"].loaded, target["a"].loaded) == (1, 1)
    assert target["a.b"].state == {"x": 1}


@pytest.mark.parametrize("how", HOW)
def test_without_flattening_keys_name_top_level_values(how, tmp_path):
    state = {"w": value("w", (3,)), "nested": {"x": 1}, "b": value("b", (2,))}
    dcp.save(state, checkpoint_id=tmp_path, planner=dcp.DefaultSavePlanner(False))
    planner = dcp.DefaultLoadPlanner(False) if how == "native" else CustomPlanner(False)
    target = {"w": torch.zeros(3), "nested": None, "b": torch.zeros(2)}
    dcp.load(target, checkpoint_id=tmp_path, planner=planner, keys=["w"])
    assert torch.equal(target["w"], state["w"]) and not target["b"].any()
    assert target["nested"] is None
    with pytest.raises(dcp.CheckpointException, match=r"nested\.x"):
        dcp.load(target, checkpoint_id=tmp_path, planner=planner, keys=["nested.x"])


@pytest.mark.parametrize("how", HOW)
def test_meta_tensors_get_memory_only_where_they_are_loaded(how, tmp_path):
    state = {"m": {0: {"w": value("w", (3,))}, 1: {"w": value("v", (3,))}}, "l": [value("l", (2,))]}
    dcp.save(state, checkpoint_id=tmp_path)

    class Opaque:
        """What torch's materialising replaces by None."""

    opaque = Opaque()
    target = {
        "m": {i: {"w": torch.empty(3, device="meta")} for i in (0, 1)},
        "l": [torch.empty(2, device="meta")],
        "other": opaque,
    }
    if how != "native":  # which wants a process group to choose the device
        target["m"][0]["w"], target["l"][0] = torch.zeros(3), torch.zeros(2)
    load(tmp_path, ["m.0", "l"], how, target)
    assert torch.equal(target["m"][0]["w"], state["m"][0]["w"])
    assert torch.equal(target["l"][0], state["l"][0])
    assert target["m"][1]["w"].is_meta and target["other"] is opaque
    assert list(target["m"]) == [0, 1]


def test_verify_is_refused_where_torch_loads(path):
    for verify in (True, "strict"):
        with pytest.raises(dcp.CheckpointException, match="verifies nothing"):
            load(path, None, "torch", verify=verify)
    load(path, None, "torch", verify=False)
    load(path, None, "hooks", verify="strict")
    with pytest.raises(ValueError, match="verify must be"):
        load(path, None, verify="very")


def test_a_checkpoint_that_only_torch_can_unpickle_is_filtered_too(path):
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.extra = 1
    file.write_bytes(pickle.dumps(metadata))
    target = blank()
    dcp.load(target, checkpoint_id=path, keys=["step"])
    assert changed(target) == {"step"} and dcp.last_report()["skipped_count"] == 11


def test_keys_that_collide_are_an_error_on_torchs_path_too(tmp_path):
    class Planner(dcp.DefaultLoadPlanner):
        pass

    dcp.save({"m": {"1": torch.ones(2)}}, checkpoint_id=tmp_path)
    target = {"m": {1: torch.zeros(2), "1": torch.zeros(2)}}
    for planner in (None, Planner()):
        with pytest.raises(dcp.CheckpointException, match=r"duplicated flatten key m\.1"):
            dcp.load(target, checkpoint_id=tmp_path, keys="m", planner=planner)
