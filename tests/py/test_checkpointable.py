"""Tensors that describe their own shards: torch 2.14's CheckpointableTensor, saved and loaded."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from checkpointable import FIELDS, blank, describe, whole
from common import value

import dcp_native as dcp
from dcp_native.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

pytest.importorskip("torch.distributed.checkpoint.protocol", reason="of torch 2.14")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Planner(torch_dcp.DefaultLoadPlanner):
    """No hook of its own; its plan goes through Python all the same."""


def state() -> dict[str, torch.Tensor]:
    return {
        # Rows around them are padding; shards in an order of their own.
        "padded": describe(
            value("padded", (10, 6)),
            (9, 6), ((6, 0), (0, 0), (3, 0)), ((1, 0), (4, 0), (7, 0)), ((3, 6),) * 3,
        ),
        "parameter": describe(
            torch.nn.Parameter(value("p", (8,))), (6,), ((0,), (3,)), ((5,), (1,)), ((3,), (3,))
        ),
        "scalar": describe(torch.tensor(3.5), (), ((),), ((),), ((),)),
        "turned": describe(
            value("turned", (4, 8)).t(),
            (8, 4), ((0, 0), (0, 2)), ((0, 0), (0, 2)), ((8, 2), (8, 2)),
        ),
        "plain": value("plain", (3, 2)),
    }  # fmt: skip


def expected() -> dict[str, torch.Tensor]:
    return {k: whole([t]) if hasattr(t, "global_shape") else t for k, t in state().items()}


def targets(device: str = "cpu") -> dict[str, torch.Tensor]:
    made = {}
    for key, tensor in state().items():
        if hasattr(tensor, "global_shape"):
            made[key] = blank(tensor, device)
        else:
            made[key] = torch.full_like(tensor, -1)
    return made


def assert_whole(path) -> None:
    for module in (torch_dcp, dcp):
        found = {key: torch.full_like(tensor, -1) for key, tensor in expected().items()}
        module.load(found, checkpoint_id=path)
        for key, tensor in expected().items():
            assert torch.equal(found[key], tensor), (module.__name__, key)


def assert_parts(found: dict[str, torch.Tensor]) -> None:
    """Every shard is there, and nothing beside the shards was written."""
    for key, tensor in expected().items():
        got = found[key]
        assert torch.equal(whole([got]) if key != "plain" else got, tensor), key
    assert (found["padded"][0] == -1).all()
    assert found["parameter"][[0, 4]].tolist() == [-1, -1]


def test_both_save_the_same_entries_and_the_same_values(tmp_path):
    ours = dcp.save(state(), checkpoint_id=tmp_path / "ours")
    assert dcp.last_report()["writer"] == dcp.last_report()["planner"] == "native"
    theirs = torch_dcp.save(state(), checkpoint_id=tmp_path / "theirs")
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert len(ours.state_dict_metadata["padded"].chunks) == 3
    assert_whole(tmp_path / "ours")


@pytest.mark.parametrize("planner", [None, Planner], ids=["native", "python"])
@pytest.mark.parametrize("writer", [torch_dcp, dcp], ids=["torchs", "ours"])
def test_shards_are_loaded_where_they_lie_and_nothing_else_is_touched(tmp_path, writer, planner):
    writer.save(state(), checkpoint_id=tmp_path)
    for module in (torch_dcp, dcp):
        found = targets()
        module.load(found, checkpoint_id=tmp_path, planner=planner and planner())
        assert_parts(found)
    assert dcp.last_report()["reader"] == "native"


def test_shards_are_filled_from_any_other_cut(tmp_path):
    full = value("w", (9, 4))
    cut = describe(
        full.clone(), (9, 4), ((0, 0), (0, 3)), ((0, 0), (0, 3)), ((9, 3), (9, 1))
    )  # fmt: skip
    dcp.save({"w": cut}, checkpoint_id=tmp_path)
    rows = describe(
        torch.full((6, 4), -1.0), (9, 4), ((7, 0), (1, 0)), ((0, 0), (3, 0)), ((2, 4), (3, 4))
    )
    dcp.load({"w": rows}, checkpoint_id=tmp_path)
    assert torch.equal(rows[:2], full[7:]) and torch.equal(rows[3:], full[1:4])
    assert (rows[2] == -1).all()


class Columns(torch.Tensor):
    """Says it for all of its tensors: two halves of columns, which lie the other way round."""

    global_shape = (6, 8)
    global_offsets = ((0, 4), (0, 0))
    local_offsets = ((0, 0), (0, 4))
    local_sizes = ((6, 4), (6, 4))


def test_a_class_may_say_it(tmp_path):
    full = value("w", (6, 8))
    dcp.save({"w": full}, checkpoint_id=tmp_path)
    for module in (torch_dcp, dcp):
        target = torch.zeros(6, 8).as_subclass(Columns)
        module.load({"w": target}, checkpoint_id=tmp_path)
        assert torch.equal(target.as_subclass(torch.Tensor), full.roll(4, 1))


def test_a_target_without_memory_gets_some_and_stays_described(tmp_path):
    dcp.save(state(), checkpoint_id=tmp_path)
    found = {"padded": blank(state()["padded"], "meta")}
    dcp.load(found, checkpoint_id=tmp_path)
    assert found["padded"].device.type == "cpu"
    assert torch.equal(whole([found["padded"]]), expected()["padded"])


@pytest.mark.parametrize("stager", [False, True], ids=["image", "dict"])
def test_a_background_save_keeps_what_they_describe(tmp_path, stager):
    given = state()
    options = dcp.staging.StagingOptions(False, False, False, False)
    chosen = {"async_stager": torch_dcp.staging.DefaultStager(options)} if stager else {}
    future = dcp.async_save(given, checkpoint_id=tmp_path, **chosen)
    if not stager:
        for tensor in given.values():
            tensor.detach().zero_()
    future.result()
    assert_whole(tmp_path)


@pytest.mark.parametrize("distributed", [False, True])
def test_a_hugging_face_export_has_the_whole_tensors(tmp_path, distributed):
    writer = HuggingFaceStorageWriter(
        str(tmp_path), save_distributed=distributed, enable_consolidation=distributed
    )
    dcp.save(state(), storage_writer=writer)
    found = {key: torch.full_like(tensor, -1) for key, tensor in expected().items()}
    dcp.load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected().items())
    parts = targets()
    dcp.load(parts, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    assert_parts(parts)


@pytest.mark.parametrize(
    "fields",
    [
        ((8, 4), ((0, 0),), (), ((8, 4),)),
        ((8, 4), ((0, 0),), ((0, 0),), ()),
        ((8, 4), ((0,),), ((0, 0),), ((8, 4),)),
        ((8, 4), ((4, 0),), ((0, 0),), ((8, 4),)),
        ((16, 4), ((0, 0),), ((4, 0),), ((8, 4),)),
        ((8, 4), ((0, 0),), ((-1, 0),), ((4, 4),)),
    ],
    ids=["no-local", "no-sizes", "dims", "outside", "behind", "negative"],
)
def test_what_torch_refuses_is_refused_with_its_words(tmp_path, fields):
    tensor = describe(value("w", (8, 4)), *fields)
    texts = []
    for module in (torch_dcp, dcp):
        with pytest.raises(torch_dcp.CheckpointException) as caught:
            module.save({"w": tensor}, checkpoint_id=tmp_path)
        (error, _) = caught.value.failures[0]
        assert isinstance(error, ValueError)
        texts.append(str(error))
    assert texts[0] in texts[1]


def test_another_global_shape_is_a_size_mismatch(tmp_path):
    dcp.save({"w": value("w", (8, 4))}, checkpoint_id=tmp_path)
    target = describe(torch.zeros(8, 4), (9, 4), ((0, 0),), ((0, 0),), ((8, 4),))
    for module in (torch_dcp, dcp):
        with pytest.raises(torch_dcp.CheckpointException, match=r"Size mismatch.*9, 4.* for w"):
            module.load({"w": target}, checkpoint_id=tmp_path)


@pytest.mark.parametrize("missing", FIELDS)
def test_a_tensor_with_some_of_the_fields_is_a_plain_one(tmp_path, missing):
    tensor = describe(value("w", (4, 2)), (8, 2), ((4, 0),), ((0, 0),), ((4, 2),))
    delattr(tensor, missing)
    metadata = dcp.save({"w": tensor}, checkpoint_id=tmp_path)
    assert metadata.state_dict_metadata["w"].size == (4, 2)
    target = torch.zeros(4, 2)
    target.global_shape = (8, 2)
    dcp.load({"w": target}, checkpoint_id=tmp_path)
    assert torch.equal(target, tensor)
