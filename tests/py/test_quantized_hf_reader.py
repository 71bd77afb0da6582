"""QuantizedHuggingFaceStorageReader against torch's, to the bit, and against values by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import save_file
from test_hf_reader import Boxes, Replaces, item_of
from torch.distributed.checkpoint import quantized_hf_storage as torch_quantized
from torch.distributed.checkpoint.planner import LoadPlan

import dcp_native as dcp
from dcp_native._hf_quant import QuantReads
from dcp_native.quantized_hf_storage import QuantizedHuggingFaceStorageReader

READERS = (torch_quantized.QuantizedHuggingFaceStorageReader, QuantizedHuggingFaceStorageReader)
TARGETS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WEIGHTS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def any_bytes(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def checkpoint(path: Path, files: dict[str, dict[str, torch.Tensor]]) -> str:
    """Files by name, and the index file that names what lies where."""
    for name, tensors in files.items():
        save_file(tensors, path / name)
    weight_map = {fqn: name for name, tensors in files.items() for fqn in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return str(path)


def blocks(
    path: Path,
    shape: tuple[int, int] = (50, 70),
    block: int = 16,
    weight: torch.dtype = torch.float8_e4m3fn,
    scale: torch.dtype = torch.float32,
) -> str:
    """A weight of every byte there is, with its scales in another file."""
    scales = torch.rand([-(-size // block) for size in shape]) * 3 - 1
    return checkpoint(path, {
        "a.safetensors": {"l.weight": any_bytes(shape).view(weight), "n.weight": torch.ones(3)},
        "b.safetensors": {"l.weight_scale_inv": scales.to(scale)},
    })  # fmt: skip


def fp4(path: Path) -> str:
    return checkpoint(path, {
        "a.safetensors": {
            "e_blocks": any_bytes((2, 3, 4, 16)), "e_scales": any_bytes((2, 3, 4), seed=1)
        },
    })  # fmt: skip


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    """Equal, the sign of zeros too; NaN where the other is."""
    assert left.dtype == right.dtype and left.shape == right.shape
    assert torch.equal(left.isnan(), right.isnan())
    kept = ~left.isnan()
    assert torch.equal(left[kept], right[kept])
    assert torch.equal(left[kept].signbit(), right[kept].signbit())


def read(cls: Any, path: str, items: list[Any], out: list[torch.Tensor], **options: Any) -> None:
    reader = cls(path, **options)
    reader.set_up_storage_reader(reader.read_metadata(), True)
    planner, given = Boxes(), iter(out)
    planner.resolve_tensor = lambda item: next(given)
    reader.read_data(LoadPlan(items), planner)


@pytest.fixture
def natively():
    """Torch's way of reading single items is not taken."""
    run = QuantReads.run
    with mock.patch.object(QuantReads, "run", autospec=True, side_effect=run) as called:
        yield
    assert called.called


@pytest.mark.parametrize("module", [torch_dcp, dcp], ids=["torch", "dcp_native"])
@pytest.mark.parametrize("target_dtype", TARGETS, ids=str)
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_blocks_are_torchs(tmp_path, module, target_dtype, weight, natively):
    path = blocks(tmp_path, weight=weight)
    loaded = []
    for load, cls in zip((torch_dcp.load, module.load), READERS, strict=True):
        target = {"l.weight": torch.zeros(50, 70, dtype=target_dtype), "n.weight": torch.zeros(3)}
        load(target, storage_reader=cls(path, target_dtype=target_dtype, block_size=16))
        loaded.append(target)
    assert_same_bits(loaded[0]["l.weight"], loaded[1]["l.weight"])
    assert loaded[1]["n.weight"].eq(1).all()


@pytest.mark.parametrize("scale", TARGETS, ids=str)
@pytest.mark.parametrize("block", [3, 32])
def test_parts_of_blocks_have_their_own_scales(tmp_path, scale, block, natively):
    path = blocks(tmp_path, (70, 90), block, scale=scale)
    boxes = [
        ((0, 0), (70, 90)), ((5, 40), (1, 1)), ((31, 31), (2, 2)), ((13, 0), (50, 90)),
        ((0, 89), (70, 1)), ((32, 32), (32, 32)), ((3, 50), (0, 7)),
    ]  # fmt: skip
    items = [item_of("l.weight", [0, 0], *box) for box in boxes]
    found = []
    for cls in READERS:
        wide = [torch.zeros(count) for _, count in boxes]
        cast = [torch.zeros(count, dtype=torch.bfloat16) for _, count in boxes]
        turned = [torch.zeros(count[::-1]).t() for _, count in boxes]
        spread = [torch.zeros(count[0], 2 * count[1])[:, ::2] for _, count in boxes]
        out = [*wide, *cast, *turned, *spread]
        read(cls, path, items * 4, out, block_size=block)
        found.append(out)
    for left, right in zip(*found, strict=True):
        assert_same_bits(left, right)


def test_blocks_by_hand(tmp_path):
    weight = torch.tensor([[1.0, 2.0, 0.5], [-448.0, 0.0, 0.001953125], [4.0, 8.0, 16.0]])
    path = checkpoint(tmp_path, {"a.safetensors": {
        "l.weight": weight.to(torch.float8_e4m3fn),
        "l.weight_scale_inv": torch.tensor([[2.0, 0.5], [0.25, 10.0]]),
    }})  # fmt: skip
    target = {"l.weight": torch.zeros(3, 3)}
    dcp.load(target, storage_reader=QuantizedHuggingFaceStorageReader(path, block_size=2))
    assert target["l.weight"].tolist() == [
        [2.0, 4.0, 0.25], [-896.0, 0.0, 0.0009765625], [1.0, 2.0, 160.0]
    ]  # fmt: skip


@pytest.mark.parametrize("target_dtype", TARGETS, ids=str)
def test_pairs_of_four_bits_are_torchs(tmp_path, target_dtype, natively):
    path = fp4(tmp_path)
    boxes = [
        ((0, 0, 0), (2, 3, 128)), ((1, 1, 0), (1, 2, 128)), ((0, 0, 33), (2, 3, 50)),
        ((0, 2, 5), (1, 1, 1)), ((0, 0, 32), (2, 2, 64)), ((0, 0, 127), (2, 3, 1)),
        ((0, 1, 31), (2, 1, 2)),
    ]  # fmt: skip
    items = [item_of("e_blocks", [0] * 4, *box) for box in boxes]
    found = []
    for cls in READERS:
        own = [torch.ones(count, dtype=target_dtype) for _, count in boxes]
        turned = [torch.ones(count[::-1]).permute(2, 1, 0) for _, count in boxes]
        read(cls, path, items * 2, [*own, *turned], target_dtype=target_dtype)
        found.append([*own, *turned])
    for left, right in zip(*found, strict=True):
        assert_same_bits(left, right)


def test_pairs_of_four_bits_by_hand_are_loaded_as_a_whole(tmp_path):
    """[mxfp4-rows]"""
    path = checkpoint(tmp_path, {"a.safetensors": {
        "e_blocks": torch.tensor([0x10, 0x32, 0xF4, 0x98], dtype=torch.uint8).view(1, 1, 2, 2),
        "e_scales": torch.tensor([127, 129], dtype=torch.uint8).view(1, 1, 2),
    }})  # fmt: skip
    loaded = []
    for module, cls in zip((torch_dcp, dcp), READERS, strict=True):
        target = {"e_blocks": torch.full((1, 1, 8), 77.0)}
        module.load(target, storage_reader=cls(path))
        loaded.append(target["e_blocks"].flatten().tolist())
    whole = [0.0, 0.5, 1.0, 1.5, 8.0, -24.0, -0.0, -2.0]
    assert loaded[0] == whole[:2] + [77.0] * 6
    assert loaded[1] == whole
    assert math.copysign(1, loaded[1][6]) == -1


@pytest.mark.parametrize("what", ["target", "scales", "hook", "weight"])
def test_what_is_not_known_is_left_to_torch(tmp_path, what, monkeypatch):
    path = blocks(tmp_path, weight=torch.bfloat16 if what == "weight" else torch.float8_e4m3fn)
    if what == "weight":
        path = checkpoint(tmp_path, {"a.safetensors": {
            "l.weight": torch.ones(50, 70, dtype=torch.bfloat16),
            "l.weight_scale_inv": torch.rand(4, 5),
        }})  # fmt: skip
    if what == "scales":
        path = checkpoint(tmp_path, {"a.safetensors": {
            "l.weight": any_bytes((50, 70)).view(torch.float8_e4m3fn),
            "l.weight_scale_inv": torch.ones(4, 5, dtype=torch.int32),
        }})  # fmt: skip
    if what == "hook":
        own = torch_quantized.QuantizedHuggingFaceStorageReader._dequantize_tensor
        monkeypatch.setattr(
            QuantizedHuggingFaceStorageReader, "_dequantize_tensor",
            lambda self, *args, **kwargs: own(self, *args, **kwargs) + 1,
        )  # fmt: skip
    monkeypatch.setattr(QuantReads, "run", mock.Mock(side_effect=AssertionError("natively")))
    dtype = torch.complex64 if what == "target" else torch.float32
    loaded = []
    for cls in READERS:
        target = {"l.weight": torch.zeros(50, 70, dtype=dtype)}
        dcp.load(target, storage_reader=cls(path, target_dtype=dtype, block_size=16))
        loaded.append(target["l.weight"])
    report = dcp.last_report()
    assert report["path"] == "torch" and report["reader"] == f"torch: {report['reason']}"
    more = 1 if what == "hook" else 0
    assert torch.equal((loaded[0] + more).nan_to_num(), loaded[1].nan_to_num())


def test_scales_that_do_not_cover_the_weight_are_torchs_error(tmp_path):
    path = checkpoint(tmp_path, {"a.safetensors": {
        "l.weight": any_bytes((50, 70)).view(torch.float8_e4m3fn),
        "l.weight_scale_inv": torch.rand(3, 5),
    }})  # fmt: skip
    for cls in READERS:
        with pytest.raises(dcp.CheckpointException, match=r"index 3 is out of bounds"):
            torch_dcp.load(
                {"l.weight": torch.zeros(50, 70)}, storage_reader=cls(path, block_size=16)
            )


def test_scales_that_are_replaced_during_a_load_are_named(tmp_path, natively):
    path = blocks(tmp_path)
    new = tmp_path / "new"
    save_file({"l.weight_scale_inv": torch.ones(4, 5)}, new)
    planner = Replaces(new, tmp_path / "b.safetensors")
    reader = QuantizedHuggingFaceStorageReader(path, block_size=16)
    with pytest.raises(dcp.CheckpointException, match=r"b\.safetensors was replaced while"):
        dcp.load({"l.weight": torch.zeros(50, 70)}, planner=planner, storage_reader=reader)
    assert planner.committed == []
