"""What docs/differences.md says of single processes, shown under torch and under dcp_native."""

from __future__ import annotations

import io
import pickle
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, value

import dcp_native as dcp


def test_objects_are_loaded_without_flattening(tmp_path):
    """[unflattened-objects]"""
    dcp.save({"n": 2}, checkpoint_id=tmp_path, planner=dcp.DefaultSavePlanner(False))
    seen = []
    for module in (torch_dcp, dcp):
        target = {"n": None}
        module.load(target, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(False))
        seen.append(target["n"])
    assert seen == [None, 2]


def test_a_hole_is_an_error_unless_told_otherwise(tmp_path):
    """[strict-coverage]"""
    dcp.save({"w": value("w", (8, 4))}, checkpoint_id=tmp_path)
    file = tmp_path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["w"].size = torch.Size([10, 4])
    file.write_bytes(pickle.dumps(metadata))
    torchs = {"w": torch.full((10, 4), 7.0)}
    torch_dcp.load(torchs, checkpoint_id=tmp_path)
    assert torchs["w"][8:].eq(7).all()
    with pytest.raises(dcp.CheckpointException, match="w") as caught:
        dcp.load({"w": torch.zeros(10, 4)}, checkpoint_id=tmp_path)
    assert caught.value.failures[0][0].dcp_code == "HOLE"
    dcp.configure(strict_coverage=False)
    ours = {"w": torch.full((10, 4), 7.0)}
    dcp.load(ours, checkpoint_id=tmp_path)
    assert_equal(ours, torchs)
    assert dcp.last_report()["hole_bytes"] == 2 * 4 * 4


def test_newest_claim_wins_and_leftovers_are_swept(tmp_path):
    """[file-exists]"""
    dcp.save({"w": value("w", (8,))}, checkpoint_id=tmp_path)
    stale = tmp_path / ".dcp_native-claim-5-0123456789abcdef"
    stale.write_text("left by a killed job")
    (tmp_path / "__0_5.distcp").write_bytes(b"half a file")
    (tmp_path / "meta.pt").write_bytes(b"the client's own")
    dcp.save({"w": value("w2", (8,))}, checkpoint_id=tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [".metadata", "__0_6.distcp", "meta.pt"]
    target = {"w": torch.zeros(8)}
    torch_dcp.load(target, checkpoint_id=tmp_path)
    assert_equal(target, {"w": value("w2", (8,))})


def records(path):
    metadata = torch_dcp.FileSystemReader(path).read_metadata()
    for index, info in metadata.storage_data.items():
        data = (path / info.relative_path).read_bytes()
        yield index.fqn, info, data[info.offset : info.offset + info.length]


def test_records_are_row_major(tmp_path):
    """[row-major]"""
    dcp.save({"w": value("w", (6, 4)).t()}, checkpoint_id=tmp_path)
    ((_, _, record),) = records(tmp_path)
    got = torch.load(io.BytesIO(record), weights_only=True)
    assert got.stride() == (6, 1) and torch.equal(got, value("w", (6, 4)).t())


def test_large_payloads_start_on_pages(tmp_path):
    """[record-layout]"""
    dcp.save({"a": value("a", (3,)), "w": value("w", (1 << 20,))}, checkpoint_id=tmp_path)
    for name, info, record in records(tmp_path):
        assert record[:4] == b"PK\3\4" and info.offset >= 64
        if name == "w":
            assert (info.offset + 44) % 4096 == 0
            blocks = zipfile.ZipFile(io.BytesIO(record)).read("archive/blocks")
            assert len(blocks) >= 4 * 4


def test_builtin_objects_have_small_records_in_slots(tmp_path):
    """[object-pickle]"""
    dcp.save({"step": 9}, checkpoint_id=tmp_path / "a")
    dcp.save({"step": 10**9}, checkpoint_id=tmp_path / "b")
    ((_, a, data),) = records(tmp_path / "a")
    ((_, b, _),) = records(tmp_path / "b")
    assert a.length == b.length <= 1024
    assert torch.load(io.BytesIO(data), weights_only=True) == 9


class Custom:
    """Needs the unsafe loader."""

    def __eq__(self, other):
        return isinstance(other, Custom)

    __hash__ = None


def test_unsafe_objects_can_be_refused(tmp_path):
    """[safe-objects]"""
    dcp.save({"o": Custom(), "s": 1}, checkpoint_id=tmp_path)
    target = {"o": None, "s": None}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target == {"o": Custom(), "s": 1}
    dcp.configure(allow_unsafe_objects=False)
    with pytest.raises(dcp.CheckpointException, match="allow_unsafe_objects"):
        dcp.load({"o": None}, checkpoint_id=tmp_path)
    target = {"s": None}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target == {"s": 1}
