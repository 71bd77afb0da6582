"""What reports say of unchanged data, of overwriting, and of names, compared with what was done."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from common import value
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

import dcp_native as dcp

LARGE, SMALL = 1 << 20, 1 << 18
"""Elements of "a" and of "b"; float32."""


def state() -> dict:
    return {
        "a": value("a", (LARGE,)),
        "b": torch.nn.Parameter(value("b", (SMALL,))),
        "o": {"x": 1},
        "n": [1, 2],
    }


def save(made: dict, path, **more) -> dcp.SaveReport:
    dcp.save(made, checkpoint_id=path, **more)
    return dcp.last_report()


def load(wanted: dict, path, **planner) -> dcp.LoadReport:
    dcp.load(wanted, checkpoint_id=path, planner=DefaultLoadPlanner(**planner))
    return dcp.last_report()


def test_an_overwritten_checkpoint_is_swept_and_compared(tmp_path):
    made = state()
    first = save(made, tmp_path / "c")
    assert (first.swept_files, first.compared_items, first.fast) == (0, 0, False)
    assert first.metadata_bytes == os.path.getsize(tmp_path / "c" / ".metadata")
    assert first.kept_bytes == first.file_bytes and first.planned_bytes == first.payload_bytes
    assert (first.trainable_items, first.trainable_bytes) == (1, 4 * SMALL)
    made["a"].add_(1)
    second = save(made, tmp_path / "c")
    assert (second.swept_files, second.fast) == (first.files_count, True)
    assert (second.compared_items, second.unchanged_items) == (4, 3)
    objects = second.payload_bytes - 4 * (LARGE + SMALL)
    assert second.unchanged_bytes == 4 * SMALL + objects
    assert (second.trainable_unchanged, second.reused_bytes) == (1, 0)


def test_the_steps_of_a_save_fit_its_time(tmp_path):
    made = state()
    save(made, tmp_path / "1")
    report = save(made, tmp_path / "2", base=tmp_path / "1")
    steps = ("vote", "plan", "hash", "compare", "metadata", "write", "commit")
    took = {step: report[f"{step}_ns"] for step in steps}
    assert all(took.values()), took
    assert sum(took.values()) <= report.total_ns
    assert report.copy_ns + report.sync_ns <= report.write_ns


def test_what_a_base_has_is_taken_over(tmp_path):
    dcp.configure(incremental_links="hard")
    made = state()
    told = save(made, tmp_path / "none", base=tmp_path / "nowhere")
    assert not told.reused_items and told.base_reason
    save(made, tmp_path / "1", base=tmp_path / "none")  # with hashes, for those after it
    for tensor in (made["a"], made["b"].data):
        tensor.add_(1)
        before = save(made, tmp_path / "1", base=tmp_path / "1")
        after = save(made, tmp_path / "2", base=tmp_path / "1")
        assert after.incremental and after.base_reason is None
        assert before.reused_items < after.reused_items == 4
        assert after.reused_bytes >= 4 * (LARGE + SMALL) and after.linked_files > 0


def test_what_a_load_did_not_find_or_had_to_change_is_named(tmp_path):
    save(state(), tmp_path / "c")
    wanted = {
        "a": torch.zeros(LARGE, dtype=torch.float64), "b": torch.zeros(SMALL), "z": torch.zeros(3)
    }  # fmt: skip
    report = load(wanted, tmp_path / "c", allow_partial_load=True)
    assert (report.missing, report.missing_count) == (["z"], 1)
    assert (report.unexpected, report.unexpected_count) == (["o.x", "n"], 2)
    assert report.unexpected_prefixes == {"o": 1, "n": 1}
    assert (report.cast, report.cast_count) == (["a"], 1)
    assert report.wanted_bytes == report.verified_bytes == 4 * (LARGE + SMALL)
    assert report.wanted_bytes <= report.read_bytes <= report.wanted_bytes + (64 << 10)
    assert (report.files_count, report.objects_count, report.resharded_count) == (1, 0, 0)
    assert 1 <= report.requests_count <= 2 + report.read_bytes // (1 << 20)
    assert not report.failed and report.filled is None


def test_hot_bytes_are_those_of_files_that_were_in_the_page_cache(tmp_path):
    dcp.configure(direct_io="off")  # what is written stays in the page cache
    save(state(), tmp_path / "c")
    report = load(state(), tmp_path / "c")
    assert report.hot_files_count == report.files_count == 1
    assert 4 * (LARGE + SMALL) <= report.hot_bytes <= report.read_bytes <= report.hot_bytes + 4096
    assert report.objects_count == 2


def test_an_object_in_the_place_of_a_tensor_is_named(tmp_path):
    save({"a": 5, "b": torch.ones(3)}, tmp_path / "c")
    wanted = {"a": torch.zeros(4), "b": torch.zeros(3)}
    report = load(wanted, tmp_path / "c")
    assert (report.replaced, report.replaced_count) == (["a"], 1) and wanted["a"] == 5


@pytest.mark.parametrize("damaged", ["a", "b"])
def test_a_failed_load_names_what_it_did_to_each(tmp_path, damaged):
    dcp.configure(read_once="off")
    save(state(), tmp_path / "c")
    damage(tmp_path / "c", damaged)
    wanted = {"a": torch.zeros(LARGE), "b": torch.zeros(SMALL), "o": {"x": 0}, "n": [0, 0]}
    with pytest.raises(dcp.CheckpointException):
        dcp.load(wanted, checkpoint_id=tmp_path / "c")
    report = dcp.last_report()
    lists = (report.filled, report.partly, report.untouched)
    counts = (report.filled_count, report.partly_count, report.untouched_count)
    assert report.failed and (report.error or "").startswith("CheckpointException: ")
    assert counts == tuple(map(len, lists)) and sum(counts) == 4
    assert damaged in report.partly
    now = state()
    for name in report.filled:
        assert torch.equal(wanted[name], now[name].detach()), name
    for name in set(report.untouched) & {"a", "b"}:
        assert not wanted[name].any(), name


def damage(path, key: str) -> None:
    """One bit near the end of the key's record."""
    records = pickle.loads((path / ".metadata").read_bytes()).storage_data
    info = next(info for at, info in records.items() if at.fqn == key)
    with open(path / info.relative_path, "r+b") as file:
        file.seek(info.offset + info.length - 5000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
