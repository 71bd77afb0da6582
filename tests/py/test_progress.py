"""Progress: callbacks hear of every byte, bars are shown where and when they are of use."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading
import types

import pytest
import torch
from common import value
from conftest import ROOT

import dcp_native as dcp
from dcp_native import _progress
from dcp_native._progress import Progress

STATE = {"w": value("w", (3 << 18,)), "o": {"x": 1}}
BYTES = STATE["w"].nbytes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Standard error as a terminal without tqdm."""
    stream = Terminal()
    stderr_is(stream, monkeypatch)
    monkeypatch.setitem(sys.modules, "tqdm", None)
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


def test_a_failed_save_ends_its_watcher(tmp_path):
    dcp.configure(progress=lambda *args: None)
    (tmp_path / "f").write_text("no directory")
    with pytest.raises(dcp.CheckpointException):
        dcp.save(STATE, checkpoint_id=tmp_path / "f")
    assert watchers() == []


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
    show((10**6, 4 * 10**6), (2 * 10**6, 4 * 10**6), ranks_bytes=8 * 10**9)
    text = terminal.getvalue()
    assert "\rsave of 8.00 GB on all ranks: 1.00 MB of 4.00 MB (25%), " in text
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
    monkeypatch.setitem(sys.modules, "tqdm", None)
    dcp.save(STATE, checkpoint_id=tmp_path)
    assert dcp.verify(tmp_path)


def test_tqdm_draws_where_it_is_installed(at_once, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    stream = Terminal()
    stderr_is(stream, monkeypatch)
    show((10**6, 4 * 10**6), (2 * 10**6, 4 * 10**6))
    assert "25%" in stream.getvalue() and "4.00M" in stream.getvalue()
    assert tqdm.tqdm.monitor_interval != 0  # the program's own


# ---- whole programs ----

PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
import dcp_native as dcp
from dcp_native import _progress
_progress.BAR_AFTER_S = float(sys.argv[2])
_progress.LOOK_S = 0.01
dcp.configure(write_limit_bytes_s=60_000_000)
dcp.save({"w": torch.arange(8_000_000)}, checkpoint_id=sys.argv[1])
"""


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    kept = {name: text for name, text in os.environ.items() if not name.startswith("TQDM_")}
    return {**kept, "PYTHONPATH": path, **more}


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
