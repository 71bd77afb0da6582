"""Progress: callbacks hear of every byte, bars are shown where and when they are of use."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from common import value
from conftest import ROOT

import dcp_native as dcp
from dcp_native import _progress, _uploads, _verify, format_utils
from dcp_native._consolidate_hf_safetensors import consolidate
from dcp_native._progress import Progress

STATE = {"w": value("w", (3 << 18,)), "o": {"x": 1}}
BYTES = STATE["w"].nbytes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Standard error as a terminal."""
    stream = Terminal()
    stderr_is(stream, monkeypatch)
    return stream


def stderr_is(stream: io.StringIO, monkeypatch) -> None:
    """pytest puts its own in the place of sys.stderr again and again."""
    monkeypatch.setattr(_progress, "sys", types.SimpleNamespace(stderr=stream))


@pytest.fixture
def at_once(monkeypatch):
    """Bars of operations of any length, that are looked at often."""
    monkeypatch.setattr(_progress, "BAR_AFTER_S", 0.0)
    monkeypatch.setattr(_progress, "LOOK_S", 0.001)


def watchers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "dcp_native-progress"]


# ---- callbacks ----


def run_all(path) -> None:
    dcp.save(STATE, checkpoint_id=path / "a")
    dcp.async_save(STATE, checkpoint_id=path / "b").result(timeout=60)
    dcp.load({"w": torch.zeros_like(STATE["w"]), "o": {"x": 0}}, checkpoint_id=path / "b")


def test_a_callback_hears_of_every_operation_to_its_last_byte(tmp_path):
    calls: list[tuple[str, int, int, float]] = []
    dcp.configure(progress=lambda *args: calls.append(args))
    run_all(tmp_path)
    for kind in ("save", "async_save", "load"):
        mine = [call[1:] for call in calls if call[0] == kind]
        done, total, rate = mine[-1]
        assert done == total >= BYTES and rate > 0
        assert [call[0] for call in mine] == sorted(call[0] for call in mine)
    assert watchers() == []


def test_a_callback_that_raises_harms_nothing_and_is_not_called_again(tmp_path, caplog):
    calls = []

    def progress(*args):
        calls.append(args)
        raise SystemExit("of the callback")

    dcp.configure(progress=progress)
    run_all(tmp_path)
    assert len(calls) == 3  # once in each operation
    assert caplog.text.count("a progress callback raised") == 3
    assert dcp.verify(tmp_path / "a") and dcp.verify(tmp_path / "b")


def test_a_callback_that_does_not_return_is_left_behind(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(_progress, "END_S", 0.05)
    go_on = threading.Event()
    dcp.configure(progress=lambda *args: go_on.wait(60))
    dcp.save(STATE, checkpoint_id=tmp_path)
    assert "did not return" in caplog.text
    go_on.set()
    assert dcp.verify(tmp_path)


def test_a_callback_that_does_not_return_holds_up_no_other_save(tmp_path, monkeypatch, caplog):
    """Not even where the watcher waits for it for ever: the other one has its result."""
    monkeypatch.setattr(_progress, "END_S", 1e9)
    go_on = threading.Event()
    dcp.configure(progress=lambda *args: go_on.wait(60), arenas=2)
    stuck = dcp.async_save(STATE, checkpoint_id=tmp_path / "a")
    dcp.configure(progress="off")
    assert dcp.async_save(STATE, checkpoint_id=tmp_path / "b").result(timeout=60)
    assert not stuck.done()
    go_on.set()
    assert stuck.result(timeout=60)
    assert "did not return" not in caplog.text


def test_a_future_has_its_result_though_its_callback_does_not_return(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(_progress, "END_S", 0.05)
    go_on = threading.Event()
    dcp.configure(progress=lambda *args: go_on.wait(60))
    assert dcp.async_save(STATE, checkpoint_id=tmp_path).result(timeout=50)
    assert caplog.text.count("did not return") == 1
    go_on.set()
    assert _uploads.wait_until_ended(60)


@pytest.mark.parametrize("inner", ["save", "async_save", "load"])
@pytest.mark.parametrize("watched", ["save", "async_save", "load"])
def test_a_callback_may_save_and_load_and_is_not_called_for_that(
    tmp_path, monkeypatch, caplog, watched, inner
):
    """What it waits for it holds up itself, where it is a callback of a background save."""
    monkeypatch.setattr(_progress, "END_S", 0.5 if watched == "async_save" else 60.0)
    dcp.save(STATE, checkpoint_id=tmp_path / "before")
    calls: list[str] = []
    ends: list[str] = []

    def run(kind: str, path) -> None:
        if kind == "save":
            dcp.save(STATE, checkpoint_id=path)
        elif kind == "async_save":
            dcp.async_save(STATE, checkpoint_id=path).result(timeout=60)
        else:
            dcp.load({"o": {"x": 0}}, checkpoint_id=tmp_path / "before")

    def progress(kind: str, done: int, total: int, rate: float) -> None:
        calls.append(kind)
        if len(calls) == 1:
            run(inner, tmp_path / "inner")
            ends.append(dcp.last_report().kind)

    dcp.configure(progress=progress)
    run(watched, tmp_path / "a")
    for _ in range(600):
        if ends:
            break
        time.sleep(0.1)
    assert ends and set(calls) == {watched}
    assert _uploads.wait_until_ended(60)
    assert "raised" not in caplog.text


def test_a_failed_save_ends_its_watcher(tmp_path):
    dcp.configure(progress=lambda *args: None)
    (tmp_path / "f").write_text("no directory")
    with pytest.raises(dcp.CheckpointException):
        dcp.save(STATE, checkpoint_id=tmp_path / "f")
    assert watchers() == []


# ---- operations beside saves and loads ----


def heard() -> list[tuple[str, int, int, float]]:
    calls: list[tuple[str, int, int, float]] = []
    dcp.configure(progress=lambda *args: calls.append(args))
    return calls


def check_heard(calls: list[tuple[str, int, int, float]], kind: str, least: int) -> None:
    assert {call[0] for call in calls} == {kind}
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)
    assert calls[-1][1] == calls[-1][2] >= least
    assert watchers() == []


def hugging_face(path, **options):
    from dcp_native.hf_storage import HuggingFaceStorageWriter

    dcp.save({"w": STATE["w"]}, storage_writer=HuggingFaceStorageWriter(str(path), **options))


def test_a_callback_hears_of_a_check_to_its_last_byte(tmp_path):
    dcp.save(STATE, checkpoint_id=tmp_path)
    calls = heard()
    assert dcp.verify(tmp_path)
    check_heard(calls, "verify", BYTES)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_that_divide_a_check_know_the_bytes_of_their_files(tmp_path, size):
    state = {f"w{i}": torch.ones(1000 * (i + 1)) for i in range(8)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, single_file_per_rank=False))
    for rank in range(size):
        with _verify._progress(tmp_path, "full", rank, size) as progress:
            _verify._run(tmp_path, "full", 100, rank, size, progress.counter)
        done, total = progress._counts()
        assert progress.counter[0] == done == total > 0


def test_a_callback_hears_of_a_torch_save_file_and_of_nothing_within(tmp_path):
    dcp.save(STATE, checkpoint_id=tmp_path / "a")
    calls = heard()
    format_utils.dcp_to_torch_save(tmp_path / "a", tmp_path / "w.pt")
    check_heard(calls, "dcp_to_torch_save", BYTES)
    calls.clear()
    format_utils.torch_save_to_dcp(tmp_path / "w.pt", tmp_path / "b")
    check_heard(calls, "save", BYTES)


def test_a_callback_hears_of_hugging_face_files_and_of_their_joining(tmp_path):
    calls = heard()
    hugging_face(tmp_path / "shards", save_distributed=True)
    check_heard(calls, "save", BYTES)
    calls.clear()
    consolidate(str(tmp_path / "shards"), str(tmp_path / "joined"), {"w": 1})
    check_heard(calls, "consolidate", BYTES)


def test_a_damaged_checkpoint_ends_the_watchers_of_its_conversion_and_check(tmp_path):
    dcp.save({"w": STATE["w"]}, checkpoint_id=tmp_path / "a")
    file = tmp_path / "a" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    calls = heard()
    with pytest.raises(dcp.NativeError, match=r"CRC|checksum"):
        format_utils.dcp_to_torch_save(tmp_path / "a", tmp_path / "w.pt")
    assert not dcp.verify(tmp_path / "a")
    assert {call[0] for call in calls} == {"dcp_to_torch_save", "verify"} and watchers() == []


@pytest.mark.parametrize("stream, threads", [(Terminal, 2), (io.StringIO, 0)])
def test_checks_and_conversions_are_watched_on_a_terminal_and_not_in_a_pipe(
    tmp_path, monkeypatch, stream, threads
):
    dcp.save(STATE, checkpoint_id=tmp_path / "a")
    shown = stream()
    stderr_is(shown, monkeypatch)
    drawn = []
    monkeypatch.setattr(Progress, "_draw", lambda self: drawn.append(self._kind))
    dcp.verify(tmp_path / "a")
    format_utils.dcp_to_torch_save(tmp_path / "a", tmp_path / "w.pt")
    assert drawn == ["verify", "dcp_to_torch_save"][:threads] and watchers() == []
    assert shown.getvalue() == ""


# ---- futures ----

THREAD, PROCESS = dcp.AsyncCheckpointerType.THREAD, dcp.AsyncCheckpointerType.PROCESS
MODES = pytest.mark.parametrize("mode", [THREAD, PROCESS], ids=["thread", "process"])


def looks_until_done(future) -> list[tuple[int, int]]:
    looks = [future.progress()]
    while not future.done():
        looks.append(future.progress())
        time.sleep(0.001)
    return [*looks, future.progress()]


def check_looks(looks: list[tuple[int, int]]) -> None:
    assert [done for done, _ in looks] == sorted(done for done, _ in looks)
    assert len({total for _, total in looks}) == 1
    assert all(0 <= done <= total for done, total in looks)


@MODES
def test_the_progress_of_a_future_only_grows_and_ends_at_its_total(tmp_path, mode):
    state = {"w": torch.zeros(16 << 20)}  # more than is in flight at a time
    dcp.configure(write_limit_bytes_s=150_000_000)
    future = dcp.async_save(state, checkpoint_id=tmp_path, async_checkpointer_type=mode)
    looks = looks_until_done(future)
    future.result(timeout=60)
    check_looks(looks)
    assert len({done for done, _ in looks}) > 2  # some of them were underway
    assert looks[-1] == (future.report.payload_bytes,) * 2 == (state["w"].nbytes,) * 2
    assert _uploads.wait_until_ended(60) and future.progress() == looks[-1]


@MODES
@pytest.mark.parametrize("how", ["cancelled", "no directory"])
def test_the_progress_of_a_future_that_fails_is_what_was_done(tmp_path, mode, how):
    state = {"w": value("w", (4 << 20,))}
    dcp.configure(write_limit_bytes_s=20_000_000)
    (tmp_path / "f").write_text("no directory")
    future = dcp.async_save(
        state, checkpoint_id=tmp_path / ("f" if how == "no directory" else "c"),
        async_checkpointer_type=mode,
    )  # fmt: skip
    if how == "cancelled":
        future.cancel()
    looks = looks_until_done(future)
    with pytest.raises(dcp.CheckpointException):
        future.result(timeout=60)
    check_looks(looks[:-1])
    done, total = looks[-1]
    assert done >= looks[-2][0] and (done < total or done == total == 0)
    assert _uploads.wait_until_ended(60) and future.progress() == looks[-1]


# ---- bars ----


@pytest.mark.parametrize("progress", ["auto", "off"])
def test_no_thread_where_nobody_would_see_anything(tmp_path, progress, monkeypatch):
    stream = io.StringIO()
    stderr_is(stream, monkeypatch)
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail(self.name))
    dcp.configure(progress=progress)
    with Progress("save", lambda: (0, 1)):
        pass
    assert stream.getvalue() == ""


def test_a_short_operation_shows_no_bar_on_a_terminal(tmp_path, terminal):
    dcp.save(STATE, checkpoint_id=tmp_path)
    assert terminal.getvalue() == ""


def test_the_time_before_a_bar_counts_from_the_begin_of_the_operation(terminal, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(_progress, "time", types.SimpleNamespace(monotonic=lambda: 100.5))

    class Event:
        def wait(self, s):
            waits.append(s)
            return True

        def set(self):
            pass

    here = types.SimpleNamespace(
        Event=Event, Thread=threading.Thread, current_thread=threading.current_thread
    )
    monkeypatch.setattr(_progress, "threading", here)
    with Progress("save", lambda: (0, 1), begin_ns=100 * 10**9):
        pass
    assert waits == [1.5] and terminal.getvalue() == ""


def show(*looks: tuple[int, int], **how) -> None:
    """One bar that saw these counts."""
    left = list(looks)
    seen = threading.Event()

    def look():
        if len(left) == 1:
            seen.set()
        return left.pop(0) if len(left) > 1 else left[0]

    with Progress("save", look, **how):
        assert seen.wait(30)


def test_a_bar_says_how_much_how_fast_and_how_long_and_goes_away(terminal, at_once):
    show((10**6, 4 * 10**6), (2 * 10**6, 4 * 10**6), ranks_count=2, ranks_bytes=8 * 10**9)
    text = terminal.getvalue()
    assert "\rsave, rank 0 (all: 8.00 GB): 1.00 MB of 4.00 MB (25%), " in text
    assert "B/s, " in text and " left" in text and "(50%)" in text
    assert "\x1b" not in text
    assert text.endswith("\r") and text.rstrip("\r").split("\r")[-1].strip() == ""


def test_only_the_first_rank_shows_a_bar(terminal, at_once, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail(self.name))
    with Progress("save", lambda: (1, 2), rank=1):
        pass
    with Progress("async_save", lambda: (1, 2), foreground=False):
        pass


def test_lines_where_they_are_asked_for_have_no_codes(monkeypatch, at_once):
    stream = io.StringIO()
    stderr_is(stream, monkeypatch)
    dcp.configure(progress="on")
    show((0, 4), (2, 4), (4, 4))
    (line,) = stream.getvalue().splitlines()  # the next one would come after 10 s
    assert line.startswith("save: ") and "\r" not in stream.getvalue()


def test_a_terminal_that_goes_away_harms_nothing(tmp_path, monkeypatch, at_once):
    class Gone(Terminal):
        def write(self, text):
            raise BrokenPipeError

    stderr_is(Gone(), monkeypatch)
    dcp.save(STATE, checkpoint_id=tmp_path)
    assert dcp.verify(tmp_path)


# ---- whole programs ----

PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import dcp_native as dcp
from dcp_native import _progress, _uploads
_progress.BAR_AFTER_S = float(sys.argv[2])
_progress.LOOK_S = 0.01
dcp.configure(write_limit_bytes_s=60_000_000)
dcp.save({"w": torch.arange(8_000_000)}, checkpoint_id=sys.argv[1])
"""


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}


@pytest.mark.parametrize("progress", ["auto", "off", "on"])
def test_a_pipe_gets_no_escape_codes_and_by_default_nothing(tmp_path, progress):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "c", "0"],
        env=environment(DCP_NATIVE_PROGRESS=progress), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "" and "\x1b" not in done.stderr and "\r" not in done.stderr
    assert done.stderr.startswith("save: ") if progress == "on" else done.stderr == ""


def on_terminal(path, after_s: str, **more: str) -> bytes:
    """What the program writes to a terminal."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, path, after_s],
        env=environment(**more), stdin=slave, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    text = b""
    while True:
        try:
            more_text = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not more_text:
            break
        text += more_text
    os.close(master)
    assert process.wait(timeout=60) == 0
    return text


def test_a_terminal_gets_a_bar_after_its_time_and_not_before(tmp_path):
    assert on_terminal(tmp_path / "a", "3600") == b""
    assert on_terminal(tmp_path / "b", "0", DCP_NATIVE_PROGRESS="off") == b""
    text = on_terminal(tmp_path / "c", "0")
    assert b"save" in text and b"64.0" in text and b"\n" not in text


@pytest.mark.parametrize("progress", ["yes", 1, None, b"auto"])
def test_other_settings_are_refused(progress):
    with pytest.raises(ValueError, match="progress must be a callable or one of"):
        dcp.configure(progress=progress)
