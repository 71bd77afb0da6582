"""HuggingFaceStorageReader against torch's and the safetensors package: metadata, loads, damage."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal
from safetensors import deserialize
from safetensors.torch import save_file
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint import hf_storage as torch_hf
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

import dcp_native as dcp
from dcp_native import _native
from dcp_native import _plan_reads as plan_reads
from dcp_native._hf_reader import HuggingFaceStorageReader
from dcp_native._hf_reads import DTYPES, HFReads

READERS = (torch_hf.HuggingFaceStorageReader, HuggingFaceStorageReader)
PACKAGE_DTYPES = [dtype for text, dtype in DTYPES.items() if text != "F8_E8M0"]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def elements(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits, but for bool and NaN."""
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return (torch.arange(count) % 3 == seed % 3).reshape(shape)
    generator = torch.Generator().manual_seed(seed + count)
    wide = torch.randint(0, 100, (count,), generator=generator)
    return wide.to(dtype).reshape(shape)


def image(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def plain(path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of two files in the layout of model hubs."""
    first = {
        "w": elements((300, 41), torch.float32),
        "b": elements((), torch.bfloat16),
        "none": elements((0, 4), torch.float32),
        "big": elements((2100, 700), torch.float32, 1),
    }
    second = {f"t.{dtype}": elements((3, 5), dtype, 2) for dtype in PACKAGE_DTYPES}
    save_file(first, path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, path / "model-00002-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text("{}")
    return {**first, **second}


def shards(path: Path) -> dict[str, torch.Tensor]:
    """Shard files as a distributed save leaves them: rows of `w`, columns of `c`."""
    whole = {"w": elements((7, 6), torch.float32), "c": elements((4, 9), torch.int16, 3)}
    cuts = [(slice(0, 3), slice(0, 5)), (slice(3, 7), slice(5, 9))]
    for i, (rows, columns) in enumerate(cuts, start=1):
        part = {"w": whole["w"][rows].clone(), "c": whole["c"][:, columns].clone()}
        info = {"w": {"saved_offsets": [rows.start, 0]}, "c": {"saved_offsets": [0, columns.start]}}
        save_file(
            part, path / f"shard-0000{i}-model-00001-of-00001.safetensors",
            metadata={"DCP_SHARDING_INFO": json.dumps(info), "DCP_VERSION": "1.0"},
        )  # fmt: skip
    return whole


def without_load_id(metadata: Metadata) -> Metadata:
    metadata.storage_meta.load_id = None
    return metadata


@pytest.mark.parametrize("make", [plain, shards])
def test_metadata_is_torchs(tmp_path, make):
    make(tmp_path)
    theirs, ours = (without_load_id(cls(str(tmp_path)).read_metadata()) for cls in READERS)
    assert theirs == ours
    assert list(theirs.state_dict_metadata) == list(ours.state_dict_metadata)
    assert list(theirs.storage_data) == list(ours.storage_data)


@pytest.mark.parametrize("module", [torch_dcp, dcp], ids=["torch", "dcp_native"])
@pytest.mark.parametrize("direct_io", ["off", "auto", "on"])
@pytest.mark.parametrize("make", [plain, shards])
def test_loads_are_what_was_saved(tmp_path, make, module, direct_io):
    saved = make(tmp_path)
    dcp.configure(direct_io=direct_io)
    target = {name: torch.full_like(tensor, 1) for name, tensor in saved.items()}
    try:
        module.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    except dcp.CheckpointException as error:
        if direct_io == "on" and "direct I/O was asked for" in str(error):
            pytest.skip("the file system of the tests does no direct I/O")
        raise
    assert_equal(target, saved)


def test_targets_are_cast_and_may_have_any_strides(tmp_path):
    saved = plain(tmp_path)
    loaded = []
    for cls in READERS:
        target = {
            "w": torch.zeros(41, 300, dtype=torch.bfloat16).t(),
            "big": torch.zeros(2100, 1400, dtype=torch.float64)[:, ::2],
            "b": torch.zeros((), dtype=torch.float32),
            "t.torch.complex64": torch.zeros(3, 5, dtype=torch.complex128),
            "t.torch.float8_e4m3fn": torch.zeros(3, 5),
        }
        torch_dcp.load(target, storage_reader=cls(str(tmp_path)))
        loaded.append(target)
    assert_equal(*loaded)
    assert loaded[1]["big"].eq(saved["big"]).all()


class Boxes(DefaultLoadPlanner):
    """Items that a test made, into memory of their own; remembers what was committed."""

    def __init__(self) -> None:
        super().__init__()
        self.got: list[torch.Tensor] = []

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return torch.zeros(read_item.lengths, dtype=torch.float32)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.got.append(tensor)


def item_of(
    fqn: str, offset: list[int], start: tuple[int, ...], count: tuple[int, ...]
) -> ReadItem:
    index = MetadataIndex(fqn, torch.Size(offset))
    zeros = torch.Size([0] * len(count))
    return ReadItem(LoadItemType.TENSOR, index, zeros, index, torch.Size(start), torch.Size(count))


def read_plan(reader: Any, items: list[ReadItem]) -> list[torch.Tensor]:
    planner = Boxes()
    reader.set_up_storage_reader(reader.read_metadata(), True)
    reader.read_data(LoadPlan(items), planner).wait()
    return planner.got


@pytest.mark.parametrize("window", [1 << 16, plan_reads.WINDOW_BYTES])
def test_boxes_of_custom_planners_are_torchs(tmp_path, window, monkeypatch):
    monkeypatch.setattr(plan_reads, "WINDOW_BYTES", window)
    plain(tmp_path)
    choose = random.Random(4)
    items = []
    for _ in range(60):
        fqn, shape = choose.choice([("w", (300, 41)), ("big", (2100, 700))])
        start = tuple(choose.randrange(size) for size in shape)
        count = tuple(
            choose.randint(1, size - first) for first, size in zip(start, shape, strict=True)
        )
        items.append(item_of(fqn, [0, 0], start, count))
    theirs, ours = (read_plan(cls(str(tmp_path)), items) for cls in READERS)
    assert_equal(ours, theirs)


def test_only_what_is_wanted_is_read(tmp_path):
    saved = plain(tmp_path)
    reader = HuggingFaceStorageReader(str(tmp_path))
    reader.set_up_storage_reader(reader.read_metadata(), True)
    planner, reads = Boxes(), HFReads(reader)
    reads.run(LoadPlan([item_of("big", [0, 0], (700, 0), (100, 700))]), planner)
    assert_equal(planner.got[0], saved["big"][700:800])
    assert reads.stats["wanted_bytes"] == 100 * 700 * 4
    assert reads.stats["read_bytes"] <= 100 * 700 * 4 + 8192


def test_a_reader_with_its_own_hooks_keeps_them(tmp_path):
    saved = plain(tmp_path)
    asked = []

    class Own(HuggingFaceStorageReader):
        def _process_read_request(self, f, req, planner):
            asked.append(req.storage_index.fqn)
            super()._process_read_request(f, req, planner)

    target = {"w": torch.zeros(300, 41)}
    torch_dcp.load(target, storage_reader=Own(str(tmp_path), thread_count=2))
    assert asked == ["w"]
    assert_equal(target, {"w": saved["w"]})


def test_a_wrong_target_size_is_torchs_error(tmp_path):
    plain(tmp_path)
    raised = []
    for cls in READERS:
        planner = Boxes()
        planner.resolve_tensor = lambda item: torch.zeros(2, 2)
        reader = cls(str(tmp_path))
        reader.set_up_storage_reader(reader.read_metadata(), True)
        with pytest.raises(AssertionError) as caught:
            reader.read_data(LoadPlan([item_of("w", [0, 0], (0, 0), (3, 3))]), planner)
        raised.append(str(caught.value))
    assert raised[0] == raised[1]


# ---- damage ----


class Replaces(DefaultLoadPlanner):
    """Puts another export's file in place of one when its tensors are asked for."""

    def __init__(self, new: Path, old: Path) -> None:
        super().__init__()
        self.new, self.old, self.committed = new, old, []

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        if self.new.exists():
            self.new.replace(self.old)
        return super().resolve_tensor(read_item)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        self.committed.append(read_item.dest_index.fqn)


def test_a_file_that_is_replaced_during_a_load_is_named(tmp_path):
    """Headers of one export and bytes of another give values of neither."""
    old, new = tmp_path / "model-00001-of-00001.safetensors", tmp_path / "new"
    save_file({"a": torch.ones(4, 5), "b": torch.zeros(5, 4)}, old)
    save_file({"a": torch.zeros(4, 5), "b": torch.ones(5, 4)}, new)
    target = {"a": torch.zeros(4, 5), "b": torch.ones(5, 4)}
    planner = Replaces(new, old)
    with pytest.raises(dcp.CheckpointException, match=r"00001\.safetensors was replaced while"):
        dcp.load(target, planner=planner, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    assert planner.committed == []
    dcp.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    assert_equal(target, {"a": torch.zeros(4, 5), "b": torch.ones(5, 4)})


def test_a_file_that_was_cut_short_is_named(tmp_path):
    plain(tmp_path)
    file = tmp_path / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(dcp.CheckpointException, match=r"model-00001.*cut short"):
        dcp.load(
            {"w": torch.zeros(300, 41)}, storage_reader=HuggingFaceStorageReader(str(tmp_path))
        )


def test_a_file_replaced_after_its_metadata_was_read_is_read_as_it_is(tmp_path):
    saved = plain(tmp_path)
    reader = HuggingFaceStorageReader(str(tmp_path))
    reader.set_up_storage_reader(reader.read_metadata(), True)
    save_file(
        {"before": torch.zeros(1000), "w": saved["w"] + 1},
        tmp_path / "model-00001-of-00002.safetensors",
    )
    planner = Boxes()
    reader.read_data(LoadPlan([item_of("w", [0, 0], (0, 0), (300, 41))]), planner)
    assert_equal(planner.got, [saved["w"] + 1])
    save_file({"other": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(KeyError, match=r"w is not in .*model-00001"):
        reader.read_data(LoadPlan([item_of("w", [0, 0], (0, 0), (300, 41))]), planner)


def test_a_type_that_torch_has_not_is_named(tmp_path):
    header = {"q": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    (tmp_path / "x.safetensors").write_bytes(image(header, b"ab"))
    with pytest.raises(ValueError, match=r"x.safetensors: q is of type F4"):
        HuggingFaceStorageReader(str(tmp_path)).read_metadata()


def accepted_by_package(data: bytes) -> Any:
    try:
        found = deserialize(data)
    except Exception:
        return None
    return {
        name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found
    }


def accepted_by_us(data: bytes) -> Any:
    try:
        tensors, _, _, _ = _native.read_safetensors_header(data)
    except _native.NativeError as error:
        assert error.dcp_code == "CORRUPT"
        return None
    return {
        name: (dtype, shape, data[start : start + length])
        for name, dtype, shape, start, length in tensors
    }


def test_a_name_that_comes_twice_is_refused():
    """[hf-strict]"""
    entry = '"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    data = image(f"{{{entry},{entry}}}".encode())
    assert accepted_by_package(data) is not None
    with pytest.raises(dcp.NativeError, match="tensor a: its name comes twice"):
        _native.read_safetensors_header(data)


def test_mutated_headers_are_accepted_as_by_the_package():
    seeds = [
        {"t": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
         "u": {"dtype": "F16", "shape": [1, 2], "data_offsets": [4, 8]}},
        {"__metadata__": {"format": "pt", "a\u00e9": "\n"},
         "t": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]}},
    ]  # fmt: skip
    marks = b'{}[]":,0123456789.-eE \\u\x80\xff'
    choose = random.Random(11)
    both = theirs_alone = 0
    for _ in range(6000):
        text = bytearray(json.dumps(choose.choice(seeds)).encode())
        for _ in range(choose.randrange(3)):
            at = choose.randrange(len(text))
            change = choose.randrange(3)
            if change == 0:
                text[at] = choose.choice(marks)
            elif change == 1:
                del text[at]
            else:
                text.insert(at, choose.choice(marks))
        data = image(bytes(text), bytes(8))
        theirs, ours = accepted_by_package(data), accepted_by_us(data)
        assert ours is None or theirs is not None, data
        if ours is not None:
            assert ours == theirs
        both += ours is not None
        theirs_alone += ours is None and theirs is not None
    assert both > 2000 and theirs_alone < 20


def load_reported(path: Path, **options: Any) -> dict[str, Any]:
    target = {"w": torch.zeros(300, 41)}
    dcp.load(target, storage_reader=HuggingFaceStorageReader(str(path)), **options)
    assert_equal(target, {"w": elements((300, 41), torch.float32)})
    return dcp.last_report()


def test_the_report_of_a_load_says_that_the_reader_is_native(tmp_path):
    plain(tmp_path)
    dcp.configure(allow_unsafe_objects=False)  # nothing is unpickled
    report = load_reported(tmp_path)
    assert (report["path"], report["reader"], report["reason"]) == ("native", "native", None)
    assert report["planner"].startswith("torch: safetensors")
    assert report["wanted_bytes"] == 300 * 41 * 4 <= report["read_bytes"]
    assert (report["failed"], report["verify"], report["files_count"]) == (False, False, 1)


def test_the_report_of_a_failed_load_names_the_tensors(tmp_path):
    plain(tmp_path)

    class Stops(DefaultLoadPlanner):
        def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
            raise OSError("full")

    target = {"w": torch.zeros(300, 41)}
    with pytest.raises(dcp.LoadException) as caught:
        dcp.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path)), planner=Stops())
    report = dcp.last_report()
    assert report["failed"] and report["partly"] == ["w"] == list(caught.value.partly)
    assert report["reader"] == "native" and report["planner"].startswith("python: ")


def test_checksums_that_the_files_do_not_have_are_refused(tmp_path):
    plain(tmp_path)
    with pytest.raises(dcp.CheckpointException, match="safetensors files carry no checksums"):
        load_reported(tmp_path, verify="strict")


def test_a_reader_with_a_hook_of_its_own_is_reported_as_not_native(tmp_path, monkeypatch):
    plain(tmp_path)
    own = torch_hf.HuggingFaceStorageReader._process_read_request
    monkeypatch.setattr(
        HuggingFaceStorageReader, "_process_read_request",
        lambda self, *args: own(self, *args),
    )  # fmt: skip
    report = load_reported(tmp_path)
    assert report["path"] == "torch" and "_process_read_request" in report["reader"]
