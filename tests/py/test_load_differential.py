"""Loads of one process under torch and under dcp_native: the same bytes, or the same exception.

Every program runs on files of both writers.  What is compared is all of the memory behind a target,
not only the target: bytes that were not asked for must stay as they were.
"""

from __future__ import annotations

import itertools
import math
import os
import random
from collections import OrderedDict, UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import _version
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import dcp_native as dcp

pytestmark = pytest.mark.filterwarnings("ignore")

MORE = 20 if os.environ.get("DCP_NATIVE_SLOW_TESTS") else 1
"""How many times the everyday number of random cases."""

MODULES = (torch_dcp, dcp)

searched = settings(
    deadline=None,
    derandomize=MORE == 1,
    database=None,
    suppress_health_check=list(HealthCheck),
)

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


class Grid(torch.Tensor):
    """A tensor that is saved as, or wants, some boxes of itself."""

    boxes: list[Box]

    @staticmethod
    def of(data: torch.Tensor, boxes: list[Box]) -> Grid:
        grid = data.as_subclass(Grid)
        grid.boxes = boxes
        return grid

    def __create_write_items__(self, fqn: str, obj: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                    properties=TensorProperties(dtype=self.dtype),
                    size=torch.Size(self.shape),
                ),
            )
            for offsets, sizes in self.boxes
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in self.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        sizes = next(s for o, s in self.boxes if torch.Size(o) == index.offset)
        plain = self.as_subclass(torch.Tensor)
        for dim, (start, length) in enumerate(zip(index.offset, sizes, strict=True)):
            plain = plain.narrow(dim, start, length)
        return plain


def grid_boxes(cuts: list[list[int]]) -> list[Box]:
    """All boxes between the cuts of each dim."""
    spans = [list(itertools.pairwise(c)) for c in cuts]
    return [
        (tuple(a for a, _ in box), tuple(b - a for a, b in box))
        for box in itertools.product(*spans)
    ]


def bits(tensor: torch.Tensor) -> bytes:
    """Of the values of a tensor, row major."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return bytes(flat.copy_(tensor.detach().reshape(-1)).untyped_storage())


def whole(tensor: torch.Tensor) -> bytes:
    """All memory behind a tensor, seen or not."""
    return bytes(tensor.untyped_storage())


def described(error: BaseException) -> object:
    if isinstance(error, torch_dcp.CheckpointException):
        causes = {rank: (type(e), str(e)) for rank, (e, _) in error.failures.items()}
        return error.args[0], causes
    return type(error), str(error)


def attempt(module: Any, state_dict: dict, path: Path, **options: Any) -> object:
    """None, or what the load raised."""
    planner = module.DefaultLoadPlanner(**options) if options else None
    try:
        module.load(state_dict, checkpoint_id=path, planner=planner)
    except BaseException as error:
        return described(error)
    if module is dcp:
        assert dcp.last_report()["path"] == "native", dcp.last_report()
    return None


def same_failure(theirs: Any, ours: Any) -> bool:
    """Both loaded, or failed alike; ours may also name the tensor."""
    if theirs is None or ours is None:
        return theirs is ours
    ((step, torchs), (our_step, our)) = (theirs, ours)
    return (
        our_step == step
        and our.keys() == torchs.keys()
        and all(
            our[rank][0] is kind and text in our[rank][1] for rank, (kind, text) in torchs.items()
        )
    )


def numbers(tensor: torch.Tensor) -> tuple[list[bool], bytes]:
    """Where the NaNs are, and all else bit by bit: which NaN depends on torch's vectorisation."""
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    return torch.isnan(wide).tolist(), bits(tensor[~torch.isnan(wide)])


# ---- boxes and memory ----

DTYPES = [
    torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@st.composite
def cuts_of(draw: Any, extent: int) -> list[int]:
    inner = draw(st.sets(st.integers(1, max(extent - 1, 1)), max_size=3))
    return [0, *sorted(i for i in inner if i < extent), extent]


@st.composite
def memories(draw: Any, shape: tuple[int, ...], single: bool) -> Any:
    """A function of a dtype that gives a tensor of `shape` in unusual memory, filled with ones."""
    kind = draw(st.sampled_from(["plain", "permuted", "padded", "stepped", "grad", "odd", "self"]))
    order = draw(st.permutations(range(len(shape))))
    pad = [draw(st.integers(0, 2)) for _ in shape]
    at = [draw(st.integers(0, p)) for p in pad]

    def make(dtype: torch.dtype) -> torch.Tensor:
        if kind == "permuted":
            inverse = [order.index(d) for d in range(len(shape))]
            return torch.ones([shape[d] for d in order], dtype=dtype).permute(inverse)
        if kind == "padded":
            base = torch.ones([n + p for n, p in zip(shape, pad, strict=True)], dtype=dtype)
            for dim, start in enumerate(at):
                base = base.narrow(dim, start, shape[dim])
            return base
        if kind == "stepped" and shape:
            return torch.ones([*shape[:-1], 2 * shape[-1]], dtype=dtype)[..., ::2]
        if kind == "grad" and dtype.is_floating_point and dtype.itemsize > 1:
            return torch.nn.Parameter(torch.ones(shape, dtype=dtype))
        if kind == "odd":  # one element off any alignment
            return torch.ones(math.prod(shape) + 3, dtype=dtype)[1:-2].reshape(shape)
        if kind == "self" and single and len(shape) > 0:  # overlaps itself, in any number of ways
            strides = [0 if p == 0 else 1 for p in pad]
            return torch.ones(sum(shape) + 1, dtype=dtype).as_strided(shape, strides)
        return torch.ones(shape, dtype=dtype)

    return make


@st.composite
def reshardings(draw: Any) -> dict[str, Any]:
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    cuts = [draw(cuts_of(n)) for n in shape]
    saved = draw(st.permutations(grid_boxes(cuts)))
    single = draw(st.booleans())
    if single:
        wanted = None
        saved = saved if draw(st.booleans()) else grid_boxes([[0, n] for n in shape])
    else:
        boxes = grid_boxes([draw(cuts_of(n)) for n in shape])
        wanted = draw(st.lists(st.sampled_from(boxes), unique=True, max_size=6))
    dtype = draw(st.sampled_from(DTYPES))
    into = draw(st.sampled_from([dtype, dtype, dtype, *DTYPES]))
    return {
        "shape": shape,
        "saved": saved,
        "wanted": wanted,
        "dtype": dtype,
        "into": into,
        "memory": draw(memories(shape, single and len(saved) == 1)),
        "writer": draw(st.sampled_from([0, 1])),
        "files": draw(st.sampled_from([{}, {"thread_count": 3}, {"single_file_per_rank": False}])),
    }


@settings(searched, max_examples=150 * MORE)
@given(case=reshardings())
def test_any_boxes_into_any_memory(case, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    source = value("source", case["shape"], case["dtype"])
    writer = MODULES[case["writer"]]
    writer.save(
        {"t": Grid.of(source, case["saved"]), "other": value("other", (3,))},
        storage_writer=writer.FileSystemWriter(path, **case["files"]),
    )
    seen = []
    for module in MODULES:
        memory = case["memory"](case["into"])
        wanted = case["wanted"]
        target = {"t": memory if wanted is None else Grid.of(memory, wanted)}
        seen.append((attempt(module, target, path), bits(memory), whole(memory)))
    (theirs, *torchs), (own, *ours) = seen
    assert same_failure(theirs, own), (theirs, own)
    assert torchs == ours


@pytest.mark.parametrize("verify", [False, True, "strict"])
@pytest.mark.parametrize("writer", MODULES)
def test_large_boxes_into_any_memory(writer, verify, tmp_path):
    """Several MiB: blocks, buffers, requests that are cut and joined."""
    choose = random.Random(f"{writer.__name__} {verify}")
    dcp.configure(verify=verify)
    for index in range(3 * MORE):
        shape = (choose.randrange(600, 900), choose.randrange(900, 1300))
        cuts = [sorted({0, n, *(choose.randrange(n) for _ in range(2))}) for n in shape]
        saved, path = grid_boxes(cuts), tmp_path / str(index)
        choose.shuffle(saved)
        source = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
        writer.save({"t": Grid.of(source, saved)}, checkpoint_id=path)
        rows = sorted(choose.sample(range(shape[0]), 4))
        columns = sorted(choose.sample(range(shape[1]), 4))
        wanted = [
            box for box in grid_boxes([rows, columns]) if choose.random() < 0.6 or box[0][0] == 0
        ]
        for into in (torch.int32, torch.float64):
            plain = torch.full(shape, -1, dtype=into)
            turned = torch.full(shape[::-1], -1, dtype=into).t()
            padded = torch.full((shape[0] + 3, shape[1] + 5), -1, dtype=into)
            want = padded.clone()[2:-1, 4:-1]
            for (r, c), (height, width) in wanted:
                want[r : r + height, c : c + width] = source[r : r + height, c : c + width]
            for memory in (plain, turned, padded[2:-1, 4:-1]):
                dcp.load({"t": Grid.of(memory, wanted)}, checkpoint_id=path)
                assert torch.equal(memory, want), (shape, cuts, rows, columns)
            assert padded.sum() - padded[2:-1, 4:-1].sum() == want.numel() - padded.numel()


# ---- dtypes ----

ALL_DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32,
    torch.uint64, torch.bool, torch.complex32, torch.complex64, torch.complex128,
]  # fmt: skip


def special(dtype: torch.dtype) -> torch.Tensor:
    """Values that are hard to cast, and which every cast to an integer defines."""
    if dtype.is_floating_point or dtype.is_complex:
        numbers = torch.tensor([0.0, -0.0, 1.0, 0.1, 2.5, 3.5, 100.7, 1e-7], dtype=torch.float64)
    else:
        numbers = torch.tensor([0, 1, 2, 3, 5, 100, 126, 127])
    if dtype.is_complex:
        return torch.complex(numbers, -numbers).to(dtype)
    return numbers.to(dtype)


def copies(source: torch.dtype, target: torch.dtype) -> bool:
    try:
        torch.zeros(2, dtype=target).copy_(torch.zeros(2, dtype=source))
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("writer", MODULES)
def test_every_pair_of_dtypes_that_copy_takes_is_cast_as_copy_does(writer, tmp_path):
    saved = {str(dtype): special(dtype) for dtype in ALL_DTYPES}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):  # into what can hold them
        extremes = torch.tensor([math.nan, math.inf, -math.inf, 1e38, -1e-40, 65520.0])
        saved[f"extremes of {dtype}"] = extremes.to(dtype)
    pairs = [(name, t) for name in saved for t in ALL_DTYPES if copies(saved[name].dtype, t)]
    pairs = [
        (name, into)
        for name, into in pairs
        if not name.startswith("extremes") or into.is_floating_point or into.is_complex
    ]
    assert len(pairs) > 300
    state = {f"{name} as {into}": saved[name] for name, into in pairs}
    writer.save(state, checkpoint_id=tmp_path)
    loaded = []
    for module in MODULES:
        target = {
            f"{name} as {into}": torch.ones(saved[name].shape, dtype=into) for name, into in pairs
        }
        assert attempt(module, target, tmp_path) is None
        loaded.append(target)
    for key, want in loaded[0].items():
        got = loaded[1][key]
        assert numbers(got) == numbers(want), (key, got, want)


def test_pairs_of_dtypes_that_copy_refuses_are_refused_as_in_torch(tmp_path):
    pairs = [(a, b) for a in ALL_DTYPES for b in ALL_DTYPES if not copies(a, b)]
    dcp.save({str(dtype): special(dtype) for dtype in ALL_DTYPES}, checkpoint_id=tmp_path)
    for a, b in random.Random(1).sample(pairs, min(len(pairs), 12)):
        errors = [attempt(module, {str(a): torch.ones(8, dtype=b)}, tmp_path) for module in MODULES]
        ((step, torchs), (our_step, ours)) = errors
        assert our_step == step and ours[0][0] is torchs[0][0], (a, b, errors)
        assert torchs[0][1] in ours[0][1], (a, b, errors)  # ours also names the tensor


# ---- state dicts ----


def leaves(draw: Any) -> Any:
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.sampled_from([1, "text", None, 2.5, (1, 2), b"bytes", {1, 2}]))
    return value(str(draw(st.integers(0, 9))), tuple(draw(st.lists(st.integers(0, 4), max_size=2))))


@st.composite
def trees(draw: Any, depth: int = 3) -> dict:
    """Nested containers of tensors and objects.

    Mappings in a list are never empty: torch forgets such a list's other elements when it loads.
    """

    def node(level: int, least: int) -> Any:
        kind = draw(st.integers(0, 5)) if level else 0
        if kind == 1:
            return [node(level - 1, 1) for _ in range(draw(st.integers(0, 3)))]
        if kind in (2, 3):
            container = draw(st.sampled_from([dict, OrderedDict, UserDict]))
            names = st.sampled_from(["a", "b", "c.d", 7])
            keys = draw(st.lists(names, unique=True, min_size=least, max_size=3))
            return container((key, node(level - 1, least)) for key in keys)
        return leaves(draw)

    return {key: node(depth, 0) for key in draw(st.sets(st.sampled_from("uvwxyz"), min_size=1))}


def mutated(draw: Any, leaf: Any) -> Any:
    """What a program might hold in the place of a saved leaf."""
    change = draw(st.integers(0, 24))
    if change == 0:
        return "an object"
    if change == 1:
        return torch.full((2,), 3.0)
    if isinstance(leaf, torch.Tensor):
        if change == 2:
            return torch.zeros(*leaf.shape, 1)
        if change == 3:
            return torch.full_like(leaf, 9, dtype=torch.int16)
        if change < 6:
            return torch.empty_like(leaf, device="meta")
        return torch.full_like(leaf, 9)
    return None


def targets_of(draw: Any, tree: Any, in_list: bool = False) -> Any:
    if isinstance(tree, (dict, UserDict)):
        keys = [k for k in tree if in_list or draw(st.integers(0, 9))]
        kept = {k: targets_of(draw, tree[k], in_list) for k in keys}
        if draw(st.integers(0, 19)) == 0:
            kept["not saved"] = torch.full((3,), 9.0)
        return type(tree)(kept)
    if isinstance(tree, list):
        return [targets_of(draw, v, True) for v in tree]
    return mutated(draw, tree)


@st.composite
def loads_of_trees(draw: Any) -> tuple:
    tree = draw(trees())
    options = draw(
        st.sampled_from([{}, {}, {"allow_partial_load": True}, {"flatten_state_dict": False}])
    )
    return tree, targets_of(draw, tree), options, draw(st.sampled_from([0, 1]))


def copied(tree: Any, *, known: bool = False) -> Any:
    """Of containers and tensors; `known`: in containers that torch can load into."""
    if isinstance(tree, (dict, UserDict)):
        kind = dict if known else type(tree)
        return kind((k, copied(v, known=known)) for k, v in tree.items())
    if isinstance(tree, list):
        return [copied(v, known=known) for v in tree]
    if isinstance(tree, torch.Tensor):
        return torch.empty_like(tree) if tree.is_meta else tree.clone()
    return tree


def shown(tree: Any) -> Any:
    if isinstance(tree, (dict, UserDict)):
        return [(k, shown(v)) for k, v in tree.items()]
    if isinstance(tree, list):
        return [shown(v) for v in tree]
    if isinstance(tree, torch.Tensor):
        return tree.dtype, tree.shape, tree.device, None if tree.is_meta else bits(tree)
    return tree


def identities(tree: Any) -> dict[str, int]:
    found = {}

    def visit(node: Any, path: str) -> None:
        if isinstance(node, (dict, UserDict)):
            for key, child in node.items():
                visit(child, f"{path}.{key}")
        elif isinstance(node, list):
            for i, child in enumerate(node):
                visit(child, f"{path}.{i}")
        elif isinstance(node, torch.Tensor) and not node.is_meta:
            found[path] = node.data_ptr()

    visit(tree, "")
    return found


@pytest.fixture
def group_of_one():
    """torch puts meta tensors nowhere without a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@settings(searched, max_examples=250 * MORE)
@given(case=loads_of_trees())
def test_any_state_dict_is_filled_or_refused_as_by_torch(case, tmp_path_factory, group_of_one):
    tree, target, options, writer = case
    path = tmp_path_factory.mktemp("checkpoint")
    flatten = options.get("flatten_state_dict", True)
    planner = MODULES[writer].DefaultSavePlanner(flatten_state_dict=flatten)
    try:
        MODULES[writer].save(copied(tree), checkpoint_id=path, planner=planner)
    except (ValueError, dcp.CheckpointException):
        return  # keys that collide when they are flattened: nothing to load
    seen = []
    for module in MODULES:
        mine = copied(target, known=module is torch_dcp)
        before = identities(mine)
        error = attempt(module, mine, path, **options)
        _version._derived_version = None  # torch leaves it set when two old keys collide
        if error is None and flatten:
            after = identities(mine)
            assert all(after[k] == before[k] for k in before if k in after), "moved a tensor"
        if not flatten:  # [unflattened-objects]
            mine = {k: v for k, v in mine.items() if isinstance(tree.get(k), torch.Tensor)}
        seen.append((error, shown(mine) if error is None else None))
    assert seen[0] == seen[1]


# ---- memory that several keys share ----


@pytest.mark.parametrize("writer", MODULES)
def test_tied_memory_is_filled_once_and_stays_tied(writer, tmp_path):
    """The same tensor, a view of it, its parts and its parameter, as tied weights are."""

    def state(fill: Any) -> tuple[dict, torch.Tensor]:
        base = fill((6, 8))
        parameter = torch.nn.Parameter(base)
        tied = {"tensor": base, "again": base, "turned": base.t(), "row": base[2], "p": parameter}
        return {"a": tied, "b": [base[:3], {"c": base[3:], "d": base[::2, 1::3]}]}, base

    source, _ = state(lambda shape: value("tied", shape))
    writer.save(source, checkpoint_id=tmp_path)
    for module in MODULES:
        target, base = state(torch.zeros)
        before = identities(target)
        assert attempt(module, target, tmp_path) is None
        assert identities(target) == before
        assert shown(target) == shown(source)
        assert torch.equal(base, value("tied", (6, 8)))


def test_a_view_that_is_conjugated_or_negated_is_filled_through_it(tmp_path):
    saved = torch.complex(value("real", (5, 4)), value("imaginary", (5, 4)))
    dcp.save({"c": saved, "i": saved.imag.clone()}, checkpoint_id=tmp_path)
    seen = []
    for module in MODULES:
        conjugated, other = torch.zeros(4, 5, dtype=torch.complex64), torch.zeros_like(saved)
        target = {"c": conjugated.t().conj(), "i": other.conj().imag}
        assert target["c"].is_conj() and target["i"].is_neg()
        seen.append((attempt(module, target, tmp_path), bits(conjugated), bits(other)))
    assert seen[0][0] is None and seen[0] == seen[1]


# ---- other writers of the past ----


@pytest.mark.parametrize("options", [{}, {"allow_partial_load": True}])
@pytest.mark.parametrize("extra", [None, "leaf", {"more": 1, "t": torch.zeros(2)}])
def test_the_flattening_of_torch_2_3_loads_as_in_torch(options, extra, tmp_path):
    saved = {
        "model": {"w": value("w", (3, 2))},
        "opt": {
            "groups": [{"lr": 0.1, "params": [1, 2]}, {"lr": 0.2, "params": [3]}],
            "state": {"0": {"avg": value("avg", (2,)), "step": 1}, "1": {"step": 5}},
        },
        "meta": {"epoch": 3, "name": "x", "deep": {"list": [1, [2, 3]]}},
    }
    _version._derived_version = "2_3"
    try:
        torch_dcp.save(copied(saved), checkpoint_id=tmp_path)
    finally:
        _version._derived_version = None
    seen = []
    for module in MODULES:
        target = copied(saved)
        target["model"]["w"].zero_()
        target["opt"]["state"]["0"]["avg"].zero_()
        target["meta"] = {"epoch": 0, "name": "y", "deep": {"list": [0, [0, 0]]}}
        target["opt"]["groups"][0]["lr"] = 7.0
        if extra is not None:
            target["extra"] = copied(extra)
        error = attempt(module, target, tmp_path, **options)
        seen.append((error, shown(target) if error is None else None))
        if error is None:
            target.pop("extra", None)
            assert shown(target) == shown(saved)
    assert seen[0] == seen[1]
    assert (seen[0][0] is None) == (extra is None or bool(options))
