"""Traces: every byte of a save in its writes, spans that nest, ranks on one line of time; what
killed processes leave is merged."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict

import cli
import pytest
import torch
from common import value
from conftest import ROOT

import dcp_native as dcp
from dcp_native import _native, _trace, _uploads
from dcp_native._trace_merge import events_of

STATE = {"w": value("w", (6 << 20,)), "t": value("t", (512, 700)).t(), "o": {"x": 1}}


@pytest.fixture
def traces(tmp_path):
    """A directory for them, and what is in its only file so far."""
    directory = tmp_path / "traces"
    dcp.configure(trace=directory)

    def read() -> list[dict]:
        _trace.flush()
        (path,) = directory.glob("*.json")
        return events_of(path)

    read.directory = directory
    return read


@pytest.fixture(autouse=True)
def recording_ends():
    yield
    dcp.configure(trace=None)
    _trace.stop()
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


def test_what_the_writer_process_did_is_in_its_trainers_trace(tmp_path, traces):
    begin_us = time.monotonic_ns() / 1000
    for i in range(2):  # its second save, too
        dcp.async_save(
            STATE, checkpoint_id=tmp_path / f"c{i}",
            async_checkpointer_type=dcp.AsyncCheckpointerType.PROCESS,
        ).result(timeout=60)  # fmt: skip
    assert _uploads.wait_until_ended(60)
    events = traces()
    (head,) = [e["args"] for e in events if e["name"] == "dcp_native"]
    starts = [e["tid"] for e in named(events, "thread_name")
              if e["args"]["name"] == "writer process: writing"]  # fmt: skip
    assert len(set(starts)) == 2
    for i, thread in enumerate(starts):
        (whole,) = named(events, "write the image", ph="X", tid=thread)
        (waiting,) = [e for e in named(events, "the writer process writes", ph="X")
                      if e["ts"] <= whole["ts"] <= e["ts"] + e["dur"]]  # fmt: skip
        assert whole["ts"] + whole["dur"] <= waiting["ts"] + waiting["dur"]
        assert whole["ts"] >= begin_us - head["start_monotonic_ns"] / 1000
        assert named(events, "map the arena", ph="X", tid=thread)
        written = sum(
            e["args"]["bytes"] for e in named(events, "write", cat="io")
            if e["ph"] in "Xb" and whole["ts"] <= e["ts"] <= whole["ts"] + whole["dur"]
        )  # fmt: skip
        size = sum(f.stat().st_size for f in (tmp_path / f"c{i}").glob("*.distcp"))
        assert size <= written < size + 4096
    assert len(named(events, "sync", ph="X")) == 2


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


def test_the_file_grows_by_what_every_call_did_and_ends_as_whole_json(tmp_path, traces):
    counts, texts = [], []
    for i in range(3):
        dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / str(i))
        counts.append(len(named(traces(), "save")))
        texts.append(next(traces.directory.glob("*.json")).read_text())
    _trace.stop()
    texts.append(next(traces.directory.glob("*.json")).read_text())
    assert counts == [1, 2, 3]
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert len(named(json.loads(texts[-1]), "save")) == 3


KILLED = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch, dcp_native as dcp
from dcp_native import _trace
dcp.save({"w": torch.ones(3)}, checkpoint_id=sys.argv[1])
assert _trace.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_leaves_what_was_written(tmp_path):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONPATH": path, "DCP_NATIVE_TRACE": str(tmp_path / "t")}
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "c"], env=env, check=False)
    (file,) = (tmp_path / "t").glob("*.json")
    assert not file.read_text().endswith("]\n")
    found = dcp.merge_traces(tmp_path / "t", tmp_path / "all.json")
    assert found.files == [file.name] and found.damaged == found.left_out == {}
    events = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    assert len(named(events, "save", cat="call")) == 1


def test_a_file_system_that_does_not_answer_holds_up_no_save(tmp_path, monkeypatch, caplog):
    go_on, asked = threading.Event(), threading.Event()

    def stuck(file, data):
        asked.set()
        assert go_on.wait(60)

    monkeypatch.setattr(_trace, "_write_all", stuck)
    monkeypatch.setattr(_trace, "_MOST_SPANS", 20)
    dcp.configure(trace=tmp_path / "t")
    for _ in range(4):
        dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    assert asked.wait(60)
    assert len(_trace._spans) <= 20 and _trace._lost_spans > 0
    assert not _trace.flush(0.01)
    dcp.configure(trace=None)
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    go_on.set()
    _trace.stop()


def test_what_found_no_room_is_told_in_the_file(tmp_path, traces, monkeypatch):
    monkeypatch.setattr(_trace, "_MOST_SPANS", 3)
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    assert any(e["ph"] == "i" and "found no room" in e["name"] for e in traces())


def test_a_signal_handler_may_save_while_the_trace_changes(tmp_path, traces, monkeypatch):
    """It comes on the thread that has the lock."""

    def end(self):
        monkeypatch.undo()
        dcp.configure(trace=tmp_path / "other")
        dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "of the handler")
        self.end()

    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    monkeypatch.setattr(_trace._Recording, "end", end)
    dcp.configure(trace=tmp_path / "other")
    thread = threading.Thread(
        target=dcp.save, args=({"w": torch.ones(3)},),
        kwargs={"checkpoint_id": tmp_path / "c"}, daemon=True,
    )  # fmt: skip
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    _trace.stop()
    calls = [
        (path.parent.name, len(named(events_of(path), "save", cat="call")))
        for path in tmp_path.glob("*/*.json")
    ]
    assert len(calls) == 2 and sum(count for _, count in calls) == 4, calls
    assert dict(calls)["other"] >= 2


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
    _trace.stop()
    files = [json.loads(path.read_text()) for path in traces.directory.glob("*.json")]
    assert [len(named(file, "save", cat="call")) for file in files] == [1, 1]


def test_failures_are_traced_too(tmp_path, traces):
    (tmp_path / "f").write_text("no directory")
    with pytest.raises(dcp.CheckpointException):
        dcp.save(STATE, checkpoint_id=tmp_path / "f")
    assert len(named(traces(), "save", cat="call")) == 1


def test_a_relative_directory_is_where_it_was_asked_for(tmp_path, monkeypatch):
    for name in ("a", "b", "gone"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    dcp.configure(trace="t")
    dcp.save(STATE, checkpoint_id=tmp_path / "c")
    for there in ("b", "gone"):
        monkeypatch.chdir(tmp_path / there)
        if there == "gone":
            (tmp_path / "gone").rmdir()
        dcp.save(STATE, checkpoint_id=tmp_path / "c")
    _trace.stop()
    monkeypatch.chdir(tmp_path)
    [file] = (tmp_path / "a" / "t").glob("*.json")
    assert len(named(json.loads(file.read_text()), "save", cat="call")) == 3
    assert not list((tmp_path / "b").iterdir())


def test_a_directory_that_cannot_be_written_is_told_once_and_harms_nothing(tmp_path, caplog):
    (tmp_path / "f").write_text("no directory")
    dcp.configure(trace=tmp_path / "f")
    dcp.save(STATE, checkpoint_id=tmp_path / "a")
    assert not _trace.flush()
    dcp.save(STATE, checkpoint_id=tmp_path / "a")
    assert not _trace.flush()
    assert caplog.text.count("no trace is written") == 1
    assert not _trace._spans and _native.trace_take(0, 0) == b""
    assert dcp.verify(tmp_path / "a")


def test_a_forked_child_has_a_file_of_its_own(tmp_path, traces):
    dcp.save(STATE, checkpoint_id=tmp_path / "a")
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "child")
            os._exit(0 if _trace.flush() else 1)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    _trace.flush()
    files = sorted(traces.directory.glob("*.json"))
    assert len(files) == 2
    threads = []
    for path in files:
        events = events_of(path)
        assert len(named(events, "save", cat="call")) == 1
        threads.append({e["tid"] for e in events if e["ph"] == "X"})
    assert not threads[0] & threads[1]


# ---- all ranks ----


def made_trace(
    path, rank, *, unix_ns, monotonic_ns, boot="b", pid=1, ts=(10.0, 20.0), ranks_count=1
):
    events = [{"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": "x"}}]
    events += [{"ph": "i", "name": f"r{rank}", "ts": t, "pid": rank, "tid": 1} for t in ts]
    facts = {"rank": rank, "ranks_count": ranks_count, "pid": pid,
             "host": f"host-{boot}", "boot_id": boot,
             "start_monotonic_ns": monotonic_ns, "start_unix_ns": unix_ns}  # fmt: skip
    events.insert(0, {"ph": "M", "name": "dcp_native", "pid": rank, "tid": 0, "args": facts})
    path.mkdir(exist_ok=True)
    (path / f"rank{rank:05d}-{boot}-{pid}.json").write_text(
        "[\n" + ",\n".join(map(json.dumps, events)) + "\n]\n"
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


def test_what_is_no_trace_is_left_out_by_name_and_none_is_an_error(tmp_path):
    made_trace(tmp_path / "t", 0, unix_ns=1, monotonic_ns=1)
    others = {"empty.json": "", "foreign.json": "{}", "list.json": "[\n7\n]", "dead.json": "[\n",
              "cut.json": '[\n{"ph": "M", "name": "dcp_na', "merged.json": '{"traceEvents":[\n]}',
              "facts.json": '[\n{"ph": "M", "name": "dcp_native", "args": {"rank": "0"}}\n]',
              "other.json": '[\n{"ph": "M", "name": "other", "args": {}}\n]'}  # fmt: skip
    for name, text in others.items():
        (tmp_path / "t" / name).write_text(text)
    (tmp_path / "t" / "directory.json").mkdir()
    (tmp_path / "t" / "gone.json").symlink_to("nowhere")
    found = dcp.merge_traces(tmp_path / "t", tmp_path / "all.json")
    assert set(found.left_out) == {*others, "directory.json", "gone.json"}
    assert len(found.files) == 1 and found.damaged == {}
    whole = json.loads((tmp_path / "all.json").read_text())
    assert len(named(whole["traceEvents"], "r0")) == 2
    assert whole["otherData"] == dataclasses.asdict(found)
    for path in (tmp_path / "t").glob("rank*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no trace of dcp_native.*cut\.json: it ends bef"):
        dcp.merge_traces(tmp_path / "t", tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_a_trace_that_is_cut_anywhere_is_merged_as_far_as_it_goes(tmp_path):
    """Every length that a killed process or a failed machine may leave."""
    made_trace(tmp_path / "t", 1, unix_ns=1, monotonic_ns=1)
    made_trace(tmp_path / "t", 0, unix_ns=1, monotonic_ns=1)
    path = tmp_path / "t" / "rank00000-b-1.json"
    text = path.read_bytes()
    lines = text.split(b",\n")
    ends = [len(b",\n".join(lines[: i + 1])) for i in range(len(lines))]
    for length in range(len(text)):
        path.write_bytes(text[:length])
        found = dcp.merge_traces(tmp_path / "t", tmp_path / "all.json")
        events = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
        assert len(named(events, "r1")) == 2
        whole = sum(length >= end for end in ends[2:-1]) + (length >= len(text) - 3)
        assert len(named(events, "r0")) == whole, length
        assert (path.name in found.left_out) == (length < ends[0]), length
        assert found.missing_ranks == [0] * (length < ends[0])


def test_blocks_that_a_machine_lost_cost_their_lines(tmp_path):
    made_trace(tmp_path / "t", 0, unix_ns=1, monotonic_ns=1, ts=tuple(range(20)))
    path = next((tmp_path / "t").glob("*.json"))
    text = bytearray(path.read_bytes())
    at = text.index(b'"ts": 5')
    text[at : at + 60] = bytes(60)
    path.write_bytes(text)
    found = dcp.merge_traces(tmp_path / "t", tmp_path / "all.json")
    assert found.damaged == {path.name: 1}
    events = json.loads((tmp_path / "all.json").read_text())["traceEvents"]
    assert {e["ts"] for e in named(events, "r0")} == set(range(20)) - {5, 6}


def test_ranks_without_a_file_are_named(tmp_path, capsys):
    made_trace(tmp_path / "t", 3, unix_ns=1, monotonic_ns=1, ranks_count=6)
    assert dcp.merge_traces(tmp_path / "t", tmp_path / "a.json").missing_ranks == [0, 1, 2, 4, 5]
    chosen = dcp.merge_traces(tmp_path / "t", tmp_path / "a.json", ranks={3, 9})
    assert chosen.missing_ranks == [9]
    (tmp_path / "t" / "cut.json").write_text("[\n{")
    done = cli.run("trace", "merge", tmp_path / "t", "-o", tmp_path / "a.json")
    assert "no trace of ranks 0-2, 4-5" in done.out
    assert "cut.json: left out, it ends before the first event does" in done.out


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
