"""Targets of a load against torch's DefaultLoadPlanner: keys, boxes, memory, exceptions."""

from __future__ import annotations

import pickle
from collections import OrderedDict, UserDict
from typing import Any
from unittest import mock

import pytest
import torch
from plans import fake_rank
from test_flatten import Halves, Sub, dtensor, seeded, sharded_tensor, strided
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from dcp_native import _bridge, _native  # noqa: F401

MEMORY, PIECES, OVERLAPS = range(3)
"""enum dcp_target_kind."""


def metadata_of(state_dict: dict, **options: bool) -> Metadata:
    """What a save of `state_dict` by one rank would leave, without storage."""
    planner = DefaultSavePlanner(**options)
    planner.set_up_planner(state_dict, is_coordinator=True)
    _, metadata = create_default_global_save_plan([planner.create_local_plan()])
    return Metadata(
        metadata.state_dict_metadata, planner_data=dict(planner.mappings), storage_data={}
    )


def torch_plan(
    metadata: Metadata, target: dict, **options: bool
) -> tuple[DefaultLoadPlanner, list]:
    """torch's planner, without its _init_state_dict: that replaces what it does not know by None,
    and asks ShardedTensors for a CUDA device."""
    planner = DefaultLoadPlanner(**options)
    with mock.patch.object(default_planner, "_init_state_dict"):
        planner.set_up_planner(target, metadata, is_coordinator=True)
    return planner, planner.create_local_plan().items


def our_targets(metadata: Metadata, target: dict, **options: bool) -> dict[str, Any]:
    return _native._debug_targets(pickle.dumps(metadata), target, **options)


def boxes_wanted(planner: DefaultLoadPlanner, items: list) -> list[tuple]:
    """(fqn, offsets, sizes) of every box that torch's read items fill, in state dict order."""
    wanted: dict[tuple, None] = {}
    for item in items:
        fqn = item.dest_index.fqn
        if item.type is LoadItemType.BYTE_IO:
            wanted[(fqn, (), ())] = None
            continue
        for chunk in _create_chunk_list(planner.state_dict[fqn]):
            if chunk.offsets == item.dest_index.offset:
                wanted[(fqn, tuple(chunk.offsets), tuple(chunk.sizes))] = None
    return list(wanted)


def compare_targets(metadata: Metadata, target: dict, **options: bool) -> dict[str, Any]:
    """Asserts that the same keys and boxes are read, and that each target is the right memory."""
    ours = our_targets(metadata, target, **options)
    planner, items = torch_plan(metadata, target, **options)
    assert [t[:3] for t in ours["targets"]] == boxes_wanted(planner, items)
    for _, _, sizes, address, tensor, kind in ours["targets"]:
        if tensor is None:
            assert address == 0
            continue
        assert tuple(tensor.shape) == sizes
        if kind == MEMORY:
            assert address == tensor.detach().data_ptr()
        else:
            assert address == 0 and not tensor.requires_grad
    if options.get("flatten_state_dict", True):
        for index, fqn, path in ours["objects"]:
            assert planner.mappings[fqn] == path
            assert ours["targets"][index][0] == fqn
    return ours


def outcome(fn: Any, *args: Any, **options: bool) -> tuple[type, str] | None:
    try:
        fn(*args, **options)
    except Exception as error:
        return type(error), str(error)
    return None


def assert_same_error(metadata: Metadata, target: dict, **options: bool) -> tuple[type, str]:
    """Both refuse, with the same exception and text."""
    ours = outcome(our_targets, metadata, target, **options)
    assert ours is not None
    assert ours == outcome(torch_plan, metadata, target, **options)
    return ours


PLAIN = {
    "model": {"w": seeded(4, 6), "b": seeded(3), "scalar": seeded(), "none": seeded(0, 3)},
    "opt": {"state": {0: {"step": 3, "avg": seeded(2)}}, "groups": [{"lr": 0.1}], "l": [1, 2]},
}


def fresh(state_dict: Any) -> Any:
    """The same structure with other values."""
    if isinstance(state_dict, torch.Tensor):
        return torch.zeros_like(state_dict)
    if isinstance(state_dict, dict):
        return type(state_dict)((k, fresh(v)) for k, v in state_dict.items())
    if isinstance(state_dict, list):
        return [fresh(v) for v in state_dict]
    return None


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("flatten_sharded", [True, False])
def test_plain_targets_are_the_callers_memory(flatten: bool, flatten_sharded: bool) -> None:
    options = {"flatten_state_dict": flatten, "flatten_sharded_tensors": flatten_sharded}
    source = PLAIN if flatten else {"a": seeded(3, 4), "b": 5, "c": [1], "d": {"x": 1}}
    target = fresh(source)
    ours = compare_targets(metadata_of(source, **options), target, **options)
    assert ours["copies_count"] == 0 and ours["cast_count"] == 0
    if flatten:
        assert ours["targets"][0][4] is target["model"]["w"]
        assert [o[1:] for o in ours["objects"]] == [
            ("opt.state.0.step", ("opt", "state", "0", "step")),
            ("opt.groups.0.lr", ("opt", "groups", 0, "lr")),
            ("opt.l", ("opt", "l")),
        ]
    else:
        assert all(path is None for _, _, path in ours["objects"])


def test_views_are_straight_targets_unless_they_overlap_themselves() -> None:
    base = torch.zeros(8, 8)
    target = {
        "t": base.t(),
        "slice": base[1:3],
        "columns": base[:, 2:4],
        "parameter": torch.nn.Parameter(torch.zeros(3)),
        "expanded": torch.zeros(1, 3).expand(2, 3),
        "conj": torch.zeros(2, dtype=torch.complex64).conj(),
        "cast": torch.zeros(3, dtype=torch.float64),
        "unknown cast": torch.zeros(3, dtype=torch.uint32),
        "subclass": torch.zeros(2).as_subclass(Sub),
    }
    source = {k: seeded(*v.shape) for k, v in target.items()}
    source["conj"] = torch.zeros(2, dtype=torch.complex64)
    ours = compare_targets(metadata_of(source), target)
    kinds = {t[0]: t[5] for t in ours["targets"] if t[5] != MEMORY}
    assert kinds == {
        "expanded": OVERLAPS,
        "conj": PIECES,
        "unknown cast": PIECES,
        "subclass": OVERLAPS,
    }
    assert (ours["straight_count"], ours["copies_count"], ours["cast_count"]) == (4, 4, 2)
    assert next(type(t[4]) for t in ours["targets"] if t[0] == "subclass") is Sub


def test_a_copy_on_write_target_is_materialised_before_it_is_written() -> None:
    original = seeded(4)
    lazy = torch._lazy_clone(original)
    ours = our_targets(metadata_of({"t": original}), {"t": lazy})
    assert ours["targets"][0][3] == lazy.data_ptr() != original.data_ptr()
    assert torch.equal(lazy, original)


def test_missing_keys_raise_torchs_error_or_are_counted() -> None:
    metadata = metadata_of({"a": seeded(2)})
    target = {"a": torch.zeros(2), "b": {"c": torch.zeros(1), "d": 2}}
    assert assert_same_error(metadata, target) == (
        RuntimeError,
        "Missing key in checkpoint state_dict: b.c.",
    )
    ours = compare_targets(metadata, target, allow_partial_load=True)
    assert ours["missing_count"] == 2 and len(ours["targets"]) == 1


def test_extra_keys_of_the_checkpoint_are_ignored() -> None:
    ours = compare_targets(metadata_of(PLAIN), {"model": {"b": torch.zeros(3)}})
    assert [t[0] for t in ours["targets"]] == ["model.b"] and not ours["is_v_2_3"]


class Sized:
    """Not a tensor, but has a size, which torch looks at first."""

    def __init__(self, *size: int) -> None:
        self._size = torch.Size(size)

    def size(self) -> torch.Size:
        return self._size


class SizeIsNone:
    size = None


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(4),
        torch.zeros(4, 5),
        torch.zeros(4, 6, 1),
        torch.zeros(()),
        torch.zeros(6, 4).as_subclass(Sub),
        Sized(4, 7),
        Sized(4, 6),
        SizeIsNone(),
        5,
        "text",
        None,
        (1, 2),
    ],
    ids=lambda value: str(getattr(value, "shape", value))[:24],
)
def test_values_that_do_not_fit_raise_torchs_error(value: object) -> None:
    kind, text = assert_same_error(metadata_of({"m": {"w": seeded(4, 6)}}), {"m": {"w": value}})
    assert kind is ValueError
    assert text.startswith(
        ("Size mismatch between saved torch.Size([4, 6]) and", "Invalid checkpoint metadata")
    )


def test_the_cause_of_invalid_metadata_is_kept() -> None:
    with pytest.raises(ValueError, match="Invalid checkpoint metadata for w") as error:
        our_targets(metadata_of({"w": seeded(2)}), {"w": "text"})
    assert "Unsupported Type" in str(error.value.__cause__)


def test_a_size_that_cannot_be_called_fails_as_in_torch() -> None:
    class Wrong:
        size = 3

    assert assert_same_error(metadata_of({"w": seeded(2)}), {"w": Wrong()})[0] is TypeError


def test_a_saved_object_replaces_a_tensor() -> None:
    ours = compare_targets(
        metadata_of({"a": {"b": 5}, "c": None}), {"a": {"b": torch.zeros(3)}, "c": 1}
    )
    assert ours["replaced_count"] == 1
    assert [o[1:] for o in ours["objects"]] == [("a.b", ("a", "b")), ("c", ("c",))]


@pytest.mark.parametrize(
    "target",
    [
        OrderedDict(a=OrderedDict(b=torch.zeros(2))),
        {"a": UserDict(b=torch.zeros(2))},
        {"a": {"b": torch.zeros(2)}},
    ],
    ids=["ordered", "user dict", "dict"],
)
def test_any_mapping_is_descended(target: dict) -> None:
    ours = compare_targets(metadata_of({"a": {"b": seeded(2)}}), target)
    assert ours["targets"][0][4] is target["a"]["b"]


# ---- torch 2.3's flattening ----


def old_metadata(state_dict: dict) -> Metadata:
    from torch.distributed.checkpoint import _version

    _version._derived_version = "2_3"
    try:
        return metadata_of(state_dict)
    finally:
        _version._derived_version = None


OLD = {
    "model": {"w": seeded(3)},
    "opt": {
        "groups": [{"lr": 0.1, "params": [1, 2]}],
        "state": {"0": {"avg": seeded(2), "step": 1}},
    },
    "meta": {"epoch": 3, "name": "x"},
}


def test_keys_of_torch_2_3_are_recognised() -> None:
    metadata = old_metadata(OLD)
    assert "meta" in metadata.state_dict_metadata
    target = fresh(OLD)
    ours = compare_targets(metadata, target)
    assert ours["is_v_2_3"]
    assert ("meta", ("meta",)) in [o[1:] for o in ours["objects"]]


def test_keys_of_today_with_extra_ones_are_not_taken_for_old() -> None:
    ours = compare_targets(metadata_of(OLD), {k: v for k, v in fresh(OLD).items() if k != "model"})
    assert not ours["is_v_2_3"]


def test_missing_keys_of_an_old_checkpoint_are_named_in_its_own_flattening() -> None:
    metadata = old_metadata(OLD)
    target = fresh(OLD) | {"more": {"x": 1, "y": 2}}
    assert assert_same_error(metadata, target)[1] == "Missing key in checkpoint state_dict: more."


# ---- distributed tensors ----


@pytest.mark.parametrize("rank", range(4))
def test_dtensor_targets_are_torchs(rank: int) -> None:
    with fake_rank(rank, 4):
        line = init_device_mesh("cpu", (4,))
        square = init_device_mesh("cpu", (2, 2))
        pair = DeviceMesh("cpu", [1, 3])
        target = {
            "even": dtensor((8, 3), line, Shard(0)),
            "uneven": dtensor((10, 3), line, Shard(0)),
            "empty": dtensor((2, 3), line, Shard(0)),
            "columns": dtensor((3, 10), line, Shard(1)),
            "replicate": dtensor((3, 2), line, Replicate()),
            "parameter": dtensor((8, 2), line, Shard(0), param=True),
            "2-D": dtensor((5, 7), square, Shard(0), Shard(1)),
            "twice": dtensor((7, 2), square, Shard(0), Shard(0)),
            "strided": dtensor((8, 4), square, strided(0, 2), Shard(0)),
            "submesh": dtensor((6, 2), pair, Shard(0)),
            "cast": DTensor.from_local(
                torch.zeros(2, 3, dtype=torch.float64), line, [Shard(0)], run_check=False
            ),
            "transposed": DTensor.from_local(
                torch.zeros(4, 2).t(), line, [Shard(0)], run_check=False
            ),
        }
        source = {k: seeded(*v.shape) for k, v in target.items()}
        ours = compare_targets(metadata_of(source), target)
        names = [t[0] for t in ours["targets"]]
        assert ("submesh" in names) == (pair.get_coordinate() is not None)
        assert ours["copies_count"] == 0 and ours["cast_count"] == 1


def test_a_dtensor_of_another_size_is_refused_before_its_mesh_is_asked() -> None:
    with fake_rank(0, 4):
        outside = dtensor((6, 2), DeviceMesh("cpu", [1, 3]), Shard(0))
        assert_same_error(metadata_of({"t": seeded(7, 2)}), {"t": outside})
        ours = compare_targets(metadata_of({"t": 5}), {"t": outside})
        assert ours["targets"] == []


def test_partial_placements_raise_torchs_error() -> None:
    with fake_rank(0, 4):
        mesh = init_device_mesh("cpu", (4,))
        partial = DTensor.from_local(seeded(2), mesh, [Partial()], run_check=False)
        assert assert_same_error(metadata_of({"t": seeded(2)}), {"t": partial})[0] is ValueError


def test_a_padded_local_tensor_is_filled_from_its_start() -> None:
    with fake_rank(3, 4):
        mesh = init_device_mesh("cpu", (4,))
        local = torch.zeros(3, 2)
        padded = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size((10, 2)), stride=(2, 1)
        )
        ours = compare_targets(metadata_of({"t": seeded(10, 2)}), {"t": padded})
        assert ours["targets"][0][:4] == ("t", (9, 0), (1, 2), local.data_ptr())


def test_hooks_choose_chunks_and_tensors() -> None:
    class Loadable(Halves):
        def size(self, *args: int) -> torch.Size:
            rows, columns = self.shape
            return torch.Size([rows + 10, columns])

        def __create_chunk_list__(self) -> list:
            return [item.tensor_data.chunk for item in self.__create_write_items__("", self)]

    with fake_rank(1, 2):
        mesh = init_device_mesh("cpu", (2,))
        target = {
            "halves": Loadable(torch.zeros(6, 4)),
            "wrapped": DTensor.from_local(
                LocalShardsWrapper([torch.zeros(2, 4), torch.zeros(3, 4)], [(5, 0), (7, 0)]),
                mesh,
                [Shard(0)],
                run_check=False,
                shape=torch.Size([10, 4]),
                stride=(4, 1),
            ),
        }
        source = {"halves": seeded(16, 4), "wrapped": seeded(10, 4)}
        ours = compare_targets(metadata_of(source), target)
        assert [t[1] for t in ours["targets"]] == [(10, 0), (13, 0), (5, 0), (7, 0)]
        assert ours["straight_count"] == 4


@pytest.mark.parametrize("rank", range(2))
def test_sharded_tensor_targets_are_torchs(rank: int) -> None:
    with fake_rank(rank, 2):
        target = {
            "st": sharded_tensor((6, 4), [(0, 2, 0), (2, 3, 1), (5, 1, 1)]),
            "elsewhere": {"st": sharded_tensor((4, 2), [(0, 4, 1 - rank)])},
        }
        # A ShardedTensor without local shards vanishes, so its absence is no error.
        metadata = metadata_of({"st": seeded(6, 4)})
        ours = compare_targets(metadata, target)
        assert len(ours["targets"]) == 1 + rank
        assert_same_error(metadata, target, flatten_sharded_tensors=False)


def test_quantised_tensors_are_left_to_torch() -> None:
    source = torch.quantize_per_tensor(seeded(4, 3), 0.5, 0, torch.qint8)
    ours = our_targets(metadata_of({"q": source}), {"q": torch.zeros(4, 3)})
    ((_, _, sizes, address, tensor, kind),) = ours["targets"]
    assert sizes == (4, 3) and tensor.dtype == torch.float32
    assert address == 0 and kind == PIECES


def test_meta_tensors_are_found_in_containers_of_any_kind() -> None:
    meta = torch.empty(2, device="meta")
    assert _native._debug_has_meta({"a": [{"b": (1, meta)}]})
    assert _native._debug_has_meta({"a": OrderedDict(b=torch.nn.Parameter(meta))})
    assert _native._debug_has_meta({"a": meta.as_subclass(Sub)})
    assert _native._debug_has_meta({"a": UserDict(b=UserDict(c=meta))})
    assert not _native._debug_has_meta(
        {"a": [seeded(1)], "b": 1, "c": UserDict(d=seeded(1)), "e": object()}
    )
    with fake_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        assert not _native._debug_has_meta({"a": sharded_tensor((4, 2), [(0, 4, 0)])})
        assert _native._debug_has_meta(
            {"a": DTensor.from_local(meta, mesh, [Shard(0)], run_check=False)}
        )


def test_metadata_of_torch_survives_our_reader() -> None:
    metadata = metadata_of(PLAIN)
    saved = metadata.state_dict_metadata["model.w"]
    assert isinstance(saved, TensorStorageMetadata)
    ours = our_targets(metadata, {"model": {"w": torch.zeros(4, 6)}})
    assert [t[:3] for t in ours["targets"]] == [("model.w", (0, 0), (4, 6))]


def test_failed_allocations_raise_and_leak_nothing() -> None:
    metadata = old_metadata(OLD)
    target = fresh(OLD) | {"t": torch.zeros(3, 3).t()}
    our_targets(metadata, target, allow_partial_load=True)
    before = _native.live_bytes()
    failures = 0
    for n in range(1, 500):
        _native._debug_fail_after(n)
        try:
            our_targets(metadata, target, allow_partial_load=True)
            break
        except (MemoryError, RuntimeError):
            failures += 1
        finally:
            _native._debug_fail_after(0)
        assert _native.live_bytes() == before
    assert failures > 5
    assert _native.live_bytes() == before
