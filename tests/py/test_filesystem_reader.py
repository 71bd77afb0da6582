"""dcp_native.FileSystemReader: torch's reader, whose metadata is checked now and unpickled late."""

from __future__ import annotations

import copy
import inspect
import pickle
import struct
import sys

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, value
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint.metadata import Metadata

import dcp_native as dcp
from dcp_native import _lazy_metadata, _native, filesystem
from dcp_native._lazy_metadata import LazyMetadata

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

STATE = {"w": value("w", (4, 3)), "n": {"step": 7, "m": [value("m", (2,)), "text"]}}
BLANK = {"w": torch.zeros(4, 3), "n": {"step": None, "m": [torch.zeros(2), None]}}


@pytest.fixture(params=["ours", "torchs"])
def path(request, tmp_path):
    """A checkpoint, by either side's save."""
    {"ours": dcp, "torchs": torch_dcp}[request.param].save(STATE, checkpoint_id=tmp_path / "x")
    return tmp_path / "x"


class Extra:
    """What only Python can rebuild."""


def hang_extra(path, name="extra"):
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    setattr(metadata, name, Extra())
    file.write_bytes(pickle.dumps(metadata))
    sys.modules.setdefault("test_filesystem_reader", sys.modules[__name__])


def test_it_is_torchs_class_with_torchs_signatures():
    assert issubclass(dcp.FileSystemReader, torch_dcp.FileSystemReader)
    assert dcp.FileSystemReader is filesystem.FileSystemReader
    for name in ("__init__", "read_metadata", "read_data", "set_up_storage_reader"):
        ours, torchs = (getattr(m.FileSystemReader, name) for m in (dcp, torch_dcp))
        assert [*inspect.signature(ours).parameters] == [*inspect.signature(torchs).parameters]
    for name in dir(torch_filesystem):
        assert name.startswith("__") or hasattr(filesystem, name), name
    assert filesystem.FileSystemWriter is torch_filesystem.FileSystemWriter


def test_nothing_is_unpickled_until_it_is_touched(path, monkeypatch):
    reads = []
    loads = pickle.loads
    monkeypatch.setattr(_lazy_metadata.pickle, "loads", lambda b: reads.append(1) or loads(b))
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata()
    assert type(metadata) is LazyMetadata and isinstance(metadata, Metadata) and metadata
    assert reads == []
    torchs = torch_dcp.FileSystemReader(path).read_metadata()
    assert metadata.storage_meta.load_id == reader.load_id
    torchs.storage_meta.load_id = reader.load_id
    assert metadata == torchs and type(metadata) is Metadata and reads == [1]
    assert copy.deepcopy(reader.read_metadata()) == torchs
    assert pickle.loads(pickle.dumps(reader.read_metadata())) == torchs


@pytest.mark.parametrize("loader", [dcp, torch_dcp])
@pytest.mark.parametrize("with_path", [False, True])
def test_either_load_takes_it(path, loader, with_path):
    target = copy.deepcopy(BLANK)
    where = {"checkpoint_id": path} if with_path else {}
    reader = dcp.FileSystemReader("elsewhere" if with_path else path)
    loader.load(target, storage_reader=reader, **where)
    assert_equal(target, STATE)
    if loader is dcp:
        assert dcp.last_report()["path"] == "native"


def test_torchs_steps_by_hand(path):
    """As clients that plan for themselves do."""
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata()
    planner = torch_dcp.DefaultLoadPlanner()
    target = copy.deepcopy(BLANK)
    reader.set_up_storage_reader(metadata, True)
    planner.set_up_planner(target, metadata, True)
    plan = planner.finish_plan(planner.create_local_plan())
    reader.read_data(plan, planner).wait()
    assert_equal(target, STATE)


def test_a_patched_or_derived_one_keeps_its_hooks(path):
    class Derived(dcp.FileSystemReader):
        def read_metadata(self, *args, **kwargs):
            asked.append("derived")
            return super().read_metadata(*args, **kwargs)

    asked = []
    patched = dcp.FileSystemReader(path)
    read = patched.read_metadata
    patched.read_metadata = lambda *args, **kwargs: asked.append("patched") or read(*args, **kwargs)
    for reader in (Derived(path), patched):
        target = copy.deepcopy(BLANK)
        dcp.load(target, storage_reader=reader)
        assert dcp.last_report()["path"] == "torch"
        assert_equal(target, STATE)
    assert asked == ["derived", "patched"]


def test_an_absent_file_is_torchs_error(tmp_path):
    for kwargs in ({}, {"rank": 3}):
        errors = []
        for module in (dcp, torch_dcp):
            with pytest.raises(FileNotFoundError) as caught:
                module.FileSystemReader(tmp_path).read_metadata(**kwargs)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_a_ranks_own_metadata(tmp_path):
    dcp.save(STATE, checkpoint_id=tmp_path, use_collectives=False)
    reader = dcp.FileSystemReader(tmp_path)
    metadata = reader.read_metadata(rank=0)
    assert type(metadata) is LazyMetadata
    assert metadata.state_dict_metadata.keys() >= {"w", "n.step"}
    with pytest.raises(FileNotFoundError):
        reader.read_metadata()


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9])
def test_a_damaged_file_is_an_error_when_it_is_read(path, share):
    data = (path / ".metadata").read_bytes()
    end = data.rindex(b".metadata") if b"\x89DCPNMD" in data else len(data)
    (path / ".metadata").write_bytes(data[: int(min(end, len(data)) * share)])
    with pytest.raises(pickle.UnpicklingError, match=r"\.metadata: .*damaged"):
        dcp.FileSystemReader(path).read_metadata()


def test_extra_attributes_survive_or_are_refused_at_the_touch(path):
    hang_extra(path)
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata()
    assert type(metadata) is LazyMetadata
    assert type(metadata.extra) is Extra
    dcp.configure(allow_unsafe_objects=False)
    metadata = reader.read_metadata()
    for _ in range(2):
        with pytest.raises(pickle.UnpicklingError, match=r"\.Extra.*allow_unsafe_objects is off"):
            repr(metadata)
    dcp.configure(allow_unsafe_objects=True)
    assert type(metadata.extra) is Extra


def test_what_the_loader_can_not_step_over_is_read_by_python_or_refused(path):
    hang_extra(path, "storage_data")
    reader = dcp.FileSystemReader(path)
    assert type(reader.read_metadata().storage_data) is Extra
    dcp.configure(allow_unsafe_objects=False)
    metadata = reader.read_metadata()
    with pytest.raises(pickle.UnpicklingError, match=r"\.Extra.*allow_unsafe_objects is off"):
        repr(metadata)


def test_a_pickle_beside_a_good_index_is_checked_before_it_runs(tmp_path):
    """The trailer vouches for the bytes of the pickle, not for what they do."""
    dcp.save(STATE, checkpoint_id=tmp_path)
    file = tmp_path / ".metadata"
    image = file.read_bytes()
    footer = [*struct.unpack("<8sIIQQII16sII", image[-64:])]
    calls = b"\x80\x04cos\nsystem\n\x8c\x04true\x85R."
    body = image[footer[3] : -64]
    footer[3], footer[5] = len(calls), _native.crc32(calls)
    head = struct.pack("<8sIIQQII16sI", *footer[:-1])
    file.write_bytes(calls + body + head + struct.pack("<I", _native.crc32(head)))
    dcp.configure(allow_unsafe_objects=False)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system.*allow_unsafe_objects is off"):
        repr(metadata)


def test_config_native_off_is_torchs_reader(path):
    dcp.configure(native=False)
    assert type(dcp.FileSystemReader(path).read_metadata()) is Metadata
