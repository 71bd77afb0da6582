"""latest and prune: which checkpoints there are, what goes, and what a crash in between leaves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import cli
import pytest
import torch

import dcp_native as dcp
from dcp_native._cli import prune
from dcp_native._cli.steps import steps_in


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return cli.save(tmp_path_factory.mktemp("one") / "c", {"w": torch.ones(64), "n": 1})


@pytest.fixture
def make(one, tmp_path):
    """Checkpoints by name below a directory of the test's own."""

    def make(*names):
        for i, name in enumerate(names):
            path = tmp_path / "runs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(one, path)
            os.utime(path / ".metadata", (1000 + i, 1000 + i))
        return tmp_path / "runs"

    return make


def left(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def removed(parent, *options):
    """Names that a dry run says would go; what --delete does is the same."""
    said = cli.run("prune", parent, *options, "--json")
    before = left(parent)
    done = cli.run("prune", parent, *options, "--json", "--delete")
    assert said.status == done.status == 0, (said, done)
    goes = [Path(c["path"]).name for c in said.json["checkpoints"] if c["action"] == "remove"]
    gone = [Path(c["path"]).name for c in done.json["checkpoints"] if c["action"] == "removed"]
    assert goes == gone and sorted(set(before) - set(left(parent))) == sorted(gone)
    return gone


@pytest.mark.parametrize(
    ("names", "newest", "step"),
    [
        (["step-90", "step-1000", "step-200"], "step-1000", 1000),
        (["epoch=0-step=300.ckpt", "epoch=1-step=10.ckpt"], "epoch=1-step=10.ckpt", 10),
        (["checkpoint_9", "checkpoint_10"], "checkpoint_10", 10),
        (["iter_0000100", "iter_0000020"], "iter_0000100", 100),
        (["first", "second"], "second", None),
    ],
)
def test_names_of_trainers_are_understood(make, names, newest, step):
    parent = make(*names)
    assert cli.run("latest", parent).out == f"{parent / newest}\n"
    assert cli.run("latest", parent, "--json").json["step"] == step
    assert dcp.find_latest(parent) == parent / newest


def test_a_checkpoint_in_parts_is_one(make):
    """As accelerate lays it out: the model and the optimizer, each a checkpoint."""
    parent = make(*(f"checkpoint_{i}/{part}_0" for i in (1, 2) for part in ("model", "optimizer")))
    assert [step.number for step in steps_in(parent)] == [2, 1]
    (parent / "checkpoint_2" / "optimizer_0" / ".metadata").unlink()
    assert [step.number for step in steps_in(parent)] == [1]
    assert cli.run("latest", parent).out == f"{parent / 'checkpoint_1'}\n"


def test_latest_skips_what_is_damaged_and_says_so(make):
    parent = make("step-1", "step-2", "step-3")
    os.truncate(parent / "step-3" / "__0_0.distcp", 10)
    (parent / "step-2" / ".metadata").unlink()
    done = cli.run("latest", parent)
    assert done.out == f"{parent / 'step-1'}\n" and "step-3" in done.err
    assert f"skipping {parent / 'step-2'}: no metadata" in done.err


def test_latest_names_only_what_is_newer_than_its_answer(make):
    parent = make("step-1", "step-2", "step-3")
    for name in ("step-1", "step-3"):
        (parent / name / ".metadata").unlink()
    (parent / "step-4").mkdir()  # of no save
    found = cli.run("latest", parent, "--json").json
    assert found["path"] == str(parent / "step-2")
    assert [Path(skipped["path"]).name for skipped in found["skipped"]] == ["step-3"]
    shutil.rmtree(parent / "step-2")
    done = cli.run("latest", parent)
    assert done.status == 1 and len(done.err.splitlines()) == 3  # both, and that there is none


def test_a_checkpoint_in_place_of_the_directory_that_it_is_in_is_told(make):
    path = make("step-1") / "step-1"
    done = cli.run("latest", path)
    assert done.status == 1 and "is a checkpoint itself" in done.err
    assert "is a checkpoint itself" in cli.run("prune", path, "--keep-last", 1).out


def test_latest_is_not_a_step_that_lacks_a_part(make):
    names = [f"checkpoint_{i}/{part}" for i in (1, 2) for part in ("model", "optimizer")]
    parent = make(*names, "checkpoint_3/model")
    done = cli.run("latest", parent)
    assert done.out == f"{parent / 'checkpoint_2'}\n"
    assert "checkpoint_3: it has no optimizer" in done.err
    (parent / "checkpoint_2" / "optimizer" / "__0_0.distcp").unlink()
    done = cli.run("latest", parent)
    assert done.out == f"{parent / 'checkpoint_1'}\n"
    assert "checkpoint_2" in done.err and "__0_0.distcp" in done.err
    shutil.copytree(parent / "checkpoint_1" / "optimizer", parent / "checkpoint_3" / "optimizer")
    assert cli.run("latest", parent).out == f"{parent / 'checkpoint_3'}\n"


def test_bytes_are_looked_at_when_asked_for(make):
    parent = make("step-1", "step-2")
    data = parent / "step-2" / "__0_0.distcp"
    at = data.read_bytes().index(torch.ones(64).numpy().tobytes())
    cli.flip(data, at + 10)
    assert cli.run("latest", parent).out.endswith("step-2\n")
    assert cli.run("latest", parent, "--verify", "full").out.endswith("step-1\n")


def test_the_newest_stay_and_every_nth(make):
    steps = [f"step-{n}" for n in range(100, 1100, 100)]
    parent = make(*steps)
    gone = removed(parent, "--keep-last", 2, "--keep-every", 400)
    assert gone == [f"step-{n}" for n in (100, 200, 300, 500, 600, 700)]
    assert removed(parent, "--keep-every", 1000) == ["step-400", "step-800", "step-900"]
    assert removed(parent, "--keep-last", 1) == []


def test_nothing_goes_without_delete(make):
    parent = make("step-1", "step-2")
    before = sorted(map(str, parent.rglob("*")))
    done = cli.run("prune", parent, "--keep-last", 1)
    assert "would remove 1 checkpoint" in done.out and "--delete" in done.out
    assert sorted(map(str, parent.rglob("*"))) == before


def test_the_last_whole_one_stays_when_newer_ones_are_damaged(make):
    parent = make("step-1", "step-2", "step-3")
    os.truncate(parent / "step-3" / "__0_0.distcp", 10)
    assert removed(parent, "--keep-last", 1) == ["step-1"]
    assert left(parent) == ["step-2", "step-3"]


def test_saves_in_flight_links_and_strangers_are_left_alone(make):
    parent = make("step-1", "step-2", "step-3", "step-4", "other")
    claim = ".dcp_native-claim-1-" + "0" * 32
    (parent / "step-1" / claim).write_text("")
    (parent / "latest").symlink_to("step-2")
    (parent / "unfinished").mkdir()
    (parent / "unfinished" / "__0_0.distcp").write_text("data")
    (parent / "notes").mkdir()
    (parent / "notes" / "text").write_text("mine")
    gone = removed(parent, "--keep-last", 1, "--pattern", "step-*")
    assert gone == ["step-3"]
    stays = ["latest", "notes", "other", "step-1", "step-2", "step-4", "unfinished"]
    assert left(parent) == sorted(stays)
    assert (parent / "notes" / "text").read_text() == "mine"


def test_what_a_link_leads_into_is_kept_whole(make):
    names = [f"step-{i}/{part}" for i in (1, 2, 3) for part in ("model", "optimizer")]
    parent = make(*names)
    (parent / "best").symlink_to("step-1/model")
    assert removed(parent, "--keep-last", 1) == ["step-2"]
    assert (parent / "best" / ".metadata").exists()


def test_a_step_of_which_a_part_is_not_saved_yet_is_not_the_newest_whole_one(make):
    """accelerate saves the model first: a crash now must find the step before."""
    names = [f"checkpoint_{i}/{part}" for i in (1, 2) for part in ("model", "optimizer")]
    parent = make(*names, "checkpoint_3/model")
    assert removed(parent, "--keep-last", 1) == ["checkpoint_1"]
    begun = parent / "checkpoint_3" / "optimizer"
    begun.mkdir()
    (begun / (".dcp_native-claim-0-" + "0" * 32)).write_text("")
    assert removed(parent, "--keep-last", 1) == []
    assert left(parent) == ["checkpoint_2", "checkpoint_3"]


@pytest.mark.parametrize("by", ["claim", "commit"])
def test_a_save_that_begins_meanwhile_keeps_what_it_saves_into(make, monkeypatch, by):
    parent = make("a", "b", "c")

    def begin(path):
        if path.name == "a":
            if by == "claim":
                (path / (".dcp_native-claim-5-" + "0" * 32)).write_text("")
            else:
                os.utime(path / ".metadata", (9000, 9000))
        return 1

    monkeypatch.setattr(prune, "_size", begin)  # is asked behind the plan
    done = cli.run("prune", parent, "--keep-last", 1, "--delete", "--json")
    actions = {Path(c["path"]).name: c["action"] for c in done.json["checkpoints"]}
    assert actions == {"a": "keep", "b": "removed", "c": "keep"}
    assert left(parent) == ["a", "c"] and (parent / "a" / ".metadata").exists()


def test_files_that_no_save_made_stay_unless_the_directory_is_asked_for(make):
    parent = make("step-1", "step-2", "step-3")
    for step in ("step-1", "step-2"):
        (parent / step / "meta.pt").write_text("of a trainer")
        (parent / step / "logs").mkdir()
        (parent / step / "logs" / "log").write_text("text")
    said = cli.run("prune", parent, "--keep-last", 2)
    assert "leaves 2 files that no save made" in said.out
    assert cli.run("prune", parent, "--keep-last", 2, "--delete").status == 0
    assert sorted(p.name for p in (parent / "step-1").iterdir()) == ["logs", "meta.pt"]
    assert cli.run("latest", parent).out.endswith("step-3\n")
    assert removed(parent, "--keep-last", 1, "--whole-directory") == ["step-2"]


def whole_or_nothing(parent: Path) -> None:
    """Every checkpoint that is to be seen is one."""
    for step in steps_in(parent):
        assert all(dcp.verify(part, level="structure") for part in step.parts), step


@pytest.mark.parametrize("kind", ["whole", "ranks", "both", "parts"])
def test_a_crash_at_any_call_leaves_whole_checkpoints_or_none(make, monkeypatch, kind):
    names = ["step-1", "step-2"]
    if kind == "parts":
        names = [f"{name}/{part}" for name in names for part in ("model", "optimizer")]
    pristine = make(*names)
    for step in names:
        path = pristine / step
        if kind in ("ranks", "both"):
            image = (path / ".metadata").read_bytes()
            for rank in (0, 1):
                (path / f"__{rank}.metadata").write_bytes(image)
        if kind == "ranks":
            (path / ".metadata").unlink()

    class Crash(BaseException):
        pass

    def crashes_after(calls):
        """Whether removing is done before its n-th call that changes the disk."""
        parent = pristine.parent / f"crash-{calls}"
        shutil.copytree(pristine, parent)
        done = 0

        def counted(function):
            def call(*args, **kwargs):
                nonlocal done
                if done == calls:
                    raise Crash
                done += 1
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("unlink", "rmdir"):
                patch.setattr(prune.os, name, counted(getattr(os, name)))
            try:
                prune.remove(steps_in(parent)[-1], False)
                crashed = False
            except Crash:
                crashed = True
        whole_or_nothing(parent)
        assert cli.run("latest", parent).out.endswith("step-2\n")
        assert cli.run("prune", parent, "--keep-last", 1, "--delete").status == 0
        shutil.rmtree(parent)
        return not crashed

    calls = 0
    while not crashes_after(calls):
        calls += 1
    assert calls >= 3


def test_metadata_goes_first_and_is_synced_before_data_goes(make, monkeypatch):
    parent = make("step-1", "step-2")
    calls = []
    for name in ("unlink", "fsync"):
        real = getattr(os, name)

        def call(what, *args, name=name, real=real, **kwargs):
            calls.append((name, os.path.basename(what) if isinstance(what, (str, Path)) else ""))
            return real(what, *args, **kwargs)

        monkeypatch.setattr(prune.os, name, call)
    prune.remove(steps_in(parent)[-1], False)
    assert calls[:3] == [("unlink", ".metadata"), ("fsync", ""), ("unlink", "__0_0.distcp")]


def test_what_can_not_be_removed_is_reported(make, monkeypatch):
    parent = make("step-1", "step-2")

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(prune.os, "unlink", refuse)
    done = cli.run("prune", parent, "--keep-last", 1, "--delete")
    assert done.status == 1 and "Permission denied" in done.out
    assert left(parent) == ["step-1", "step-2"]
