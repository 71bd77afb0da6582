"""survive_trainer: writer processes whose trainers die finish the save, or leave the one before.

Real processes over gloo: forked ranks where nobody watches over them (test_kill.py), torchrun where
its agent does.  After whatever happens: one version, bit for bit, in dcp_native and in stock torch;
no claim, no file that nobody names, no process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from survive_job import ends
from test_kill import DEADLINE_S, KILL, Jobs, Rank, check_no_junk, loaded_version, until

pytestmark = pytest.mark.filterwarnings("ignore")

NUMEL = 3 << 20  # 12 MiB per rank: two requests


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("jobs"), "survive_job.py")
    yield jobs
    jobs.forker.stdin.close()
    assert jobs.forker.wait(timeout=DEADLINE_S) == 0


def fly(jobs: Jobs, path: Path, **args) -> tuple[list[Rank], list[int]]:
    """Two ranks that have saved version 1 and are writing version 2; their writer processes."""
    ranks = jobs.start("in_flight", 2, dir=str(path), numel=NUMEL, **args)
    until(lambda: all(rank.fact("flying") for rank in ranks), "a save in flight", *ranks)
    return ranks, [rank.fact("writer") for rank in ranks]


def kill(*ranks: Rank) -> None:
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        assert rank.wait() == -9, rank.out.read_text()[-3000:]


def await_ends(writers: list[int]) -> None:
    until(lambda: all(map(ends, writers)), "the end of the writer processes")


def check(path: Path, version: int) -> None:
    assert loaded_version(path, 2, NUMEL) == version
    check_no_junk(path)


def save_on_top(jobs: Jobs, path: Path, **args) -> list[Rank]:
    """A new job saves version 3."""
    ranks = jobs.run("save_again", 2, dir=str(path), numel=NUMEL, **{"writers": [], **args})
    check(path, 3)
    return ranks


# ---- nobody watches over the ranks ----


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_save_whose_trainers_all_die_is_committed(jobs, tmp_path, order):
    ranks, writers = fly(jobs, tmp_path / "c")
    kill(*(ranks[i] for i in order))
    assert not any(map(ends, writers)), "too fast to prove anything"
    await_ends(writers)
    check(tmp_path / "c", 2)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_trainer_that_dies_alone_costs_no_more_than_its_save(jobs, tmp_path, victim):
    """The coordinator's process commits for it, which the other sees at the deadline; a coordinator
    that lives waits for the word of all and gives the save up."""
    ranks, writers = fly(jobs, tmp_path / "c", timeout_s=5)
    kill(ranks[victim])
    other = ranks[1 - victim]
    assert other.wait() == 0, other.out.read_text()[-3000:]
    second = other.fact("second")
    assert second["raised"] == (None if victim == 0 else "CheckpointException"), second
    await_ends(writers)
    if victim == 0:
        check(tmp_path / "c", 2)
    else:
        assert loaded_version(tmp_path / "c", 2, NUMEL) == 1
        save_on_top(jobs, tmp_path / "c")


def test_without_it_the_save_before_is_kept_and_the_next_one_sweeps(jobs, tmp_path):
    ranks, writers = fly(jobs, tmp_path / "c", survive=False)
    kill(*ranks)
    await_ends(writers)
    assert loaded_version(tmp_path / "c", 2, NUMEL) == 1
    save_on_top(jobs, tmp_path / "c", survive=False)


@pytest.mark.parametrize("raises", [False, True])
def test_a_script_that_ends_leaves_no_orphan(jobs, tmp_path, raises):
    ranks = jobs.start("exits", 2, dir=str(tmp_path / "c"), numel=NUMEL, raises=raises)
    assert [rank.wait() for rank in ranks] == [int(raises)] * 2, ranks[0].out.read_text()[-3000:]
    check(tmp_path / "c", 2)  # by then, and not by somebody who goes on
    await_ends([rank.fact("writer") for rank in ranks])


# ---- a new job in the same directory ----


def test_a_new_job_waits_for_the_orphans_of_the_old_one(jobs, tmp_path):
    ranks, writers = fly(jobs, tmp_path / "c", seconds=4)
    kill(*ranks)
    new = save_on_top(jobs, tmp_path / "c", writers=writers)
    assert set(new[0].fact("orphans")) == set(writers)
    assert new[0].fact("replaces") == 2
    await_ends(writers)


@pytest.mark.parametrize("stuck", [False, True])
def test_a_new_job_fences_orphans_that_take_too_long(jobs, tmp_path, stuck):
    ranks, writers = fly(jobs, tmp_path / "c", seconds=20)
    kill(*ranks)
    time.sleep(0.3)  # they have noticed
    if stuck:
        for pid in writers:
            os.kill(pid, signal.SIGSTOP)
    new = save_on_top(jobs, tmp_path / "c", writers=writers, orphan_wait_s=0.3)
    assert set(new[0].fact("orphans")) == set(writers)
    assert new[0].fact("replaces") == 1
    if stuck:
        assert not any(map(ends, writers))
        for pid in writers:
            os.kill(pid, signal.SIGCONT)
    await_ends(writers)
    check(tmp_path / "c", 3)


# ---- under torchrun ----


class Torchrun:
    """One job of two ranks."""

    def __init__(self, tmp: Path, scenario: str, **args) -> None:
        self.out = tmp / "rank"
        text = json.dumps({"out": str(self.out), **args})
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        with open(tmp / "agent", "w") as said:
            self.agent = subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1",
                    str(KILL / "survive_job.py"), scenario, text,
                ],
                stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        self.said = tmp / "agent"

    def ranks(self, attempt: int) -> list[Rank]:
        return [Rank(0, Path(f"{self.out}-{attempt}-{rank}")) for rank in range(2)]

    def facts(self, name: str, attempt: int = 0) -> list:
        return [rank.fact(name) for rank in self.ranks(attempt)]

    def wait(self) -> None:
        try:
            code = self.agent.wait(timeout=DEADLINE_S)
        finally:
            self.agent.terminate()  # with its ranks
        assert code == 0, self.said.read_text()[-5000:]


def test_a_restarted_job_goes_on_from_the_checkpoint_that_survived(tmp_path):
    """Rank 1 dies, the agent ends rank 0 and starts both anew."""
    steps = tmp_path / "steps"
    job = Torchrun(tmp_path, "restarted_job", dir=str(steps), numel=NUMEL, victim=1, then="load")
    job.wait()
    assert job.facts("loaded", attempt=1) == [2, 2]
    await_ends(job.facts("writer"))
    check(steps / "step-2", 2)


def test_a_restarted_job_saves_where_its_orphans_still_write(tmp_path):
    """The coordinator dies, the agent ends rank 1 and starts both anew."""
    steps = tmp_path / "steps"
    job = Torchrun(
        tmp_path, "restarted_job", dir=str(steps), numel=NUMEL, victim=0, then="save", seconds=12
    )
    job.wait()
    assert job.facts("replaces", attempt=1)[0] == 2
    await_ends(job.facts("writer"))
    check(steps / "step-2", 3)


@pytest.mark.parametrize("ranks_die", [False, True])
def test_the_end_of_the_agent_loses_no_checkpoint(jobs, tmp_path, ranks_die):
    """The store goes with it: ranks that live hear that, those that die leave the save to their
    writer processes."""
    path = tmp_path / "c"
    job = Torchrun(tmp_path, "in_flight", dir=str(path), numel=NUMEL, timeout_s=20)
    ranks = job.ranks(0)
    until(lambda: all(job.facts("flying")), "a save in flight", *ranks)
    pids, writers = job.facts("pid"), job.facts("writer")
    job.agent.kill()
    for pid in pids if ranks_die else ():  # before they hear of it, and give the save up
        os.kill(pid, signal.SIGKILL)
    job.agent.wait(timeout=DEADLINE_S)
    until(lambda: all(map(ends, pids + writers)), "the end of all processes", *ranks)
    second = job.facts("second")
    if ranks_die:
        assert second == [None, None]
        check(path, 2)
    else:
        assert {s["raised"] for s in second} == {"CheckpointException"}, second
        assert loaded_version(path, 2, NUMEL) == 1
        save_on_top(jobs, path)
