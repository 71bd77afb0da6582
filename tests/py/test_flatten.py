"""Plans of a save against torch's DefaultSavePlanner: flattening, items, boxes, bytes."""

from __future__ import annotations

import io
from collections import OrderedDict, UserDict, UserList
from collections.abc import Mapping

import plans
import pytest
import torch
import torch.distributed as dist
from plans import compare_plans, fake_rank, load_record, torch_planner
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardedProperties
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from dcp_native import _native


class ReversedMapping(Mapping):
    """A mapping that is no dict and has an order of its own."""

    def __init__(self, content: dict) -> None:
        self.content = content

    def __getitem__(self, key: object) -> object:
        return self.content[key]

    def __iter__(self):
        return iter(reversed(list(self.content)))

    def __len__(self) -> int:
        return len(self.content)


class SkippingDict(dict):
    """A dict whose items() are not what it stores."""

    def items(self):
        return [(k, v) for k, v in super().items() if not str(k).startswith("_")]


class Text(str):
    def __str__(self) -> str:
        return "text:" + str.__str__(self)


def seeded(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def moved_order() -> OrderedDict:
    d = OrderedDict((k, seeded(2, seed=i)) for i, k in enumerate("abc"))
    d.move_to_end("a")
    return d


NESTED = {
    "empty": {},
    "only_empty_dicts": {"a": {"b": {}}, "c": {}},
    "scalars": {
        "i": 7,
        "f": 0.5,
        "nan": float("nan"),
        "s": "x",
        "n": None,
        "b": True,
        "big": 1 << 90,
    },
    "bytes": {"b": b"\x00\xff", "e": b""},
    "nested": {"a": {"b": {"c": seeded(2, 3)}}, "x": seeded(4)},
    "int keys": {0: seeded(1), "s": {1: {2: seeded(2)}, -5: 3}},
    "odd keys": {None: 1, (1, 2): seeded(3), 1.5: "x", True: 2},
    "str subclass key": {Text("k"): seeded(2)},
    "not ascii": {"ключ": {"層.0": seeded(2)}, "": {"": 1}, "a..b": 1},
    "list of tensors": {"l": [seeded(1), seeded(2), 3, "x"]},
    "list of scalars": {"l": [1, 2.0, "x", None, (1, 2)]},
    "empty list": {"l": [], "ll": [[]], "lll": [[], [[]]]},
    "list of dicts": {"l": [{}, {"a": 1}, [1, [2, [seeded(1)]]], [3]]},
    "list with an empty dict": {"l": [{}], "m": [1, [{}], 2]},
    "tuples": {"t": (1, 2), "u": (), "v": ([1], {"a": 2}), "w": [(1, 2)]},
    "tuple of tensors": {"t": (1, [2, (3,)])},
    "ordered": OrderedDict(b=1, a=OrderedDict(z=seeded(2), y=2)),
    "moved order": {"o": moved_order()},
    "user dict": {"u": UserDict({"a": seeded(2), "b": UserDict()}), "v": [UserDict(c=1)]},
    "own mapping": {"m": ReversedMapping({"a": 1, "b": seeded(2), "c": {"d": 3}})},
    "overridden items": {"d": SkippingDict(a=1, _b=seeded(1), c=seeded(2))},
    "user list is a leaf": {"l": UserList([1, 2])},
    "set and others": {
        "s": {1, 2},
        "c": 1j,
        "r": range(3),
        "d": torch.float32,
        "z": torch.Size([2, 3]),
    },
    "optimizer": {
        "state": {i: {"step": seeded(), "exp_avg": seeded(3, 2)} for i in range(3)},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0, 1, 2]}],
    },
    "shared": {"a": [1, 2], "b": {"c": "x" * 3000, "d": ["y" * 700] * 3}},
    "deep": {"a": [[[[[[{"b": [[seeded(2)]]}]]]]]]},
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("flatten_sharded", [True, False])
def test_plan_of_nested_containers_is_torchs(
    name: str, flatten: bool, flatten_sharded: bool
) -> None:
    state_dict = NESTED[name]
    options = {"flatten_state_dict": flatten, "flatten_sharded_tensors": flatten_sharded}
    if flatten or flatten_sharded:
        compare_plans(state_dict, **options)
        return
    # Without any flattening torch keeps keys that are no strings; ours are their text.
    _, items = torch_planner(state_dict, **options)
    ours = _native._debug_plan(state_dict, **options)
    assert [item[0] for item in ours["items"]] == [str(item.index.fqn) for item in items]


DTYPES = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.bfloat16,
    torch.complex32,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
    torch.bits8,
    torch.bits16,
    torch.bits1x8,
    torch.bits2x4,
    torch.bits4x2,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0, 2), (2, 3, 4)], ids=str)
def test_every_dtype_is_read_from_memory(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.empty(shape, dtype=dtype)
    tensor.untyped_storage().copy_(
        torch.arange(tensor.untyped_storage().nbytes(), dtype=torch.uint8).untyped_storage()
    )
    _, items = torch_planner({"t": tensor})
    ours = _native._debug_plan({"t": tensor}, with_data=True)
    assert [item[:7] for item in ours["items"]] == [plans.shown(item) for item in items]
    assert ours["payloads"] == [plans.raw_bytes_of(tensor)]
    assert ours["records_count"] == ours["python_count"] == 0


VIEWS = {
    "transposed": seeded(4, 6).t(),
    "narrowed": seeded(10, 4)[3:7],
    "columns": seeded(6, 8)[:, 2:5],
    "steps": seeded(12)[1::3],
    "permuted": seeded(2, 3, 4).permute(2, 0, 1),
    "expanded": seeded(3, 1).expand(3, 5),
    "zero stride scalar": seeded().expand(4),
    "flipped by index": seeded(5)[[4, 2, 0]],
    "channels last": seeded(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "one row": seeded(4, 4).t()[1:2],
    "empty slice": seeded(4, 4)[2:2],
    "conj": torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "neg": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "parameter": torch.nn.Parameter(seeded(3, 3)),
    "frozen parameter": torch.nn.Parameter(seeded(3, 3), requires_grad=False),
    "requires grad": seeded(2).requires_grad_(),
    "not a leaf": seeded(2).requires_grad_() * 2,
    "0-d view": seeded(3)[1],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("grad", [True, False])
def test_views_and_parameters_give_their_row_major_value(name: str, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        ours = compare_plans({"t": VIEWS[name]})
    assert ours["copied_count"] == (name in ("conj", "neg"))
    assert ours["records_count"] == 0


def test_names_are_unique_or_the_plan_is_refused() -> None:
    for state_dict in (
        {"a.b": 1, "a": {"b": 2}},
        {"a": {1: 1, "1": 2}},
        {"l": [seeded(1)], "l.0": 1},
    ):
        with pytest.raises(ValueError, match=r"^duplicated flatten key ") as torchs:
            torch_planner(state_dict)
        with pytest.raises(ValueError, match=r"^duplicated flatten key ") as ours:
            _native._debug_plan(state_dict)
        assert str(ours.value) == str(torchs.value)


def test_containers_that_hold_themselves_are_refused_not_recursed_into() -> None:
    endless: dict = {}
    endless["again"] = endless
    loop: list = [seeded(1)]
    loop.insert(0, loop)
    for state_dict in ({"a": endless}, {"l": loop}):
        with pytest.raises(ValueError, match="nests containers more than 256 deep"):
            _native._debug_plan(state_dict)


def test_a_dict_that_grows_while_it_is_walked_is_an_error() -> None:
    state_dict: dict = {}

    class Growing(dict):
        def items(self):
            state_dict["later"] = 1
            return super().items()

    state_dict["a"] = Growing(b=1)
    with pytest.raises(RuntimeError, match="changed size during iteration"):
        _native._debug_plan(state_dict)


def test_exceptions_of_a_mapping_come_through() -> None:
    class Broken(UserDict):
        def items(self):
            raise KeyError("broken on purpose")

    with pytest.raises(KeyError, match="broken on purpose"):
        _native._debug_plan({"a": Broken(b=1)})


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        1 << 200,
        2.5,
        "x" * 5000,
        "\x00é層",
        b"\x00" * 300,
        None,
        True,
        [],
        {},
        [1, [2, {"a": (None,)}]],
    ],
    ids=lambda value: repr(value)[:20],
)
def test_object_records_are_what_torch_save_would_hold(value: object) -> None:
    ours = _native._debug_plan({"v": (value,)}, with_data=True)
    record = ours["payloads"][0]
    reference = io.BytesIO()
    torch.save((value,), reference)
    assert torch.load(io.BytesIO(record), weights_only=True) == (value,)
    assert torch.load(io.BytesIO(record), weights_only=False) == (value,)
    assert reference.getvalue()[:4] == record[:4] == b"PK\3\4"
    assert ours["items"][0][7] == len(record)


def test_objects_that_refer_to_themselves_are_left_to_torch_save() -> None:
    loop: list = [1]
    loop.append(loop)
    ours = _native._debug_plan({"l": (loop,)}, with_data=True)
    (loaded,) = load_record(ours["payloads"][0])
    assert loaded[0] == 1 and loaded[1] is loaded


# ---- tensors that are not plain memory ----


def test_quantised_tensors_become_records_of_torch_save() -> None:
    tensor = torch.quantize_per_tensor(seeded(20, 3), 0.5, 3, torch.qint8)
    ours = compare_plans({"q": tensor[2:9]})
    loaded = load_record(ours["payloads"][0])
    assert torch.equal(loaded, tensor[2:9]) and loaded.q_scale() == 0.5
    assert len(ours["payloads"][0]) < 4000  # the view, not the storage behind it
    assert ours["records_count"] == 1


class Sub(torch.Tensor):
    pass


def test_subclasses_become_records_of_torch_save() -> None:
    tensor = seeded(3, 4).as_subclass(Sub)
    ours = _native._debug_plan({"s": tensor}, with_data=True)
    assert ours["items"][0][:7] == ("s", "tensor", "float32", (3, 4), (0, 0), (3, 4), False)
    assert torch.equal(load_record(ours["payloads"][0]), tensor)
    assert (ours["records_count"], ours["python_count"]) == (1, 1)


def test_tensors_without_data_are_refused_by_name() -> None:
    freed = seeded(4)
    freed.untyped_storage().resize_(0)
    sparse = torch.eye(3).to_sparse()
    nested = torch.nested.nested_tensor([seeded(2), seeded(3)])
    jagged = torch.nested.nested_tensor([seeded(2), seeded(3)], layout=torch.jagged)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        fake = torch.empty(3)
    for tensor, error, text in (
        (
            torch.empty(3, device="meta"),
            NotImplementedError,
            "'x.y'.*Cannot copy out of meta tensor; no data!",
        ),
        (fake, NotImplementedError, "'x.y'.*FakeTensor"),
        (freed, RuntimeError, "'x.y'.*no memory"),
        (sparse, NotImplementedError, "'x.y'.*layout.*sparse"),
        (nested, RuntimeError, "Nested"),
        (jagged, (NotImplementedError, TypeError, ValueError, RuntimeError), "."),
    ):
        with pytest.raises(error, match=text):
            _native._debug_plan({"x": {"y": tensor}})


def test_an_empty_meta_tensor_has_nothing_to_copy() -> None:
    ours = _native._debug_plan({"x": torch.empty(0, 3, device="meta")})
    assert ours["items"][0][:6] == ("x", "tensor", "float32", (0, 3), (0, 0), (0, 3))


# ---- objects that describe themselves ----


class TwoChunks:
    """Not a tensor; writes an object under its name."""

    def __create_write_items__(self, fqn: str, obj: object) -> list[WriteItem]:
        return [WriteItem(index=MetadataIndex(fqn), type=WriteItemType.BYTE_IO)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TwoChunks)


class Halves(torch.Tensor):
    """A tensor that saves itself as two shards of a larger one."""

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Halves:
        return data.as_subclass(cls)

    def __create_write_items__(self, fqn: str, obj: object) -> list[WriteItem]:
        rows, columns = self.shape
        half = rows // 2
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size([start + 10, 0])),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(
                        torch.Size([start + 10, 0]), torch.Size([half, columns])
                    ),
                    properties=TensorProperties(dtype=self.dtype, requires_grad=True),
                    size=torch.Size([rows + 10, columns]),
                ),
            )
            for start in (0, half)
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        start = index.offset[0] - 10
        plain = self.as_subclass(torch.Tensor)
        return plain[start : start + self.shape[0] // 2]


def test_objects_with_hooks_decide_for_themselves() -> None:
    ours = compare_plans(
        {"a": Halves(seeded(6, 4)), "b": TwoChunks(), "c": {"d": Halves(seeded(2, 1))}}
    )
    assert [item[1] for item in ours["items"]] == ["shard", "shard", "bytes", "shard", "shard"]
    assert ours["python_count"] == 5 and ours["records_count"] == 0


def test_a_hook_on_a_plain_tensor_is_asked_too() -> None:
    tensor = seeded(4, 2)
    tensor.__create_write_items__ = lambda fqn, obj: []  # type: ignore[attr-defined]
    assert torch_planner({"t": tensor})[1] == []
    ours = _native._debug_plan({"t": tensor})
    assert ours["items"] == [] and ours["names"] == [("t", ("t",))]


def test_an_item_under_another_name_is_refused() -> None:
    class Stray:
        def __create_write_items__(self, fqn: str, obj: object) -> list[WriteItem]:
            return [WriteItem(index=MetadataIndex("elsewhere"), type=WriteItemType.BYTE_IO)]

    with pytest.raises(ValueError, match="Could not find FQN: 'elsewhere'"):
        _native._debug_plan({"s": Stray()})


# ---- distributed tensors on four fake ranks ----


def local_tensor(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple, seed: int = 0
) -> torch.Tensor:
    sizes, _ = compute_local_shape_and_global_offset(shape, mesh, placements)
    return seeded(*sizes, seed=seed)


def dtensor(
    shape: tuple[int, ...], mesh: DeviceMesh, *placements: object, param: bool = False
) -> DTensor:
    stride = torch.empty(shape, device="meta").stride()
    if mesh.get_coordinate() is None:
        local = torch.empty(0)
    else:
        local = local_tensor(shape, mesh, placements)
    tensor = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return torch.nn.Parameter(tensor) if param else tensor


def strided(dim: int, split_factor: int) -> _StridedShard:
    return _StridedShard(dim, split_factor=split_factor)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("grad", [True, False])
def test_dtensor_boxes_are_torchs(rank: int, grad: bool) -> None:
    with fake_rank(rank, 4), torch.set_grad_enabled(grad):
        line = init_device_mesh("cpu", (4,))
        square = init_device_mesh("cpu", (2, 2))
        column = init_device_mesh("cpu", (4, 1))
        pair = DeviceMesh("cpu", [0, 2])
        native = {
            "even": dtensor((8, 3), line, Shard(0)),
            "uneven": dtensor((10, 3), line, Shard(0)),
            "some empty": dtensor((5, 3), line, Shard(0)),
            "most empty": dtensor((1, 3), line, Shard(0)),
            "no rows": dtensor((0, 3), line, Shard(0)),
            "columns": dtensor((3, 10), line, Shard(1)),
            "replicate": dtensor((3, 2), line, Replicate()),
            "one element": dtensor((), line, Replicate()),
            "parameter": dtensor((8, 2), line, Shard(0), param=True),
            "hsdp": dtensor((7, 2), square, Replicate(), Shard(0)),
            "2-D": dtensor((5, 7), square, Shard(0), Shard(1)),
            "2-D swapped": dtensor((5, 7), square, Shard(1), Shard(0)),
            "same dim twice": dtensor((7, 2), square, Shard(0), Shard(0)),
            "same dim twice, few": dtensor((2, 2), square, Shard(0), Shard(0)),
            "same dim twice, one": dtensor((1, 2), square, Shard(0), Shard(0)),
            "size one mesh dim": dtensor((9, 2), column, Shard(0), Shard(0)),
            "3-D": dtensor((3, 4, 5), square, Shard(2), Replicate()),
            "submesh": dtensor((6, 2), pair, Shard(0)),
            "replicated submesh": dtensor((6, 2), pair, Replicate()),
        }
        asked = {
            "strided": dtensor((8, 4), square, strided(0, 2), Shard(0)),
            "strided uneven": dtensor((9, 4), square, strided(0, 2), Shard(0)),
        }
        ours = compare_plans({"model": {**native, **asked}})
        assert ours["python_count"] == len(asked)
        assert [item[0] for item in ours["items"] if item[7]] == []
        assert ours["records_count"] == ours["copied_count"] == 0
        in_pair = pair.get_coordinate() is not None
        assert ours["dtensors_count"] == len(native) - (0 if in_pair else 2)
        assert len(ours["names"]) == len(native) + len(asked)


@pytest.mark.parametrize("rank", range(3))
def test_random_dtensor_boxes_are_torchs(rank: int) -> None:
    generator = torch.Generator().manual_seed(1234)

    def pick(n: int) -> int:
        return int(torch.randint(0, n, (1,), generator=generator))

    with fake_rank(rank * 5, 12):
        meshes = [init_device_mesh("cpu", shape) for shape in ((12,), (3, 4), (2, 3, 2), (6, 2))]
        state_dict = {}
        for i in range(120):
            mesh = meshes[pick(len(meshes))]
            shape = tuple(pick(30) for _ in range(1 + pick(3)))
            placements = [
                Replicate() if pick(3) == 0 else Shard(pick(len(shape))) for _ in range(mesh.ndim)
            ]
            state_dict[f"t{i}"] = dtensor(shape, mesh, *placements)
        ours = compare_plans(state_dict)
        assert ours["dtensors_count"] == 120


def test_dtensors_with_partial_placements_raise_torchs_text() -> None:
    with fake_rank(1, 4):
        mesh = init_device_mesh("cpu", (4,))
        tensor = DTensor.from_local(seeded(2, 2), mesh, [Partial()], run_check=False)
        with pytest.raises(ValueError) as torchs:
            torch_planner({"p": tensor})
        with pytest.raises(ValueError) as ours:
            _native._debug_plan({"p": tensor})
        assert str(ours.value) == str(torchs.value)
        outside = DTensor.from_local(
            seeded(2, 2), DeviceMesh("cpu", [0, 2]), [Partial()], run_check=False
        )
        compare_plans({"p": outside})


class ShardSubclass(Shard):
    pass


def test_unusual_dtensors_are_described_by_torch() -> None:
    with fake_rank(2, 4):
        mesh = init_device_mesh("cpu", (4,))
        wrapper = LocalShardsWrapper([seeded(2, 4), seeded(3, 4)], [(4, 0), (6, 0)])
        wrapped = DTensor.from_local(wrapper, mesh, [Shard(0)], run_check=False)
        state_dict = {
            "wrapped": wrapped,
            "bare wrapper": wrapper,
            "subclass local": DTensor.from_local(
                seeded(2, 4).as_subclass(Sub), mesh, [Shard(0)], run_check=False
            ),
            "own placement": dtensor((8, 2), mesh, ShardSubclass(0)),
        }
        ours = compare_plans(state_dict)
        assert ours["dtensors_count"] == 0
        assert ours["records_count"] == 1


def test_a_padded_local_tensor_is_written_as_torch_writes_it() -> None:
    with fake_rank(3, 4):
        mesh = init_device_mesh("cpu", (4,))
        padded = DTensor.from_local(
            seeded(3, 2),
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size((10, 2)),
            stride=(2, 1),
        )
        ours = compare_plans({"t": padded})
        assert ours["items"][0][5] == (1, 2)
        assert torch.equal(load_record(ours["payloads"][0]), padded.to_local())


def test_conjugated_and_strided_locals() -> None:
    with fake_rank(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        state_dict = {
            "conj": DTensor.from_local(
                torch.tensor([1 + 2j, 3j]).conj(), mesh, [Shard(0)], run_check=False
            ),
            "strided": DTensor.from_local(seeded(4, 6).t(), mesh, [Shard(1)], run_check=False),
            "expanded": DTensor.from_local(
                seeded(1, 6).expand(3, 6), mesh, [Shard(0)], run_check=False
            ),
        }
        ours = compare_plans(state_dict)
        assert ours["copied_count"] == 1 and ours["records_count"] == 0


def sharded_tensor(
    shape: tuple[int, int], cuts: list[tuple[int, int, int]], dtype: torch.dtype = torch.float32
) -> ShardedTensor:
    """Row shards (start, rows, rank); the local ones get data."""
    metadata = [
        ShardMetadata([start, 0], [rows, shape[1]], f"rank:{rank}/cpu")
        for start, rows, rank in cuts
    ]
    local = [
        LocalShard(seeded(rows, shape[1], dtype=dtype, seed=start).requires_grad_(), shard)
        for shard, (start, rows, rank) in zip(metadata, cuts, strict=True)
        if rank == dist.get_rank()
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        local,
        ShardedTensorMetadata(
            metadata,
            torch.Size(shape),
            ShardedProperties(dtype=dtype, memory_format=torch.preserve_format, requires_grad=True),
        ),
    )


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("flatten_sharded", [True, False])
def test_sharded_tensors_are_described_by_torch(
    rank: int, flatten: bool, flatten_sharded: bool
) -> None:
    with fake_rank(rank, 3):
        st = sharded_tensor((6, 4), [(0, 2, 0), (2, 3, 1), (5, 1, 1)])
        state_dict = {"st": st, "plain": seeded(2)}
        if flatten:
            state_dict = {"model": state_dict, "l": [1, sharded_tensor((4, 2), [(0, 4, 1)])]}
        ours = compare_plans(
            state_dict, flatten_state_dict=flatten, flatten_sharded_tensors=flatten_sharded
        )
        assert ours["records_count"] == 0


@pytest.mark.parametrize("rank", range(2))
def test_sharded_tensors_of_sharded_tensors_are_flattened(rank: int) -> None:
    with fake_rank(rank, 2):
        inner = sharded_tensor((4, 4), [(0, 2, 0), (2, 2, 1)])
        outer_shard = LocalShard(inner, ShardMetadata([0, 0], [4, 4], f"rank:{rank}/cpu"))
        outer = ShardedTensor._init_from_local_shards_and_global_metadata(
            [LocalShard(seeded(4, 4).requires_grad_(), outer_shard.metadata)],
            ShardedTensorMetadata(
                [outer_shard.metadata, ShardMetadata([4, 0], [4, 4], f"rank:{1 - rank}/cpu")],
                torch.Size([8, 4]),
                ShardedProperties(dtype=torch.float32, requires_grad=True),
            ),
        )
        outer._local_shards[0] = outer_shard
        ours = compare_plans({"a": {"outer": outer}, "b": seeded(1)})
        assert ours["items"][0][3:6] == ((8, 4), (2 * rank, 0), (2, 4))


def test_failed_allocations_raise_and_leak_nothing() -> None:
    state_dict = {"a": {"b": seeded(4, 4).t(), "c": [1, 2]}, "d": torch.float32, "e": "text" * 300}
    _native._debug_plan(state_dict)
    before = _native.live_bytes()
    failures = 0
    for n in range(1, 200):
        _native._debug_fail_after(n)
        try:
            _native._debug_plan(state_dict, show=False)
            break
        except (MemoryError, RuntimeError):
            failures += 1
        finally:
            _native._debug_fail_after(0)
        assert _native.live_bytes() == before
    assert failures > 5
    assert _native.live_bytes() == before
