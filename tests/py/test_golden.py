"""Files that stock torch 2.1 to 2.14 wrote, and layouts of old releases made by hand."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import pathlib
import pickle
import sys

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal
from conftest import GOLDEN
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import dcp_native as dcp
from dcp_native import _native

CHECKPOINTS = sorted(GOLDEN.glob("2.*/*")) if GOLDEN.exists() else []
SHARDED_KEYS = {"even", "uneven", "cols", "one", "repl", "plain"}


def golden_value(name, shape, dtype):
    """As shared/golden/make.py: element i is (hash of name + i) modulo 97 (bool: is odd)."""
    seed = sum((i + 1) * b for i, b in enumerate(name.encode())) % 97
    flat = (torch.arange(torch.Size(shape).numel()) + seed) % 97
    return ((flat % 2).bool() if dtype == torch.bool else flat.to(dtype)).reshape(shape)


SPECIAL = {
    "model.transposed": lambda: golden_value("model.transposed", (6, 4), torch.float32).t(),
    "model.sliced": lambda: golden_value("model.sliced", (8, 4), torch.float32)[2:7:2],
}
OBJECTS = {
    "step": (3, 17), "lr": (1e-3,), "none": (None,), "flag": (True,), "big": (1 << 70,),
    "bytes": (b"raw",), "name": ("adam",), "nest.list.1": (5,), "nest.list.2": ("x",),
    "nest.tup": ((1, 2),),
}  # fmt: skip


def blank_of(metadata):
    return {
        key: torch.empty(entry.size, dtype=entry.properties.dtype).fill_(0)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for key, entry in metadata.state_dict_metadata.items()
    }


def load_flat(path):
    """By the checkpoint's own (flattened) keys."""
    target = blank_of(torch_dcp.FileSystemReader(path).read_metadata())
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    dcp.load(target, checkpoint_id=path, planner=planner)
    assert dcp.last_report()["path"] == "native"
    return target


def test_golden_checkpoints_are_there_or_said_to_be_missing():
    if not CHECKPOINTS:
        pytest.skip("the golden checkpoints are not beside this clone")
    assert {p.parent.name for p in CHECKPOINTS} >= {"2.1.2", "2.3.1", "2.13.0", "2.14.1"}


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_every_value_of_a_golden_checkpoint(path):
    loaded = load_flat(path)
    assert loaded
    for key, got in loaded.items():
        if isinstance(got, torch.Tensor):
            want = SPECIAL[key]() if key in SPECIAL else golden_value(key, got.shape, got.dtype)
            assert_equal(got.contiguous(), want.contiguous(), key)
        elif key in OBJECTS:
            assert got in OBJECTS[key], key


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_metadata_of_a_golden_checkpoint_reads_as_torchs(path):
    reader, torchs_reader = dcp.FileSystemReader(path), torch_dcp.FileSystemReader(path)
    torchs_reader.load_id = reader.load_id
    ours, torchs = (vars(r.read_metadata()) for r in (reader, torchs_reader))
    # Torch 2.6 and before wrote a StorageMeta that its successors can not compare.
    assert vars(ours.pop("storage_meta")) == vars(torchs.pop("storage_meta"))
    assert ours == torchs and [*ours] == [*torchs]
    image = (path / ".metadata").read_bytes()
    assert _native.check_metadata(image) is None
    for size in range(0, len(image), 7):
        with pytest.raises(dcp.NativeError, match="damaged"):
            _native.check_metadata(image[:size])


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_golden_nested_targets_load_by_either_flattening(path):
    """Torch 2.3 and before flattened differently; the target decides by its keys."""
    if path.name != "plain":
        pytest.skip("only the plain checkpoints are nested")
    results = []
    for loader in (torch_dcp, dcp):
        target = {
            "nest": {
                "list": [torch.zeros(3), None, None],
                "ints": {1: torch.zeros(2, 2, dtype=torch.int64)},
            },
            "step": None,
        }
        loader.load(target, checkpoint_id=path)
        results.append(target)
    assert_equal(results[1], results[0])
    assert results[1]["step"] == 17


def stock(tmp_path):
    sd = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16), "n": 3}
    torch_dcp.save(sd, checkpoint_id=tmp_path)
    return sd


def rewrite(tmp_path, change, protocol=2):
    file = tmp_path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata, protocol=protocol))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "missing", [(), ("storage_meta",), ("version",), ("storage_meta", "version")]
)
def test_metadata_of_old_releases(tmp_path, protocol, missing):
    sd = stock(tmp_path)

    def change(metadata):
        for name in missing:
            del metadata.__dict__[name]

    rewrite(tmp_path, change, protocol)
    target = {"w": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "n": None}
    dcp.load(target, checkpoint_id=tmp_path)
    assert dcp.last_report()["path"] == "native"
    assert_equal(target, sd)


def test_legacy_tensor_properties(tmp_path):
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as Legacy

    sd = stock(tmp_path)

    def change(metadata):
        for entry in metadata.state_dict_metadata.values():
            if isinstance(entry, TensorStorageMetadata):
                entry.properties = Legacy(dtype=entry.properties.dtype)

    rewrite(tmp_path, change)
    target = {"w": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "n": None}
    dcp.load(target, checkpoint_id=tmp_path)
    assert dcp.last_report()["path"] == "native"
    assert_equal(target, sd)


class Extra:
    """What Megatron and others hang onto a Metadata."""

    def __init__(self):
        self.hello = 1


class Kind(enum.Enum):
    SMALL = 1


def hang_extra(metadata):
    metadata.mcore_data = Extra()


def hang_many(metadata):
    """As NVRx does with plans, and everything that a pickle has opcodes for."""
    metadata.all_local_plans = [
        Extra(), Kind.SMALL, {1, 2}, frozenset({3}), bytearray(b"x"), 1 << 2000, b"y" * 300, 1.5,
        collections.OrderedDict(a=[Extra()]), collections.defaultdict(list, b=[1]), Extra, (),
        pathlib.PurePosixPath("a/b"), torch.Size([1, 2]), torch.float32, datetime.date(2026, 1, 1),
        dataclasses.replace(next(iter(metadata.storage_data))), metadata.state_dict_metadata,
    ]  # fmt: skip


def own_planner_data(metadata):
    metadata.planner_data = [Extra(), dict(metadata.planner_data)]


def own_storage_meta(metadata):
    metadata.storage_meta = Extra()


FOREIGN = (hang_extra, hang_many, own_planner_data, own_storage_meta)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("change", FOREIGN, ids=lambda change: change.__name__)
def test_what_others_hang_onto_metadata_is_stepped_over_or_refused(tmp_path, change, protocol):
    """[metadata-foreign]"""
    sys.modules.setdefault("test_golden", sys.modules[__name__])
    sd = stock(tmp_path)
    rewrite(tmp_path, change, protocol)
    target = {"w": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "n": None}
    dcp.load(target, checkpoint_id=tmp_path)
    assert dcp.last_report()["path"] == "native"
    assert "test_golden.Extra" in dcp.last_report()["foreign"]
    assert_equal(target, sd)
    dcp.configure(allow_unsafe_objects=False)
    with pytest.raises(dcp.CheckpointException, match=r"test_golden\.Extra.*allow_unsafe_objects"):
        dcp.load(target, checkpoint_id=tmp_path)


class Info(_StorageInfo):
    """Where the loader needs the data."""


def test_foreign_classes_that_the_loader_needs_go_through_torch_or_are_refused(tmp_path):
    sys.modules.setdefault("test_golden", sys.modules[__name__])
    sd = stock(tmp_path)

    def change(metadata):
        for key, info in metadata.storage_data.items():
            metadata.storage_data[key] = Info(**vars(info))

    rewrite(tmp_path, change)
    target = {"w": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "n": None}
    dcp.load(target, checkpoint_id=tmp_path)
    assert dcp.last_report()["reader"] == "native"
    assert dcp.last_report()["planner"].startswith("torch: ")
    assert "test_golden.Info" in dcp.last_report()["planner"]
    assert_equal(target, sd)
    dcp.configure(allow_unsafe_objects=False)
    with pytest.raises(dcp.CheckpointException, match=r"test_golden\.Info.*allow_unsafe_objects"):
        dcp.load(target, checkpoint_id=tmp_path)


@pytest.mark.parametrize("where", [0, 1, 0.3, 0.5, 0.9, -1])
def test_damaged_metadata_is_an_error_and_never_a_fallback(tmp_path, where):
    sd = stock(tmp_path)
    data = (tmp_path / ".metadata").read_bytes()
    cut = {0: b"", 1: data[:1], -1: data[:-1]}.get(where, data[: int(len(data) * where)])
    (tmp_path / ".metadata").write_bytes(cut)
    torch_dcp.save(sd, checkpoint_id=tmp_path / "own", use_collectives=False)
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load({"w": torch.zeros(3, 4)}, checkpoint_id=tmp_path)
    assert "metadata" in str(caught.value)
