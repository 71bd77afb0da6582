"""plot --timeline: what it reads from traces and reports, and that it draws it."""

from __future__ import annotations

import json

import cli
import pytest

import dcp_native as dcp
from dcp_native import _trace, _uploads
from dcp_native._cli.timeline import calls_of

US = 1_000_000
"""In a second."""


@pytest.fixture(autouse=True)
def recording_ends():
    yield
    dcp.configure(trace=None)
    _trace.stop()


def span(pid, category, name, begin_s, end_s, tid=1, **args):
    return {"ph": "X", "pid": pid, "tid": tid, "cat": category, "name": name, "ts": begin_s * US,
            "dur": (end_s - begin_s) * US, "args": args}  # fmt: skip


def call(pid, kind, begin_s, end_s, directory="d", outcome_s=None):
    events = [span(pid, "call", kind, begin_s, end_s, directory=directory)]
    if outcome_s is not None:
        common = {"pid": pid, "tid": 1, "cat": "call", "name": f"{kind}, to its outcome",
                  "id2": {"local": f"{kind} {begin_s}"}}  # fmt: skip
        events.append({"ph": "b", "ts": begin_s * US, **common})
        events.append({"ph": "e", "ts": outcome_s * US, **common})
    return events


def rank(pid, number):
    return {"ph": "M", "name": "process_name", "pid": pid, "tid": 0,
            "args": {"name": f"rank {number} (host, pid 7)"}}  # fmt: skip


def trace_of(path, *events):
    path.write_text(json.dumps({"traceEvents": list(events)}))
    return calls_of(path)


def report(number=0, kind="save", directory="d", total_ns=10 * 10**9, **phases_s):
    return {"kind": kind, "directory": directory, "rank": number, "total_ns": total_ns,
            "phases": {name: s * 10**9 for name, s in phases_s.items()}}  # fmt: skip


# ---- traces ----


def test_an_inner_phase_interrupts_the_outer_one(tmp_path):
    (found,) = trace_of(
        tmp_path / "t.json", rank(0, 0), *call(0, "save", 0, 9),
        span(0, "phase", "open", 1, 5), span(0, "phase", "flatten", 2, 3),
        span(0, "phase", "write", 6, 9), span(0, "phase", "write files", 7, 8),
        span(0, "io", "write", 7, 8),
    )  # fmt: skip
    (lane,) = found.lanes
    assert lane.spans == [("open", 1, 2), ("flatten", 2, 3), ("open", 3, 5), ("write", 6, 9)]
    assert (lane.end_s, lane.returned_s) == (9, None)


def test_ranks_lie_on_one_line_that_the_first_begins(tmp_path):
    (found,) = trace_of(
        tmp_path / "t.json", rank(0, 3), *call(0, "load", 12, 20), span(0, "phase", "read", 13, 19),
        rank(1, 1), *call(1, "load", 10, 19), span(1, "phase", "read", 11, 18),
    )  # fmt: skip
    assert [(lane.rank, lane.begin_s, lane.spans) for lane in found.lanes] == [
        (1, 0, [("read", 1, 8)]),
        (3, 2, [("read", 3, 9)]),
    ]
    assert found.longest() == {"read": (7, 1)}


def test_what_goes_on_behind_a_call_is_its_own_and_not_that_of_the_call_before(tmp_path):
    first, second = trace_of(
        tmp_path / "t.json", rank(0, 0),
        *call(0, "async_save", 0, 2, outcome_s=8), span(0, "phase", "stage", 1, 2),
        span(0, "phase", "write files", 2, 5, tid=2), span(0, "phase", "publish", 6, 7, tid=3),
        *call(0, "async_save", 4, 10, outcome_s=12), span(0, "phase", "wait", 5, 8),
        span(0, "phase", "stage", 8, 10), span(0, "phase", "write files", 10, 11, tid=2),
    )  # fmt: skip
    assert first.lanes[0].spans == [
        ("stage", 1, 2), ("write", 2, 5), ("settle", 5, 6), ("publish", 6, 7), ("settle", 7, 8),
    ]  # fmt: skip
    assert first.lanes[0].returned_s == 2
    assert second.lanes[0].spans == [
        ("wait", 1, 4), ("stage", 4, 6), ("write", 6, 7), ("settle", 7, 8),
    ]  # fmt: skip


def test_calls_are_one_if_ranks_made_them_at_the_same_time(tmp_path):
    found = trace_of(
        tmp_path / "t.json", rank(0, 0), rank(1, 1), rank(2, 0),
        *call(0, "save", 0, 4), *call(1, "save", 1, 5), *call(1, "save", 10, 14),
        *call(2, "save", 11, 15),  # rank 0 was started again
        *call(1, "load", 10, 14),
    )  # fmt: skip
    assert [(each.kind, [lane.rank for lane in each.lanes]) for each in found] == [
        ("save", [0, 1]), ("save", [0, 1]), ("load", [1]),
    ]  # fmt: skip


def test_a_trace_and_a_report_of_one_call_agree(tmp_path):
    dcp.configure(trace=tmp_path / "traces")
    reports = []
    cli.save(tmp_path / "a")
    reports.append(dict(dcp.last_report()))
    future = dcp.async_save(cli.state(), checkpoint_id=str(tmp_path / "b"), no_dist=True)
    future.result(timeout=60)
    assert _uploads.wait_until_ended(60)
    reports.append(dict(future.report))
    dcp.load(cli.state(), checkpoint_id=str(tmp_path / "a"), no_dist=True)
    reports.append(dict(dcp.last_report()))
    assert _trace.flush()
    calls = calls_of(tmp_path / "traces")
    assert [each.kind for each in calls] == ["save", "async_save", "load"]
    for each, wanted in zip(calls, reports, strict=True):
        found = each.lanes[0].by_phase()
        found.pop("publish", None)  # within settle
        assert set(found) <= set(wanted["phases"])
        for name, ns in wanted["phases"].items():
            if name not in ("write", "settle") or each.kind == "save":
                assert found.get(name, 0) == pytest.approx(ns / 1e9, abs=1e-4), name


# ---- reports ----


def test_phases_of_reports_lie_one_after_another(tmp_path):
    for number in (10, 9):
        path = tmp_path / f"rank-{number}.json"
        path.write_text(json.dumps(report(number, open=1, write=number - 7)))
    (found,) = calls_of(tmp_path)
    assert [(lane.rank, lane.end_s, lane.spans) for lane in found.lanes] == [
        (9, 10, [("open", 0, 1), ("write", 1, 3)]),
        (10, 10, [("open", 0, 1), ("write", 1, 4)]),
    ]
    assert found.longest()["write"] == (3, 10)


def test_reports_of_several_calls_are_told_apart(tmp_path):
    path = tmp_path / "all.json"
    path.write_text(json.dumps(
        [report(0), report(1), report(0), report(1, kind="load"), report(1), report(0, "load")]
    ))  # fmt: skip
    found = calls_of(path)
    assert [(each.kind, len(each.lanes)) for each in found] == [
        ("save", 2), ("save", 2), ("load", 2),
    ]  # fmt: skip


# ---- the command ----


def test_timelines_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    dcp.configure(trace=tmp_path / "traces")
    cli.save(tmp_path / "a$b$_{")
    dcp.async_save(cli.state(), checkpoint_id=str(tmp_path / "b"), no_dist=True).result(timeout=60)
    assert _uploads.wait_until_ended(60) and _trace.flush()
    assert cli.run("trace", "merge", tmp_path / "traces", "-o", tmp_path / "all.json").status == 0
    many = [report(i, open=1, agree=2, write=i % 5, odd=3, **{"a$b": 1}) for i in range(100)]
    (tmp_path / "one.json").write_text(json.dumps(many[0]))
    (tmp_path / "many.json").write_text(json.dumps(many))
    (trace,) = (tmp_path / "traces").glob("*.json")
    for source in (tmp_path / "traces", trace, *tmp_path.glob("*.json")):
        done = cli.run("plot", source, "--timeline", "--call", 1, "-o", tmp_path / "x.png")
        assert done.status == 0, done
        assert "longest phase: " in done.out
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "x.png").unlink()


def test_a_call_is_chosen_by_number_the_last_unless_asked(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "all.json"
    path.write_text(json.dumps([report(directory=name, write=2) for name in "abc"]))
    for argv, directory in (((), "c"), (("--call", 1), "a"), (("--call", -2), "b")):
        done = cli.run("plot", path, "--timeline", *argv, "-o", tmp_path / "x.svg", "--json")
        assert done.json["directory"] == directory and done.json["calls"] == 3
        assert done.json["phases"] == {"write": {"longest_ns": 2 * 10**9, "rank": 0}}
    for number in (0, 4, -4):
        done = cli.run("plot", path, "--timeline", "--call", number, "-o", tmp_path / "y.svg")
        assert done.status == 2 and not (tmp_path / "y.svg").exists()


@pytest.mark.parametrize("text", [
    None, "", "{", "7", "[]", "{}", '{"traceEvents": []}', '{"traceEvents": [7]}',
    '{"traceEvents": 7}', '{"kind": "save", "total_ns": "long"}',
    '{"kind": "save", "total_ns": 1, "phases": [1]}', '[[]]',
    '[{"kind": "save", "total_ns": 1, "rank": 0}, {"kind": "save", "total_ns": 1, "rank": "x"}]',
], ids=str)  # fmt: skip
def test_what_is_neither_a_trace_nor_a_report_is_said_in_one_line(tmp_path, text):
    source = tmp_path / "source"
    source.mkdir()
    if text is not None:
        (source / "x.json").write_text(text)
    for each in (source, source / "x.json"):
        done = cli.run("plot", each, "--timeline", "-o", tmp_path / "x.png")
        assert done.status in (1, 2) and len(done.err.splitlines()) == 1, done
        assert "Traceback" not in done.err and not (tmp_path / "x.png").exists()


def test_options_that_do_not_go_together_are_refused(tmp_path):
    path = cli.save(tmp_path / "c")
    for argv in (("--call", 1), ("step", "--timeline")):
        done = cli.run("plot", path, *argv, "-o", tmp_path / "x.png")
        assert done.status == 2 and len(done.err.splitlines()) == 1
