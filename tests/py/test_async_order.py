"""Several background saves: their order, what they wait for and leave, what their futures do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import pickle
import time
import weakref
from pathlib import Path

import pytest
import torch
from test_async_faults import NUMEL, SMALL, store
from test_kill import check_no_junk, jobs, loaded_version
from torch.distributed.checkpoint.metadata import Metadata

import dcp_native as dcp
from dcp_native import _uploads

__all__ = ["jobs", "store"]

MODES = pytest.mark.parametrize("mode", ["thread", "process"])


# ---- order ----


@pytest.mark.parametrize(
    ("arenas", "same", "mode"),
    [(1, False, "thread"), (1, True, "process"), (2, False, "process"), (2, True, "thread")],
)
def test_saves_end_in_order_and_only_as_many_at_once_as_there_are_arenas(
    jobs, tmp_path, store, arenas, same, mode
):
    path, numel = tmp_path / "checkpoint", NUMEL
    ranks = jobs.run(
        "in_row", 2, order=store.order, dir=str(path), numel=numel, arenas=arenas, same=same,
        mode=mode,
    )  # fmt: skip
    for rank in ranks:
        order = rank.fact("order")
        assert (order if arenas == 1 or same else sorted(order)) == [0, 1, 2]
        assert rank.fact("most") == (1 if same else arenas)
    paths = {2: path} if same else {i: Path(f"{path}-{i}") for i in range(3)}
    for version, where in paths.items():
        assert loaded_version(where, 2, numel) == version
        check_no_junk(where)
    assert store.keys() == []


@pytest.mark.parametrize(
    ("policy", "mode"),
    [("wait", "thread"), ("skip", "thread"), ("skip", "process"), ("fail", "process")],
)
def test_ranks_decide_together_when_one_of_them_is_busy(jobs, tmp_path, store, policy, mode):
    path = tmp_path / "checkpoint"
    ranks = jobs.run(
        "one_is_busy", 2, order=store.order, dir=str(path), numel=NUMEL // 4, policy=policy,
        mode=mode,
    )  # fmt: skip
    for rank in ranks:
        first = rank.fact("first")
        assert first["raised"] == ("CheckpointException" if policy == "fail" else None), first
        if policy == "fail":
            assert "in flight" in first["failures"]["1"][1], first
        assert (rank.fact("result") == "None") == (policy == "skip")
        assert rank.fact("third")["raised"] is None
    assert ranks[1].fact("own_was_done") == (policy == "wait")
    assert ranks[1].fact("own")["raised"] is None
    assert loaded_version(path, 2, NUMEL // 4) == 3
    assert loaded_version(Path(f"{path}-own"), 1, NUMEL) == 7
    check_no_junk(path)
    assert store.keys() == []


@MODES
def test_a_foreground_save_and_a_load_wait_for_the_background(jobs, tmp_path, store, mode):
    path = tmp_path / "checkpoint"
    ranks = jobs.run(
        "then_foreground", 2, order=store.order, dir=str(path), numel=NUMEL // 2, mode=mode
    )
    for rank in ranks:
        assert rank.fact("load_waited") and rank.fact("loaded") == 1
        assert rank.fact("save_waited")
    assert loaded_version(path, 2, NUMEL // 2) == 3
    check_no_junk(path)


# ---- fork ----


@MODES
def test_a_child_that_exits_normally_does_not_disturb_the_save(jobs, tmp_path, store, mode):
    path = tmp_path / "checkpoint"
    ranks = jobs.run("fork_meanwhile", 2, order=store.order, dir=str(path), numel=NUMEL, mode=mode)
    for rank in ranks:
        assert rank.fact("child") == 0, rank.out.read_text()[-3000:]
        assert rank.fact("still_in_flight"), "the child waited for the save, or ended it"
        assert "Error" not in rank.out.read_text()
    assert loaded_version(path, 2, NUMEL) == 2
    check_no_junk(path)
    assert store.keys() == []


# ---- memory ----


def control_group_of_this_process() -> Path:
    """Of the memory controller's first version."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory", path.lstrip("/"))
    raise FileNotFoundError("no memory controller of the first version")


@pytest.fixture
def small_group():
    """A memory control group of 64 MiB."""
    try:
        group = control_group_of_this_process() / f"dcp_native-test-{os.getpid()}"
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group of our own to be had: {error}")
    try:
        (group / "memory.limit_in_bytes").write_text(str(64 << 20))
        yield group
    finally:
        end = time.monotonic() + 10
        while group.exists() and time.monotonic() < end:
            with contextlib.suppress(OSError):
                group.rmdir()
            time.sleep(0.05)


@MODES
def test_a_rank_whose_control_group_has_no_room_streams(jobs, tmp_path, store, small_group, mode):
    path, numel = tmp_path / "checkpoint", 20 << 20  # 80 MiB: more than the group has
    ranks = jobs.run(
        "in_control_group", 2, order=store.order, dir=str(path), numel=numel, mode=mode,
        group=str(small_group),
    )  # fmt: skip
    assert [rank.fact("staging") for rank in ranks] == ["arena", "streamed"]
    assert "oom_kill 0" in (small_group / "memory.oom_control").read_text()
    assert loaded_version(path, 2, numel) == 2
    assert store.keys() == []


def test_200_saves_leave_nothing_behind(jobs, tmp_path, store):
    path = tmp_path / "checkpoint"
    ranks = jobs.run("many", 2, order=store.order, dir=str(path), numel=64 << 10, count=200)
    for rank in ranks:
        before, after = rank.fact("before"), rank.fact("after")
        assert after.pop("rss") - before.pop("rss") < 4 << 20
        assert after.pop("mappings") - before.pop("mappings") < 8  # of the allocators
        # One connection is kept for each of the saves that ever took leave at the same time.
        assert after.pop("descriptors") - before.pop("descriptors") < 4
        assert after == before
    assert loaded_version(path, 2, 64 << 10) == 199
    check_no_junk(path)
    assert store.keys() == []


# ---- futures ----


@pytest.fixture
def slow():
    dcp.configure(write_limit_bytes_s=16 << 20)
    yield
    assert _uploads.wait_until_ended(30)


def start(path: Path, numel: int = NUMEL) -> _uploads.SaveFuture:
    return dcp.async_save({"w": torch.ones(numel)}, checkpoint_id=path, no_dist=True)


def test_waiting_with_a_timeout_leaves_the_save_alone(tmp_path, slow):
    future = start(tmp_path)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.result(timeout=0.05)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.exception(timeout=0.05)
    assert future.running() and not future.done() and not future.cancelled()
    assert future.result(timeout=30) is future.result()


def test_futures_work_with_concurrent_futures_and_asyncio(tmp_path, slow):
    dcp.configure(arenas=2)
    short, long = start(tmp_path / "short", SMALL), start(tmp_path / "long")
    first = concurrent.futures.FIRST_COMPLETED
    done, left = concurrent.futures.wait([short, long], timeout=30, return_when=first)
    assert (done, left) == ({short}, {long})
    assert list(concurrent.futures.as_completed([long, short], timeout=30)) == [short, long]

    async def wait() -> object:
        return await asyncio.wait_for(asyncio.wrap_future(start(tmp_path / "awaited")), 30)

    assert isinstance(asyncio.run(wait()), Metadata)


def test_an_asyncio_task_that_is_cancelled_cancels_the_save(tmp_path, slow):
    saves: list[_uploads.SaveFuture] = []

    async def give_up() -> None:
        saves.append(start(tmp_path))
        await asyncio.wait_for(asyncio.wrap_future(saves[0]), 0.2)

    with pytest.raises((asyncio.TimeoutError, TimeoutError)):
        asyncio.run(give_up())
    with pytest.raises(dcp.CheckpointException, match="cancelled"):
        saves[0].result(timeout=30)
    assert os.listdir(tmp_path) == []


def test_a_callback_that_raises_harms_nobody(tmp_path, slow, caplog):
    seen: list[int] = []
    future = start(tmp_path, SMALL)

    def raises(_: concurrent.futures.Future) -> None:
        seen.append(1)
        raise RuntimeError("of the user's")

    future.add_done_callback(raises)
    future.add_done_callback(lambda f: seen.append(2))
    future.result(timeout=30)
    assert _uploads.wait_until_ended(30)
    assert seen == [1, 2]
    future.add_done_callback(lambda f: seen.append(3))  # done already: at once
    assert seen == [1, 2, 3]
    start(tmp_path, SMALL).result(timeout=30)


def test_a_callback_may_start_the_next_save(tmp_path, slow):
    later: list[_uploads.SaveFuture] = []
    future = start(tmp_path / "a", SMALL)
    future.add_done_callback(lambda f: later.append(start(tmp_path / "b", SMALL)))
    future.result(timeout=30)
    end = time.monotonic() + 30
    while not later and time.monotonic() < end:
        time.sleep(0.01)
    later[0].result(timeout=30)
    assert (tmp_path / "b" / ".metadata").exists()


def test_the_exceptions_of_futures_can_be_pickled(tmp_path, slow):
    future = start(tmp_path)
    assert future.cancel()
    error = future.exception(timeout=30)
    assert isinstance(error, dcp.CheckpointException)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and set(copy.failures) == {0}
    cause = copy.failures[0][0]
    assert str(cause) == str(error.failures[0][0])
    assert cause.dcp_code == "CANCELLED"


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_that_is_over_keeps_no_memory(tmp_path, fails):
    dcp.configure(write_limit_bytes_s=16 << 20 if fails else 0)
    state = {"w": torch.ones(NUMEL)}
    tensor = weakref.ref(state["w"])
    future = dcp.async_save(state, checkpoint_id=tmp_path, no_dist=True)
    save, weak = weakref.ref(future._save), weakref.ref(future)
    del state
    assert tensor() is None, "what was staged is let go of"
    if fails:
        assert future.cancel()
    assert (future.exception(timeout=30) is not None) == fails
    assert _uploads.wait_until_ended(30)
    gc.collect()
    assert save() is None, gc.get_referrers(save())
    del future
    gc.collect()
    assert weak() is None
