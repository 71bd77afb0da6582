"""verify as a command: what it finds is named, counted and in the exit status."""

from __future__ import annotations

import os
import shutil

import cli
import pytest
import torch

import dcp_native as dcp


@pytest.fixture
def path(tmp_path):
    return cli.save(tmp_path / "step-1", {"w": torch.arange(5000.0), "v": torch.ones(3000)})


def test_a_changed_byte_is_named_with_tensor_file_and_offset(path):
    data = path / "__0_0.distcp"
    at = data.read_bytes().index(torch.arange(5000.0).numpy().tobytes())
    cli.flip(data, at + 7777)
    done = cli.run("verify", path)
    assert done.status == 1 and "1 problem" in done.out
    assert "w  " in done.out and "__0_0.distcp" in done.out and "CHECKSUM" in done.out
    found = cli.run("verify", path, "--json").json
    assert not found["ok"] and found["problems"][0]["tensor"] == "w"
    (record,) = cli.run("inspect", path, "w", "--json").json["entries"][0]["records"]
    begin, end = record["offset_bytes"], record["offset_bytes"] + record["length_bytes"]
    assert begin <= found["problems"][0]["offset_bytes"] < end
    assert cli.run("verify", path, "--quick").status == 0


@pytest.mark.parametrize("quick", [(), ("--quick",)], ids=["full", "quick"])
def test_missing_and_short_files_are_found_at_every_level(path, quick):
    os.truncate(path / "__0_0.distcp", 9000)
    assert cli.run("verify", path, *quick).status == 1
    (path / "__0_0.distcp").unlink()
    done = cli.run("verify", path, *quick)
    assert done.status == 1 and "__0_0.distcp" in done.out
    assert cli.run("du", path).status == 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_find_what_one_finds(tmp_path, threads):
    values = {f"t{i}": torch.full((999,), float(i)) for i in range(12)}
    path = tmp_path / "many"
    writer = dcp.FileSystemWriter(path, thread_count=6)
    dcp.save(values, storage_writer=writer, no_dist=True)
    files = sorted(path.glob("*.distcp"))
    assert len(files) == 6
    for file in files[::2]:
        cli.flip(file, file.stat().st_size // 2)
    expected = dcp.verify(path)
    found = cli.run("verify", path, "--threads", threads, "--json").json
    assert found["problems_found"] == expected.problems_found > 0
    assert {(p["tensor"], p["file"], p["offset_bytes"]) for p in found["problems"]} == {
        (p.tensor, p.file, p.offset_bytes) for p in expected.problems
    }
    for name in ("tensors", "records", "files", "file_bytes", "checked_bytes"):
        assert found[name] == getattr(expected, name), name


def test_a_run_is_checked_checkpoint_by_checkpoint(path):
    for step in (2, 3):
        shutil.copytree(path, path.with_name(f"step-{step}"))
    (path.with_name("step-2") / "__0_0.distcp").unlink()
    done = cli.run("verify", path.parent)
    assert done.status == 1 and "3 checkpoints: 1 damaged" in done.out
    found = cli.run("verify", path.parent, "--json").json
    assert [one["ok"] for one in found] == [True, False, True]
    (path.with_name("step-2") / ".metadata").unlink()
    assert cli.run("verify", path.parent).status == 0


def test_several_checkpoints_are_checked_in_turn(tmp_path):
    names = [str(cli.save(tmp_path / name, {"w": torch.ones(3)})) for name in ("a", "b")]
    done = cli.run("verify", *names, tmp_path, "--json")
    assert [found["path"] for found in done.json] == [*names, *names] and done.status == 0
    next((tmp_path / "b").glob("*.distcp")).unlink()
    assert "2 checkpoints: 1 damaged" in cli.run("verify", *names).out
    assert cli.run("verify", names[0], tmp_path / "nowhere").status == 2


def test_lists_are_cut_and_counts_are_not(tmp_path):
    path = cli.save(tmp_path / "c", {f"t{i}": torch.ones(4) for i in range(30)})
    (path / "__0_0.distcp").unlink()
    found = cli.run("verify", path, "--most", 1, "--json").json
    assert len(found["problems"]) == 1 <= found["problems_found"]


def test_progress_counts_the_bytes_that_are_gone_through(path):
    from array import array

    from dcp_native._verify import verify_alone

    counters = [array("Q", [0]), array("Q", [0])]
    result = verify_alone(path, "full", 10, counters)
    assert sum(counter[0] for counter in counters) >= result.checked_bytes > 30_000


def test_a_counter_of_another_size_is_refused(path):
    from array import array

    from dcp_native import _native

    for counter in (array("Q", [0, 0]), array("I", [0]), bytes(8)):
        with pytest.raises((ValueError, TypeError, BufferError)):
            _native.verify_checkpoint(path, progress=counter)
