"""Hugging Face exports and consolidation in one process: what readers find, what is refused."""

from __future__ import annotations

import json
import struct
from unittest.mock import Mock

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
NOT_TORCHS = (torch.float8_e8m0fnu,)
"""Torch's reader refuses files that hold one."""


def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 2, (31, 8), generator=generator)
    return {
        **{str(dtype): values.to(dtype) for dtype in DTYPE_NAMES if dtype not in NOT_TORCHS},
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


@pytest.mark.parametrize("step", ["export_create", "export_write"])
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


def test_publishing_that_fails_half_way_keeps_the_new_export(tmp_path):
    """The old one is lost in part: what is whole must not be removed."""
    tensors = {"a": torch.ones(4), "b": torch.full((4,), 2.0)}
    mapping = {"a": 1, "b": 2}
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(tmp_path), mapping))
    stuck = tmp_path / "model-00002-of-00002.safetensors"
    stuck.unlink()
    stuck.mkdir()  # what can not be removed as files are
    with pytest.raises(dcp.CheckpointException, match=r"begin with \.dcp_native-export-"):
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(tmp_path), mapping))
    found = {}
    for path in tmp_path.glob(".dcp_native-export-*.safetensors"):
        found.update(read(tmp_path, path.name))
    same(found, tensors)


def test_what_could_not_be_published_is_not_removed_by_those_who_asked(tmp_path, monkeypatch):
    """Publishing may go on, on its thread, when its caller was interrupted."""

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    def parts():
        return len(list(tmp_path.glob("out*/.dcp_native-export-*.safetensors")))

    monkeypatch.setattr(_native, "export_publish", fail)
    with pytest.raises(BaseException):  # noqa: B017
        dcp.save(state(), storage_writer=HuggingFaceStorageWriter(str(tmp_path / "out1")))
    assert parts() == 1
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in", 1, {"w": torch.ones(4)}, {"w": [0]})
    with pytest.raises(KeyboardInterrupt):
        consolidate_safetensors_files(str(tmp_path / "in"), str(tmp_path / "out2"), {"w": 1})
    assert parts() == 2
    monkeypatch.setattr(HuggingFaceStorageWriter, "_is_shared", lambda self, plans: False)
    writer = HuggingFaceStorageWriter(str(tmp_path / "out3"), save_distributed=True)
    with pytest.raises(BaseException):  # noqa: B017
        dcp.save(state(), storage_writer=writer)
    assert parts() == 3


def test_a_planner_that_keeps_plans_saves_new_values(tmp_path):
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    writer = HuggingFaceStorageWriter(str(tmp_path))
    for i in range(3):
        dcp.save({"w": torch.full((9,), float(i))}, storage_writer=writer, planner=planner)
        same(read(tmp_path), {"w": torch.full((9,), float(i))})


def test_every_type_that_safetensors_takes_is_written(tmp_path):
    tensors = {}
    for dtype in (d for d in vars(torch).values() if isinstance(d, torch.dtype)):
        try:
            tensors[str(dtype)] = torch.arange(16, dtype=torch.uint8).view(dtype)
            save_file({"t": tensors[str(dtype)]}, tmp_path / "theirs")
            with safe_open(tmp_path / "theirs", "pt") as file:
                fits = file.get_slice("t").get_shape() == list(tensors[str(dtype)].shape)
        except Exception:
            fits = False
        if not fits:  # as with two values to a byte
            tensors.pop(str(dtype), None)
    assert str(torch.float8_e8m0fnu) in tensors and str(torch.complex64) in tensors
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    same(read(tmp_path), tensors)


def test_nobody_reads_an_export_that_is_not_published(tmp_path, monkeypatch):
    """Neither while it is written nor when it was killed: what readers take for files is old."""
    dcp.save({"w": torch.ones(9)}, storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    write = _native.export_write
    seen = []

    def look(*args, **kwargs):
        hidden = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
        assert any(ONE in name for name in hidden)
        for cls in (HuggingFaceStorageReader, dcp.HuggingFaceStorageReader):
            target = {"w": torch.zeros(9)}
            torch_dcp.load(target, storage_reader=cls(str(tmp_path)))
            seen.append(target["w"].unique().tolist())
        assert not any(name.endswith(".safetensors") for name in hidden)
        return write(*args, **kwargs)

    monkeypatch.setattr(_native, "export_write", look)
    dcp.save({"w": torch.full((9,), 2.0)}, storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    assert seen == [[1.0], [1.0]]
    same(read(tmp_path), {"w": torch.full((9,), 2.0)})


@pytest.mark.parametrize("saver", [dcp, torch_dcp], ids=["ours", "torch"])
def test_background_saves_are_as_torchs(tmp_path, saver):
    """async_save by a thread: the tensors may change when it has returned."""
    tensors = {"a": torch.arange(100_000.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)}
    wanted = {name: tensor.clone() for name, tensor in tensors.items()}
    mapping = {"a": 1, "b": 2}
    exports = []
    for path, cls in ((tmp_path / "ours", HuggingFaceStorageWriter), (tmp_path / "t", TorchWriter)):
        writer = cls(str(path), mapping, save_distributed=True, enable_consolidation=True)
        future = saver.async_save(
            tensors,
            storage_writer=writer,
            async_checkpointer_type=dcp.AsyncCheckpointerType.THREAD,
        )
        getattr(future, "staging_completion", future).result(60)
        for tensor in tensors.values():
            tensor.zero_()
        future.result(60)
        for name, tensor in tensors.items():
            tensor.copy_(wanted[name])
        index = json.loads((path / INDEX).read_text())
        files = sorted(p.name for p in path.iterdir() if p.is_file())
        exports.append((index["weight_map"], files))
        same({**read(path, files[0]), **read(path, files[1])}, wanted)
    assert exports[0] == exports[1]


def test_objects_are_refused_by_name(tmp_path):
    """[hf-object]"""
    with pytest.raises(dcp.CheckpointException, match="step is not a tensor"):
        dcp.save({"step": 3}, storage_writer=HuggingFaceStorageWriter(str(tmp_path)))
    assert not any(p.name.endswith(".safetensors") for p in tmp_path.iterdir())


@pytest.mark.parametrize("distributed", [False, True])
def test_a_save_of_nothing_leaves_what_is_there(tmp_path, distributed):
    """[hf-empty]"""
    for path, cls in ((tmp_path / "ours", HuggingFaceStorageWriter), (tmp_path / "t", TorchWriter)):
        dcp.save({"w": torch.ones(3)}, storage_writer=cls(str(path), None, 1, distributed))
        before = {p.name: p.read_bytes() for p in path.iterdir()}
        if cls is HuggingFaceStorageWriter:
            with pytest.raises(dcp.CheckpointException, match="no tensor to save"):
                dcp.save({}, storage_writer=cls(str(path), None, 1, distributed))
        else:
            dcp.save({}, storage_writer=cls(str(path), None, 1, distributed))
        after = {p.name: p.read_bytes() for p in path.iterdir() if not p.name.startswith(".")}
        assert (after == before) is (distributed or cls is HuggingFaceStorageWriter)


@pytest.mark.parametrize("mapping", [{}, {"alien": 1}, {"w": 1}])
def test_consolidation_of_nothing_leaves_what_is_there(tmp_path, mapping):
    """[hf-empty]"""
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    if "w" not in mapping:
        write_shard(source, 1, {"w": torch.ones(4)}, {"w": [0]})
    dcp.save({"w": torch.ones(3)}, storage_writer=HuggingFaceStorageWriter(str(out)))
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError, match=f"{source}: no file has any"):
        consolidate_safetensors_files(str(source), str(out), mapping)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


class Halving(dcp.DefaultSavePlanner):
    def resolve_data(self, write_item):
        return super().resolve_data(write_item).half()


def test_a_planner_that_changes_the_type_is_refused_by_name(tmp_path):
    """[hf-dtype]"""
    tensors = {"w": torch.ones(3)}
    dcp.save(tensors, storage_writer=TorchWriter(str(tmp_path / "t")), planner=Halving())
    assert read(tmp_path / "t")["w"].dtype == torch.float16
    with pytest.raises(dcp.CheckpointException, match=r"w: the planner gave torch\.float16"):
        dcp.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(tmp_path / "ours")),
            planner=Halving(),
        )


def test_a_name_that_is_safetensors_own_is_refused(tmp_path):
    with pytest.raises(dcp.CheckpointException, match="__metadata__ for itself"):
        dcp.save(
            {"__metadata__": torch.ones(3)}, storage_writer=HuggingFaceStorageWriter(str(tmp_path))
        )


def test_a_writer_whose_save_failed_may_be_used_on_torchs_path(tmp_path, monkeypatch):
    writer = HuggingFaceStorageWriter(str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(dcp.CheckpointException, match="absent"):
        patch.setattr(writer, "_write", Mock(side_effect=OSError("absent")))
        dcp.save({"old": torch.ones(3)}, storage_writer=writer)
    assert writer._order is not None
    dcp.configure(native=False)
    dcp.save({"w": torch.ones(4)}, storage_writer=writer)
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"] == {"w": ONE}


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
