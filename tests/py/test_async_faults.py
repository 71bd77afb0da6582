"""Background saves of real jobs, some process of which dies, stands still, is interrupted or ends.

Whatever happens: every future is resolved in time and says why, what was loadable before still is,
the next save clears up, and no key stays in the store when a save has ended.
"""

from __future__ import annotations

import signal
import socket
import time

import pytest
import torch.distributed as dist
from test_kill import DEADLINE_S, Rank, check_no_junk, jobs, loaded_version, until

__all__ = ["jobs"]

NUMEL = 4 << 20  # 16 MiB per rank: four seconds for a slow one
SMALL = 1 << 10
SOON_S = 5
"""Within 2 s is the promise; these machines are busy."""
TIMEOUT_S = 3
GRACE_S = 5 + 4
"""Behind a deadline: EXPIRE_GRACE_NS of csrc/core/upload.c, and the machine's."""


class Store:
    """The store of a job, served by this process, which nothing happens to."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.order = {"port": self.store.port, "served": True, "module": "async_job"}

    def keys(self) -> list[str]:
        """Those of ours."""
        return [key for key in self.store.list_keys() if "dcp_native" in key]


@pytest.fixture
def store():
    return Store()


def ended_well(*ranks: Rank) -> None:
    for rank in ranks:
        assert rank.wait() == 0, rank.out.read_text()[-3000:]


def until_in_flight(ranks: list[Rank]) -> None:
    until(lambda: all(r.fact("in_flight") for r in ranks), "saves in flight", *ranks)


def check_that_life_goes_on(jobs, path, size: int, before: int) -> None:
    """What was there is there; the next job overwrites it and sweeps."""
    assert loaded_version(path, size, NUMEL) == before
    jobs.run("overwrite", size, dir=str(path), version=9, numel=NUMEL)
    assert loaded_version(path, size, NUMEL) == 9
    check_no_junk(path)


# ---- a rank dies ----

DEATHS = {
    "member-writing": (2, [1], [0, 1], "thread"),
    "member-durable": (2, [1], [0], "thread"),
    "coordinator-writing": (2, [0], [0, 1], "thread"),
    "coordinator-durable": (2, [0], [1], "process"),
    "member-of-3-writing": (3, [2], [0, 1, 2], "process"),
    "member-of-3-durable": (3, [1], [0], "thread"),
    "coordinator-of-3-writing": (3, [0], [0, 1, 2], "process"),
    "coordinator-of-3-durable": (3, [0], [1, 2], "thread"),
    "coordinator-and-member-of-3": (3, [0, 2], [0, 1, 2], "thread"),
}
"""Name -> ranks, those that die, those that write slowly, mode."""


@pytest.mark.parametrize("case", DEATHS)
def test_a_death_is_on_every_survivors_future_and_loses_nothing(jobs, tmp_path, store, case):
    size, victims, slow, mode = DEATHS[case]
    path = tmp_path / "checkpoint"
    ranks = jobs.start(
        "disturbed", size, order=store.order, dir=str(path), numel=NUMEL, slow=slow, mode=mode
    )
    until_in_flight(ranks)
    killed = time.monotonic()
    for victim in victims:
        ranks[victim].kill()
    survivors = [rank for i, rank in enumerate(ranks) if i not in victims]
    ended_well(*survivors)
    for rank in survivors:
        first = rank.fact("first")
        assert first["raised"] == "CheckpointException", first
        assert {str(v) for v in victims} & set(first["failures"]), first
        assert set(first["failures"]) <= {str(v) for v in victims}, first
        for victim, (_, text, code) in first["failures"].items():
            assert f"rank {victim}" in text and "died" in text and code == "PEER", first
        assert 0 < rank.fact("at") - killed < SOON_S, first
    assert store.keys() == []
    check_that_life_goes_on(jobs, path, size, before=1)


# ---- a store that dies or stands still ----

STORES = {
    "rank-0-killed": ("rank", signal.SIGKILL, "thread"),
    "rank-0-stopped": ("rank", signal.SIGSTOP, "thread"),
    "agent-killed": ("agent", signal.SIGKILL, "thread"),
    "agent-stopped": ("agent", signal.SIGSTOP, "process"),
}


@pytest.mark.parametrize("case", STORES)
def test_without_its_store_a_save_ends_by_the_deadline(jobs, tmp_path, case):
    host, signum, mode = STORES[case]
    path, stop = tmp_path / "checkpoint", tmp_path / "stop"
    if host == "agent":
        (agent,) = jobs.start("serve", 1, alone=True, order={"module": "async_job"}, stop=str(stop))
        until(lambda: agent.fact("port") is not None, "the store", agent)
        port = agent.fact("port")
    else:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
    ranks = jobs.start(
        "disturbed", 2, order={"port": port, "served": host == "agent", "module": "async_job"},
        dir=str(path), numel=NUMEL, slow=[0, 1], mode=mode, timeout_s=TIMEOUT_S,
        again=str(tmp_path / "again"),
    )  # fmt: skip
    until_in_flight(ranks)
    victim = agent if host == "agent" else ranks[0]
    victim.kill(signum)
    hurt = time.monotonic()
    survivors = ranks if host == "agent" else ranks[1:]
    for rank in survivors:
        until(lambda r=rank: r.fact("first"), "the end of its save", rank)
        first = rank.fact("first")
        assert first["raised"] == "CheckpointException", first
        assert rank.fact("at") - hurt < TIMEOUT_S + GRACE_S, first
        text = str(first["failures"])
        assert "store" in text or "rank 0" in text, first
        assert ".metadata tells" in text or "given up" in text, first
    jobs.run("overwrite", 2, dir=str(path), version=5, numel=NUMEL)
    if signum == signal.SIGSTOP:
        victim.kill(signal.SIGCONT)
        if host == "rank":
            ended_well(victim)
            assert victim.fact("first")["raised"] == "CheckpointException"
        stop.touch()
    ended_well(*survivors)
    for rank in survivors:
        assert rank.fact("again")["raised"] is None
    assert loaded_version(path, 2, NUMEL) == 5
    check_no_junk(path)


# ---- a rank stands still ----

STOPPED = {
    "member": (2, 1, "thread"),
    "coordinator": (2, 0, "thread"),
    "member-process": (2, 1, "process"),
    "coordinator-of-3": (3, 0, "process"),
}


@pytest.mark.parametrize("case", STOPPED)
def test_a_rank_that_stands_still_is_left_and_harms_no_newer_save(jobs, tmp_path, store, case):
    size, victim, mode = STOPPED[case]
    path = tmp_path / "checkpoint"
    ranks = jobs.start(
        "disturbed", size, order=store.order, dir=str(path), numel=NUMEL, slow=[victim], mode=mode,
        timeout_s=TIMEOUT_S,
    )  # fmt: skip
    until_in_flight(ranks)
    ranks[victim].kill(signal.SIGSTOP)
    stopped = time.monotonic()
    for rank in ranks[:victim] + ranks[victim + 1 :]:
        until(lambda r=rank: r.fact("first"), "the end of its save", rank)
        first = rank.fact("first")
        assert first["raised"] == "CheckpointException", first
        assert rank.fact("at") - stopped < TIMEOUT_S + GRACE_S, first
    assert loaded_version(path, size, NUMEL) == 1
    jobs.run("overwrite", size, dir=str(path), version=5, numel=NUMEL)
    ranks[victim].kill(signal.SIGCONT)
    ended_well(*ranks)
    assert ranks[victim].fact("first")["raised"] == "CheckpointException"
    assert loaded_version(path, size, NUMEL) == 5
    check_no_junk(path)
    assert store.keys() == []


# ---- Ctrl-C ----

INTERRUPTS = {
    "plan": ("plan", SMALL, 1, 0, True),
    "vote": ("vote", SMALL, 1, 2, True),
    "vote-absent": ("vote", SMALL, 1, 13, False),
    "vote-twice": ("vote", SMALL, 2, 5, False),
    "stage": ("stage", 32 << 20, 1, 0, True),
    "room": ("room", NUMEL, 1, 0, True),
    "save": ("save", NUMEL, 1, 0, True),
    "load": ("load", NUMEL, 1, 0, True),
}
"""Name -> phase, elements, how often, how late the other rank is, are ranks in step behind it."""


@pytest.mark.parametrize("case", INTERRUPTS)
def test_ctrl_c_in_async_save_is_prompt_and_heard_by_all(jobs, tmp_path, store, case):
    phase, numel, times, late_s, in_step = INTERRUPTS[case]
    path = tmp_path / "checkpoint"
    ranks = jobs.start(
        "interrupted", 2, order=store.order, dir=str(path), numel=numel, phase=phase, times=times,
        late_s=late_s, in_step=in_step, mode="thread",
    )  # fmt: skip
    ended_well(*ranks)
    other, first = (rank.fact("first") for rank in ranks)
    assert first["raised"] == "KeyboardInterrupt", first
    took_s = ranks[1].fact("at") - ranks[1].fact("pressed")
    assert took_s < (1 if times == 2 else 11.5 if phase == "vote" else SOON_S), first
    assert other["raised"] == "CheckpointException", other
    assert ranks[0].fact("at") - ranks[1].fact("pressed") < late_s + SOON_S + 10, other
    if in_step:
        assert other["failures"]["1"][0] == "KeyboardInterrupt", other
        assert [rank.fact("second")["raised"] for rank in ranks] == [None, None]
        assert loaded_version(path, 2, numel) == 2
        check_no_junk(path)
    else:
        assert loaded_version(path, 2, numel) == 1
    if phase in ("room", "save", "load"):
        assert [rank.fact("older")["raised"] for rank in ranks] == [None, None]
    assert store.keys() == []


# ---- the end of the script ----

EXITS = [
    ("plain", "thread"), ("plain", "process"), ("destroy", "thread"), ("sys.exit", "process"),
    ("exception", "thread"),
]  # fmt: skip


@pytest.mark.parametrize(("how", "mode"), EXITS)
def test_the_end_of_the_script_waits_for_the_save(jobs, tmp_path, store, how, mode):
    path = tmp_path / "checkpoint"
    ranks = jobs.start(
        "exit_in_flight", 2, order=store.order, dir=str(path), numel=NUMEL // 4, mode=mode,
        limit_bytes_s=4 << 20, how=how,
    )  # fmt: skip
    for rank in ranks:
        assert rank.wait() == (how == "exception"), rank.out.read_text()[-3000:]
        assert rank.fact("resolved") == "NoneType"
    assert loaded_version(path, 2, NUMEL // 4) == 2
    check_no_junk(path)
    assert store.keys() == []


@pytest.mark.parametrize("mode", ["thread", "process"])
def test_an_end_without_farewell_tears_nothing(jobs, tmp_path, store, mode):
    path = tmp_path / "checkpoint"
    ranks = jobs.start(
        "exit_in_flight", 2, order=store.order, dir=str(path), numel=NUMEL, mode=mode,
        limit_bytes_s=4 << 20, how="os._exit",
    )  # fmt: skip
    ended_well(*ranks)
    check_that_life_goes_on(jobs, path, 2, before=1)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_at_the_end_of_the_script_gives_the_save_up(jobs, tmp_path, store, times):
    path = tmp_path / "checkpoint"
    ranks = jobs.start(
        "exit_in_flight", 2, order=store.order, dir=str(path), numel=4 * NUMEL, mode="thread",
        limit_bytes_s=4 << 20, how="plain",
    )  # fmt: skip
    until(lambda: all(r.fact("leaving") for r in ranks), "the end of the script", *ranks)
    time.sleep(0.5)
    pressed = time.monotonic()
    for _ in range(times):
        ranks[1].kill(signal.SIGINT)
        time.sleep(0.2)
    ranks[1].wait()
    assert time.monotonic() - pressed < (3 if times == 2 else 10 + SOON_S)
    ranks[0].wait()
    assert ranks[0].fact("resolved") == "CheckpointException", ranks[0].out.read_text()[-3000:]
    assert time.monotonic() - pressed < DEADLINE_S
    assert loaded_version(path, 2, 4 * NUMEL) == 1
    if times == 1:
        assert store.keys() == []
