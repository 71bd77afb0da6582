"""Ctrl-C: a command stops in the middle of its work, says so in a line, and leaves nothing."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from array import array

import cli
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from conftest import ROOT

from dcp_native import _verify

FILES = 600
BUSY = """
import signal, sys, threading
from contextlib import contextmanager
from dcp_native._cli import output

@contextmanager
def progress(self, what, total):
    told = []
    def update(done):
        if done and not told:
            told.append(print("busy", file=sys.stderr, flush=True))
            if threading.current_thread() is threading.main_thread():
                signal.pause()
    yield update

output.Output.progress = progress
from dcp_native._cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line; where it shows progress it says so, and waits for a signal if it can."""


def start(*argv, program=("-c", BUSY)):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, *program, *map(str, argv)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def end(process):
    """After an interrupt; what it wrote to stdout."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    # A signal that met torch's import ends the process by that signal: the same to a shell.
    assert process.returncode in (130, -signal.SIGINT), (out, err)
    assert err.splitlines() == ["dcp-native: interrupted"]
    return out


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A checkpoint of many files, all one on the disk: long to read and small to keep."""
    path = tmp_path_factory.mktemp("long") / "c"
    torch_dcp.save({"t": torch.zeros(1 << 22)}, checkpoint_id=path, no_dist=True)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    ((index, info),) = metadata.storage_data.items()
    tensor = metadata.state_dict_metadata["t"]
    for number in range(1, FILES):
        os.link(path / info.relative_path, path / f"__{number}_0.distcp")
        key = f"t{number}"
        metadata.state_dict_metadata[key] = tensor
        metadata.storage_data[type(index)(key, index.offset, index.index)] = type(info)(
            f"__{number}_0.distcp", info.offset, info.length
        )
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


@pytest.mark.parametrize("threads", [1, 3])
def test_an_interrupt_stops_all_threads_of_a_check(long, threads):
    counters = [array("Q", [0]) for _ in range(threads)]
    main = threading.get_ident()

    def interrupt():
        while not any(counter[0] for counter in counters):
            time.sleep(0.001)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        _verify.verify_alone(long, "full", 100, counters)
    thread.join()
    assert sum(counter[0] for counter in counters) < FILES * (4 << 22)


def test_a_failure_of_one_thread_stops_the_others(long, monkeypatch):
    counters = [array("Q", [0]) for _ in range(2)]
    run = _verify._run

    def one(path, level, most, part, parts, counter, cancel):
        if part == 0:
            while not counters[1][0]:
                time.sleep(0.001)
            raise RuntimeError("part 0")
        return run(path, level, most, part, parts, counter, cancel)

    monkeypatch.setattr(_verify, "_run", one)
    with pytest.raises(RuntimeError, match="part 0"):
        _verify.verify_alone(long, "full", 100, counters)
    assert counters[1][0] < FILES // 2 * (4 << 22)


@pytest.mark.parametrize(
    "argv",
    [
        ("verify", "C"), ("diff", "C", "C"), ("convert", "C", "new", "--to", "hf"),
        ("bench", ".", "--size", "20MB", "--no-checkpoint", "--json"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_interrupt_ends_a_command_with_130_and_leaves_nothing(long, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    process = start(*(long if arg == "C" else arg for arg in argv))
    assert process.stderr.readline() == "busy\n"
    assert end(process) == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("argv", [("new.pt",), ("new", "--files", "2")], ids=" ".join)
def test_an_interrupted_conversion_leaves_nothing(long, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    process = start("convert", long, *argv, program=("-m", "dcp_native"))
    while not os.listdir(tmp_path):  # until it has begun to write
        assert process.poll() is None
        time.sleep(0.01)
    assert end(process) == ""
    assert os.listdir(tmp_path) == []


def test_an_interrupt_before_the_first_import_is_over_is_no_traceback(tmp_path):
    program = "import sys, signal\nsys.argv[1:] = ['inspect', '.']\n"
    program += "class Slow:\n    def find_spec(self, name, *unused):\n"
    program += "        if name == 'WHERE':\n            signal.raise_signal(signal.SIGINT)\n"
    program += "sys.meta_path.insert(0, Slow())\n"
    program += "import runpy\nrunpy.run_module('dcp_native', run_name='__main__')\n"
    for where in ("dcp_native._cli.main", "dcp_native._cli.du"):
        done = cli.run_alone(program=("-c", program.replace("WHERE", where)))
        assert (done.status, done.out, done.err) == (130, "", "dcp-native: interrupted\n")
