"""What ``last_report()`` says of loads, that verification does what it says, and how loads fail."""

from __future__ import annotations

import gc
import os
import pickle
import re
import weakref
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, like, value

import dcp_native as dcp
from dcp_native import _load, _native, _uploads
from dcp_native._reports import Report

BLOCK = 1 << 20
LISTED = 1000


def of_rows(*boxes: tuple[int, int]) -> tuple[Any, list[torch.Tensor]]:
    """A ShardedTensor-like leaf: rows of a global (64, 4) tensor, as its own chunks."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    parts = [torch.zeros(stop - start, 4) for start, stop in boxes]

    class Rows(torch.Tensor):
        def __create_chunk_list__(self):
            return [
                ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([stop - start, 4]))
                for start, stop in boxes
            ]

        def __get_tensor_shard__(self, index):
            return parts[[b[0] for b in boxes].index(index.offset[0])]

    return torch.zeros(64, 4).as_subclass(Rows), parts


def lists_of(report: dict[str, Any]) -> dict[str, list[str]]:
    return {k: v for k, v in report.items() if isinstance(v, list) and v}


# ---- names ----


def test_every_name_is_in_the_list_of_what_became_of_it(tmp_path):
    saved = {
        "same": value("same", (8,)),
        "cast": value("cast", (8,)),
        "rows": value("rows", (64, 4)),
        "object": {"a": 1, "b": 2},
        "became": "an object",
        "left": [value("l0", (2,)), value("l1", (2,))],
    }
    dcp.save(saved, checkpoint_id=tmp_path)
    rows, parts = of_rows((8, 16), (32, 64))
    target = {
        "same": torch.zeros(8),
        "cast": torch.zeros(8, dtype=torch.float64),
        "rows": rows,
        "object": {"a": None},
        "became": torch.zeros(3),
        "absent": torch.zeros(3),
        "unselected": torch.zeros(3),
    }
    dcp.load(
        target,
        checkpoint_id=tmp_path,
        planner=dcp.DefaultLoadPlanner(allow_partial_load=True),
        keys=lambda name: name != "unselected",
    )
    report = dcp.last_report()
    assert lists_of(report) == {
        "cast": ["cast"],
        "resharded": ["rows"],
        "replaced": ["became"],
        "missing": ["absent"],
        "skipped": ["unselected"],
        "unexpected": ["object.b", "left.0", "left.1"],
    }
    assert report["unexpected_prefixes"] == {"object": 1, "left": 2}
    for name, names in lists_of(report).items():
        assert report[f"{name}_count"] == len(names)
    assert report["objects_count"] == 2 and not report["failed"] and report["error"] is None
    assert torch.equal(parts[1], saved["rows"][32:])
    # float32 of same and cast, 40 rows of 16 bytes; objects count their records
    tensors = 32 + 32 + 40 * 16
    assert 0 < report["wanted_bytes"] - tensors <= 2 * 4096
    assert report["read_bytes"] >= report["wanted_bytes"] == report["progress_bytes"]


def test_holes_are_named_where_they_are_allowed(tmp_path):
    dcp.save({"w": value("w", (8, 4)), "v": value("v", (2,))}, checkpoint_id=tmp_path)
    file = tmp_path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.state_dict_metadata["w"].size = torch.Size([10, 4])
    file.write_bytes(pickle.dumps(metadata))
    dcp.configure(strict_coverage=False)
    dcp.load({"w": torch.zeros(10, 4), "v": torch.zeros(2)}, checkpoint_id=tmp_path)
    report = dcp.last_report()
    assert (report["holes"], report["holes_count"], report["hole_bytes"]) == (["w"], 1, 2 * 4 * 4)
    assert report["resharded"] == ["w"]


def test_lists_are_bounded_and_counts_are_not(tmp_path):
    count = LISTED + 345
    saved = {f"a{i % 2}.{i}": torch.zeros(1) for i in range(count)}
    dcp.save(saved, checkpoint_id=tmp_path)
    dcp.load({"a0": {"0": torch.zeros(1)}}, checkpoint_id=tmp_path)
    report = dcp.last_report()
    assert report["unexpected_count"] == count - 1
    assert len(report["unexpected"]) == LISTED == len(set(report["unexpected"]))
    assert set(report["unexpected"]) < set(saved)
    # the keys alternate, so that only the first runs of them are counted
    assert 0 < sum(report["unexpected_prefixes"].values()) <= LISTED
    assert set(report["unexpected_prefixes"]) == {"a0", "a1"}
    target = {f"a{i}": {str(j): torch.zeros(1) for j in range(i, count, 2)} for i in (0, 1)}
    dcp.load(target, checkpoint_id=tmp_path, keys="a0.0")
    report = dcp.last_report()
    assert (len(report["skipped"]), report["skipped_count"]) == (LISTED, count - 1)


def test_prefixes_are_summed_over_runs(tmp_path):
    dcp.save({"m.a": 1, "o.a": 1, "m.b": 1, "plain": 2, "x": 3}, checkpoint_id=tmp_path)
    dcp.load({"x": None}, checkpoint_id=tmp_path)
    assert dcp.last_report()["unexpected_prefixes"] == {"m": 2, "o": 1, "plain": 1}


def test_names_of_any_script_come_back(tmp_path):
    names = ["größe", "層.0", "", "a\0b", "x" * 3000]
    dcp.save({name: 1 for name in [*names, "w"]}, checkpoint_id=tmp_path)
    dcp.load({"w": None}, checkpoint_id=tmp_path)
    assert sorted(dcp.last_report()["unexpected"]) == sorted(names)


def test_a_report_keeps_no_tensor_and_no_load_alive(tmp_path):
    dcp.save({"w": value("w", (1 << 16,))}, checkpoint_id=tmp_path)
    dcp.load({"w": torch.zeros(1 << 16)}, checkpoint_id=tmp_path)
    dcp._native.trim()
    before = _native.live_bytes()
    target = {"w": torch.zeros(1 << 16), "cast": torch.zeros(3)}
    gone = weakref.ref(target["w"])
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(target, checkpoint_id=tmp_path, planner=planner)
    del target, planner
    gc.collect()
    assert gone() is None
    _native.trim()
    assert _native.live_bytes() <= before
    assert dcp.last_report()["missing"] == ["cast"]


def test_a_report_is_the_callers_to_change(tmp_path):
    dcp.save({"w": 1, "v": 2}, checkpoint_id=tmp_path)
    dcp.load({"w": None}, checkpoint_id=tmp_path)
    dcp.last_report()["unexpected"].clear()
    assert dcp.last_report()["unexpected"] == ["v"]


def documented() -> set[str]:
    text = "".join(c.__doc__ for c in (Report, dcp.SaveReport, dcp.LoadReport))
    found = re.findall(r"^ {8}([a-z0-9_, ]+): ", text, re.M)
    return {name.strip() for names in found for name in names.split(",")}


def test_every_field_of_a_report_is_documented(tmp_path):
    dcp.save({"w": value("w", (8,))}, checkpoint_id=tmp_path)
    fields = set(dcp.last_report())
    future = dcp.async_save({"w": value("w", (8,))}, checkpoint_id=tmp_path)
    future.result(timeout=60)
    assert _uploads.wait_until_ended(60)
    fields |= set(future.report)
    dcp.load({"w": torch.zeros(8)}, checkpoint_id=tmp_path)
    fields |= set(dcp.last_report())
    with pytest.raises(dcp.CheckpointException):
        dcp.load({"v": torch.zeros(8)}, checkpoint_id=tmp_path)
    fields |= set(dcp.last_report())
    lists = {name for name in fields if f"{name}_count" in fields}
    missing = fields - documented() - {f"{name}_count" for name in lists}
    assert missing == set()
    assert documented() - fields == set()


# ---- verification ----

ROW = 512
"""Elements of a row; 512 rows of int32 are a block."""


@pytest.fixture
def blocks(tmp_path):
    """A tensor of four blocks, and the same path."""
    tensor = value("w", (2048, ROW), torch.int32)
    dcp.save({"w": tensor}, checkpoint_id=tmp_path)
    return tmp_path, tensor


def load_rows(path, start: int, stop: int, **more: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    part = torch.zeros(stop - start, ROW, dtype=torch.int32)

    class Rows(torch.Tensor):
        def __create_chunk_list__(self):
            return [ChunkStorageMetadata(torch.Size([start, 0]), torch.Size([stop - start, ROW]))]

        def __get_tensor_shard__(self, index):
            return part

    whole = torch.zeros(2048, ROW, dtype=torch.int32).as_subclass(Rows)
    dcp.load({"w": whole}, checkpoint_id=path, **more)
    return part, dcp.last_report()


def test_a_narrow_slice_counts_its_unverified_bytes_exactly(blocks):
    path, tensor = blocks
    # few rows of the first and the last block, which are not worth the rest of them, and all of two
    part, report = load_rows(path, 512 - 37, 1536 + 3)
    assert torch.equal(part, tensor[475:1539])
    row = 4 * ROW
    assert report["wanted_bytes"] == 1064 * row
    assert report["unverified_bytes"] == (37 + 3) * row
    assert report["verified_bytes"] == 1024 * row
    assert report["verify"] is True
    # most of a block: it is read whole
    part, report = load_rows(path, 512 + 100, 1536)
    assert torch.equal(part, tensor[612:1536])
    assert report["unverified_bytes"] == 0 and report["verified_bytes"] == 924 * row


def test_strict_reads_whole_blocks_and_leaves_nothing_unverified(blocks):
    path, tensor = blocks
    for how in ("config", "call"):
        if how == "config":
            dcp.configure(verify="strict")
            part, report = load_rows(path, 700, 703)
        else:
            dcp.configure(verify=False)
            part, report = load_rows(path, 700, 703, verify="strict")
        assert torch.equal(part, tensor[700:703])
        assert report["unverified_bytes"] == 0 and report["verified_bytes"] == 3 * 4 * ROW
        assert report["read_bytes"] >= BLOCK and report["verify"] == "strict"


def test_false_verifies_nothing(blocks):
    path, tensor = blocks
    part, report = load_rows(path, 0, 2048, verify=False)
    assert torch.equal(part, tensor)
    assert report["verified_bytes"] == 0
    assert report["unverified_bytes"] == report["wanted_bytes"] == 4 * BLOCK
    assert dcp.config().verify is True
    _, report = load_rows(path, 0, 2048)
    assert report["unverified_bytes"] == 0 and report["verified_bytes"] == 4 * BLOCK


# ---- failures ----


def record_of(path, fqn: str) -> tuple[Any, int, int]:
    metadata = torch_dcp.FileSystemReader(path).read_metadata()
    ((_, info),) = [item for item in metadata.storage_data.items() if item[0].fqn == fqn]
    return path / info.relative_path, info.offset, info.length


def damage(path, fqn: str, part: float) -> None:
    """Flips a bit about `part` of the way through a record."""
    file, offset, length = record_of(path, fqn)
    with open(file, "r+b") as data:
        data.seek(offset + int(length * part))
        (byte,) = data.read(1)
        data.seek(-1, os.SEEK_CUR)
        data.write(bytes([byte ^ 16]))


def check_failed_load(target: dict[str, Any], saved: dict[str, Any], error: Any) -> dict[str, Any]:
    """Every name is in one list, and its memory is as the list says."""
    report = dcp.last_report()
    assert report["failed"] and report["kind"] == "load"
    names = {key: set(report[key]) for key in ("filled", "partly", "untouched")}
    assert sum(len(n) for n in names.values()) == len(set().union(*names.values()))
    assert set().union(*names.values()) == set(saved)
    for key in names:
        assert report[f"{key}_count"] == len(names[key])
        assert set(getattr(error, key, names[key])) == names[key]
    for name in names["filled"]:
        assert_equal(target[name], saved[name])
    for name in names["untouched"]:
        assert_equal(target[name], like({"leaf": saved[name]})["leaf"])
    return report


@pytest.mark.parametrize("direct_io", ["off", "auto"])
@pytest.mark.parametrize("part", [0.1, 0.9])
def test_a_checksum_error_says_what_was_overwritten(part, direct_io, tmp_path):
    """[load-exception]"""
    saved = {
        **{f"small{i}": value(f"s{i}", (40,)) for i in range(5)},
        "large": value("large", (6 * BLOCK // 4 + 77,)),
        "other": value("other", (3 * BLOCK // 4,)),
        "cast": value("cast", (50,)),
        "object": [1, 2, 3],
    }
    dcp.save(saved, checkpoint_id=tmp_path)
    damage(tmp_path, "large", part)
    dcp.configure(direct_io=direct_io)
    target = like(saved)
    target["cast"] = torch.zeros(50, dtype=torch.float64)
    with pytest.raises(dcp.LoadException) as caught:
        dcp.load(target, checkpoint_id=tmp_path)
    error = caught.value
    file, offset, length = record_of(tmp_path, "large")
    text = str(error.failures[0][0])
    assert "large in " in text and file.name in text
    assert offset <= int(re.search(r"at byte (\d+)", text)[1]) < offset + length
    target["cast"] = target["cast"].float()
    report = check_failed_load(target, saved, error)
    assert "large" in report["partly"], report
    assert "object" in report["untouched"], "objects are set when all is read"
    counts = [report[f"{key}_count"] for key in ("filled", "partly", "untouched")]
    said = f"{counts[0]} were already overwritten, {counts[1]} partly, {counts[2]} not at all"
    assert said in str(error) and "do not train on them" in str(error)
    assert report["progress_bytes"] < sum(
        t.numel() * 4 for t in saved.values() if t is not None and isinstance(t, torch.Tensor)
    )
    again = pickle.loads(pickle.dumps(error))
    assert (again.args[0], again.filled, again.partly) == ("read", error.filled, error.partly)


class Frozen(dict):
    """Refuses new values, as soon as there is one."""

    def __setitem__(self, key, value):
        raise RuntimeError("frozen")


def test_objects_are_untouched_until_all_is_read(tmp_path):
    """Then those before one that cannot be set may be set; the caller's own dict comes last."""
    saved = {"w": value("w", (8,)), "top": 1, "in": {"side": 2}}
    dcp.save(saved, checkpoint_id=tmp_path)
    target = {"w": torch.zeros(8), "top": None, "in": Frozen(side=None)}
    with pytest.raises(dcp.LoadException, match="frozen"):
        dcp.load(target, checkpoint_id=tmp_path)
    report = dcp.last_report()
    assert report["filled"] == ["w"] and torch.equal(target["w"], saved["w"])
    assert report["partly"] == ["in.side"] and report["untouched"] == ["top"]
    damage(tmp_path, "top", 0.3)
    target = {"top": None, "in": {"side": None}}
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(target, checkpoint_id=tmp_path)
    assert not isinstance(caught.value, dcp.LoadException)
    assert sorted(dcp.last_report()["untouched"]) == ["in.side", "top"]
    assert target == {"top": None, "in": {"side": None}}


class Refusing(torch.Tensor):
    """A destination that torch's copy cannot fill."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            raise RuntimeError("this tensor takes no copies")
        return super().__torch_function__(func, types, args, kwargs)


def test_a_destination_that_refuses_its_copy_is_not_called_filled(tmp_path):
    saved = {"a": value("a", (8,)), "r": value("r", (8,))}
    dcp.save(saved, checkpoint_id=tmp_path)
    target = {"a": torch.zeros(8), "r": torch.zeros(8).as_subclass(Refusing)}
    with pytest.raises(dcp.LoadException, match="takes no copies"):
        dcp.load(target, checkpoint_id=tmp_path)
    report = dcp.last_report()
    assert report["partly"] == ["r"] and report["untouched"] in ([], ["a"])


def test_a_load_that_fails_in_planning_has_touched_nothing(tmp_path):
    saved = {"w": value("w", (8,)), "v": value("v", (4,))}
    dcp.save(saved, checkpoint_id=tmp_path)
    target = {"w": torch.zeros(8), "v": torch.zeros(5)}
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(target, checkpoint_id=tmp_path)
    assert not isinstance(caught.value, dcp.LoadException)
    assert "overwritten" not in str(caught.value)
    report = dcp.last_report()
    assert report["failed"] and "Size mismatch" in report["error"]
    assert report["filled"] == report["partly"] == [] and not target["w"].any()


class Raises:
    def state_dict(self):
        raise ZeroDivisionError("state_dict of the application")

    def load_state_dict(self, state_dict):
        raise AssertionError("never loaded")


class CustomPlanner(dcp.DefaultLoadPlanner):
    pass


@pytest.mark.parametrize("planner", [None, CustomPlanner()], ids=["native", "hooks"])
@pytest.mark.parametrize("case", ["state_dict", "no checkpoint", "missing key", "damaged metadata"])
def test_every_failure_leaves_a_report(case, planner, tmp_path):
    dcp.save({"w": value("w", (8,))}, checkpoint_id=tmp_path / "c")
    path, target, kind, text = tmp_path / "c", {"w": torch.zeros(8)}, dcp.CheckpointException, ""
    if case == "state_dict":
        target, kind, text = {"a": Raises()}, ZeroDivisionError, "of the application"
    elif case == "no checkpoint":
        path, text = tmp_path / "nowhere", "nowhere"
    elif case == "missing key":
        target, text = {"v": torch.zeros(8)}, "Missing key"
    else:
        (path / ".metadata").write_bytes(b"not a pickle")
    with pytest.raises(kind):
        dcp.load(target, checkpoint_id=path, planner=planner)
    report = dcp.last_report()
    assert report["kind"] == "load" and report["failed"]
    assert report["path"] == report["reader"] == "native"
    assert ("CustomPlanner" in report["planner"]) == (planner is not None)
    assert kind.__name__ in report["error"] and text in report["error"]
    dcp.save({"w": value("w", (8,))}, checkpoint_id=tmp_path / "c")
    dcp.load({"w": torch.zeros(8)}, checkpoint_id=tmp_path / "c", planner=planner)
    assert not dcp.last_report()["failed"]


def test_what_a_replaced_checkpoint_left_is_told_when_the_new_one_fails(tmp_path, monkeypatch):
    """The first try fills "a" from a file that stays; the second finds no "b" any more."""
    writer = torch_dcp.FileSystemWriter(tmp_path, single_file_per_rank=False, thread_count=1)
    count = 12 * BLOCK  # of 4 bytes: more than is read ahead of "b"
    saved = {"a": torch.ones(count), "b": value("b", (8,))}
    dcp.save(saved, storage_writer=writer)
    kept = record_of(tmp_path, "a")[0]
    if kept == record_of(tmp_path, "b")[0]:
        pytest.skip("both tensors lie in one file")
    os.link(kept, tmp_path / "kept")
    plan = _load.NativeLoad._plan
    tries = []

    def replace_meanwhile(self, native, state_dict):
        tries.append(None)
        plan(self, native, state_dict)
        if len(tries) == 1:
            dcp.save({"a": torch.zeros(count)}, checkpoint_id=tmp_path)
            if not kept.exists():
                os.link(tmp_path / "kept", kept)

    monkeypatch.setattr(_load.NativeLoad, "_plan", replace_meanwhile)
    target = {"a": torch.zeros(count), "b": torch.zeros(8)}
    with pytest.raises(dcp.LoadException, match="Missing key") as caught:
        dcp.load(target, checkpoint_id=tmp_path)
    assert len(tries) == 2 and not target["b"].any()
    assert caught.value.partly == ("a",) and dcp.last_report()["partly"] == ["a"]
