"""Storage that refuses: full, read-only, forbidden, gone, out of inodes, descriptors or file size.

Each time all ranks raise the same error, which names rank, place and remedy; the previous
checkpoint loads whole in dcp_native and in stock torch, nothing of the failed save is left, and the
next save works as soon as the cause is gone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from test_kill import SMALL, Rank, check_no_junk, jobs, loaded_version

import dcp_native as dcp

__all__ = ["jobs"]

pytestmark = pytest.mark.filterwarnings("ignore")

MIB = 1 << 18
"""Elements of a MiB of int32."""


def mount(path: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"mounting a file system is not permitted here: {error}")


@pytest.fixture
def disk(tmp_path):
    """A file system of 20 MiB and 16 names, of which the root takes one."""
    path = tmp_path / "disk"
    path.mkdir()
    mount(path, "size=20m,nr_inodes=16")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True, timeout=10)


@pytest.fixture
def open_place():
    """A directory that every user may enter."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def told(ranks: list[Rank], step: str, culprits: set[int], kind: str, *texts: str) -> None:
    """Every rank raised the same, and it says what is expected."""
    facts = [rank.fact("first") for rank in ranks]
    for fact in facts:
        assert fact["raised"] == "CheckpointException" and fact["step"] == step, fact
        assert fact["failures"] == facts[0]["failures"], facts
        assert {int(r) for r in fact["failures"]} == culprits, fact
        for name, text, _ in fact["failures"].values():
            assert name == kind, fact
            for part in texts:
                assert part in text, fact


def next_save_works(jobs, path: Path, numel: int = SMALL) -> None:
    jobs.run("overwrite", 2, dir=str(path), version=9, numel=numel)
    assert loaded_version(path, 2, numel) == 9
    check_no_junk(path)


def test_ranks_that_do_not_fit_together_are_told_before_they_write(jobs, disk):
    path = disk / "checkpoint"
    ranks = jobs.run("hurt_save", 2, dir=str(path), version=2, good=4 * MIB, numel=8 * MIB, kind="")
    told(
        ranks, "plan", {0}, "OSError", "not enough space", "2 ranks", "previous checkpoint is kept"
    )
    assert loaded_version(path, 2, 4 * MIB) == 1
    check_no_junk(path)
    next_save_works(jobs, path, 4 * MIB)


def test_a_disk_that_fills_while_it_is_written_costs_the_new_save_only(jobs, disk):
    path = disk / "checkpoint"
    ranks = jobs.run(
        "hurt_save",
        2,
        dir=str(path),
        version=2,
        good=4 * MIB,
        numel=4 * MIB,
        kind="disk filled",
        ranks=[0],
    )
    for rank in ranks:
        fact = rank.fact("first")
        assert fact["raised"] == "CheckpointException" and fact["step"] == "write", fact
        assert fact["failures"], fact
        for name, text, _ in fact["failures"].values():
            assert name == "OSError" and "No space left" in text and "free some space" in text, fact
    assert loaded_version(path, 2, 4 * MIB) == 1
    check_no_junk(path)
    next_save_works(jobs, path, 4 * MIB)


def test_a_disk_without_inodes_says_so(jobs, disk):
    path = disk / "checkpoint"
    jobs.run("overwrite", 2, dir=str(path), version=1, numel=SMALL)  # 5 names, the directory one
    for i in range(9):
        (disk / f"other{i}").touch()
    ranks = jobs.run("hurt_save", 2, dir=str(path), version=2, numel=SMALL, kind="")
    facts = [rank.fact("first") for rank in ranks]
    assert facts[0]["failures"] == facts[1]["failures"], facts
    for _, text, _ in facts[0]["failures"].values():
        assert "No space left" in text and "df -i" in text, facts
    assert loaded_version(path, 2, SMALL) == 1
    check_no_junk(path)
    (disk / "other0").unlink()
    (disk / "other1").unlink()
    (disk / "other2").unlink()
    next_save_works(jobs, path)


def test_a_file_system_that_became_read_only_says_so(jobs, disk):
    path = disk / "checkpoint"
    jobs.run("overwrite", 2, dir=str(path), version=1, numel=SMALL)
    remount = ["mount", "-o", "remount,ro", str(disk)]
    subprocess.run(remount, check=True, timeout=10)
    ranks = jobs.run("hurt_save", 2, dir=str(path), version=2, numel=SMALL, kind="")
    told(ranks, "plan", {0}, "OSError", "Read-only file system", "mount it for writing", str(path))
    assert loaded_version(path, 2, SMALL) == 1
    check_no_junk(path)
    subprocess.run([*remount[:2], "remount,rw", str(disk)], check=True, timeout=10)
    next_save_works(jobs, path)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_whose_user_may_not_write_there_says_so(jobs, open_place, culprit):
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    path = open_place / "checkpoint"
    jobs.run("overwrite", 2, dir=str(path), version=1, numel=SMALL)
    path.chmod(0o755)
    ranks = jobs.run(
        "hurt_save", 2, dir=str(path), version=2, numel=SMALL, kind="user", ranks=[culprit]
    )
    step = "plan" if culprit == 0 else "write"
    told(
        ranks,
        step,
        {culprit},
        "PermissionError",
        "Permission denied",
        "check owner and mode",
        str(path),
    )
    assert loaded_version(path, 2, SMALL) == 1
    check_no_junk(path)
    next_save_works(jobs, path)


def test_a_file_in_the_place_of_the_directory_says_so(jobs, tmp_path):
    path = tmp_path / "checkpoint"
    path.write_text("not a directory")
    ranks = jobs.run("hurt_save", 2, dir=str(path), version=2, numel=SMALL, kind="")
    told(ranks, "plan", {0, 1}, "NotADirectoryError", "is a file", str(path))
    assert path.read_text() == "not a directory"
    path.unlink()
    next_save_works(jobs, path)


def test_a_directory_removed_while_it_is_written_says_so(jobs, tmp_path):
    path = tmp_path / "checkpoint"
    ranks = jobs.run(
        "hurt_save",
        2,
        dir=str(path),
        version=2,
        good=SMALL,
        numel=SMALL,
        kind="directory removed",
        ranks=[0],
    )
    for rank in ranks:
        fact = rank.fact("first")
        assert fact["raised"] == "CheckpointException", fact
        assert {code for _, _, code in fact["failures"].values()} == {"REMOVED"}, fact
    assert not path.exists()
    next_save_works(jobs, path)


def test_leftovers_are_never_cleared_through_a_link_or_waited_for(tmp_path):
    state = {"w": torch.arange(1000)}
    dcp.save(state, checkpoint_id=tmp_path / "whole")
    (data,) = (tmp_path / "whole").glob("*.distcp")
    before = data.read_bytes()
    there = tmp_path / "there"
    there.mkdir()
    (there / "__0_7.distcp").symlink_to(data)
    os.mkfifo(there / "__0_8.distcp")
    dcp.save(state, checkpoint_id=there)
    assert data.read_bytes() == before
    for path in (tmp_path / "whole", there):
        target = {"w": torch.zeros(1000, dtype=torch.int64)}
        dcp.load(target, checkpoint_id=path)
        assert torch.equal(target["w"], state["w"])


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("small files", ("File too large", "ulimit -f")),
        ("few files", ("Too many open files", "ulimit -n")),
    ],
)
def test_a_limit_of_one_process_costs_the_new_save_only(jobs, tmp_path, kind, texts):
    path = tmp_path / "checkpoint"
    ranks = jobs.run(
        "hurt_save", 2, dir=str(path), version=2, good=MIB, numel=MIB, kind=kind, ranks=[1]
    )
    step = "write" if kind == "small files" else "plan"
    told(ranks, step, {1}, "OSError", *texts)
    assert all(rank.fact("ignores_sigxfsz") for rank in ranks), "SIGXFSZ would end the trainer"
    assert loaded_version(path, 2, MIB) == 1
    check_no_junk(path)
    next_save_works(jobs, path)


def test_a_small_disk_of_one_node_costs_the_new_save_only(jobs, disk):
    """Rank 1 has a file system of its own at the path of the checkpoint."""
    path = disk / "checkpoint"
    ranks = jobs.run(
        "hurt_save", 2, dir=str(path), version=2, good=MIB, numel=MIB, kind="own disk", ranks=[1]
    )
    told(ranks, "write", {1}, "OSError", "not enough space", "this rank writes")
    assert loaded_version(path, 2, MIB) == 1
    check_no_junk(path)
    next_save_works(jobs, path)
