"""Nothing is lost and nothing hangs: processes are killed, interrupted, forked, crowded.

After whatever happens, the directory must hold exactly one version of a checkpoint, bit for bit, in
dcp_native and in stock torch, not older than the last save that returned.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.checkpoint as torch_dcp

import dcp_native as dcp

KILL = Path(__file__).resolve().parent / "kill"
sys.path.insert(0, str(KILL))

from job import blank, version_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

DEADLINE_S = 60
"""When a test stops believing that something still comes.  Nothing is that slow."""
TIMEOUT_S = 10
"""Of the process groups: survivors must know by then."""
SMALL = 1 << 10
LARGE = 3 << 20  # 12 MiB per rank
SEED = 20240607


class Rank:
    """One process of a job."""

    def __init__(self, pid: int, out: Path) -> None:
        self.pid, self.out = pid, out

    def lines(self) -> list[dict]:
        text = self.out.read_text() if self.out.exists() else ""
        return [
            json.loads(line) for line in text.splitlines(True) if line[:1] == "{" and "\n" in line
        ]

    def fact(self, name: str):
        """The last value that the rank said of `name`, else None."""
        return next((line[name] for line in reversed(self.lines()) if name in line), None)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def wait(self) -> int:
        """Exit code; -9 when it was killed."""
        status = Path(f"{self.out}.status")
        until(status.exists, f"the end of rank {self.out.name}", self)
        return int(status.read_text())


def until(condition, what: str, *ranks: Rank) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            said = "\n".join(f"{r.out.name}: {r.out.read_text()[-3000:]}" for r in ranks)
            raise AssertionError(f"waited in vain for {what}\n{said}")
        time.sleep(0.002)


class Jobs:
    """Starts jobs; each rank is forked off a process that has imported torch already."""

    def __init__(self, tmp: Path, script: str = "job.py") -> None:
        self.tmp, self.count = tmp, 0
        self.forker = subprocess.Popen(
            [sys.executable, str(KILL / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(dcp.__file__).resolve().parents[1])},
        )

    def start(
        self, scenario: str, size: int, *, alone: bool = False, order: dict | None = None, **args
    ) -> list[Rank]:
        """`size` ranks of one job; `alone`: processes that know nothing of each other.

        `order`: more of the orders that job.py takes.
        """
        more = order or {}
        self.count += 1
        ranks = []
        for rank in range(size):
            out = self.tmp / f"job{self.count}-{scenario}-{rank}"
            order = {
                "rank": rank, "size": 0 if alone else size, "out": str(out),
                "store": str(self.tmp / f"job{self.count}-store"),
                "timeout_s": TIMEOUT_S, "scenario": scenario, "args": args, **more,
            }  # fmt: skip
            self.forker.stdin.write(json.dumps(order).encode() + b"\n")
            self.forker.stdin.flush()
            ranks.append(Rank(json.loads(self.forker.stdout.readline())["pid"], out))
        return ranks

    def run(self, scenario: str, size: int, **args) -> list[Rank]:
        """A job that is meant to end well."""
        ranks = self.start(scenario, size, **args)
        for rank in ranks:
            assert rank.wait() == 0, rank.out.read_text()[-3000:]
        return ranks


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("jobs"))
    yield jobs
    jobs.forker.stdin.close()
    assert jobs.forker.wait(timeout=DEADLINE_S) == 0


def loaded_version(path: Path, size: int, numel: int) -> int:
    """What dcp_native and stock torch load there: one version, the same one."""
    versions = []
    for module in (dcp, torch_dcp):
        state = blank(size, numel)
        module.load(state, checkpoint_id=path, no_dist=True)
        versions.append(version_of(state, size, numel))
    assert versions[0] == versions[1]
    return versions[0]


def check_no_junk(path: Path) -> None:
    """No claims, and no data files but those that the metadata names."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    named = {info.relative_path for info in metadata.storage_data.values()}
    assert set(os.listdir(path)) == named | {".metadata"}


# ---- SIGKILL ----


def test_killed_jobs_leave_one_whole_version(jobs, tmp_path):
    """Both ranks overwrite one checkpoint until they are killed, 16 times."""
    choose = random.Random(SEED)
    path, numel, last = tmp_path / "checkpoint", LARGE // 2, -1
    for _ in range(16):
        ranks = jobs.start("overwrite_for_ever", 2, dir=str(path), version=last + 1, numel=numel)
        until(lambda r=ranks: all(x.fact("saved") is not None for x in r), "a first save", *ranks)
        time.sleep(choose.uniform(0, 0.25))
        order = choose.sample(ranks, 2)
        order[0].kill()
        time.sleep(choose.choice([0, 0, 0.003, 0.03]))
        order[1].kill()
        for rank in ranks:
            assert rank.wait() == -9, rank.out.read_text()[-3000:]
        returned = max(rank.fact("saved") for rank in ranks)
        last = loaded_version(path, 2, numel)
        assert last >= returned, "a save that had returned was lost"
        assert last <= returned + 1, "a version that nobody can have saved"
    jobs.run("overwrite", 2, dir=str(path), version=last + 1, numel=numel)
    assert loaded_version(path, 2, numel) == last + 1
    check_no_junk(path)


PHASES = {
    "state_dict": (2, 0, 1, False),
    "agree": (2, 0, 1, False),
    "write": (2, 0, 1, False),
    "finish": (2, 0, 1, False),
    "state_dict-3": (3, 0, 2, False),
    "agree-3": (3, 2, 2, False),
    "write-3": (3, 1, 0, False),
    "finish-3": (3, 2, 2, False),
    "write-async": (2, 0, 1, True),
    "write-async-coordinator": (2, 0, 0, True),
}
"""Name -> ranks, coordinator, rank that dies, in the background."""


@pytest.mark.parametrize("case", PHASES)
def test_survivors_of_a_killed_rank_know_and_lose_nothing(jobs, tmp_path, case):
    size, coordinator, victim, background = PHASES[case]
    phase = case.split("-")[0]
    path, numel = tmp_path / "checkpoint", (LARGE if phase == "write" else SMALL)
    ranks = jobs.start(
        "one_dies", size, dir=str(path), numel=numel, phase=phase, victim=victim,
        coordinator=coordinator, background=background,
    )  # fmt: skip
    assert ranks[victim].wait() == -9
    for rank in (r for i, r in enumerate(ranks) if i != victim):
        assert rank.wait() == 0, rank.out.read_text()[-3000:]
        first = rank.fact("first")
        assert first["raised"] == "CheckpointException", first
        assert first["seconds"] < TIMEOUT_S + 10, first
        if background:
            continue
        ((_, text, code),) = first["failures"].values()
        assert code in ("COMM", "TIMEOUT") and "make a new process group" in text, first
        second = rank.fact("second")
        assert second["raised"] == "CheckpointException" and second["seconds"] < 2, second
        assert "group" in str(second["failures"]), second
    assert loaded_version(path, size, numel) == 1
    jobs.run("overwrite", size, dir=str(path), version=3, numel=numel)
    assert loaded_version(path, size, numel) == 3
    check_no_junk(path)


def test_readers_see_whole_versions_while_ranks_overwrite(jobs, tmp_path):
    path, stop = tmp_path / "checkpoint", tmp_path / "stop"
    jobs.run("overwrite", 2, dir=str(path), version=0, numel=LARGE // 8)
    writers = jobs.start("overwrite_for_ever", 2, dir=str(path), version=1, numel=LARGE // 8)
    readers = jobs.start(
        "read_for_ever", 1, alone=True, dir=str(path), ranks=2, numel=LARGE // 8, stop=str(stop)
    )
    until(lambda: all((w.fact("saved") or 0) > 50 for w in writers), "50 saves", *writers, *readers)
    stop.touch()
    for reader in readers:
        assert reader.wait() == 0, reader.out.read_text()[-3000:]
        assert reader.fact("loads") > 2
    for writer in writers:
        writer.kill()
        writer.wait()


# ---- SIGINT ----


def test_an_interrupt_while_writing_is_heard_by_all(jobs, tmp_path):
    path = tmp_path / "checkpoint"
    ranks = jobs.start("interrupted", 2, dir=str(path), numel=8 * LARGE, where="write", late_s=0)
    for rank in ranks:
        assert rank.wait() == 0, rank.out.read_text()[-3000:]
    first = [rank.fact("first") for rank in ranks]
    assert first[1]["raised"] == "KeyboardInterrupt", first
    assert first[0]["raised"] == "CheckpointException", first
    assert first[0]["failures"]["1"][0] == "KeyboardInterrupt", first
    assert all(f["seconds"] < 15 for f in first), first
    loaded_version(path, 2, 8 * LARGE)


@pytest.mark.parametrize("late_s", [1.5, 13])
def test_an_interrupt_while_waiting_for_a_rank_ends_the_wait(jobs, tmp_path, late_s):
    """A rank that is a little late is waited for; one that does not come is left after 10 s."""
    path = tmp_path / "checkpoint"
    ranks = jobs.start(
        "interrupted", 2, dir=str(path), numel=SMALL, where="collective", late_s=late_s
    )
    for rank in ranks:
        assert rank.wait() == 0, rank.out.read_text()[-3000:]
    first = [rank.fact("first") for rank in ranks]
    assert first[1]["raised"] == "KeyboardInterrupt", first
    assert first[1]["seconds"] < 15, first
    assert first[0]["raised"] == "CheckpointException", first
    assert loaded_version(path, 2, SMALL) == 1


# ---- exit and fork ----


@pytest.mark.parametrize("destroy", [False, True])
def test_a_save_in_flight_outlives_the_script(jobs, tmp_path, destroy):
    path = tmp_path / "checkpoint"
    jobs.run("exit_in_flight", 2, dir=str(path), version=4, numel=LARGE, destroy=destroy)
    assert loaded_version(path, 2, LARGE) == 4
    check_no_junk(path)


@pytest.mark.parametrize("child_saves", [False, True])
def test_a_forked_child_leaves_the_save_to_its_parent(jobs, tmp_path, child_saves):
    path = tmp_path / "checkpoint"
    for version in (1, 2):  # the second time there is a save behind the fork, too
        ranks = jobs.run(
            "fork_in_flight", 2, dir=str(path), version=version, numel=LARGE,
            child_saves=child_saves,
        )  # fmt: skip
        assert [rank.fact("child") for rank in ranks] == [0, 0], ranks[0].out.read_text()
        assert loaded_version(path, 2, LARGE) == version
        check_no_junk(path)
    for rank in range(2) if child_saves else ():
        assert loaded_version(Path(f"{path}-child{rank}"), 1, LARGE) == 9


# ---- others in the directory ----


def test_two_jobs_in_one_directory_never_mix(jobs, tmp_path):
    path, rounds = tmp_path / "checkpoint", 60
    ranks = [
        jobs.start("compete", 1, alone=True, dir=str(path), numel=SMALL, rounds=rounds, base=base)[
            0
        ]
        for base in (1000, 2000)
    ]
    committed = set()
    while not all(Path(f"{r.out}.status").exists() for r in ranks):
        if (path / ".metadata").exists():
            state = blank(1, SMALL)
            dcp.load(state, checkpoint_id=path, no_dist=True)
            version_of(state, 1, SMALL)
    for rank in ranks:
        assert rank.wait() == 0, rank.out.read_text()[-3000:]
        assert len(rank.fact("committed")) + rank.fact("superseded") == rounds
        committed |= set(rank.fact("committed"))
    assert loaded_version(path, 1, SMALL) in committed
    jobs.run("overwrite", 1, alone=True, dir=str(path), version=1, numel=SMALL)
