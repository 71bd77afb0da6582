"""The store table of `_bridge`: torch's stores answer it as they answer Python, off the GIL."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from bridge_table import BridgeTable, Code, CommError, Store, table_of

from dcp_native import _bridge

TABLE: BridgeTable = table_of(_bridge)


class Dictionary(dist.Store):
    """A store written in Python: what torch calls of it takes the GIL."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}

    def clone(self) -> Dictionary:
        return self

    def set(self, key: str, value: bytes) -> None:
        self.values[key] = value

    def compare_set(self, key: str, expected: bytes, value: bytes) -> bytes:
        if self.values.get(key, b"") == bytes(expected):
            self.values[key] = value
        return self.values[key]

    def get(self, key: str) -> bytes:
        return self.values[key]

    def add(self, key: str, delta: int) -> int:
        value = int(self.values.get(key, b"0")) + delta
        self.values[key] = str(value).encode()
        return value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def deleteKey(self, key: str) -> bool:  # the name that torch looks for
        return self.values.pop(key, None) is not None


def tcp() -> dist.Store:
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10)
    )


STORES: dict[str, Callable[[Path], dist.Store]] = {
    "tcp": lambda path: tcp(),
    "file": lambda path: dist.FileStore(str(path / "store"), 1),
    "hash": lambda path: dist.HashStore(),
    "prefix over tcp": lambda path: dist.PrefixStore("a", dist.PrefixStore("b", tcp())),
    "prefix over file": lambda path: dist.PrefixStore("a", dist.FileStore(str(path / "store"), 1)),
    "Python": lambda path: Dictionary(),
}


def group_of(store: dist.Store) -> dist.ProcessGroup:
    """A group that is nothing but its store."""
    return dist.ProcessGroup(store, 0, 1)


class Storeless(dist.ProcessGroup):
    """A group written in Python."""

    def __init__(self) -> None:
        super().__init__(0, 1)


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[dist.Store, Store]]:
    theirs = STORES[request.param](tmp_path)
    ours = Store(TABLE, group_of(theirs))
    yield theirs, ours
    ours.close()


def speak(ours: Store) -> None:
    """Every call, on keys that are there and that are not."""
    assert ours.raw.kind == b"store"
    assert not ours.check("k")
    ours.set("k", b"one\0two")
    assert ours.check("k") and ours.get("k") == b"one\0two"
    ours.set("k", b"")
    ours.set_once("once", bytes(range(256)) * 400)
    ours.set_once("once", b"later")
    assert ours.get("once", 1 << 20) == bytes(range(256)) * 400
    with pytest.raises(CommError, match="has 102400 bytes, at most 4096") as caught:
        ours.get("once")
    assert caught.value.code is Code.LIMIT
    assert [ours.add("n", delta) for delta in (0, 1, 0, 41, -2)] == [0, 1, 1, 42, 40]
    for key in ("k", "once", "n", "never made"):
        ours.remove(key)
        assert not ours.check(key)


def test_every_store_answers_every_call(store):
    theirs, ours = store
    speak(ours)
    theirs.set("from torch", b"hello")
    assert ours.get("from torch") == b"hello"
    ours.set("to torch", b"hello")
    assert theirs.get("to torch") == b"hello"
    assert theirs.add("counter", 3) == 3 and ours.add("counter", 4) == 7


def test_every_store_answers_a_thread(store):
    """The main thread takes the GIL again and again; a store in Python needs it, too."""
    _, ours = store
    failures: list[BaseException] = []

    def body() -> None:
        try:
            speak(ours)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
    assert not failures, failures[0]


def test_calls_need_no_gil():
    """A thread of C makes a call while this one keeps the GIL until it has ended."""
    store = Store(TABLE, group_of(tcp()))
    libc = ctypes.PyDLL(None)  # keeps the GIL
    thread, value = ctypes.c_ulong(), ctypes.c_void_p()
    # `void destroy(void *)` is near enough to a thread's function on every machine of today, and
    # closing a connection needs as little of Python as using one.
    start = ctypes.cast(store.raw.destroy, ctypes.c_void_p)
    null = ctypes.c_void_p()
    assert (
        libc.pthread_create(ctypes.byref(thread), null, start, ctypes.c_void_p(store.raw.ctx)) == 0
    )
    assert libc.pthread_join(thread, ctypes.byref(value)) == 0


def test_a_call_that_waits_on_the_trainers_client_blocks_none_of_ours():
    theirs = tcp()
    ours = Store(TABLE, group_of(theirs))
    waiting = threading.Thread(target=lambda: theirs.wait(["go"], timedelta(seconds=20)))
    waiting.start()
    time.sleep(0.2)  # it holds the trainer's client now
    start = time.monotonic()
    speak(ours)
    assert waiting.is_alive() and time.monotonic() - start < 5
    ours.set("go", b"")
    waiting.join(10)
    assert not waiting.is_alive()
    ours.close()


def test_the_client_outlives_the_group_and_lets_go_of_the_store():
    theirs = Dictionary()
    gone = weakref.ref(theirs)
    group = group_of(theirs)
    ours = Store(TABLE, group)
    del group
    gc.collect()
    speak(ours)
    ours.close()
    del theirs
    gc.collect()
    assert gone() is None


HOST = """
import sys, time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(60)
"""


def test_a_store_whose_host_was_killed_is_an_error_at_once_that_says_so():
    host = subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, text=True)
    try:
        assert host.stdout is not None
        port = int(host.stdout.readline())
        theirs = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        ours = Store(TABLE, group_of(theirs))
        assert ours.add("n", 1) == 1
        os.kill(host.pid, signal.SIGKILL)
        host.wait()
        start = time.monotonic()
        for call in (
            lambda: ours.add("n", 1),
            lambda: ours.check("n"),
            lambda: ours.set_once("f", b"x"),
            lambda: ours.get("n"),
            lambda: ours.remove("n"),
        ):
            with pytest.raises(CommError, match="in the process group's store failed") as caught:
                call()
            assert caught.value.code is Code.COMM
            assert "may be gone" in str(caught.value) and "Exception raised" not in str(
                caught.value
            )
        assert time.monotonic() - start < 5
        ours.close()
        with pytest.raises(CommError, match="cannot connect to the store"):
            theirs.set_timeout(timedelta(seconds=1))
            Store(TABLE, group_of(theirs))
    finally:
        host.kill()
        host.wait()


@pytest.mark.parametrize("kind", ["tcp", "hash", "prefix over tcp"])
def test_the_trainers_timeout_stays_as_it_is(kind, tmp_path):
    theirs = STORES[kind](tmp_path)
    theirs.set_timeout(timedelta(seconds=77))
    ours = Store(TABLE, group_of(theirs))
    assert theirs.timeout == timedelta(seconds=77)
    ours.close()


class Failing(Dictionary):
    """A store that raises at one call."""

    def check(self, keys: list[str]) -> bool:
        raise KeyError("no such thing")


def test_an_exception_of_a_store_in_python_is_an_error_and_stays_there():
    theirs = Failing()
    ours = Store(TABLE, group_of(theirs))
    with pytest.raises(CommError, match="no such thing"):
        ours.check("k")
    assert ours.add("n", 2) == 2
    ours.close()


@pytest.mark.parametrize(
    "thing", [None, object(), dist.HashStore()], ids=["None", "object", "store"]
)
def test_what_is_no_group_is_refused_by_its_type(thing):
    with pytest.raises(CommError, match=r"not a torch\.distributed\.ProcessGroup") as caught:
        Store(TABLE, thing)
    assert caught.value.code is Code.INVALID


def test_a_group_without_a_store_is_refused():
    with pytest.raises(CommError, match="has no store"):
        Store(TABLE, Storeless())
