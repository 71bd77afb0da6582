"""Hugging Face exports and consolidation in one process: what readers find, what is refused."""

from __future__ import annotations

import json
import struct

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter as TorchWriter

import dcp_native as dcp
from dcp_native import _native
from dcp_native._consolidate_hf_safetensors import consolidate_safetensors_files
from dcp_native._hf_layout import DTYPE_NAMES
from dcp_native.hf_storage import HuggingFaceStorageWriter

ONE = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 2, (31, 8), generator=generator)
    return {
        **{str(dtype): values.to(dtype) for dtype in DTYPE_NAMES},
        "turned": torch.arange(600.0).reshape(20, 30).t(),
        "every_second": torch.arange(100)[::2],
        "expanded": torch.tensor([1.5]).expand(7),
        "conjugate": torch.complex(torch.ones(4), torch.arange(4.0)).conj(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(3, 0),
        "large": torch.arange(3_000_001, dtype=torch.float32),
        "parameter": torch.nn.Parameter(torch.ones(5)),
    }


def read(path, name=ONE) -> dict[str, torch.Tensor]:
    with safe_open(path / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def same(found, wanted) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        tensor = tensor.detach().resolve_conj().contiguous()
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        assert found[name].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


@pytest.mark.parametrize("save", [dcp.save, torch_dcp.save], ids=["ours", "torch"])
@pytest.mark.parametrize("distributed", [False, True])
def test_what_safetensors_and_torch_read_is_what_was_saved(tmp_path, save, distributed):
    """[hf-one-pass]"""
    writer = HuggingFaceStorageWriter(
        str(tmp_path), save_distributed=distributed, enable_consolidation=distributed
    )
    save(state(), storage_writer=writer)
    assert sorted(p.name for p in tmp_path.iterdir()) == [ONE, INDEX]
    same(read(tmp_path), state())
    wanted = {k: v.detach() for k, v in state().items() if k not in ("expanded", "conjugate")}
    target = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    torch_dcp.load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    same(target, wanted)


def test_the_data_begins_on_a_page_and_tensors_are_aligned(tmp_path):
    dcp.save(state(), storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    image = (tmp_path / ONE).read_bytes()
    (length,) = struct.unpack("<Q", image[:8])
    assert (8 + length) % 4096 == 0
    header = json.loads(image[8 : 8 + length])
    assert header.pop("__metadata__")["format"] == "pt"
    for name, entry in header.items():
        assert entry["data_offsets"][0] % state()[name].element_size() == 0


def test_names_follow_the_mapping_as_in_torch(tmp_path):
    tensors = {name: torch.full((4,), float(i)) for i, name in enumerate("abcd")}
    mapping = {"a": 2, "b": 1, "c": 3, "d": 2}
    for path, cls in ((tmp_path / "ours", HuggingFaceStorageWriter), (tmp_path / "t", TorchWriter)):
        torch_dcp.save(tensors, storage_writer=cls(str(path), fqn_to_index_mapping=mapping))
    ours, torchs = (json.loads((tmp_path / side / INDEX).read_text()) for side in ("ours", "t"))
    assert ours == torchs


def test_former_exports_go_and_other_files_stay(tmp_path):
    """[hf-replaced]"""
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"the user's own")
    mapping = {"a": 1, "b": 3}
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(tmp_path), mapping))
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["config.json", ONE, "model.safetensors", INDEX]


@pytest.mark.parametrize("step", ["export_create", "export_write", "export_publish"])
def test_a_failure_at_any_step_leaves_the_export_before(tmp_path, monkeypatch, step):
    dcp.save(state(), storage_writer=HuggingFaceStorageWriter(str(tmp_path)))

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_native, step, fail)
    newer = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    with pytest.raises(dcp.CheckpointException, match="No space left"):
        dcp.save(newer, storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    monkeypatch.undo()
    same(read(tmp_path), state())
    left = [p.name for p in tmp_path.iterdir() if p.name not in (ONE, INDEX)]
    assert all(name.startswith(".dcp_native-export-probe-") for name in left)
    dcp.save(newer, storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [ONE, INDEX]


def test_a_planner_that_keeps_plans_saves_new_values(tmp_path):
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    writer = HuggingFaceStorageWriter(str(tmp_path))
    for i in range(3):
        dcp.save({"w": torch.full((9,), float(i))}, storage_writer=writer, planner=planner)
        same(read(tmp_path), {"w": torch.full((9,), float(i))})


def test_objects_are_refused_by_name(tmp_path):
    """[hf-object]"""
    with pytest.raises(dcp.CheckpointException, match="step is not a tensor"):
        dcp.save({"step": 3}, storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    assert not any(p.name.endswith(".safetensors") for p in tmp_path.iterdir())


def write_shard(path, number, tensors, offsets) -> None:
    info = {name: {"saved_offsets": at} for name, at in offsets.items()}
    file = path / f"shard-{number:05d}-model-00001-of-00001.safetensors"
    save_file(tensors, file, metadata={"DCP_SHARDING_INFO": json.dumps(info)})


def test_integers_and_scalars_are_consolidated_and_holes_refused(tmp_path):
    """[hf-format]"""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    whole = torch.arange(60, dtype=torch.int32).reshape(6, 10)
    first = {"w": whole[:, :3].contiguous(), "n": torch.tensor(5)}
    write_shard(source, 1, first, {"w": [0, 0], "n": []})
    write_shard(source, 2, {"w": whole[:, 3:].contiguous()}, {"w": [0, 3]})
    mapping = {"n": 1, "w": 1, "tied": 1}
    consolidate_safetensors_files(str(source), str(out), mapping)
    same(read(out), {"w": whole, "n": torch.tensor(5)})
    (source / "shard-00001-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(_native.NativeError, match="42 of its 60") as caught:
        consolidate_safetensors_files(str(source), str(out), mapping)
    assert caught.value.dcp_code == "HOLE"
    same(read(out), {"w": whole, "n": torch.tensor(5)})
    assert sorted(p.name for p in out.iterdir()) == [ONE, INDEX]


@pytest.mark.parametrize("said", [[-1], [1 << 70], ["0"], [0, 0], None, [True]])
def test_hostile_offsets_are_refused_by_name(tmp_path, said):
    source = tmp_path / "in"
    source.mkdir()
    write_shard(source, 1, {"w": torch.ones(4)}, {"w": said})
    with pytest.raises(ValueError, match=r"shard-00001.*: w: "):
        consolidate_safetensors_files(str(source), str(tmp_path / "out"), {"w": 1})
    assert not (tmp_path / "out").exists()


def test_the_report_of_a_save_says_that_the_writer_is_native(tmp_path):
    dcp.save({"w": torch.ones(3)}, storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    report = dcp.last_report()
    assert report["writer"] == "native" and report["planner"].startswith("torch: safetensors")
    dcp.configure(native=False)
    dcp.save({"w": torch.ones(3)}, storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    assert dcp.last_report()["writer"] == "torch: config.native is off"
