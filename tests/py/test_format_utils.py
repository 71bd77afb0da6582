"""Conversions between checkpoints and torch.save files, beside torch's own, both ways."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import resource
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal
from conftest import GOLDEN, ROOT
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint import format_utils as torch_utils
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import dcp_native as dcp
from dcp_native import format_utils, state_dict_saver
from dcp_native.format_utils import dcp_to_torch_save, torch_save_to_dcp

PLAIN = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "uint16",
    "uint32",
    "uint64",
    "float8_e4m3fn",
    "float8_e5m2",
]
CHECKPOINTS = sorted(GOLDEN.glob("2.*/*")) if GOLDEN.exists() else []


class Known:
    """An object that only unsafe unpickling loads."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Known) and self.value == other.value


def tensor(rng: random.Random) -> torch.Tensor:
    size = rng.choice([(), (0,), (3, 0), (1,), (7,), (5, 3), (2, 3, 4), (40000,), (300, 1000)])
    made = torch.randint(0, 100, size, generator=torch.Generator().manual_seed(rng.getrandbits(30)))
    made = made.to(torch.float32).to(getattr(torch, rng.choice(PLAIN)))
    return made.t() if made.ndim == 2 and rng.random() < 0.3 else made


def nested(rng: random.Random, depth: int = 0):
    kind = rng.random()
    if depth < 3 and (depth == 0 or kind < 0.25):
        made = collections.OrderedDict() if rng.random() < 0.3 else {}
        for i in range(rng.randint(1, 5)):
            made[f"k{i}"] = nested(rng, depth + 1)
        return made
    if depth < 3 and kind < 0.4:
        return [nested(rng, depth + 1) for _ in range(rng.randint(1, 3))]
    if kind < 0.8:
        return tensor(rng)
    return rng.choice([3, 2.5, None, "text", b"bytes", True, (1, "x"), 1 << 70, {}, []])


def members(path):
    """Names, contents and places of a zip's files, but for what torch makes of their hashes."""
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        return [
            (i.filename, file.read(i), i.header_offset, i.CRC, i.flag_bits)
            for i in file.infolist()
            if not i.filename.endswith("serialization_id")
        ]


def both_ways(source, tmp_path):
    """Converts with torch and with us; returns what both files hold, which must be the same."""
    paths = [tmp_path / who / "model.pt" for who in ("torch", "ours")]
    for path, convert in zip(
        paths, (torch_utils.dcp_to_torch_save, dcp_to_torch_save), strict=True
    ):
        path.parent.mkdir(exist_ok=True)
        convert(source, path)
    theirs, ours = (torch.load(path, weights_only=False) for path in paths)
    assert_equal(ours, theirs)
    return paths


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("saver", [dcp, torch_dcp], ids=["native", "torch"])
def test_a_converted_checkpoint_is_byte_for_byte_what_torch_saves(saver, seed, tmp_path):
    saver.save(nested(random.Random(seed)), checkpoint_id=tmp_path / "dcp")
    theirs, ours = both_ways(tmp_path / "dcp", tmp_path)
    assert members(ours) == members(theirs)


@pytest.mark.parametrize("seed", range(12, 20))
def test_a_converted_file_is_the_checkpoint_that_torch_makes(seed, tmp_path):
    torch.save(nested(random.Random(seed)), tmp_path / "in.pt")
    torch_utils.torch_save_to_dcp(tmp_path / "in.pt", tmp_path / "theirs")
    torch_save_to_dcp(tmp_path / "in.pt", tmp_path / "ours")
    files = []
    for name in ("theirs", "ours"):
        torch_utils.dcp_to_torch_save(tmp_path / name, tmp_path / f"{name}.pt")
        files.append(torch.load(tmp_path / f"{name}.pt", weights_only=False))
    assert_equal(files[1], files[0])


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_golden_checkpoints_convert_as_torch_converts_them(path, tmp_path):
    try:
        torch_utils.dcp_to_torch_save(path, tmp_path / "theirs.pt")
    except Exception:
        pytest.skip("torch can not convert it")
    dcp_to_torch_save(path, tmp_path / "ours.pt")
    theirs, ours = (
        torch.load(tmp_path / name, weights_only=False) for name in ("theirs.pt", "ours.pt")
    )
    assert_equal(ours, theirs)


class Casts(DefaultSavePlanner):
    """Saves less than what it says of it."""

    def transform_object(self, write_item, obj):
        made = super().transform_object(write_item, obj)
        return made.to(torch.bfloat16) if isinstance(made, torch.Tensor) else made


@pytest.mark.parametrize("saver", [dcp, torch_dcp], ids=["native", "torch"])
def test_what_a_planner_cast_is_cast_back(saver, tmp_path):
    state = {"a": torch.randn(300, 70), "n": 3, "b": torch.arange(5.0)}
    saver.save(state, checkpoint_id=tmp_path / "dcp", planner=Casts())
    theirs, ours = both_ways(tmp_path / "dcp", tmp_path)
    assert members(ours) == members(theirs)
    assert torch.load(ours)["a"].equal(state["a"].bfloat16().float())


def in_many_files(path, parts):
    """One tensor's rows, one file each, as that many ranks save them; returns the tensor."""
    rows = torch.arange(parts * 30_000.0).reshape(parts, 30_000)
    dcp.save({str(i): rows[i : i + 1] for i in range(parts)}, checkpoint_id=path)
    metadata = dcp.FileSystemReader(path).read_metadata()
    whole = metadata.state_dict_metadata["0"]
    storage = dict(metadata.storage_data)
    metadata.storage_data = {}
    whole.size = rows.size()
    whole.chunks = []
    for i in range(parts):
        offsets = torch.Size([i, 0])
        info = storage[MetadataIndex(str(i), [0, 0])]
        name = f"__{i}_0.distcp"
        (path / f"part{i}").write_bytes(
            (path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        )
        whole.chunks.append(ChunkStorageMetadata(offsets, torch.Size([1, 30_000])))
        metadata.storage_data[MetadataIndex("w", offsets, i)] = type(info)(name, 0, info.length)
    for file in path.glob("*.distcp"):
        file.unlink()
    for i in range(parts):
        (path / f"part{i}").rename(path / f"__{i}_0.distcp")
    metadata.state_dict_metadata = {"w": whole}
    metadata.planner_data = {"w": ("w",)}
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return rows


def test_a_tensor_in_more_files_than_may_be_open_is_converted(tmp_path):
    rows = in_many_files(tmp_path / "dcp", 200)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 90, before[1]))
    try:
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "out.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert torch.load(tmp_path / "out.pt")["w"].equal(rows)


def test_files_load_mapped_and_with_calculated_offsets(tmp_path, monkeypatch):
    state = {"a": torch.arange(100000.0), "e": torch.empty(0), "b": torch.ones(3, 5), "n": 1}
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "f.pt")
    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    for calculate in (False, True):
        with torch.utils.serialization.config.patch("load.calculate_storage_offsets", calculate):
            for safe in (True, False):
                assert_equal(torch.load(tmp_path / "f.pt", mmap=True, weights_only=safe), state)


def test_storages_are_aligned_as_torch_is_told_to(tmp_path):
    state = {"a": torch.ones(3), "b": torch.arange(70000)}
    dcp.save(state, checkpoint_id=tmp_path / "dcp")
    with torch.utils.serialization.config.patch("save.storage_alignment", 4096):
        theirs, ours = both_ways(tmp_path / "dcp", tmp_path)
    assert members(ours) == members(theirs)


def test_views_of_one_storage_keep_their_values(tmp_path):
    base = torch.arange(1 << 16, dtype=torch.float32)
    torch.save({"a": base, "b": base[100:200], "c": base.view(256, 256).t()}, tmp_path / "in.pt")
    torch_save_to_dcp(tmp_path / "in.pt", tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "out.pt")
    assert_equal(torch.load(tmp_path / "out.pt"), torch.load(tmp_path / "in.pt"))


def test_what_is_not_in_the_file_is_never_given_back_to_it(tmp_path):
    state = {"w": torch.ones(1 << 18), "p": torch.nn.Parameter(torch.arange(70000.0))}
    torch.save(state, tmp_path / "in.pt")
    loaded, mapped = format_utils._torch_file.load_mapped(tmp_path / "in.pt")
    loaded["fresh"] = torch.arange(1 << 18)
    state_dict_saver._save(
        loaded, dcp.FileSystemWriter(tmp_path / "dcp"), None, 0, True, None, True, False,
        mapped=mapped,
    )  # fmt: skip
    assert mapped[1] - mapped[0] >= 1 << 20
    assert torch.equal(loaded["fresh"], torch.arange(1 << 18))
    assert_equal(loaded["w"], state["w"])


def test_old_files_and_unsafe_objects(tmp_path):
    state = {"w": torch.arange(5), "o": Known(3)}
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("new", "old"):
        torch_save_to_dcp(tmp_path / f"{name}.pt", tmp_path / name)
        dcp_to_torch_save(tmp_path / name, tmp_path / f"{name}-out.pt")
        out = torch.load(tmp_path / f"{name}-out.pt", weights_only=False)
        assert out["o"] == state["o"] and torch.equal(out["w"], state["w"])
    dcp.configure(allow_unsafe_objects=False)
    with pytest.raises(pickle.UnpicklingError, match=r"new\.pt.*allow_unsafe_objects is off"):
        torch_save_to_dcp(tmp_path / "new.pt", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(CheckpointException, match="allow_unsafe_objects is off"):
        dcp_to_torch_save(tmp_path / "new", tmp_path / "refused.pt")
    assert not (tmp_path / "refused.pt").exists()


@pytest.mark.parametrize("kind", ["zip", "old", "unsafe", "open file"])
def test_a_stream_is_read(tmp_path, kind):
    state = {"w": torch.arange(5), "o": Known(3) if kind == "unsafe" else 3}
    path = tmp_path / "in.pt"
    torch.save(state, path, _use_new_zipfile_serialization=kind != "old")
    stream = path.open("rb") if kind == "open file" else io.BytesIO(path.read_bytes())
    with stream:
        torch_save_to_dcp(stream, tmp_path / "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=False)
    assert out["o"] == state["o"] and torch.equal(out["w"], state["w"])


def test_files_are_replaced_by_a_rename_and_missing_directories_named(tmp_path):
    """[torch-file-replaced]"""
    dcp.save({"w": torch.arange(5)}, checkpoint_id=tmp_path / "dcp")
    kept = {}
    for convert in (torch_utils.dcp_to_torch_save, dcp_to_torch_save):
        target = tmp_path / "f.pt"
        target.write_bytes(b"old")
        with target.open("rb") as reader:
            convert(tmp_path / "dcp", target)
            kept[convert] = reader.read() == b"old"
        target.unlink()
    assert kept == {torch_utils.dcp_to_torch_save: False, dcp_to_torch_save: True}
    with pytest.raises(RuntimeError):
        torch_utils.dcp_to_torch_save(tmp_path / "dcp", tmp_path / "absent" / "f.pt")
    with pytest.raises(FileNotFoundError, match="absent"):
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "absent" / "f.pt")


def test_files_are_unpickled_safely_first(tmp_path, monkeypatch):
    """[torch-file-safe]"""
    load, ways = torch.load, []

    def watched(*args, **kwargs):
        ways.append(kwargs["weights_only"])
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    for name, value, torchs, ours in (
        ("safe", {"w": torch.ones(3)}, [False], [True]),
        ("unsafe", {"w": torch.ones(3), "o": Known(1)}, [False], [True, False]),
    ):
        torch.save(value, tmp_path / name)
        for convert, wanted in (
            (torch_utils.torch_save_to_dcp, torchs),
            (torch_save_to_dcp, ours),
        ):
            ways.clear()
            convert(tmp_path / name, tmp_path / "dcp")
            assert ways == wanted
    reader = format_utils.BroadcastingTorchSaveReader(tmp_path / "unsafe")
    ways.clear()
    target = {"w": torch.zeros(3)}
    dcp.load(target, storage_reader=reader, planner=format_utils.DynamicMetaLoadPlanner())
    assert ways == [True, False]
    dcp.configure(allow_unsafe_objects=False)
    with pytest.raises(pickle.UnpicklingError, match="allow_unsafe_objects is off"):
        torch_save_to_dcp(tmp_path / "unsafe", tmp_path / "dcp")
    with pytest.raises(CheckpointException, match="allow_unsafe_objects is off"):
        dcp.load(target, storage_reader=reader, planner=format_utils.DynamicMetaLoadPlanner())


def test_a_file_of_an_accelerator_needs_none(tmp_path):
    """[torch-file-device]"""
    state = {"w": torch.arange(7.0)}
    torch.save(state, tmp_path / "cpu.pt")
    # What the pickle says of the storage's device, five letters in place of three.
    with (
        zipfile.ZipFile(tmp_path / "cpu.pt") as old,
        zipfile.ZipFile(tmp_path / "f.pt", "w") as new,
    ):
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                assert b"X\x03\0\0\0cpu" in data
                data = data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:9")
            new.writestr(info.filename, data)
    with pytest.raises((RuntimeError, AssertionError)):
        torch_utils.torch_save_to_dcp(tmp_path / "f.pt", tmp_path / "theirs")
    torch_save_to_dcp(tmp_path / "f.pt", tmp_path / "ours")
    target = {"w": torch.zeros(7)}
    torch_dcp.load(target, checkpoint_id=tmp_path / "ours")
    assert_equal(target, state)


def test_a_stream_is_written_by_torch(tmp_path):
    dcp.save({"w": torch.arange(5)}, checkpoint_id=tmp_path / "dcp")
    stream = io.BytesIO()
    dcp_to_torch_save(tmp_path / "dcp", stream)
    stream.seek(0)
    assert torch.load(stream)["w"].tolist() == [0, 1, 2, 3, 4]


@pytest.fixture
def converted(tmp_path):
    """A checkpoint of 3 MB and a file that is there already."""
    dcp.save(
        {"a": torch.ones(300, 1000), "b": torch.arange(200000), "n": 1},
        checkpoint_id=tmp_path / "dcp",
    )
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "f.pt"
    target.write_bytes(b"what was there")
    target.chmod(0o640)
    yield tmp_path / "dcp", target
    assert [entry.name for entry in target.parent.iterdir()] == ["f.pt"]


def test_a_file_is_replaced_whole_and_keeps_its_mode(converted):
    source, target = converted
    dcp_to_torch_save(source, target)
    assert torch.load(target, weights_only=True)["n"] == 1
    assert target.stat().st_mode & 0o777 == 0o640


def test_damage_is_named_and_the_old_file_stays(converted):
    source, target = converted
    file = next(source.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(dcp.NativeError, match=rf"reading a from .*{file.name} failed") as failure:
        dcp_to_torch_save(source, target)
    assert failure.value.dcp_code == "CHECKSUM"
    assert target.read_bytes() == b"what was there"
    dcp.configure(verify=False)
    dcp_to_torch_save(source, target)


@pytest.mark.parametrize("how", ["missing", "short"])
def test_lost_data_is_named_and_the_old_file_stays(how, converted):
    source, target = converted
    file = next(source.glob("*.distcp"))
    if how == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises((OSError, dcp.NativeError, CheckpointException), match=file.name):
        dcp_to_torch_save(source, target)
    assert target.read_bytes() == b"what was there"


def test_a_file_that_can_not_grow_is_named_and_the_old_one_stays(converted):
    source, target = converted
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(OSError, match="out"):
            dcp_to_torch_save(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert target.read_bytes() == b"what was there"


def test_what_is_no_checkpoint_or_no_file_is_named(tmp_path):
    with pytest.raises(CheckpointException, match="nowhere"):
        dcp_to_torch_save(tmp_path / "nowhere", tmp_path / "f.pt")
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "dcp")
    with pytest.raises(FileNotFoundError, match="absent"):
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "absent" / "f.pt")
    with pytest.raises(IsADirectoryError):
        dcp_to_torch_save(tmp_path / "dcp", tmp_path / "dcp")
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        torch_save_to_dcp(tmp_path / "absent.pt", tmp_path / "new")
    (tmp_path / "junk.pt").write_bytes(b"junk" * 100)
    with pytest.raises(Exception, match=r"."):
        torch_save_to_dcp(tmp_path / "junk.pt", tmp_path / "new")
    assert not (tmp_path / "new").exists()


MEASURE = """
import sys, torch, dcp_native
sys.path.insert(0, "benchmarks")
from limits import restart_peak, status_bytes
from dcp_native import format_utils
torch.set_num_threads(1)
source, target, mode = sys.argv[1:]
convert = getattr(format_utils, mode)
small = source + "-small", target + "-small"
convert(*small)  # imports and first uses
dcp_native._native.trim()
restart_peak()
before = status_bytes("VmRSS")
convert(source, target)
print(status_bytes("VmHWM") - before)
"""


@pytest.mark.parametrize("mode", ["dcp_to_torch_save", "torch_save_to_dcp"])
def test_memory_is_that_of_one_tensor_and_64_mib(mode, tmp_path):
    largest = 32 << 20
    states = {
        "": {str(i): torch.ones(largest // 4) for i in range(8)},
        "-small": {"w": torch.ones(1000)},
    }
    for suffix, state in states.items():
        if mode == "dcp_to_torch_save":
            dcp.save(state, checkpoint_id=tmp_path / f"in{suffix}")
        else:
            torch.save(state, tmp_path / f"in{suffix}")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "in"), str(tmp_path / "out"), mode],
        capture_output=True, text=True, timeout=200, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= largest + (64 << 20)


def test_the_command_line_converts_both_ways(tmp_path, capsys):
    torch.save({"w": torch.arange(9)}, tmp_path / "in.pt")
    format_utils._main(["torch_to_dcp", str(tmp_path / "in.pt"), str(tmp_path / "dcp")])
    format_utils._main(["dcp_to_torch", str(tmp_path / "dcp"), str(tmp_path / "out.pt")])
    assert torch.load(tmp_path / "out.pt")["w"].tolist() == list(range(9))
    format_utils._main(["dcp_to_torch", str(tmp_path / "none"), str(tmp_path / "never.pt")])
    assert "no checkpoint" in capsys.readouterr().out
    assert not (tmp_path / "never.pt").exists()


def test_one_process_loads_a_torch_save_file(tmp_path):
    state = {"m": {"w": torch.randn(5, 4), "s": torch.tensor(2.0)}}
    torch.save(state, tmp_path / "f.pt")
    target = {"m": {"w": torch.zeros(5, 4), "s": torch.tensor(0.0)}}
    dcp.load(
        target,
        checkpoint_id=tmp_path / "f.pt",
        storage_reader=format_utils.BroadcastingTorchSaveReader(),
        planner=format_utils.DynamicMetaLoadPlanner(),
    )
    assert_equal(target, state)
