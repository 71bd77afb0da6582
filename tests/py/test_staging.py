"""Stagers: what torch's make, made again, in memory that is nobody else's.

Each case runs torch's stager and ours on the same state dict and compares values, types, layout
and which tensors share memory.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint import _state_dict_stager as torch_state_dict_stager
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from dcp_native._state_dict_stager import StateDictStager

DTYPES = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32,
    torch.float64, torch.complex32, torch.complex64, torch.complex128, torch.bool, torch.bfloat16,
    torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e4m3fnuz,
    torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
    torch.bits8, torch.bits16,
]  # fmt: skip


def base() -> torch.Tensor:
    return torch.arange(24.0).reshape(4, 6)


LAYOUTS = {
    "plain": base,
    "scalar": lambda: torch.tensor(3.0),
    "empty": lambda: torch.empty(0, 3),
    "no elements, offset": lambda: base()[4:],
    "transposed": lambda: base().t(),
    "stepped": lambda: base()[1:3, ::2],
    "offset": lambda: base().view(-1)[7:],
    "expanded": lambda: torch.ones(1).expand(5),
    "windows": lambda: base().view(-1).unfold(0, 3, 1),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "other type's view": lambda: base().view(torch.int32),
    "parameter": lambda: torch.nn.Parameter(base()),
    "not a leaf": lambda: base().requires_grad_() * 2,
    "larger storage": lambda: torch.ones(100).resize_(3),
}
"""What torch stages as it should."""
WRONG_IN_TORCH = {
    "conj": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "neg": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "quantised": lambda: torch.quantize_per_tensor(base(), 0.5, 3, torch.qint8),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
}


def memory(tensor: torch.Tensor) -> bytes:
    """All bytes of its storage."""
    return bytes(tensor.untyped_storage().tolist())


def same(got: object, want: object) -> None:
    assert type(got) is type(want)
    if isinstance(want, torch.Tensor):
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
        assert got.storage_offset() == want.storage_offset()
        assert got.requires_grad == want.requires_grad
        assert memory(got) == memory(want)
        same(got.__dict__, want.__dict__)
    elif isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            same(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            same(a, b)
    elif hasattr(want, "__dict__") and not callable(want):
        same(vars(got), vars(want))
    else:
        assert got == want


def tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value, *tensors(value.__dict__)]
    if isinstance(value, dict):
        return [t for child in value.values() for t in tensors(child)]
    if isinstance(value, (list, tuple)):
        return [t for child in value for t in tensors(child)]
    return tensors(vars(value)) if hasattr(value, "__dict__") and not callable(value) else []


def sharing(value: object) -> list[tuple[int, int]]:
    """Pairs of tensors, by their place, that are one object or share one storage."""
    found = list(enumerate(tensors(value)))
    return [
        (i, j, a is b)
        for (i, a), (j, b) in itertools.combinations(found, 2)
        if a.untyped_storage()._cdata == b.untyped_storage()._cdata
    ]


def both(state: object, **options: bool) -> tuple[object, object]:
    ours, torchs = StateDictStager(**options), torch_state_dict_stager.StateDictStager(**options)
    return ours.stage(state), torchs.stage(state)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("share", [False, True])
def test_layouts_are_staged_as_torch_does(kind, share):
    tensor = LAYOUTS[kind]()
    got, want = both({"x": tensor, "again": [tensor, tensor.detach()[None]]}, share_memory=share)
    same(got, want)
    assert sharing(got) == sharing(want) == [(0, 1, True), (0, 2, False), (1, 2, False)]
    ours = {t.untyped_storage()._cdata for t in tensors(got)}
    assert tensor.untyped_storage()._cdata not in ours
    assert all(t.is_shared() == share for t in tensors(got) if t.untyped_storage().nbytes())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_staged_and_may_then_be_overwritten(dtype):
    data = torch.arange(64, dtype=torch.uint8)
    tensor = data.view(dtype)
    before = memory(tensor)
    got, want = both({"x": tensor})
    same(got, want)
    data.fill_(255)
    assert memory(got["x"]) == before


@pytest.mark.parametrize("kind", WRONG_IN_TORCH)
def test_values_that_torch_loses_are_kept(kind):
    """[stager-values]"""
    tensor = WRONG_IN_TORCH[kind]()
    got = StateDictStager().stage({"x": tensor})["x"]
    assert (got.layout, got.dtype, got.shape) == (tensor.layout, tensor.dtype, tensor.shape)
    dense = [t.dequantize() if t.is_quantized else t.to_dense() for t in (got, tensor)]
    assert torch.equal(*dense)
    try:
        lost = torch_state_dict_stager.StateDictStager().stage({"x": tensor})["x"]
        lost = lost.dequantize() if lost.is_quantized else lost.to_dense()
        assert not torch.equal(lost, dense[1]), "no longer different: strike it from the list"
    except RuntimeError:
        pass


@pytest.mark.parametrize("bytes_count", [0, 396])
@pytest.mark.parametrize("share", [False, True])
def test_freed_memory_is_an_error(bytes_count, share):
    """[stager-values]"""
    tensor = torch.ones(100)
    tensor.untyped_storage().resize_(bytes_count)
    stager = StateDictStager(share_memory=share)
    with pytest.raises((ValueError, RuntimeError), match=r"freed|not resizable"):
        stager.stage({"x": tensor})
    assert stager.stage({"y": base()})["y"].equal(base())


@dataclass
class Options:
    name: str
    tensor: torch.Tensor
    parts: list = field(default_factory=list)


class Slotted:
    __slots__ = ("number", "tensor")

    def __init__(self):
        self.tensor, self.number = base(), 7


class Subclass(torch.Tensor):
    """Has memory of its own, as plain tensors have."""


class Reads:
    """Looks at its tensors' values when it is put together again."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __reduce__(self):
        return rebuild, (self.tensor,)


def rebuild(tensor):
    made = Reads(tensor)
    made.total = float(tensor.sum())
    return made


Pair = namedtuple("Pair", "first second")


def nested() -> dict:
    weight, parameter = base(), torch.nn.Parameter(base())
    parameter.note = ["a", weight]
    metadata = OrderedDict(module=weight, buffer=weight[1:])
    metadata._metadata = OrderedDict(version=1)
    inner = [weight, 1]
    inner.append(inner)
    return {
        "weight": weight,
        "parameter": parameter,
        "odict": metadata,
        "tuple": (weight.t(), ("x", None, 1.5, b"y")),
        "unchanged": (1, "x"),
        "object": Options("o", weight[0], [weight]),
        "subclass": base().as_subclass(Subclass),
        "set": {1, 2},
        "default": defaultdict(list, a=[weight]),
        "pair": Pair(weight, 2),
        3: torch.float32,
        "class": Options,
        "bytes": bytearray(b"abc"),
    }


def test_structure_objects_and_aliases_are_torchs():
    state = nested()
    got, want = both(state)
    same(got, want)
    assert sharing(got) == sharing(want) and len(sharing(got)) > 20
    assert got["unchanged"] is state["unchanged"]
    assert got["object"] is not state["object"]
    state["object"].parts.append(1)
    state["bytes"][0] = 0
    assert len(got["object"].parts) == 1 and got["bytes"] == b"abc"
    assert got["odict"]._metadata is not state["odict"]._metadata


def test_containers_that_hold_themselves():
    loop: list = [base()]
    loop.append((loop, {"loop": loop}))
    got = StateDictStager().stage(loop)
    assert got is not loop and got[1][0] is got and got[1][1]["loop"] is got


def test_slots_are_staged():
    original = Slotted()
    got = StateDictStager().stage([original])[0]
    assert got.number == 7 and got.tensor.equal(base()) and got.tensor is not original.tensor


def test_an_object_that_looks_at_its_tensors_sees_their_values():
    tensor = base()
    got = StateDictStager().stage({"before": tensor, "reads": Reads(tensor)})
    assert got["reads"].total == float(tensor.sum())
    assert got["reads"].tensor is got["before"]


def test_an_object_that_can_not_be_copied_raises_what_it_raises_in_torch():
    for bad in (threading.Lock(), (i for i in ())):
        errors = []
        for cls in (StateDictStager, torch_state_dict_stager.StateDictStager):
            with pytest.raises(TypeError) as caught:
                cls().stage({"x": base(), "bad": bad})
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_keep_placement_and_mesh(mesh):
    """[stager-mesh]"""
    original = distribute_tensor(base(), mesh, [Shard(0)])
    parameter = torch.nn.Parameter(original)
    parameter.note = "n"
    got, want = both({"d": original, "p": parameter, "local": original.to_local()})
    for key in ("d", "p"):
        assert type(got[key]) is type(want[key]) is DTensor
        assert got[key]._spec == want[key]._spec == original._spec
        assert got[key].requires_grad == want[key].requires_grad
        assert vars(got[key]) == vars(want[key])
        assert got[key].device_mesh is mesh and want[key].device_mesh is not mesh
        assert got[key].to_local().equal(base())
    assert got["local"].data_ptr() == got["d"].to_local().data_ptr()
    with torch.no_grad():
        original.to_local().fill_(-1)
    assert got["d"].to_local().equal(base())


def test_a_collective_that_is_not_waited_for_yet_is_staged_as_its_result():
    """[stager-values]"""
    got = StateDictStager().stage({"x": AsyncCollectiveTensor(base())})["x"]
    assert type(got) is torch.Tensor and got.equal(base())
