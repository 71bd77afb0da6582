"""Two hundred saves and loads cost no memory, no file descriptor, no object and no thread."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

import dcp_native as dcp
from dcp_native import _native

pytestmark = pytest.mark.filterwarnings("ignore")

WARM_UP, ROUNDS = 10, 200
RSS_SLACK_BYTES = 8 << 20
"""The allocators of Python and libc keep pages; a leak of 1 % of the data would exceed this."""
NUMEL = 1 << 20  # 4 MiB, 800 MiB over all rounds


@pytest.fixture(autouse=True)
def nothing_is_logged():
    logging.disable(logging.CRITICAL)  # pytest would keep every record
    yield
    logging.disable(logging.NOTSET)


class Broken:
    """Fails when it is serialised."""

    def __reduce__(self):
        raise ValueError("this one can not be pickled")


def state() -> dict:
    return {
        "w": torch.arange(NUMEL, dtype=torch.float32),
        "t": torch.ones(37, 11).t(),
        "objects": {"step": 1, "list": [1, 2, "three"], "tensors": [torch.ones(3)]},
    }


def usage() -> dict[str, int]:
    gc.collect()
    rss = next(
        int(line.split()[1]) << 10
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    )
    return {
        "live_bytes": _native.live_bytes(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "rss": rss,
    }


def save(path, sd):
    dcp.save(sd, checkpoint_id=path, no_dist=True)


def load(path, sd):
    dcp.load(sd, checkpoint_id=path, no_dist=True)


def save_in_background(path, sd):
    dcp.async_save(sd, checkpoint_id=path, no_dist=True).result()


def save_that_fails_planning(path, sd):
    with contextlib.suppress(dcp.CheckpointException):
        dcp.save({**sd, "bad": Broken()}, checkpoint_id=path, no_dist=True)


def save_in_background_that_fails_planning(path, sd):
    future = dcp.async_save({**sd, "bad": Broken()}, checkpoint_id=path, no_dist=True)
    assert isinstance(future.exception(), dcp.CheckpointException)


def save_that_fails_writing(path, sd):
    os.chmod(path, 0o777)
    blocked = path / "file"
    blocked.touch()
    with contextlib.suppress(dcp.CheckpointException):
        dcp.save(sd, checkpoint_id=blocked, no_dist=True)


def load_that_fails_planning(path, sd):
    with contextlib.suppress(dcp.CheckpointException):
        dcp.load({**sd, "missing": torch.ones(2)}, checkpoint_id=path, no_dist=True)


def load_that_finds_no_file(path, sd):
    damaged = path / "damaged"
    if not damaged.exists():
        save(damaged, sd)
        for file in damaged.glob("*.distcp"):
            file.unlink()
    with contextlib.suppress(dcp.CheckpointException):
        dcp.load(sd, checkpoint_id=damaged, no_dist=True)


@pytest.mark.parametrize(
    "call",
    [
        save,
        load,
        save_in_background,
        save_that_fails_planning,
        save_in_background_that_fails_planning,
        save_that_fails_writing,
        load_that_fails_planning,
        load_that_finds_no_file,
    ],
)
def test_nothing_grows(call, tmp_path):
    path, sd = tmp_path / "checkpoint", state()
    save(path, sd)
    for _ in range(WARM_UP):
        call(path, sd)
    before = usage()
    for _ in range(ROUNDS):
        call(path, sd)
    after = usage()
    assert after["live_bytes"] == before["live_bytes"]
    assert after["descriptors"] == before["descriptors"]
    assert after["threads"] == before["threads"]
    assert after["objects"] - before["objects"] < ROUNDS // 4, "an object or more in four rounds"
    assert after["rss"] - before["rss"] < RSS_SLACK_BYTES


def test_a_failed_save_lets_go_of_its_tensors(tmp_path):
    """The exception may live on; what was to be saved must not live on with it."""
    import weakref

    path = tmp_path / "file"
    path.touch()
    gc.disable()
    try:
        tensor = torch.ones(NUMEL)
        seen = weakref.ref(tensor)
        with contextlib.suppress(dcp.CheckpointException):
            dcp.save({"w": tensor}, checkpoint_id=path, no_dist=True)
        del tensor
        assert seen() is None, "only the cyclic garbage collector would free it"
    finally:
        gc.enable()


class Interrupts:
    """Unpickled, it sends a signal and takes its time."""

    def __reduce__(self):
        return _interrupt, ()


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.5)


class Interrupted(Exception):
    """What the signal handler raises."""


def test_an_interrupted_load_lets_go_of_its_tensors(tmp_path):
    def stop(*unused) -> None:
        raise Interrupted

    def load() -> weakref.ref:
        target = {"w": torch.zeros(NUMEL), "o": None}
        with pytest.raises(Interrupted):
            dcp.load(target, checkpoint_id=tmp_path)
        return weakref.ref(target["w"])

    dcp.save({"w": torch.ones(NUMEL), "o": Interrupts()}, checkpoint_id=tmp_path)
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        seen = load()
    finally:
        signal.signal(signal.SIGUSR1, before)
    gc.collect()
    assert seen() is None
