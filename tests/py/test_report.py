"""Reports are dicts with documented fields, their times and bytes add up, and a line tells them."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
import re

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import value

import dcp_native as dcp
from dcp_native import _uploads

STATE = {"w": value("w", (3 << 18,)), "b": value("b", (7,)), "o": {"x": 1}}


def saved(path, **settings) -> dcp.SaveReport:
    dcp.configure(**settings)
    dcp.save(STATE, checkpoint_id=path)
    return dcp.last_report()


def saved_behind(path) -> dcp.SaveReport:
    future = dcp.async_save(STATE, checkpoint_id=path)
    future.result(timeout=60)
    assert _uploads.wait_until_ended(60)
    return future.report


def loaded(path) -> dcp.LoadReport:
    dcp.load({key: copy.deepcopy(leaf) for key, leaf in STATE.items()}, checkpoint_id=path)
    return dcp.last_report()


@pytest.fixture(params=["save", "async_save", "load"])
def report(request, tmp_path):
    if request.param == "async_save":
        return saved_behind(tmp_path)
    made = saved(tmp_path)
    return made if request.param == "save" else loaded(tmp_path)


def test_a_report_is_the_dict_that_it_always_was(report):
    assert isinstance(report, dict) and "kind" in report and report.get("no such") is None
    assert dict(report) == report == {**report} == copy.deepcopy(report)
    assert json.loads(json.dumps(report)) == report
    assert pickle.loads(pickle.dumps(report)) == report
    assert type(pickle.loads(pickle.dumps(report))) is type(report)


def test_every_key_is_a_field_and_an_attribute(report):
    fields = {field.name for field in dataclasses.fields(report)}
    assert set(report) <= fields
    for key in report:
        assert getattr(report, key) == report[key]
    for absent in fields - set(report):
        assert getattr(report, absent) is None and absent not in report
    with pytest.raises(AttributeError, match="no_such_fact"):
        _ = report.no_such_fact
    assert dataclasses.asdict(report)["kind"] == report["kind"]


def test_phases_do_not_overlap_and_fit_the_call(report):
    assert all(ns >= 0 for ns in report.phases.values())
    assert 0 < sum(report.phases.values()) <= report.total_ns


def test_phases_are_named_in_order(tmp_path):
    made = saved(tmp_path)
    assert list(made.phases) == [
        "wait", "state_dict", "open", "flatten", "agree", "compare", "write", "commit",
    ]  # fmt: skip
    assert list(saved_behind(tmp_path / "b").phases) == [
        "wait", "state_dict", "open", "flatten", "agree", "compare", "stage", "write", "settle",
    ]  # fmt: skip
    assert list(loaded(tmp_path).phases) == ["open", "plan", "agree", "read"]


def test_a_phase_within_a_phase_is_counted_once(tmp_path):
    dcp.trim()  # else it has the memory of a save before
    dcp.configure(arena_cap_bytes=1)  # no memory to stage in: written within the staging
    report = saved_behind(tmp_path)
    assert report.staging == "streamed"
    assert report.phases["write"] > 0
    assert sum(report.phases.values()) <= report.total_ns


@pytest.mark.parametrize(("direct_io", "direct"), [("off", False), ("on", True)])
def test_each_file_is_named_with_its_length_and_the_way_it_was_written(tmp_path, direct_io, direct):
    writer = dcp.FileSystemWriter(tmp_path, thread_count=3, single_file_per_rank=False)
    dcp.configure(direct_io=direct_io)
    try:
        dcp.save(STATE, storage_writer=writer)
    except dcp.CheckpointException:
        assert direct
        pytest.skip("this file system has no direct I/O")
    report = dcp.last_report()
    on_disk = {path.name: path.stat().st_size for path in tmp_path.glob("*.distcp")}
    assert {file["name"]: file["bytes"] for file in report.files} == on_disk
    assert len(on_disk) > 1
    assert [file["direct"] for file in report.files] == [direct] * len(on_disk)
    assert report.direct_files_count == len(on_disk) * direct
    assert sum(on_disk.values()) == report.file_bytes


def test_the_ways_of_a_loads_files_are_counted(tmp_path):
    saved(tmp_path)
    dcp.configure(direct_io="off")
    report = loaded(tmp_path)
    assert report.files_count == 1 and report.direct_files_count == 0
    assert report.hot_files_count in (0, 1)


def test_rates_are_bytes_by_time(tmp_path):
    report = saved(tmp_path)
    assert report.write_bytes_s == pytest.approx(report.file_bytes / report.write_ns * 1e9)
    assert report.total_bytes_s < report.write_bytes_s
    assert report.stage_bytes_s is None
    report = loaded(tmp_path)
    assert report.read_bytes_s == pytest.approx(report.wanted_bytes / report.wall_ns * 1e9)


def test_collectives_memory_and_roles_are_told(report):
    assert report.comm == "local" and report.comm_calls_count > 0
    assert report.comm_ns <= report.total_ns
    assert report.peak_memory_bytes > 0
    assert set(report.roles.values()) == {"native"}
    assert (report.rank, report.ranks_count) == (0, 1)


def test_a_report_of_a_running_save_is_what_is_known(tmp_path):
    future = dcp.async_save(STATE, checkpoint_id=tmp_path)
    early = future.report
    assert isinstance(early, dcp.SaveReport) and early.planned_bytes > 0
    future.result(timeout=60)


# ---- the line for people ----


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="dcp_native")
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if (record.name, record.levelno) == ("dcp_native", logging.INFO)
    ]


def test_a_save_and_a_load_each_tell_one_line(tmp_path, lines):
    state = {**STATE, str(tmp_path): 1}  # no save of this process had this plan
    dcp.save(state, checkpoint_id=tmp_path)
    dcp.save(state, checkpoint_id=tmp_path)
    loaded(tmp_path)
    first, second, third = lines()
    size = r"3\.1\d MB in [\d.]+ m?s \([\d.]+ .?B/s\); .*write [\d.]+ m?s"
    assert re.match(rf"save {re.escape(str(tmp_path))}: {size}", first)
    assert "planned anew" in first and "1 file (" in first
    assert "plan of the save before" in second
    assert re.match(rf"load {re.escape(str(tmp_path))}: 3\.1\d MB in .*read ", third)
    assert "rank" not in first + second + third
    assert all("\n" not in line for line in (first, second, third))


def test_a_background_save_tells_its_line_when_it_is_committed(tmp_path, lines):
    saved_behind(tmp_path)
    (line,) = lines()
    assert line.startswith(f"async save {tmp_path}: ") and "stage" in line


def test_torchs_path_says_why(tmp_path, lines):
    class Own(torch_dcp.FileSystemWriter):
        pass

    dcp.save(STATE, storage_writer=Own(tmp_path))
    (line,) = lines()
    report = dcp.last_report()
    assert report.path == "torch" and report.total_ns > 0
    assert line.startswith(f"save {tmp_path}: ")
    assert f"by torch's implementation, because {report.reason}" in line


def test_failures_tell_no_line(tmp_path, lines):
    saved(tmp_path)
    with pytest.raises(dcp.CheckpointException):
        dcp.load({"missing": torch.zeros(3)}, checkpoint_id=tmp_path)
    (tmp_path / "f").write_text("no directory")
    with pytest.raises(dcp.CheckpointException):
        dcp.save(STATE, checkpoint_id=tmp_path / "f")
    assert len(lines()) == 1
    assert dcp.last_report().failed and isinstance(dcp.last_report(), dcp.LoadReport)
