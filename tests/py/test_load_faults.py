"""Loads that are interrupted, killed or forked: everybody knows soon, and the next load works."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_kill import DEADLINE_S, KILL, LARGE, SMALL, TIMEOUT_S, Jobs

import dcp_native as dcp

pytestmark = pytest.mark.filterwarnings("ignore")


class LoadJobs(Jobs):
    """Jobs that know the scenarios of kill/load_job.py."""

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.count = tmp, 0
        self.forker = subprocess.Popen(
            [sys.executable, str(KILL / "load_job.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(dcp.__file__).resolve().parents[1])},
        )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = LoadJobs(tmp_path_factory.mktemp("jobs"))
    yield jobs
    jobs.forker.stdin.close()
    assert jobs.forker.wait(timeout=DEADLINE_S) == 0


@pytest.mark.parametrize(("size", "victim"), [(1, 0), (2, 1), (2, 0)])
def test_an_interrupt_ends_a_load_at_once_and_the_others_are_told(jobs, tmp_path, size, victim):
    ranks = jobs.run(
        "interrupt_a_load", size, dir=str(tmp_path / "c"), numel=4 * LARGE, victim=victim, save=True
    )
    assert all(rank.fact("version") == 1 for rank in ranks)
    assert sum(rank.fact("hits") for rank in ranks) > 0, "no interrupt met a load"
    for round_ in range(6):
        results = [rank.fact(f"round{round_}") for rank in ranks]
        assert all(r["seconds"] < 15 for r in results), results
        hit = results[victim]["raised"]
        assert hit in (None, "KeyboardInterrupt"), results
        for other in (r for i, r in enumerate(results) if i != victim):
            # The last agreement may have come before the signal.
            assert other["raised"] in ((None,) if hit is None else (None, "CheckpointException"))
            if other["raised"] is not None:
                assert other["failures"][str(victim)][0] == "KeyboardInterrupt", results


@pytest.mark.parametrize("delay_s", [0.01, 0.1])
def test_survivors_of_a_rank_killed_in_a_load_know_within_the_timeout(jobs, tmp_path, delay_s):
    ranks = jobs.start(
        "die_in_a_load", 3, dir=str(tmp_path / "c"), numel=2 * LARGE, victim=1, delay_s=delay_s
    )
    assert ranks[1].wait() == -9
    for rank in (ranks[0], ranks[2]):
        assert rank.wait() == 0, rank.out.read_text()[-3000:]
        first, second = rank.fact("first"), rank.fact("second")
        assert first["raised"] == "CheckpointException" and first["failures"], first
        assert first["seconds"] < TIMEOUT_S + 10, first
        assert all(text for _, text, _ in first["failures"].values()), first
        assert second["raised"] == "CheckpointException" and second["seconds"] < 2, second


@pytest.mark.parametrize("numel", [SMALL, LARGE])
def test_forked_children_load_beside_their_parent(jobs, tmp_path, numel):
    (rank,) = jobs.start("load_in_children", 1, alone=True, dir=str(tmp_path / "c"), numel=numel)
    said = tmp_path / "c-child"
    assert rank.wait() == 0, rank.out.read_text()[-3000:]
    assert rank.fact("children") == [0, 0], said.read_text() if said.exists() else "killed"
