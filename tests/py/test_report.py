"""Reports are dicts with documented fields, their times and bytes add up, and a line tells them."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import value
from conftest import ROOT

import dcp_native as dcp
from dcp_native import _by_torch, _native, _uploads

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


# ---- fields against what others measure ----


def big_state() -> dict:
    return {f"w{i}": value(f"w{i}", (1 << 19,)) for i in range(8)} | {"o": {"x": 1}}


def held_bytes() -> int:
    """What the core holds for other reasons, such as reports and plans of other tests."""
    gc.collect()
    dcp.trim()
    _native.peak_bytes(True)
    return _native.peak_bytes()


def on_disk(path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in path.iterdir()}


@pytest.mark.parametrize("kind", ["save", "async_save"])
def test_the_bytes_and_times_of_a_save_are_those_of_its_files_and_of_a_clock(tmp_path, kind):
    state = big_state()
    tensor_bytes = sum(leaf.nbytes for key, leaf in state.items() if key != "o")
    writer = dcp.FileSystemWriter(tmp_path, thread_count=3, single_file_per_rank=False)
    held = held_bytes()
    begin_ns = time.monotonic_ns()
    if kind == "save":
        dcp.save(state, storage_writer=writer)
        took_ns = time.monotonic_ns() - begin_ns
        report = dcp.last_report()
    else:
        future = dcp.async_save(state, storage_writer=writer)
        future.result(timeout=60)
        took_ns = time.monotonic_ns() - begin_ns
        assert _uploads.wait_until_ended(60)
        report = future.report
    files = on_disk(tmp_path)
    data = {name: size for name, size in files.items() if name.endswith(".distcp")}
    assert report.file_bytes == sum(data.values())
    assert report.files_count == len(data) == len(report.files)
    assert report.metadata_bytes == files[".metadata"]
    assert 0 < report.payload_bytes - tensor_bytes < 4096  # the object
    assert report.payload_bytes == report.progress_bytes == report.planned_bytes
    assert report.kept_bytes == report.file_bytes and report.kept_items == len(state)
    assert report.payload_bytes < report.file_bytes < report.payload_bytes + (64 << 10)
    assert report.dropped_items == report.cut_items == report.reused_items == 0
    assert report.is_coordinator and report.call_agrees and report.outcome == "committed"
    assert 0 < report.total_ns <= took_ns
    inside = [report.copy_ns, report.sync_ns, report.limited_ns]
    assert all(0 <= ns <= report.write_ns for ns in inside)
    assert report.limited_ns == 0 and report.sync_ns > 0
    if kind == "save":
        assert report.phases["write"] >= report.write_ns
        assert report.phases["agree"] >= report.vote_ns
        # Its buffers and little more: nothing of the state is copied.
        assert report.ring_bytes <= report.peak_memory_bytes - held < report.ring_bytes + (4 << 20)
    else:
        assert report.settle_ns == report.phases["settle"]
        assert report.phases["stage"] >= report.stage_ns >= report.stage_begin_ns
        assert report.staged_bytes >= report.file_bytes
        assert report.arena_bytes >= report.staged_bytes
        assert report.peak_memory_bytes - held < report.arena_bytes + (40 << 20)
        assert report.stage_bytes_s == pytest.approx(report.staged_bytes * 1e9 / report.stage_ns)


def test_the_bytes_and_times_of_a_load_are_those_of_its_files_and_of_a_clock(tmp_path):
    state = big_state()
    dcp.save(state, checkpoint_id=tmp_path)
    into = copy.deepcopy(state)
    held = held_bytes()
    begin_ns = time.monotonic_ns()
    dcp.load(into, checkpoint_id=tmp_path)
    took_ns = time.monotonic_ns() - begin_ns
    report = dcp.last_report()
    files = on_disk(tmp_path)
    tensor_bytes = sum(leaf.nbytes for key, leaf in state.items() if key != "o")
    assert 0 < report.wanted_bytes - tensor_bytes < 4096
    assert report.progress_bytes >= tensor_bytes
    assert report.wanted_bytes <= report.read_bytes <= sum(files.values()) + 8192
    assert report.verified_bytes + report.unverified_bytes == report.wanted_bytes
    assert report.hot_bytes <= report.read_bytes
    assert report.straight_bytes <= report.wanted_bytes
    assert report.files_count == 1 and report.objects_count == 1
    assert report.hot_files_count + report.direct_files_count <= report.files_count
    assert report.shared_bytes == report.hole_bytes == report.device_direct_bytes == 0
    assert 0 < report.wall_ns <= report.phases["read"] <= report.total_ns <= took_ns
    assert report.comm_ns <= report.total_ns
    assert 0 < report.peak_memory_bytes - held < 40 << 20
    one = {"w3": torch.zeros_like(state["w3"])}
    dcp.load(one, checkpoint_id=tmp_path, keys=["w3"])
    report = dcp.last_report()
    assert report.wanted_bytes == one["w3"].nbytes <= report.read_bytes
    assert report.read_bytes < one["w3"].nbytes + (2 << 20)
    assert report.skipped_count == len(report.skipped) == 0


def test_a_limit_on_writing_is_time_asleep(tmp_path):
    dcp.configure(write_limit_bytes_s=50_000_000)
    dcp.save(big_state(), checkpoint_id=tmp_path)
    report = dcp.last_report()
    assert report.limited_ns > 0 and report.write_ns >= report.limited_ns
    assert report.write_bytes_s < 75_000_000


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
    report = saved_behind(tmp_path)
    (line,) = lines()
    assert line.startswith(f"async save {tmp_path}: ")
    longest = max(report.phases, key=report.phases.get)
    assert f"{longest} " in line


def test_torchs_path_says_why(tmp_path, lines):
    class Own(torch_dcp.FileSystemWriter):
        pass

    dcp.save(STATE, storage_writer=Own(tmp_path))
    (line,) = lines()
    report = dcp.last_report()
    assert report.path == "torch" and report.total_ns > 0
    assert line.startswith(f"save {tmp_path}: ")
    assert f"by torch's implementation, because {report.reason}" in line


class Own(torch_dcp.FileSystemWriter):
    """Not torch's own: its saves are made by torch's implementation."""


class Asynchronous(torch_dcp.staging.DefaultStager):
    def __init__(self):
        super().__init__(torch_dcp.staging.StagingOptions(False, False, True, False))


@pytest.mark.parametrize("staged", ["at once", "later"])
def test_a_background_save_by_torch_has_a_future_with_a_report(tmp_path, lines, staged):
    stager = Asynchronous() if staged == "later" else None
    response = dcp.async_save(
        STATE, storage_writer=Own(tmp_path), async_stager=stager, no_dist=True
    )
    future = response
    if staged == "later":
        assert isinstance(response, dcp.AsyncSaveResponse)
        response.staging_completion.result(timeout=60)
        future = response.upload_completion
    assert future.report.path == "torch" and future.progress() == (0, 0)
    assert future.cancel() is False
    assert isinstance(future.result(timeout=60), dcp.Metadata)
    report = future.report
    assert (report.kind, report.path, report.outcome) == ("async_save", "torch", "committed")
    assert report.directory == str(tmp_path) and report.total_ns > 0
    assert (report.rank, report.ranks_count) == (0, 1)
    assert report.reason in report.writer and "Own" in report.reason
    assert report.phases is None and report.file_bytes is None and report.write_bytes_s is None
    (line,) = [line for line in lines() if line.startswith("async save")]
    assert line.startswith(f"async save {tmp_path}: ")
    assert f"by torch's implementation, because {report.reason}" in line


def test_a_sink_of_logs_that_raises_does_not_hold_up_who_waits_for_a_save(tmp_path, monkeypatch):
    def raises(*unused):
        raise OSError("of the sink")

    monkeypatch.setattr(_by_torch, "tell", raises)
    future = dcp.async_save(STATE, storage_writer=Own(tmp_path), no_dist=True)
    assert isinstance(future.result(timeout=60), dcp.Metadata)


def test_a_background_save_by_torch_that_fails_says_so(tmp_path, lines):
    class Fails(Own):
        def write_data(self, *unused):
            raise OSError("of the writer")

    future = dcp.async_save(STATE, storage_writer=Fails(tmp_path), no_dist=True)
    with pytest.raises(dcp.CheckpointException, match="of the writer"):
        future.result(timeout=60)
    assert future.report.outcome is None and future.report.total_ns > 0
    assert lines() == []


@pytest.mark.parametrize("use_collectives", [True, False])
@pytest.mark.parametrize("why", ["native is off", "writer", "reader"])
def test_every_call_on_torchs_path_has_a_report_and_a_line(tmp_path, lines, why, use_collectives):
    dcp.save(STATE, checkpoint_id=tmp_path / "before")
    if why == "native is off":
        dcp.configure(native=False)
    writer = Own(tmp_path / "c") if why == "writer" else torch_dcp.FileSystemWriter(tmp_path / "c")
    dcp.save(STATE, storage_writer=writer, use_collectives=use_collectives)
    made = dcp.last_report()
    assert (made.path == "torch") == (why != "reader")

    class OwnReader(torch_dcp.FileSystemReader):
        pass

    reader = OwnReader if why == "reader" else torch_dcp.FileSystemReader
    dcp.load(dict(STATE), storage_reader=reader(tmp_path / "before"))
    loaded = dcp.last_report()
    assert (loaded.path == "torch") == (why != "writer")
    for kind, report, line in zip(("save", "load"), (made, loaded), lines()[1:], strict=True):
        assert report.kind == kind and report.total_ns > 0
        assert (report.rank, report.ranks_count) == (0, 1)
        assert line.startswith(f"{kind} {report.directory}: ") and "\n" not in line
        if report.path == "torch":
            assert report.reason and f"because {report.reason}" in line


RANKS = """
import logging, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
import dcp_native as dcp
rank, path = int(sys.argv[1]), sys.argv[2]
lines = []
class Sink(logging.Handler):
    def emit(self, record):
        if record.levelno == logging.INFO:
            lines.append(record.getMessage())
dcp_log = logging.getLogger("dcp_native")
dcp_log.setLevel(logging.INFO)
dcp_log.addHandler(Sink(logging.INFO))
dist.init_process_group("gloo", init_method="file://" + path + "/store", rank=rank, world_size=2)
class Own(torch_dcp.FileSystemWriter):
    pass
state = {"same": torch.zeros(5000), "r%d" % rank: torch.ones(9)}
dcp.save(state, checkpoint_id=path + "/c")
dcp.async_save(state, checkpoint_id=path + "/d").result()
dcp.load(state, checkpoint_id=path + "/c")
dcp.save(state, storage_writer=Own(path + "/e") if rank == 1 else dcp.FileSystemWriter(path + "/e"))
assert dcp.last_report().path == "torch"
future = dcp.async_save(state, storage_writer=Own(path + "/f"))
future.result()
assert future.report.rank == rank and future.report.ranks_count == 2
assert len(lines) == 5, lines
for line, start in zip(lines, ("save", "async save", "load", "save", "async save")):
    assert line.startswith(start + " " + path) and line.endswith("; rank %d of 2" % rank), line
dist.destroy_process_group()
"""


def test_each_of_two_ranks_tells_its_own_lines(tmp_path):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank), tmp_path], env=env)
        for rank in (0, 1)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]


# ---- torch's structured events ----


@pytest.fixture
def events():
    """What torch's sinks hear: (function, event)."""
    heard: list[tuple[str, str]] = []

    class Sink(logging.Handler):
        def emit(self, record):
            heard.append((record.msg["func_name"], record.msg["event"]))

    sink = Sink(logging.DEBUG)
    torchs = torch_dcp.logger._dcp_logger
    level = torchs.level
    torchs.setLevel(logging.DEBUG)
    torchs.addHandler(sink)
    yield heard
    torchs.removeHandler(sink)
    torchs.setLevel(level)


def test_torchs_sinks_hear_of_saves_and_loads_as_of_torchs_own(tmp_path, events):
    def heard_of(module, name):
        del events[:]
        module.save(STATE, checkpoint_id=tmp_path / name, no_dist=True)
        module.async_save(STATE, checkpoint_id=tmp_path / f"{name}2", no_dist=True).result(60)
        module.load(dict(STATE), checkpoint_id=tmp_path / name, no_dist=True)
        with pytest.raises(dcp.CheckpointException):
            module.load({"none": torch.ones(1)}, checkpoint_id=tmp_path / name, no_dist=True)
        return {event for event in events if event[0] in ("save", "async_save", "load")}

    wanted = heard_of(torch_dcp, "theirs")
    assert ("load", "exception") in wanted and ("save", "end") in wanted
    assert heard_of(dcp, "ours") == wanted


def test_failures_tell_no_line(tmp_path, lines):
    saved(tmp_path)
    with pytest.raises(dcp.CheckpointException):
        dcp.load({"missing": torch.zeros(3)}, checkpoint_id=tmp_path)
    (tmp_path / "f").write_text("no directory")
    with pytest.raises(dcp.CheckpointException):
        dcp.save(STATE, checkpoint_id=tmp_path / "f")
    assert len(lines()) == 1
    assert dcp.last_report().failed and isinstance(dcp.last_report(), dcp.LoadReport)
