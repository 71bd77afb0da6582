"""verify: real directories, damaged in real ways; what it says of them, and that it only looks."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import struct
import sys
import threading
import time
import zlib

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from test_golden import CHECKPOINTS, Extra, rewrite
from torch.distributed.checkpoint.filesystem import _StorageInfo

import dcp_native as dcp
from dcp_native import VerifyProblem, _verify

pytestmark = pytest.mark.filterwarnings("ignore")


def state(seed=0):
    made = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "large": torch.randn(1500, 1000, generator=made),
            "small": torch.randn(7, 3, generator=made).t(),
            "half": torch.randn(30, generator=made).to(torch.bfloat16),
            "scalar": torch.tensor(1.0),
            "empty": torch.empty(0, 3),
        },
        "step": seed,
        "object": {"lr": 1e-3, "names": ["a", "b"]},
    }


def fingerprint(path):
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(path.iterdir())}


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def data_file(path):
    return max(path.glob("*.distcp"), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("level", ["complete", "structure", "full"])
@pytest.mark.parametrize("saver", [dcp, torch_dcp], ids=["ours", "torch"])
def test_an_intact_checkpoint_passes_and_stays_as_it_is(tmp_path, saver, level):
    saver.save(state(), checkpoint_id=tmp_path)
    before = fingerprint(tmp_path)
    result = dcp.verify(tmp_path, level=level)
    assert result and result.ok and result.problems == () and result.problems_found == 0
    assert fingerprint(tmp_path) == before
    assert result.native == (saver is dcp)
    assert (result.save_id is not None) == (saver is dcp)
    assert (result.tensors, result.files, result.ranks) == (5, 1, ())
    assert result.objects == 3 and result.records == 8
    assert result.unverified_bytes == 0 and result.unreferenced_files == result.claims == 0
    assert (result.checked_bytes > 6_000_000) == (level == "full")
    assert result.wall_ns > 0 and "no problems" in str(result)


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_golden_checkpoints_pass(path):
    result = dcp.verify(path)
    assert result, result.problems
    assert result.checked_bytes > 0 and result.unverified_bytes == 0


@pytest.mark.parametrize("saver", [dcp, torch_dcp], ids=["ours", "torch"])
def test_a_flipped_bit_is_named_by_tensor_file_and_byte(tmp_path, saver):
    saver.save(state(), checkpoint_id=tmp_path)
    file = data_file(tmp_path)
    at = file.stat().st_size // 2
    flip(file, at)
    assert dcp.verify(tmp_path, level="structure")
    result = dcp.verify(tmp_path)
    assert not result and result.problems_found == 1
    (problem,) = result.problems
    assert isinstance(problem, VerifyProblem)
    assert (problem.tensor, problem.file, problem.code) == ("model.large", file.name, "CHECKSUM")
    assert problem.offset_bytes <= at
    assert "model.large" in str(problem) and file.name in str(result)


def test_problems_are_listed_up_to_a_number_and_all_counted(tmp_path):
    dcp.save({f"t{i}": torch.full((100,), float(i)) for i in range(20)}, checkpoint_id=tmp_path)
    file = data_file(tmp_path)
    data = bytearray(file.read_bytes())
    for i in range(1, 20):
        at = data.find(torch.full((100,), float(i)).numpy().tobytes())
        data[at] ^= 1
    file.write_bytes(data)
    result = dcp.verify(tmp_path, max_problems=4)
    assert len(result.problems) == 4 and result.problems_found == 19
    assert "18 more" in str(result)


def test_cut_missing_and_replaced_files(tmp_path):
    dcp.save(state(), checkpoint_id=tmp_path)
    file = data_file(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert "cut short" in dcp.verify(tmp_path, level="complete").problems[0].what
    file.write_bytes(b"")
    assert "0 of its 64 bytes" in dcp.verify(tmp_path, level="complete").problems[0].what
    file.unlink()
    problem = dcp.verify(tmp_path, level="complete").problems[0]
    assert problem.code == "NOENT" and "8 records of the checkpoint lie in it" in problem.what
    file.mkdir()
    assert "directory" in dcp.verify(tmp_path, level="complete").problems[0].what
    file.rmdir()
    os.mkfifo(file)
    assert "0 of its 64 bytes" in dcp.verify(tmp_path, level="complete").problems[0].what
    file.unlink()
    dcp.save(state(), checkpoint_id=tmp_path / "other")
    os.link(data_file(tmp_path / "other"), file)
    assert dcp.verify(tmp_path, level="complete").problems[0].code == "STALE"


def test_unreadable_files_are_problems(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    dcp.save(state(), checkpoint_id=tmp_path)
    data_file(tmp_path).chmod(0)
    assert dcp.verify(tmp_path).problems[0].code == "IO"


def test_no_checkpoint_is_a_problem_and_no_directory_an_error(tmp_path):
    problem = dcp.verify(tmp_path).problems[0]
    assert problem.file == ".metadata" and "no .metadata" in problem.what
    (tmp_path / ".dcp_native-claim-0-0123456789abcdef").write_text("")
    result = dcp.verify(tmp_path)
    assert "in flight" in result.problems[0].what and result.claims == 1
    with pytest.raises(FileNotFoundError):
        dcp.verify(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError):
        dcp.verify(tmp_path / ".dcp_native-claim-0-0123456789abcdef")


def test_leftovers_are_told_and_no_problem(tmp_path):
    dcp.save(state(), checkpoint_id=tmp_path)
    (tmp_path / "__5_77.distcp").write_bytes(b"x")
    (tmp_path / ".dcp_native-claim-78-0123456789abcdef").write_text("")
    result = dcp.verify(tmp_path)
    assert result and (result.unreferenced_files, result.claims) == (1, 1)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="URL"):
        dcp.verify("s3://bucket/step-1")
    with pytest.raises(ValueError, match="level"):
        dcp.verify(tmp_path, level="everything")
    with pytest.raises(ValueError, match="max_problems"):
        dcp.verify(tmp_path, max_problems=0)


def test_checkpoints_of_single_ranks(tmp_path):
    for saver in (dcp, torch_dcp):
        saver.save(state(), checkpoint_id=tmp_path / saver.__name__, use_collectives=False)
        result = dcp.verify(tmp_path / saver.__name__)
        assert result and result.ranks == (0,)
        flip(data_file(tmp_path / saver.__name__), 3_000_000)
        assert dcp.verify(tmp_path / saver.__name__).problems[0].tensor == "model.large"


def test_an_incremental_chain_passes_and_its_links_are_checked(tmp_path):
    dcp.configure(content_hash=True, incremental_links="hard")
    first, second = state(), state()
    second["model"]["small"] = second["model"]["small"] + 1
    dcp.save(first, checkpoint_id=tmp_path / "1")
    dcp.save(second, checkpoint_id=tmp_path / "2", base=tmp_path / "1")
    assert dcp.last_report()["linked_files"] == 1
    assert dcp.verify(tmp_path / "2")
    linked = data_file(tmp_path / "2")
    linked.chmod(0o600)
    flip(linked, linked.stat().st_size // 2)
    result = dcp.verify(tmp_path / "2")
    assert [p.tensor for p in result.problems] == ["model.large"]


def test_records_without_checksums_are_counted(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch_dcp.save(state(), checkpoint_id=tmp_path)
    finally:
        torch.serialization.set_crc32_options(before)
    result = dcp.verify(tmp_path)
    assert result and result.checked_bytes == 0
    assert result.unverified_records == 8 and result.unverified_bytes > 6_000_000


@pytest.mark.parametrize("allowed", [True, False])
def test_extra_attributes_of_metadata_do_not_matter(tmp_path, allowed):
    sys.modules.setdefault("test_golden", sys.modules[Extra.__module__])
    torch_dcp.save(state(), checkpoint_id=tmp_path)
    rewrite(tmp_path, lambda metadata: setattr(metadata, "mcore_data", Extra()))
    assert dcp.verify(tmp_path)
    flip(data_file(tmp_path), 3_000_000)
    dcp.configure(allow_unsafe_objects=allowed)
    assert dcp.verify(tmp_path).problems[0].code == "CHECKSUM"


@dataclasses.dataclass
class MarkedInfo(_StorageInfo):
    """What a storage writer of somebody else's might put into storage_data."""


def test_metadata_that_only_torch_reads_is_translated_or_refused(tmp_path):
    torch_dcp.save(state(), checkpoint_id=tmp_path)

    def change(metadata):
        for info in metadata.storage_data.values():
            info.__class__ = MarkedInfo

    rewrite(tmp_path, change)
    torch_dcp.load({"step": None}, checkpoint_id=tmp_path)
    assert dcp.verify(tmp_path)
    flip(data_file(tmp_path), 3_000_000)
    assert dcp.verify(tmp_path).problems[0].tensor == "model.large"
    dcp.configure(allow_unsafe_objects=False)
    (problem,) = dcp.verify(tmp_path).problems
    assert problem.code == "UNSUPPORTED" and "allow_unsafe_objects is off" in problem.what


def mark(file):
    metadata = pickle.loads(file.read_bytes())
    for info in metadata.storage_data.values():
        info.__class__ = MarkedInfo
    file.write_bytes(pickle.dumps(metadata))


def test_metadata_of_single_ranks_that_only_torch_reads_is_translated(tmp_path):
    for rank in range(3):
        part = tmp_path / f"part-{rank}"
        torch_dcp.save(state(rank), checkpoint_id=part, use_collectives=False)
        (part / "__0.metadata").rename(tmp_path / f"__{rank}.metadata")
        (part / "__0_0.distcp").rename(tmp_path / "__0_0.distcp")
    for rank in (0, 2):
        mark(tmp_path / f"__{rank}.metadata")
    result = dcp.verify(tmp_path, level="complete")
    assert result and result.ranks == (0, 1, 2), result.problems
    flip(tmp_path / "__0_0.distcp", 3_000_000)
    assert {p.tensor for p in dcp.verify(tmp_path).problems} == {"model.large"}


def test_metadata_that_is_gone_when_it_is_translated_is_looked_for_again(tmp_path, monkeypatch):
    torch_dcp.save(state(), checkpoint_id=tmp_path)
    mark(tmp_path / ".metadata")
    translate, hidden = _verify._translations, []

    def hides_it_once(path):
        if hidden:
            return translate(path)
        hidden.append((path / ".metadata").rename(path / "hidden"))
        try:
            return translate(path)
        finally:
            hidden[0].rename(path / ".metadata")

    monkeypatch.setattr(_verify, "_translations", hides_it_once)
    assert dcp.verify(tmp_path) and hidden


def test_what_ranks_found_is_merged_within_the_limit():
    def found(metadata_id, problems, hidden=0):
        part = _verify._unreadable("") | {"metadata_id": metadata_id, "problems": problems}
        return part | {"problems_found": len(problems) + hidden}

    problems = [("t", f"__{i}_0.distcp", 5, "damaged", "CHECKSUM") for i in range(6)]
    merged = _verify._merge([found("a", problems[:3]), found("a", problems[3:], 4)], 4)
    assert merged["problems"] == problems[:4] and merged["problems_found"] == 10
    merged = _verify._merge([found("a", problems[:3]), found("b", problems[3:], 4)], 4)
    assert [p[-1] for p in merged["problems"]] == ["STALE"] + 3 * ["CHECKSUM"]
    assert merged["problems_found"] == 11


def test_a_file_that_asks_for_a_huge_table_is_damaged(tmp_path):
    """A sparse file whose header, by its checksum intact, has a block table of 1 TiB."""
    dcp.save({"w": torch.ones(100)}, checkpoint_id=tmp_path)
    file = data_file(tmp_path)
    header = bytearray(file.read_bytes()[:64])
    length = (1 << 40) + (1 << 20)
    header[40:64] = struct.pack("<QQQ", length, 1 << 20, 1 << 40)
    header[8:12] = struct.pack("<I", zlib.crc32(header[12:], zlib.crc32(header[:8])))
    with open(file, "r+b") as out:
        out.write(header)
        out.truncate(length)
    for level in ("complete", "full"):
        (problem,) = dcp.verify(tmp_path, level=level).problems
        assert problem.code == "CORRUPT" and "longer than its records allow" in problem.what
    with pytest.raises(torch_dcp.api.CheckpointException, match="longer than its records allow"):
        dcp.load({"w": torch.zeros(100)}, checkpoint_id=tmp_path)


def test_chunks_that_leave_a_hole_are_named(tmp_path):
    """As if ranks 0 and 1 had saved rows 0-2 and 2-4, and those of rank 1 were forgotten."""
    torch_dcp.save({"w": torch.zeros(4, 2), "b": torch.zeros(2)}, checkpoint_id=tmp_path)
    os.link(tmp_path / "__0_0.distcp", tmp_path / "__1_0.distcp")

    def change(metadata):
        entry = metadata.state_dict_metadata["w"]
        entry.size = torch.Size((8, 2))
        for index, info in metadata.storage_data.items():
            if index.fqn == "b":
                info.relative_path = "__1_0.distcp"

    rewrite(tmp_path, change)
    (problem,) = dcp.verify(tmp_path, level="structure").problems
    assert (problem.tensor, problem.code) == ("w", "HOLE") and "8 of its 16" in problem.what


def test_damaged_metadata_is_one_problem(tmp_path):
    dcp.save(state(), checkpoint_id=tmp_path)
    file = tmp_path / ".metadata"
    image = file.read_bytes()
    for damaged in (b"", image[:10], image[: len(image) // 3], pickle.dumps({"a": 1})):
        file.write_bytes(damaged)
        result = dcp.verify(tmp_path)
        assert result.problems_found == 1 and result.problems[0].file == ".metadata"
        assert str(result)


def test_a_checkpoint_that_is_replaced_all_the_time_passes(tmp_path):
    dcp.save(state(0), checkpoint_id=tmp_path)
    stop = threading.Event()

    def overwrite():
        seed = 1
        while not stop.is_set():
            dcp.save(state(seed), checkpoint_id=tmp_path)
            seed += 1

    thread = threading.Thread(target=overwrite)
    thread.start()
    try:
        results = [dcp.verify(tmp_path) for _ in range(40)]
    finally:
        stop.set()
        thread.join()
    assert all(results), [str(r) for r in results if not r]
    assert len({r.save_id for r in results}) > 1


def test_ctrl_c_ends_a_check(tmp_path):
    big = torch.zeros(1 << 20)
    dcp.save({f"t{i}": big for i in range(64)}, checkpoint_id=tmp_path)
    main = threading.get_ident()
    rounds = 0

    def interrupt():
        time.sleep(0.15)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        while True:
            assert dcp.verify(tmp_path)
            rounds += 1
    thread.join()
    assert dcp.verify(tmp_path), rounds


def test_a_check_leaves_no_memory_behind(tmp_path):
    dcp.save(state(), checkpoint_id=tmp_path)
    dcp.verify(tmp_path)
    dcp.trim()
    before = dcp._native.live_bytes()
    for _ in range(3):
        dcp.verify(tmp_path)
    dcp.trim()
    assert dcp._native.live_bytes() == before
