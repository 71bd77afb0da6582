"""docs/format.md is enough to read a checkpoint: a reader written from it finds every byte."""

from __future__ import annotations

import pickle
import random
import re
import subprocess
import sys
import zlib
from pathlib import Path

import format_reader
import pytest
import torch
from common import value
from format_reader import Checkpoint, Damaged

import dcp_native as dcp

OF_TORCH_ALONE = ("q", "bits", "bcomplex")
DTYPES = [
    getattr(torch, name)
    for name in format_reader.WIDTHS
    if not name.startswith(OF_TORCH_ALONE) and hasattr(torch, name)
]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def of_dtype(dtype: torch.dtype) -> torch.Tensor:
    """Every byte of it differs from its neighbours; not through `to`, which many dtypes lack."""
    flat = (torch.arange(6 * 5 * dtype.itemsize) * 7 % 251).to(torch.uint8)
    flat = flat % 2 if dtype == torch.bool else flat
    return flat.view(dtype).reshape(6, 5)


def everything() -> dict:
    return {
        "dtype": {str(d): of_dtype(d) for d in DTYPES},
        "large": value("large", (700, 1001), torch.float64),
        "exactly a block": value("block", (1024, 256)),
        "page": value("page", (130, 127)),
        "turned": value("turned", (6, 4)).t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "six dimensions": value("six", (2, 1, 3, 1, 2, 5)),
        "objects": {"step": 10**12, "text": "ä" * 600, "list": [1, {"b": b"\0\1"}, None, 0.5]},
        "of torch": torch.device("cpu"),
    }


def leaves(state: dict, prefix: str = ""):
    for key, leaf in state.items():
        if isinstance(leaf, dict) and not prefix:
            yield from leaves(leaf, f"{key}.")
        else:
            yield f"{prefix}{key}", leaf


def assert_holds(checkpoint: Checkpoint, state: dict) -> None:
    wanted = dict(leaves(state))
    seen = 0
    for name, leaf in wanted.items():
        if isinstance(leaf, torch.Tensor):
            entry = checkpoint.entries[name]
            assert (f"torch.{entry.dtype}", entry.size) == (str(leaf.dtype), tuple(leaf.shape))
            assert checkpoint.array(name) == raw(leaf), name
            seen += 1
    assert seen > 0
    assert {n for n, e in checkpoint.entries.items() if e.kind == format_reader.TENSOR} == {
        n for n, leaf in wanted.items() if isinstance(leaf, torch.Tensor)
    }


@pytest.mark.parametrize("content_hash", [False, True])
@pytest.mark.parametrize("how", ["save", "threads", "files", "thread", "process"])
def test_every_byte_and_checksum_is_where_the_document_says(tmp_path, how, content_hash):
    dcp.configure(content_hash=content_hash)
    state = everything()
    if how in ("thread", "process"):
        dcp.async_save(
            state,
            checkpoint_id=tmp_path,
            async_checkpointer_type=dcp.AsyncCheckpointerType[how.upper()],
        ).result()
    else:
        files = {"threads": {"thread_count": 3}, "files": {"single_file_per_rank": False}}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path, **files.get(how, {})))
    checkpoint = Checkpoint(tmp_path)
    assert_holds(checkpoint, state)
    assert checkpoint.value("objects.step") == 10**12
    assert checkpoint.value("objects.text") == "ä" * 600
    assert checkpoint.value("of torch").args == ("cpu",)
    assert any(f.hashes for f in checkpoint.files) == content_hash
    assert sum(len(f.blocks) for f in checkpoint.files) == 1  # of more than a block there is one


def test_pickle_and_index_say_the_same(tmp_path):
    dcp.save(everything(), checkpoint_id=tmp_path)
    checkpoint = Checkpoint(tmp_path)
    metadata = pickle.loads(checkpoint.pickle)
    assert list(metadata.state_dict_metadata) == list(checkpoint.entries)
    for index, info in metadata.storage_data.items():
        entry = checkpoint.entries[index.fqn]
        chunk = entry.chunks[index.index or 0]
        assert (info.offset, info.length) == (chunk.offset, chunk.length)
        assert info.relative_path == checkpoint.files[chunk.file].path.name
        if index.offset is not None:
            stored = metadata.state_dict_metadata[index.fqn]
            box = stored.chunks[index.index]
            assert (tuple(box.offsets), tuple(box.sizes)) == (chunk.offsets, chunk.sizes)
            assert tuple(stored.size) == entry.size


def test_the_short_reader_shown_gives_every_tensor(tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    reader, _, _ = shown.partition("\nfor key, ")
    dcp.configure(incremental_links="hard")
    state = everything()
    dcp.save(state, checkpoint_id=tmp_path / "first", base=tmp_path / "none")
    state["new"] = torch.ones(4)
    dcp.save(state, checkpoint_id=tmp_path / "second", base=tmp_path / "first")
    assert dcp.last_report()["linked_files"] > 0
    namespace: dict = {}
    exec(reader, namespace)
    read = {
        key: (size, offsets, sizes, payload)
        for key, _, size, offsets, sizes, payload in namespace["tensors"](tmp_path / "second")
    }
    tensors = {name: leaf for name, leaf in leaves(state) if isinstance(leaf, torch.Tensor)}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        assert read[name] == (shape, [0] * len(shape), shape, raw(tensor)), name


def test_files_of_an_earlier_save_are_accepted_by_its_id(tmp_path):
    dcp.configure(content_hash=True, incremental_links="hard")
    state = {f"w{i}": value(f"w{i}", (300, 400)) for i in range(8)}
    dcp.save(state, checkpoint_id=tmp_path / "a")
    state["w3"] = value("new", (300, 400))
    dcp.save(state, checkpoint_id=tmp_path / "b", base=tmp_path / "a")
    checkpoint = Checkpoint(tmp_path / "b")
    assert_holds(checkpoint, state)
    assert checkpoint.accepted == [Checkpoint(tmp_path / "a").save_id]
    assert {f.save_id for f in checkpoint.files} == {checkpoint.save_id, *checkpoint.accepted}


def test_a_claim_is_named_by_number_and_save_id(tmp_path):
    dcp.save({"w": value("w", (10,))}, checkpoint_id=tmp_path)
    dcp.configure(write_limit_bytes_s=8 << 20)
    future = dcp.async_save({"w": value("w", (2 << 20,))}, checkpoint_id=tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    future.result()
    checkpoint = Checkpoint(tmp_path)
    n0 = min(file.n for file in checkpoint.files)
    assert f".dcp_native-claim-{n0}-{checkpoint.save_id[:8].hex()}" in names


def test_a_damaged_byte_is_noticed_wherever_it_is(tmp_path):
    dcp.configure(content_hash=True)
    dcp.save({"w": value("w", (600, 500)), "s": value("s", (3,)), "n": 1}, checkpoint_id=tmp_path)
    Checkpoint(tmp_path)
    seeded = random.Random(9)
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for at in {*seeded.sample(range(len(whole)), 40), 0, 20, len(whole) - 1, len(whole) - 70}:
            broken = bytearray(whole)
            broken[at] ^= 0x10
            path.write_bytes(broken)
            with pytest.raises((Damaged, ValueError, LookupError, pickle.UnpicklingError)):
                Checkpoint(tmp_path)
        path.write_bytes(whole)
    Checkpoint(tmp_path)


def test_the_reader_needs_neither_torch_nor_this_package(tmp_path):
    state = {"w": value("w", (50, 3)), "step": 3}
    dcp.save(state, checkpoint_id=tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(Path(format_reader.__file__).parent)!r})\n"
        f"import zlib, format_reader; c = format_reader.Checkpoint({str(tmp_path)!r})\n"
        "print(zlib.crc32(c.array('w')), c.value('step'))\n"
        "assert not {m.split('.')[0] for m in sys.modules} & {'torch', 'dcp_native', 'numpy'}"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [str(zlib.crc32(raw(state["w"]))), "3"], done.stderr
