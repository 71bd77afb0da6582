"""Traces: whole JSON, every byte of a save in its writes, spans that nest, ranks on one line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
import torch
from common import value
from conftest import ROOT

import dcp_native as dcp
from dcp_native import _native, _trace, _uploads

STATE = {"w": value("w", (6 << 20,)), "t": value("t", (512, 700)).t(), "o": {"x": 1}}


@pytest.fixture
def traces(tmp_path):
    """A directory for them, and what is in its only file."""
    directory = tmp_path / "traces"
    dcp.configure(trace=directory)

    def read() -> list[dict]:
        (path,) = directory.glob("*.json")
        return json.loads(path.read_text())["traceEvents"]

    read.directory = directory
    return read


@pytest.fixture(autouse=True)
def recording_ends():
    yield
    dcp.configure(trace=None)
    _trace.follow_config(0)
    assert _native.trace_take(0, 0).decode() == ""


def run_all(path) -> None:
    dcp.save(STATE, checkpoint_id=path / "a")
    dcp.async_save(STATE, checkpoint_id=path / "b").result(timeout=60)
    assert _uploads.wait_until_ended(60)
    into = {"w": torch.zeros_like(STATE["w"]), "t": torch.zeros(700, 512), "o": {"x": 0}}
    dcp.load(into, checkpoint_id=path / "b")


def named(events, name, **fields):
    return [e for e in events if e["name"] == name and fields.items() <= e.items()]


def test_every_begin_has_its_end_and_spans_of_a_thread_nest(tmp_path, traces):
    run_all(tmp_path)
    events = traces()
    assert {event["ph"] for event in events} <= {"M", "X", "b", "e"}
    open_ids = Counter()
    for event in events:
        if event["ph"] in "be":
            open_ids[event["cat"], event["id2"]["local"]] += 1 if event["ph"] == "b" else -1
    assert set(open_ids.values()) <= {0}
    by_thread = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            by_thread[event["tid"]].append((event["ts"], -event["dur"], event["name"]))
    for spans in by_thread.values():
        ends: list[float] = []
        for begin, minus_length, name in sorted(spans):
            end = begin - minus_length
            while ends and ends[-1] <= begin + 0.0015:  # nanoseconds as decimal microseconds
                ends.pop()
            assert not ends or end <= ends[-1] + 0.0015, name
            ends.append(end)


@pytest.mark.parametrize("settings", [
    {"direct_io": "off"}, {"io_uring": "off"}, {"io_uring": "auto"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["save", "async_save"])
def test_every_byte_of_a_file_is_in_its_writes(tmp_path, traces, settings, kind):
    dcp.configure(**settings)
    writer = dcp.FileSystemWriter(tmp_path / "c", thread_count=2, single_file_per_rank=False)
    if kind == "save":
        dcp.save(STATE, storage_writer=writer)
    else:
        dcp.async_save(STATE, storage_writer=writer).result(timeout=60)
        assert _uploads.wait_until_ended(60)
    events = traces()
    writes = defaultdict(list)
    for event in events:
        if event["name"] == "write" and event.get("cat") == "io" and event["ph"] in "Xb":
            args = event["args"]
            writes[args["file"]].append((args["offset"], args["offset"] + args["bytes"]))
    files = {path.name: path.stat().st_size for path in (tmp_path / "c").glob("*.distcp")}
    assert set(writes) == set(files)
    for name, ranges in writes.items():
        at = 0
        for begin, end in sorted(ranges):
            assert begin == at, name
            at = end
        assert files[name] <= at < files[name] + 4096
    assert len(named(events, "sync", ph="X")) == len(files)


def test_every_byte_that_a_load_read_is_in_its_reads(tmp_path, traces):
    dcp.save(STATE, checkpoint_id=tmp_path / "a")
    before = len(traces())
    with contextlib.suppress(dcp.CheckpointException):  # no direct I/O here
        dcp.configure(direct_io="on")
        dcp.load({"w": torch.zeros_like(STATE["w"])}, checkpoint_id=tmp_path / "a")
        read = sum(e["args"]["bytes"] for e in named(traces()[before:], "read", cat="io"))
        report = dcp.last_report()
        assert report.wanted_bytes <= read <= report.read_bytes + 4096


def test_calls_phases_and_threads_are_named(tmp_path, traces):
    run_all(tmp_path)
    events = traces()
    calls = [e for e in events if e.get("cat") == "call"]
    assert [e["name"] for e in calls if e["ph"] == "X"] == ["save", "async_save", "load"]
    assert {e["args"]["directory"] for e in calls if e["ph"] == "X"} == {
        str(tmp_path / "a"), str(tmp_path / "b"),
    }  # fmt: skip
    phases = {e["name"] for e in events if e.get("cat") == "phase"}
    assert {"flatten", "agree", "write", "commit", "stage", "read"} <= phases
    assert named(events, "vote") and named(events, "publish") and named(events, "copy and checksum")
    threads = {e["args"]["name"] for e in named(events, "thread_name")}
    assert {"Python: MainThread", "background save: writing"} <= threads
    assert len({e["pid"] for e in events}) == 1


def test_the_file_is_whole_after_every_call(tmp_path, traces):
    counts = []
    for i in range(3):
        dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / str(i))
        counts.append(len(named(traces(), "save")))
    assert counts == [1, 2, 3]


def test_nothing_is_recorded_when_it_is_off_again(tmp_path, traces):
    dcp.save(STATE, checkpoint_id=tmp_path)
    dcp.configure(trace=None)
    before = len(traces())
    dcp.save(STATE, checkpoint_id=tmp_path)
    assert len(traces()) == before
    assert _native.trace_take(0, 0).decode() == ""


def test_a_trace_that_is_switched_on_again_does_not_replace_the_one_before(tmp_path, traces):
    for wanted in (traces.directory, None, traces.directory):
        dcp.configure(trace=wanted)
        dcp.save(STATE, checkpoint_id=tmp_path / "a")
    files = [json.loads(path.read_text()) for path in traces.directory.glob("*.json")]
    assert [len(named(file["traceEvents"], "save", cat="call")) for file in files] == [1, 1]


def test_failures_are_traced_too(tmp_path, traces):
    (tmp_path / "f").write_text("no directory")
    with pytest.raises(dcp.CheckpointException):
        dcp.save(STATE, checkpoint_id=tmp_path / "f")
    assert len(named(traces(), "save", cat="call")) == 1


def test_a_directory_that_cannot_be_written_is_told_once_and_harms_nothing(tmp_path, caplog):
    (tmp_path / "f").write_text("no directory")
    dcp.configure(trace=tmp_path / "f")
    dcp.save(STATE, checkpoint_id=tmp_path / "a")
    dcp.save(STATE, checkpoint_id=tmp_path / "a")
    assert caplog.text.count("no trace is written") == 1
    assert dcp.verify(tmp_path / "a")


def test_a_forked_child_has_a_file_of_its_own(tmp_path, traces):
    dcp.save(STATE, checkpoint_id=tmp_path / "a")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "child")
            os._exit(0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    files = sorted(traces.directory.glob("*.json"))
    assert len(files) == 2
    for path in files:
        assert len(named(json.loads(path.read_text())["traceEvents"], "save", cat="call")) == 1


# ---- all ranks ----


def made_trace(path, rank, *, unix_ns, monotonic_ns, boot="b", pid=1, ts=(10.0, 20.0)) -> None:
    events = [{"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": "x"}}]
    events += [{"ph": "i", "name": f"r{rank}", "ts": t, "pid": rank, "tid": 1} for t in ts]
    facts = {"written_by": "dcp_native", "rank": rank, "pid": pid,
             "host": f"host-{boot}", "boot_id": boot,
             "start_monotonic_ns": monotonic_ns, "start_unix_ns": unix_ns}  # fmt: skip
    head = f'{{"displayTimeUnit":"ms","otherData":{json.dumps(facts)},"traceEvents":[\n'
    path.mkdir(exist_ok=True)
    (path / f"rank{rank:05d}-{boot}-{pid}.json").write_text(
        head + ",\n".join(map(json.dumps, events)) + "\n]}\n"
    )


def merged(tmp_path, **how) -> list[dict]:
    dcp.merge_traces(tmp_path / "t", tmp_path / "all.json", **how)
    return json.loads((tmp_path / "all.json").read_text())["traceEvents"]


def test_ranks_of_a_host_are_aligned_by_the_clock_that_they_share(tmp_path):
    """The wall clock was set back by a second between them: it does not matter."""
    made_trace(tmp_path / "t", 0, unix_ns=5 * 10**9, monotonic_ns=1000, pid=1)
    made_trace(tmp_path / "t", 1, unix_ns=4 * 10**9, monotonic_ns=4000, pid=2)
    events = merged(tmp_path)
    assert [e["ts"] for e in named(events, "r0")] == [10, 20]
    assert [e["ts"] for e in named(events, "r1")] == [13, 23]


def test_hosts_are_aligned_by_their_wall_clocks(tmp_path):
    made_trace(tmp_path / "t", 0, unix_ns=5 * 10**9, monotonic_ns=1000, boot="a")
    made_trace(tmp_path / "t", 1, unix_ns=5 * 10**9 - 2000, monotonic_ns=77, boot="b")
    events = merged(tmp_path)
    assert [e["ts"] for e in named(events, "r0")] == [12, 22]
    assert [e["ts"] for e in named(events, "r1")] == [10, 20]


def test_processes_of_one_rank_stay_apart_and_ranks_are_chosen(tmp_path):
    for pid in (1, 2):
        made_trace(tmp_path / "t", 3, unix_ns=pid, monotonic_ns=pid, pid=pid)
    made_trace(tmp_path / "t", 4, unix_ns=1, monotonic_ns=1)
    assert len({e["pid"] for e in merged(tmp_path)}) == 3
    assert len({e["pid"] for e in merged(tmp_path, ranks={3})}) == 2


def test_what_is_no_trace_is_left_alone_and_none_is_an_error(tmp_path):
    made_trace(tmp_path / "t", 0, unix_ns=1, monotonic_ns=1)
    (tmp_path / "t" / "other.json").write_text("{}")
    assert len(named(merged(tmp_path), "r0")) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no trace of dcp_native"):
        dcp.merge_traces(tmp_path / "empty", tmp_path / "x.json")
    path = next((tmp_path / "t").glob("rank*"))
    path.write_text(path.read_text()[:-4])
    with pytest.raises(ValueError, match="is not whole"):
        dcp.merge_traces(tmp_path / "t", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


RANKS = """
import sys, warnings
warnings.simplefilter("ignore")
import torch, torch.distributed as dist
import dcp_native as dcp
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2] + "/store", rank=rank,
                        world_size=2)
dcp.save({"w": torch.full((1 << 20,), rank), "r%d" % rank: torch.ones(9)},
         checkpoint_id=sys.argv[2] + "/c")
report = dcp.last_report()
assert report.comm == "gloo" and report.ranks_count == 2 and report.rank == rank
assert report.comm_calls_count > 3 and report.comm_bytes > 0
assert (report.ranks_bytes > report.planned_bytes) == (rank == 0)
dist.destroy_process_group()
"""


def test_the_ranks_of_a_job_are_merged_by_one_command(tmp_path):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "DCP_NATIVE_TRACE": str(tmp_path / "t")}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANKS, str(rank), tmp_path], env=env)
        for rank in (0, 1)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    done = subprocess.run(
        [sys.executable, "-m", "dcp_native", "trace", "merge", tmp_path / "t",
         "-o", tmp_path / "all.json"],
        env={**env, "DCP_NATIVE_TRACE": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 traces" in done.stdout
    events = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    saves = named(events, "save", cat="call")
    assert {e["pid"] for e in saves} == {0, 1}
    votes = named(events, "vote", ph="X")
    assert len(votes) == 2  # one agreement: the later begin lies within the other's span
    late = max(e["ts"] for e in votes)
    assert all(late <= e["ts"] + e["dur"] for e in votes)
