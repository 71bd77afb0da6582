"""Every kind of value, both ways between dcp_native and stock torch, and record by record."""

from __future__ import annotations

import collections
import dataclasses
import io
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, like, value

import dcp_native as dcp

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128,
    torch.complex32, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn,
    torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip
SHAPES = [(), (0,), (3, 0), (5,), (2, 3, 4), (300, 1001), (1 << 19,)]


@dataclasses.dataclass
class Settings:
    """An object that the safe loader does not know."""

    rate: float
    names: list[str]


def make(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype is torch.complex32:
        return value("x", (*shape, 2), torch.float16).view(dtype).reshape(shape)
    return value("x", shape, torch.float32).to(dtype)


def tensors() -> dict[str, torch.Tensor]:
    base = value("base", (6, 8))
    images = value("images", (2, 3, 5, 4))
    complex_ = torch.view_as_complex(value("c", (4, 2)).contiguous())
    shared = value("shared", (64,))
    return {
        **{f"{d}-{s}": make(d, s) for d in DTYPES for s in SHAPES},
        "transposed": base.t(),
        "sliced": base[1:5:2, ::3],
        "expanded": base[:1].expand(6, 8),
        "permuted": images.permute(3, 0, 2, 1),
        "channels_last": images.to(memory_format=torch.channels_last),
        "flipped view": base.flip(0)[2:],
        "offset": base.view(-1)[7:23],
        "big transposed": value("bt", (700, 1000)).t(),
        "parameter": torch.nn.Parameter(base.clone()),
        "conj": complex_.conj(),
        "neg": complex_.conj().imag,
        "shared a": shared[:32],
        "shared b": shared[16:],
        "requires grad": base.clone().requires_grad_(),
        "many dims": value("many", (2,) * 12),
    }


def objects() -> dict[str, object]:
    return {
        "int": 7,
        "big int": 1 << 70,
        "negative": -(1 << 40),
        "float": 1e-3,
        "nan": None,
        "true": True,
        "text": "adam \u00e9\u4e16 \x00",
        "bytes": b"\x00raw",
        "none": None,
        "tuple": (1, (2, "x"), None),
        "empty list": [],
        "list": [1, 2.5, "z"],
        "ordered": [collections.OrderedDict(a=1)],
        "set": {1, 2},
        "dtype": torch.bfloat16,
        "size": torch.Size([1, 2]),
        "tuple of tensors": (value("t0", (3,)), value("t1", (2, 2))),
        "settings": Settings(0.1, ["a", "b"]),
        "long text": "x" * 5000,
        "complex": 1 + 2j,
        "slice": slice(1, 2),
    }


@pytest.fixture(scope="module")
def everything():
    return {
        "tensors": tensors(),
        "objects": objects(),
        "nested": {"ints": {1: {"2": 5}}, "empty": {}},
    }


@pytest.fixture(scope="module")
def ours(everything, tmp_path_factory):
    path = tmp_path_factory.mktemp("ours")
    dcp.save(everything, checkpoint_id=path)
    assert dcp.last_report()["path"] == "native"
    return path


@pytest.fixture(scope="module")
def theirs(everything, tmp_path_factory):
    path = tmp_path_factory.mktemp("theirs")
    torch_dcp.save(everything, checkpoint_id=path)
    return path


def plain(tree):
    """Values as they come back: lazy bits resolved."""
    if isinstance(tree, dict):
        return {k: plain(v) for k, v in tree.items()}
    if isinstance(tree, torch.Tensor):
        return tree.detach().resolve_conj().resolve_neg()
    return tree


def targets(everything):
    blank = like(plain(everything))
    blank["tensors"] = {k: torch.zeros_like(v.contiguous()) for k, v in blank["tensors"].items()}
    return blank


def check(target, everything):
    assert_equal(target["tensors"], plain(everything["tensors"]))
    for key, want in everything["objects"].items():
        got = target["objects"][key]
        if key == "tuple of tensors":
            assert_equal(list(got), list(want), key)
        else:
            assert got == want and type(got) is type(want), key
    assert target["nested"]["ints"][1] == {"2": 5} or target["nested"]["ints"]["1"] == {"2": 5}


@pytest.mark.parametrize("writer", ["ours", "theirs"])
@pytest.mark.parametrize("loader", [dcp, torch_dcp], ids=["in ours", "in torch"])
def test_every_value_comes_back(writer, loader, everything, request):
    path = request.getfixturevalue(writer)
    target = targets(everything)
    loader.load(target, checkpoint_id=path)
    if loader is dcp:
        assert dcp.last_report()["path"] == "native"
    check(target, everything)


def test_the_metadata_is_torchs(everything, tmp_path):
    ours = dcp.save(everything, checkpoint_id=tmp_path / "ours")
    theirs = torch_dcp.save(everything, checkpoint_id=tmp_path / "theirs")
    assert list(ours.state_dict_metadata) == list(theirs.state_dict_metadata)
    for key, want in theirs.state_dict_metadata.items():
        assert ours.state_dict_metadata[key] == want, key
    assert ours.planner_data == theirs.planner_data
    assert list(ours.planner_data) == list(theirs.planner_data)
    hints = {(i.fqn, i.offset): i.index for i in theirs.storage_data}
    assert {(i.fqn, i.offset): i.index for i in ours.storage_data} == hints
    assert ours.storage_meta.checkpoint_id == tmp_path / "ours"
    assert ours.version == theirs.version


def test_each_record_is_a_torch_save_file(ours, everything):
    metadata = torch_dcp.FileSystemReader(ours).read_metadata()
    flat = {f"tensors.{k}": v for k, v in plain(everything["tensors"]).items()}
    for index, info in metadata.storage_data.items():
        with open(ours / info.relative_path, "rb") as file:
            file.seek(info.offset)
            data = file.read(info.length)
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None, index
        if index.fqn in flat:
            got = torch.load(io.BytesIO(data), weights_only=True)
            assert_equal(got, flat[index.fqn].contiguous(), index.fqn)
        else:
            torch.load(io.BytesIO(data), weights_only=False)


def test_the_state_dict_is_not_touched(everything, tmp_path):
    before = {
        k: (v.data_ptr(), v._version, v.requires_grad) for k, v in everything["tensors"].items()
    }
    dcp.save(everything, checkpoint_id=tmp_path)
    after = {
        k: (v.data_ptr(), v._version, v.requires_grad) for k, v in everything["tensors"].items()
    }
    assert before == after


def test_targets_of_other_dtypes_are_cast_as_copy_does(tmp_path):
    saved = {"a": value("a", (40, 30)), "b": value("b", (1 << 19,), torch.float64)}
    dcp.save(saved, checkpoint_id=tmp_path)
    for loader in (dcp, torch_dcp):
        target = {
            "a": torch.zeros(40, 30, dtype=torch.bfloat16),
            "b": torch.zeros(1 << 19, dtype=torch.int32),
        }
        loader.load(target, checkpoint_id=tmp_path)
        assert_equal(target, {"a": saved["a"].bfloat16(), "b": saved["b"].int()}, loader.__name__)


def test_strided_targets_are_filled_in_place(tmp_path):
    saved = {"a": value("a", (40, 30)), "b": value("b", (2, 3, 5, 4)), "c": value("c", (900, 700))}
    dcp.save(saved, checkpoint_id=tmp_path)
    base = torch.zeros(30, 40)
    target = {
        "a": base.t(),
        "b": torch.zeros(2, 3, 5, 4).to(memory_format=torch.channels_last),
        "c": torch.zeros(900, 1400)[:, ::2],
    }
    dcp.load(target, checkpoint_id=tmp_path)
    assert_equal({k: v.contiguous() for k, v in target.items()}, saved)
    assert torch.equal(base.t(), saved["a"])


def test_leaf_that_requires_grad_is_filled_in_place(tmp_path):
    dcp.save({"w": value("w", (4, 4))}, checkpoint_id=tmp_path)
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    dcp.load({"w": parameter}, checkpoint_id=tmp_path)
    assert_equal(parameter.detach(), value("w", (4, 4)))
    assert parameter.requires_grad and parameter.grad is None


def test_quantised_tensors_go_through_torch(tmp_path):
    q = torch.quantize_per_tensor(value("q", (6, 5)), 0.5, 3, torch.quint8)
    dcp.save({"q": q, "w": value("w", (3,))}, checkpoint_id=tmp_path)
    for loader in (dcp, torch_dcp):
        target = {
            "q": torch.quantize_per_tensor(torch.zeros(6, 5), 0.5, 3, torch.quint8),
            "w": torch.zeros(3),
        }
        loader.load(target, checkpoint_id=tmp_path)
        assert torch.equal(target["q"].int_repr(), q.int_repr())
        assert_equal(target["w"], value("w", (3,)))


def test_meta_targets_are_materialised(tmp_path):
    dcp.save({"w": value("w", (4, 4))}, checkpoint_id=tmp_path)
    target = {"w": torch.empty(4, 4, device="meta")}
    dcp.load(target, checkpoint_id=tmp_path)
    assert_equal(target["w"], value("w", (4, 4)))


def test_partial_load_keeps_what_is_absent(tmp_path):
    dcp.save({"w": value("w", (4,)), "x": 1}, checkpoint_id=tmp_path)
    for loader in (dcp, torch_dcp):
        target = {"w": torch.zeros(4), "absent": torch.full((2,), 7.0), "gone": "kept"}
        loader.load(
            target, checkpoint_id=tmp_path, planner=dcp.DefaultLoadPlanner(allow_partial_load=True)
        )
        assert_equal(target["w"], value("w", (4,)))
        assert target["gone"] == "kept" and target["absent"].tolist() == [7.0, 7.0]


def test_without_flattening(tmp_path):
    sd = {"w": value("w", (4,)), "nested": {"a": 1, "t": value("t", (3,))}, "n": 2}
    planner = {"flatten_state_dict": False, "flatten_sharded_tensors": False}
    ours = dcp.save(sd, checkpoint_id=tmp_path / "o", planner=dcp.DefaultSavePlanner(**planner))
    theirs = torch_dcp.save(
        sd, checkpoint_id=tmp_path / "t", planner=dcp.DefaultSavePlanner(**planner)
    )
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.planner_data == theirs.planner_data
    for path in ("o", "t"):
        for loader in (dcp, torch_dcp):
            target = {"w": torch.zeros(4), "nested": None, "n": None}
            loader.load(
                target, checkpoint_id=tmp_path / path, planner=dcp.DefaultLoadPlanner(**planner)
            )
            assert_equal(target, sd)


def test_stateful_values_are_asked_and_told(tmp_path):
    class App:
        def __init__(self, step):
            self.step = step

        def state_dict(self):
            return {"step": self.step, "w": torch.full((3,), float(self.step))}

        def load_state_dict(self, state_dict):
            self.step = state_dict["step"]
            self.w = state_dict["w"]

    dcp.save({"app": App(5)}, checkpoint_id=tmp_path)
    app = App(0)
    dcp.load({"app": app}, checkpoint_id=tmp_path)
    assert app.step == 5 and app.w.tolist() == [5.0] * 3
