"""Records one by one: ours as files of torch.save, torch's and damaged ones in our reader."""

from __future__ import annotations

import collections
import io
import os
import pickle
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from bridge_table import DTYPES
from common import value

import dcp_native as dcp

PLAIN_DTYPES = [d for d in DTYPES if not str(d).startswith("torch.q")]
SHAPES = [(), (0,), (3, 0), (1, 1), (2, 3, 4), (2, 2, 2, 2, 1), (70_000,), (300, 1000, 1)]
BLOCK_BYTES = 1 << 20
SLOW_DISK_S = 200
"""4.3 GB at 22 MB/s."""


def made(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes that follow from dtype and shape; all types, also those that torch cannot fill."""
    tensor = torch.empty(shape, dtype=dtype)
    count = tensor.untyped_storage().nbytes()
    data = (torch.arange(count) * 31 + DTYPES[dtype]) % (2 if dtype == torch.bool else 251)
    tensor.untyped_storage().copy_(data.to(torch.uint8).untyped_storage())
    return tensor


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy())


def cut(path: Path) -> dict[str, tuple[bytes, Any]]:
    """fqn -> its bytes, and where they were, of a checkpoint with one chunk a name."""
    metadata = torch_dcp.FileSystemReader(path).read_metadata()
    out = {}
    for index, info in metadata.storage_data.items():
        with open(path / info.relative_path, "rb") as file:
            file.seek(info.offset)
            out[index.fqn] = (file.read(info.length), info)
    return out


def put_record(path: Path, fqn: str, record: bytes) -> None:
    """Let a checkpoint take the bytes of one name from a file of its own."""
    (path / "foreign.distcp").write_bytes(b"before" + record + b"behind")
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == fqn:
            info.relative_path = "foreign.distcp"
            info.offset, info.length = len(b"before"), len(record)
    file.write_bytes(pickle.dumps(metadata))


def torch_save(thing: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def failure_of(state_dict: dict[str, Any], path: Path) -> BaseException:
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(state_dict, checkpoint_id=path)
    assert caught.value.args[0] == "read"
    return caught.value.failures[0][0]


@pytest.fixture
def without_crc() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


# ---- ours in torch ----


@pytest.fixture(scope="module")
def tensor_records(tmp_path_factory) -> dict[str, tuple[bytes, Any]]:
    path = tmp_path_factory.mktemp("tensors")
    dcp.save({f"{d} {s}": made(d, s) for d in PLAIN_DTYPES for s in SHAPES}, checkpoint_id=path)
    assert dcp.last_report()["path"] == "native"
    return cut(path)


@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
def test_a_byte_range_is_a_file_of_torch_save(dtype, tensor_records, tmp_path):
    for shape in SHAPES:
        want = made(dtype, shape)
        record, _ = tensor_records[f"{dtype} {shape}"]
        file = tmp_path / "record.pt"
        file.write_bytes(record)
        assert zipfile.ZipFile(file).testzip() is None
        for weights_only in (True, False):
            for got in (
                torch.load(io.BytesIO(record), weights_only=weights_only),
                torch.load(file, weights_only=weights_only),
                torch.load(file, weights_only=weights_only, mmap=True),
            ):
                assert (got.dtype, got.shape) == (dtype, shape)
                assert got.stride() == want.stride() and got.storage_offset() == 0
                assert not got.requires_grad
                assert raw(got) == raw(want), shape
            meta = torch.load(file, weights_only=weights_only, map_location="meta")
            assert meta.is_meta and (meta.dtype, meta.shape) == (dtype, shape)


def test_blocks_are_the_crc_of_every_mebibyte(tmp_path):
    tensor = made(torch.uint8, (3 * BLOCK_BYTES + 12345,))
    dcp.save({"w": tensor}, checkpoint_id=tmp_path)
    record, _ = cut(tmp_path)["w"]
    archive = zipfile.ZipFile(io.BytesIO(record))
    blocks = archive.read("archive/blocks")
    payload = archive.read("archive/data/0")
    assert payload == raw(tensor)
    crcs = [
        zlib.crc32(payload[at : at + BLOCK_BYTES]) for at in range(0, len(payload), BLOCK_BYTES)
    ]
    assert blocks.endswith(b"".join(crc.to_bytes(4, "little") for crc in crcs))


OBJECTS: dict[str, Any] = {
    "tensors": (torch.arange(10.0), torch.ones(3, 3, dtype=torch.bfloat16)),
    "ordered": collections.OrderedDict(w=1, b=torch.eye(300)),
    "deep": [{"b": [1, 2]}, {"s": "x" * 5000}],
    "int": 7,
    "text": "text \u4e16",
    "none": None,
    "floats": (1, 2.5, -0.0),
    "betas": {"lr": 1e-3, "betas": (0.9, 0.999)},
    "shared storage": (lambda t: (t[:3], t[2:]))(torch.arange(6)),
    "large": b"\x01" * 3_000_000,
}


def assert_same(got: Any, want: Any) -> None:
    if isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and torch.equal(got, want)
    elif isinstance(want, dict):
        assert type(got) is type(want) and list(got) == list(want)
        for key in want:
            assert_same(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert type(got) is type(want) and len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)
    else:
        assert got == want and type(got) is type(want)


def slots() -> Iterator[int]:
    slot = 512
    while True:
        yield slot
        slot = (slot + slot // 4 + 63) // 64 * 64


def test_objects_fill_their_slots_with_an_entry_that_torch_skips(tmp_path):
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    state_dict = {**OBJECTS, **{f"text {n}": "t" * n for n in range(0, 2500, 61)}}
    dcp.save(state_dict, checkpoint_id=tmp_path / "c", planner=planner)
    records = cut(tmp_path / "c")
    assert set(records) == set(state_dict)
    file = tmp_path / "object.pt"
    for name, (record, _) in records.items():
        assert len(record) == next(s for s in slots() if s >= len(record)), name
        archive = zipfile.ZipFile(io.BytesIO(record))
        assert archive.testzip() is None
        pad = archive.infolist()[-1]
        assert pad.filename.endswith("/pad") and not any(archive.read(pad)), name
        used = len(record) - pad.file_size
        assert next(s for s in slots() if s >= used + 200) >= len(record), f"{name}: wasteful"
        file.write_bytes(record)
        for weights_only in (True, False):
            assert_same(torch.load(io.BytesIO(record), weights_only=weights_only), state_dict[name])
            assert_same(torch.load(file, weights_only=weights_only, mmap=True), state_dict[name])


# ---- torch's in ours ----

BASE = value("base", (6, 8))
WRITTEN_BY_TORCH: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: BASE,
    "larger storage": lambda: BASE[1:5],
    "offset and steps": lambda: BASE[1:5:2, ::3],
    "transposed": lambda: BASE.t(),
    "permuted": lambda: BASE.reshape(2, 3, 8).permute(2, 0, 1),
    "column": lambda: BASE[:, 3],
    "expanded": lambda: BASE[:1].expand(5, 8),
    "sliding windows": lambda: BASE.view(-1).unfold(0, 4, 1),
    "scalar of many": lambda: BASE[1, 2],
    "empty of many": lambda: BASE[:0],
    "parameter": lambda: torch.nn.Parameter(BASE),
    "requires grad": lambda: BASE.clone().requires_grad_(),
    "conj": lambda: torch.complex(BASE, BASE + 1).conj(),
    "neg": lambda: torch.complex(BASE, BASE + 1).conj().imag,
    "large and transposed": lambda: value("l", (700, 900)).t(),
    "large with gaps": lambda: value("l", (700, 1800))[:, ::2],
}


class Sub(torch.Tensor):
    """What only its own copy_ may write."""


@pytest.mark.parametrize("crc", [True, False], ids=["crc", "no crc"])
@pytest.mark.parametrize("kind", WRITTEN_BY_TORCH)
def test_any_record_of_a_tensor_is_read(kind, crc, tmp_path):
    """Whatever strides and storage it has; torch's DCP itself writes only some of them."""
    tensor = WRITTEN_BY_TORCH[kind]()
    plain = tensor.detach().resolve_conj().resolve_neg()
    torch_dcp.save({"w": plain, "other": BASE}, checkpoint_id=tmp_path)
    torch.serialization.set_crc32_options(crc)
    try:
        put_record(tmp_path, "w", torch_save(tensor))
    finally:
        torch.serialization.set_crc32_options(True)
    for module in (torch_dcp, dcp):
        target = {"w": torch.full(tensor.shape, 7.0).to(tensor.dtype), "other": torch.zeros(6, 8)}
        module.load(target, checkpoint_id=tmp_path)
        assert torch.equal(target["w"], plain) and torch.equal(target["other"], BASE)
    assert dcp.last_report()["path"] == "native"
    for dtype in (torch.float64, torch.complex128, torch.complex64):
        for whole in (False, True):  # converted, in pieces, in whole overlaps
            room = torch.zeros(tensor.shape, dtype=dtype)
            cast = {"w": room.as_subclass(Sub) if whole else room}
            dcp.load(cast, checkpoint_id=tmp_path)
            assert torch.equal(room, torch.zeros_like(room).copy_(plain))


def test_records_without_crc_are_read_and_counted_as_unverified(without_crc, tmp_path):
    saved = {"small": value("s", (50,)), "large": value("l", (1 << 19,)), "step": {"n": 5}}
    torch_dcp.save(saved, checkpoint_id=tmp_path)
    target = {"small": torch.zeros(50), "large": torch.zeros(1 << 19), "step": {"n": None}}
    dcp.load(target, checkpoint_id=tmp_path)
    assert_same(target, saved)
    assert dcp.last_report()["unverified_bytes"] >= 4 * (50 + (1 << 19))
    torch.serialization.set_crc32_options(True)
    torch_dcp.save(saved, checkpoint_id=tmp_path / "with")
    dcp.load(target, checkpoint_id=tmp_path / "with")
    assert dcp.last_report()["unverified_bytes"] == 0


# ---- damage ----


def flip(path: Path, fqn: str, entry: str, at: int = 0) -> int:
    """Flips one bit of an entry of a record; returns where in its file."""
    record, info = cut(path)[fqn]
    archive = zipfile.ZipFile(io.BytesIO(record))
    (found,) = [e for e in archive.infolist() if e.filename.endswith(entry)]
    header = record[found.header_offset :]
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    offset = info.offset + found.header_offset + 30 + names + at
    with open(path / info.relative_path, "r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))
    return offset


@pytest.mark.parametrize("module", [dcp, torch_dcp], ids=["ours", "torchs"])
@pytest.mark.parametrize("shape", [(50,), (40_000,), (900, 700)], ids=str)
def test_a_wrong_bit_is_named_by_tensor_file_and_place(module, shape, tmp_path):
    saved = {"good": value("g", (9,)), "w": value("w", shape)}
    module.save(saved, checkpoint_id=tmp_path)
    last = saved["w"].numel() * 4 - 1
    offset = flip(tmp_path, "w", "/data/0", last)
    error = failure_of({"w": torch.zeros(shape)}, tmp_path)
    assert error.dcp_code == "CHECKSUM"
    (_, info) = cut(tmp_path)["w"]
    assert "w in " in str(error) and info.relative_path in str(error), str(error)
    assert 0 <= offset - int(str(error).split("at byte ")[1].split(":")[0]) <= last, str(error)
    target = {"good": torch.zeros(9)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["good"], saved["good"])
    dcp.configure(verify=False)
    target = {"w": torch.zeros(shape)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert int((target["w"] != saved["w"]).sum()) == 1


@pytest.mark.parametrize("module", [dcp, torch_dcp], ids=["ours", "torchs"])
def test_a_wrong_bit_in_an_object_is_named(module, tmp_path):
    module.save({"text": "x" * 300, "n": 1}, checkpoint_id=tmp_path)
    flip(tmp_path, "text", "/data.pkl", 200)
    error = failure_of({"text": None}, tmp_path)
    assert error.dcp_code == "CHECKSUM" and "text in " in str(error), str(error)
    assert "data.pkl" in str(error)
    target = {"n": None}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target == {"n": 1}


def rewritten(record: bytes, **changes: bytes | None) -> dict[str, bytes]:
    """Entries of a record by name; `byteorder=b"big"` and the like replace one, None drops it."""
    archive = zipfile.ZipFile(io.BytesIO(record))
    entries = {name: archive.read(name) for name in archive.namelist()}
    for name, data in changes.items():
        (key,) = [k for k in entries if k.endswith("/" + name.replace("_", "."))]
        if data is None:
            del entries[key]
        else:
            entries[key] = data
    return entries


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def legacy(thing: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


PLAIN_RECORD = torch_save(value("w", (300,)))
REFUSED: dict[str, tuple[bytes, str]] = {
    "compressed": (zipped(rewritten(PLAIN_RECORD), zipfile.ZIP_DEFLATED), "compressed"),
    "big endian": (zipped(rewritten(PLAIN_RECORD, byteorder=b"big")), "big-endian"),
    "odd endian": (zipped(rewritten(PLAIN_RECORD, byteorder=b"middle")), "byteorder"),
    "without a pickle": (zipped(rewritten(PLAIN_RECORD, data_pkl=None)), "data.pkl"),
    "cut short": (PLAIN_RECORD[:-200], "zip end record|no end record"),
    "storage cut short": (
        zipped({**rewritten(PLAIN_RECORD), "archive/data/0": b"short"}),
        "disagree about the size",
    ),
    "before torch 1.6": (legacy(value("w", (300,))), "zip end record|no end record"),
    "no bytes": (b"", "w"),
}


def test_a_record_zipped_by_another_hand_is_read(tmp_path):
    """The control: what follows is refused for its damage, not for who zipped it."""
    torch_dcp.save({"w": torch.zeros(300)}, checkpoint_id=tmp_path)
    put_record(tmp_path, "w", zipped(rewritten(PLAIN_RECORD)))
    target = {"w": torch.zeros(300)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["w"], value("w", (300,)))


@pytest.mark.parametrize("verify", [True, False], ids=["verify", "no verify"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_damaged_record_is_refused_by_name(kind, verify, tmp_path):
    record, text = REFUSED[kind]
    torch_dcp.save({"w": torch.zeros(300), "other": BASE}, checkpoint_id=tmp_path)
    put_record(tmp_path, "w", record)
    dcp.configure(verify=verify)
    error = failure_of({"w": torch.zeros(300)}, tmp_path)
    assert error.dcp_code == "CORRUPT", repr(error)
    assert "w in " in str(error) and "foreign.distcp" in str(error), str(error)
    assert any(part in str(error) for part in text.split("|")), str(error)
    target = {"other": torch.zeros(6, 8)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["other"], BASE)


# ---- more than 32 bits ----


@pytest.mark.skipif(
    not os.environ.get("DCP_NATIVE_SLOW_TESTS"),
    reason="moves 4.3 GB, and needs as much memory and twice the disk space (slow)",
)
def test_a_payload_over_four_gib_is_zip64(tmp_path):
    count = (4 << 30) + 5 * BLOCK_BYTES + 77
    marks = [0, 1 << 31, (4 << 30) - 1, 4 << 30, count - 1]
    tensor = torch.zeros(count, dtype=torch.uint8)  # the pages that stay zero take no memory
    tensor[marks] = torch.arange(1, 6, dtype=torch.uint8)
    start = time.monotonic()
    dcp.save({"w": tensor, "small": BASE}, checkpoint_id=tmp_path / "c")
    assert time.monotonic() - start < SLOW_DISK_S
    metadata = torch_dcp.FileSystemReader(tmp_path / "c").read_metadata()
    ((info,),) = [[v for k, v in metadata.storage_data.items() if k.fqn == "w"]]
    assert info.length > count > 0xFFFFFFFF
    file = tmp_path / "record.pt"
    with open(tmp_path / "c" / info.relative_path, "rb") as whole, open(file, "wb") as record:
        done = 0
        while done < info.length:
            done += os.copy_file_range(
                whole.fileno(), record.fileno(), info.length - done, info.offset + done
            )
    entry = zipfile.ZipFile(file).getinfo("archive/data/0")
    assert entry.file_size == entry.compress_size == count
    mapped = torch.load(file, mmap=True, weights_only=True)
    assert mapped.shape == (count,) and mapped[marks].tolist() == [1, 2, 3, 4, 5]
    del mapped
    file.unlink()
    target = {"w": torch.full((count,), 9, dtype=torch.uint8), "small": torch.zeros(6, 8)}
    start = time.monotonic()
    dcp.load(target, checkpoint_id=tmp_path / "c")
    assert time.monotonic() - start < SLOW_DISK_S
    assert dcp.last_report()["unverified_bytes"] == 0
    assert torch.equal(target["w"], tensor) and torch.equal(target["small"], BASE)
    assert int(target["w"].count_nonzero()) == 5
    shutil.rmtree(tmp_path)  # pytest would keep it
