"""Full state dicts: ours beside torch's functions, on generated tensors and in small buckets."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import weakref
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._state_dict_utils as stock
from common import gather_all, mesh_of, shard, sizes, value
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as LocalShard
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dcp_native import _byte_buckets, _full_gather
from dcp_native import _full_state_dict as ours

CPU = torch.device("cpu")
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
)
BUCKETS_BYTES = (64, 1000, 32 << 20)


@contextlib.contextmanager
def buckets_of(size_bytes: int):
    before = _byte_buckets.BUCKET_BYTES
    _byte_buckets.BUCKET_BYTES = size_bytes
    try:
        yield
    finally:
        _byte_buckets.BUCKET_BYTES = before


class Peak(TorchDispatchMode):
    """The most bytes that storages made inside were alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor) and not isinstance(t, DTensor)
        }
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and not isinstance(t, DTensor):
                self._count(t, given)
        return out

    def _count(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in given or storage._cdata in self._known:
            return
        size, key = storage.nbytes(), storage._cdata
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def gone() -> None:
            self.now -= size
            self._known.discard(key)

        weakref.finalize(storage, gone)


def same(got: Any, want: Any, where: str = "") -> None:
    """Types, order, values to the bit, devices and requires_grad are the same."""
    assert type(got) is type(want), (where, type(got), type(want))
    if isinstance(want, dict):
        assert list(got) == list(want), where
        for key in want:
            same(got[key], want[key], f"{where}.{key}")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), where
        for i, (g, w) in enumerate(zip(got, want, strict=True)):
            same(g, w, f"{where}.{i}")
    elif isinstance(want, DTensor):
        assert got.shape == want.shape and got.stride() == want.stride(), where
        assert got.placements == want.placements and got.device_mesh == want.device_mesh, where
        assert got.requires_grad == want.requires_grad, where
        same(got._local_tensor, want._local_tensor, where)
    elif isinstance(want, torch.Tensor):
        assert got.dtype == want.dtype and got.shape == want.shape, (where, got, want)
        assert got.device == want.device and got.requires_grad == want.requires_grad, where
        a, b = (
            t.detach().resolve_conj().contiguous().view(-1).view(torch.uint8) for t in (got, want)
        )
        assert torch.equal(a, b), (where, got, want)
    else:
        assert got == want, (where, got, want)


def meshes(ctx) -> list[DeviceMesh]:
    return _meshes(ctx.size)


@functools.cache
def _meshes(size: int) -> list[DeviceMesh]:
    """Once: every two-dimensional mesh makes groups, and a gloo group has three threads."""
    return [mesh_of(size)] + ([mesh_of(2, 2)] if size == 4 else [])


def placements_of(rng: random.Random, mesh: DeviceMesh, shape: tuple[int, ...]) -> list:
    """Some placements, strided ones where FSDP2 makes them: outer dimension of two on one dim."""
    dims = [Replicate(), *map(Shard, range(len(shape)))]
    chosen = [rng.choice(dims) for _ in range(mesh.ndim)]
    even = isinstance(chosen[-1], Shard) and shape[chosen[-1].dim] % mesh.size() == 0
    if mesh.ndim == 2 and chosen[0] == chosen[1] and even and rng.random() < 0.5:
        chosen[0] = _StridedShard(chosen[1].dim, split_factor=mesh.size(1))
    return chosen


def full_values(seed: int, count: int) -> dict[str, torch.Tensor]:
    rng = random.Random(seed)
    return {
        f"t{i}": value(
            f"t{seed}.{i}",
            tuple(rng.choice((1, 2, 3, 4, 5, 8, 13)) for _ in range(rng.randint(1, 3))),
            rng.choice(DTYPES),
        )
        for i in range(count)
    }


def sharded(ctx, seed: int, full: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same values, some as DTensors, in nested containers beside other things."""
    rng = random.Random(seed)
    leaves: list[Any] = []
    for tensor in full.values():
        mesh = rng.choice(meshes(ctx))
        leaves.append(shard(tensor, mesh, *placements_of(rng, mesh, tuple(tensor.shape))))
    third = len(leaves) // 3
    return {
        "model": dict(zip("abcdefghijklmnopqrstuvwxyz", leaves[:third], strict=False)),
        "list": [*leaves[third : 2 * third], 3, "text", None, {"deep": (1.5, b"raw")}],
        "tuple": (*leaves[2 * third :], True),
        "plain": value("plain", (3, 2)),
        7: torch.tensor(2.0),
    }


def numbers(full: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what gloo or torch's padding can not do: those are checked by their values."""
    return {k: v for k, v in full.items() if v.dtype != torch.float8_e4m3fn}


def case_gather_equals_torch(ctx):
    for seed in range(4):
        state = sharded(ctx, seed, numbers(full_values(seed, 24)))
        want = stock._gather_state_dict(state)
        for size in BUCKETS_BYTES:
            with buckets_of(size):
                same(ours._gather_state_dict(state), want, f"seed {seed}, buckets of {size}")
        with torch.no_grad():
            same(ours._gather_state_dict(state), stock._gather_state_dict(state))


def case_gather_gives_every_dtype_bit_for_bit(ctx):
    full = {str(d): value(str(d), (7, 6), d) for d in DTYPES}
    full["nan"] = torch.tensor([0x7FC00001, -1, 1], dtype=torch.int32).view(torch.float32)
    mesh = mesh_of(ctx.size)
    for placement in (Shard(0), Shard(1)):
        state = {k: shard(v, mesh, placement if v.ndim > 1 else Shard(0)) for k, v in full.items()}
        for size in BUCKETS_BYTES:
            with buckets_of(size):
                same(ours._gather_state_dict(state), full)


def case_gather_for_some_ranks(ctx):
    state = sharded(ctx, 50, numbers(full_values(50, 24)))
    for ranks in ((0,), (ctx.size - 1,), (0, ctx.size - 1), tuple(range(ctx.size)), (99,)):
        for offload in (False, True):
            options = {"ranks_only": ranks, "cpu_offload": offload}
            want = stock._gather_state_dict(state, **options)
            for size in (100, 32 << 20):
                with buckets_of(size):
                    same(ours._gather_state_dict(state, **options), want, str(options))
    assert ours._gather_state_dict([1], ranks_only=(99,)) is None


def case_gather_of_conjugates_and_permuted_locals(ctx):
    mesh = mesh_of(ctx.size)
    local = value("c", (3, 4), torch.complex64).conj()
    state = {
        "conj": DTensor.from_local(local, mesh, [Shard(0)]),
        "permuted": DTensor.from_local(value("p", (4, 3)).t(), mesh, [Shard(1)]),
        "sliced": DTensor.from_local(value("s", (4, 6))[:, ::2], mesh, [Shard(0)]),
    }
    want = {k: v.full_tensor() for k, v in state.items()}
    same(ours._gather_state_dict(state), want)


def case_gather_leaves_tensors_that_are_whole_where_they_are(ctx):
    plain, mesh = value("p", (3,)), mesh_of(ctx.size)
    replica = shard(value("r", (5, 2)), mesh, Replicate())
    with torch.no_grad():
        for module in (stock, ours):
            got = module._gather_state_dict({"p": plain, "r": replica}, cpu_offload=True)
            assert got["p"] is plain
            assert got["r"] is replica._local_tensor
    for module in (stock, ours):
        got = module._gather_state_dict({"r": replica})
        assert got["r"].data_ptr() == replica._local_tensor.data_ptr()


def case_gather_leaves_the_rare_to_torch(ctx):
    mesh = mesh_of(ctx.size)
    uneven = value("u", (9, 2))
    state = {
        "partial": DTensor.from_local(value("q", (4,)) * (ctx.rank + 1), mesh, [Partial()]),
        "tensor": shard(value("t", (5, 3)), mesh, Shard(0)),
        "differentiable": shard(value("g", (4, 3)), mesh, Shard(0)).requires_grad_(),
    }
    if ctx.size == 4:
        strided = [_StridedShard(0, split_factor=2), Shard(0)]
        state["strided"] = shard(uneven, mesh_of(2, 2), *strided)
    same(ours._gather_state_dict(state), stock._gather_state_dict(state))


@sizes(4)
def case_gather_on_meshes_that_leave_ranks_out(ctx):
    part = DeviceMesh("cpu", [0, 1])
    halves = mesh_of(2, 2)
    state = {
        "part": shard(value("a", (5, 3)), part, Shard(0)),
        "row": shard(value("b", (7, 3)), halves, Shard(1), Shard(0)),
        "both": shard(value("c", (6, 3)), mesh_of(4), Shard(0)),
    }
    for options in ({}, {"ranks_only": (0,)}, {"ranks_only": (3,)}):
        same(
            ours._gather_state_dict(state, **options),
            stock._gather_state_dict(state, **options),
            str(options),
        )


@sizes(4)
def case_gather_of_submeshes_with_states_of_their_own(ctx):
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("pp", "dp"))["dp"]
    stage = ctx.rank // 2
    state = {
        f"s{stage}.{i}": shard(value(f"{i}", (5 + stage, 2)), mesh, Shard(0)) for i in range(4)
    }
    same(ours._gather_state_dict(state), stock._gather_state_dict(state))
    for ranks in ((0,), (1, 3)):
        same(
            ours._gather_state_dict(state, ranks_only=ranks),
            stock._gather_state_dict(state, ranks_only=ranks),
        )


def sharded_tensor(ctx, full: torch.Tensor):
    size = -(-full.shape[0] // ctx.size)
    start = ctx.rank * size
    mine = full[start : start + size]
    metadata = ShardMetadata(
        [start, *[0] * (full.ndim - 1)], list(mine.shape), f"rank:{ctx.rank}/cpu"
    )
    local = [LocalShard(mine.clone(), metadata)] if mine.shape[0] else []
    return init_from_local_shards(local, *full.shape)


def case_gather_of_sharded_tensors(ctx):
    full = {
        "even": value("e", (4 * ctx.size, 3)),
        "uneven": value("u", (4 * ctx.size - 3, 2), torch.bfloat16),
        "none": value("n", (1, 5)),
        "flat": value("f", (2 * ctx.size + 1,), torch.int64),
    }
    state = {k: sharded_tensor(ctx, v) for k, v in full.items()}
    for size in BUCKETS_BYTES:
        with buckets_of(size):
            same(ours._gather_state_dict(state), stock._gather_state_dict(state))
            same(ours._gather_state_dict(state), full)
    options = {"ranks_only": (0,), "cpu_offload": True, "device": CPU}
    same(ours._gather_state_dict(state, **options), stock._gather_state_dict(state, **options))


class Odd:
    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Odd) and other.name == self.name


def case_values_of_other_types(ctx):
    state = {"w": shard(value("w", (5, 2)), mesh_of(ctx.size), Shard(0)), "odd": [Odd("x")]}
    for module in (stock, ours):
        for function in (module._gather_state_dict, module._offload_state_dict_to_cpu):
            got = function(state, type_check=False)
            assert got["odd"] == [Odd("x")] and got["odd"][0] is not state["odd"][0]
            try:
                function(state)
            except ValueError as error:
                assert str(error) == f"Unexpected value type {Odd}", error
            else:
                raise AssertionError("no ValueError")
            ctx.barrier()


def failures_of(function, *args, **kwargs) -> list[str]:
    """What every rank raised, as text."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    else:
        text = ""
    return gather_all(text)


def case_gather_fails_everywhere_when_one_rank_can_not(ctx):
    """[full-state-failure]"""
    mesh = mesh_of(ctx.size)
    state: dict[str, Any] = {"w": shard(value("w", (5, 2)), mesh, Shard(0))}
    if ctx.rank == 1:
        state["odd"] = Odd("x")
    texts = failures_of(ours._gather_state_dict, state)
    assert texts.pop(1).startswith("ValueError: Unexpected value type")
    assert all("RuntimeError" in t and "rank 1 failed" in t for t in texts), texts

    wrong = value("w", (9, 2) if ctx.rank == 0 else (1, 2))
    bad = DTensor.from_local(wrong, mesh, [Shard(0)], shape=(5, 2), stride=(2, 1))
    texts = failures_of(ours._gather_state_dict, {"w": bad})
    assert texts[0].startswith("ValueError") and "(9, 2)" in texts[0], texts
    assert all(texts)


def case_gather_fails_everywhere_when_ranks_mean_other_tensors(ctx):
    mesh = mesh_of(ctx.size)
    rows = 5 if ctx.rank == 0 else 6
    for name, tensor in (
        ("shape", shard(value("w", (rows, 2)), mesh, Shard(0))),
        ("dtype", shard(value("w", (8,), DTYPES[ctx.rank % 2]), mesh, Shard(0))),
        ("placement", shard(value("w", (8, 8)), mesh, Shard(ctx.rank % 2))),
    ):
        texts = failures_of(ours._gather_state_dict, {"w": tensor})
        assert all("other shapes" in t for t in texts), (name, texts)


def case_gather_holds_the_results_and_two_buckets(ctx):
    mesh, bucket = mesh_of(ctx.size), 1 << 16
    full = {f"small{i}": value(f"{i}", (16, 16)) for i in range(200)}
    full |= {"large": value("l", (1 << 18,)), "cols": value("c", (64, 4096))}
    state = {k: shard(v, mesh, Shard(1 if k == "cols" else 0)) for k, v in full.items()}
    result_bytes = sum(v.nbytes for v in full.values())
    with buckets_of(bucket):
        ours._gather_state_dict(state)  # groups, caches
        with Peak() as peak:
            got = ours._gather_state_dict(state)
        same(got, full)
        slack = 4096
        assert result_bytes <= peak.most <= result_bytes + 2 * bucket + slack, peak.most
        with Peak() as peak:
            got = ours._gather_state_dict(state, ranks_only=(0,), cpu_offload=True)
        if ctx.rank != 0:
            assert got == {} and 0 < peak.most <= 2 * bucket + slack, peak.most


def case_gather_sends_few_messages(ctx):
    mesh = mesh_of(ctx.size)
    state = {f"{i}": shard(value(f"{i}", (8, 8)), mesh, Shard(0)) for i in range(500)}
    calls = []
    plain = dist.broadcast

    def counted(*args, **kwargs):
        calls.append(args)
        return plain(*args, **kwargs)

    dist.broadcast = counted
    try:
        ours._gather_state_dict(state)
    finally:
        dist.broadcast = plain
    assert len(calls) == ctx.size, len(calls)


def full_state(ctx) -> dict[str, Any]:
    full: dict[str, Any] = full_values(70, 24)
    full |= {
        "step": torch.tensor(5.0),
        "count": 3,
        "text": "adam",
        "none": None,
        "extra": value("extra", (4, 4)),
        "empty": torch.empty(0, 3),
        "not here": 1,
        "permuted on no rank": value("x", (3, 2)),
        "large": value("large", (700, 3)),
    }
    return full


def local_state(ctx, full: dict[str, Any], meta: bool) -> dict[str, Any]:
    """DTensors and plain tensors in turn, other values; a key that `full` lacks."""
    rng = random.Random(3)
    local: dict[str, Any] = {"missing": value("m", (2,)), "step": None, "count": 0, "text": ""}
    for i, (key, tensor) in enumerate(full.items()):
        if not torch.is_tensor(tensor) or tensor.ndim == 0 or key == "extra":
            continue
        mesh = rng.choice(meshes(ctx))
        placements = placements_of(rng, mesh, tuple(tensor.shape))
        blank = torch.zeros_like(tensor)
        if i % 3 == 2:
            local[key] = blank
            continue
        local[key] = shard(blank, mesh, *placements)
        if meta and i % 3 == 1:
            local[key] = DTensor.from_local(
                local[key]._local_tensor.to("meta"), mesh, placements,
                shape=tensor.shape, stride=tensor.stride(),
            )  # fmt: skip
    return local


@torch.no_grad()
def case_broadcast_equals_torch(ctx):
    full = numbers_of(full_state(ctx))
    given = full if ctx.rank == 0 else {}
    for meta, strict, bucket_sizes in ((False, True, BUCKETS_BYTES), (True, False, (32 << 20,))):
        want = local_state(ctx, full, meta)
        stock._broadcast_state_dict(given, want, CPU, strict=strict)
        for size in bucket_sizes:
            got = local_state(ctx, full, meta)
            before = dict(got)
            with buckets_of(size):
                ours._broadcast_state_dict(given, got, CPU, strict=strict)
            same(got, want, f"meta {meta}, strict {strict}, buckets of {size}")
            for key, tensor in before.items():
                if isinstance(tensor, DTensor) and not tensor.is_meta:
                    assert got[key] is tensor, key


def numbers_of(full: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v for k, v in full.items() if not (torch.is_tensor(v) and v.dtype == torch.float8_e4m3fn)
    }


@torch.no_grad()
def case_broadcast_to_the_cpu(ctx):
    full = {k: v for k, v in numbers_of(full_state(ctx)).items() if k != "extra"}
    given = full if ctx.rank == 0 else {}
    for meta in (False, True):
        want, got = local_state(ctx, full, meta), local_state(ctx, full, meta)
        stock._broadcast_state_dict(given, want, CPU, cpu_offload=True)
        ours._broadcast_state_dict(given, got, CPU, cpu_offload=True)
        same(got, want)
    given = {"extra": value("e", (4,))} if ctx.rank == 0 else {}
    for module in (stock, ours):
        texts = failures_of(module._broadcast_state_dict, given, {}, CPU, cpu_offload=True)
        assert texts == ["KeyError: 'extra'"] * ctx.size


@torch.no_grad()
def case_broadcast_casts_into_dtensors_that_exist(ctx):
    mesh = mesh_of(ctx.size)
    full = {"w": value("w", (9, 5)), "v": value("v", (6,), torch.int64)}
    given = full if ctx.rank == 0 else {}
    results = []
    for module in (stock, ours):
        local = {
            "w": shard(torch.zeros(9, 5, dtype=torch.bfloat16), mesh, Shard(1)),
            "v": torch.zeros(6),
        }
        with buckets_of(64):
            module._broadcast_state_dict(given, local, CPU)
        results.append(local)
    same(results[1], results[0])


@torch.no_grad()
def case_broadcast_of_every_dtype_and_of_permuted_memory(ctx):
    """[full-state-order]"""
    mesh = mesh_of(ctx.size)
    full = {str(d): value(str(d), (6, 7), d) for d in DTYPES}
    full["permuted"] = value("p", (5, 8)).t()
    full["conj"] = value("c", (4, 4), torch.complex64).conj()
    for size in (100, 32 << 20):
        for placement in (Shard(0), Shard(1), Replicate()):
            local = {k: shard(torch.zeros_like(v), mesh, placement) for k, v in full.items()}
            with buckets_of(size):
                ours._broadcast_state_dict(full if ctx.rank == 0 else {}, local, CPU)
            for key, tensor in full.items():
                want = shard(tensor.resolve_conj().contiguous(), mesh, placement)
                same(local[key]._local_tensor, want._local_tensor, key)
        local = {k: torch.zeros(()) for k in full}
        with buckets_of(size):
            ours._broadcast_state_dict(full if ctx.rank == 0 else {}, local, CPU)
        same(local, full)
    theirs = {"permuted": torch.zeros(8, 5)}
    given = {"permuted": full["permuted"]} if ctx.rank == 0 else {}
    stock._broadcast_state_dict(given, theirs, CPU)
    assert torch.equal(theirs["permuted"], full["permuted"]) == (ctx.rank == 0)


@torch.no_grad()
def case_broadcast_keeps_rank_0s_own_tensor(ctx):
    full = {"w": value("w", (4,))}
    for module in (stock, ours):
        local = {"w": torch.zeros(4)}
        module._broadcast_state_dict(full if ctx.rank == 0 else {}, local, CPU)
        if ctx.rank == 0:
            assert local["w"].data_ptr() == full["w"].data_ptr()


@torch.no_grad()
def case_broadcast_holds_its_shards_and_two_buckets(ctx):
    mesh, bucket = mesh_of(ctx.size), 1 << 16
    full = {f"small{i}": value(f"{i}", (16, 16)) for i in range(200)}
    full |= {"large": value("l", (1 << 18,)), "cols": value("c", (64, 4096))}
    given = full if ctx.rank == 0 else {}
    with buckets_of(bucket):
        for _ in range(2):
            local = {k: shard(torch.zeros_like(v), mesh, Shard(0)) for k, v in full.items()}
            with Peak() as peak:
                ours._broadcast_state_dict(given, local, CPU)
        # The description of 202 tensors is about 20 kB.
        assert 0 < peak.most <= 2 * bucket + (64 << 10), peak.most
        for key, tensor in full.items():
            same(local[key]._local_tensor, shard(tensor, mesh, Shard(0))._local_tensor)


class Refuses:
    def __reduce__(self):
        raise TypeError("will not be pickled")


class Unloadable:
    def __reduce__(self):
        return _raise_where_loaded, ()


def _raise_where_loaded():
    if dist.get_rank() == 1:
        raise ImportError("not on this rank")


@torch.no_grad()
def case_broadcast_fails_everywhere_when_one_rank_can_not(ctx):
    def texts_of(extra: Any, local: dict[str, Any]) -> list[str]:
        full = {"w": value("w", (4, 2)), "extra": extra}
        return failures_of(
            ours._broadcast_state_dict, full if ctx.rank == 0 else {}, {"w": None, **local}, CPU
        )

    texts = texts_of(Refuses(), {})
    assert texts[0] == "TypeError: will not be pickled", texts
    assert all("rank 0 failed" in t for t in texts[1:]), texts

    texts = texts_of(Unloadable(), {})
    assert texts.pop(1) == "ImportError: not on this rank", texts
    assert all("rank 1 failed" in t for t in texts), texts

    mesh = mesh_of(ctx.size)
    rows = 3 if ctx.rank == 1 else 4
    odd = DTensor.from_local(torch.zeros(rows, 2), mesh, [Replicate()])
    texts = texts_of(1, {"w": odd})
    assert texts.pop(1).startswith("ValueError"), texts
    assert all("rank 1 failed" in t for t in texts), texts


@torch.no_grad()
def case_broadcast_tensors_equals_torch(ctx):
    full = {"a": value("a", (5, 3)), "b": value("b", (7,))}
    described = {k: stock._TensorInfo(v.size(), v.dtype) for k, v in full.items()}
    results = []
    for module in (stock, ours):
        local = {"a": shard(torch.zeros(5, 3), mesh_of(ctx.size), Shard(0)), "b": torch.zeros(7)}
        given = full if ctx.rank == 0 else dict(described)
        module._broadcast_tensors(given, local, ["a", "b"], CPU)
        pair = {"a": (copy.deepcopy(local["a"]), full["a"] + 1), "b": full["b"], "c": None}
        module._distribute_tensors(pair, ["a", "b", "c", "d"], CPU)
        results.append((local, pair))
    same(results[1], results[0])


@torch.no_grad()
def case_distribute_equals_torch(ctx):
    full = numbers_of(full_state(ctx))
    for meta in (False, True):
        want, got = local_state(ctx, full, meta), local_state(ctx, full, meta)
        stock._distribute_state_dict(full, want, CPU)
        ours._distribute_state_dict(full, got, CPU)
        same(got, want)
        for key, tensor in full.items():
            if not isinstance(want.get(key), DTensor) or tensor.numel() == 0:
                continue
            aliased = [sd[key]._local_tensor.data_ptr() == tensor.data_ptr() for sd in (want, got)]
            assert aliased[0] == aliased[1], (key, want[key].placements)


@torch.no_grad()
def case_distribute_sends_nothing(ctx):
    """[full-state-own]"""
    mesh = mesh_of(ctx.size)
    full = {"w": value("w", (5, 4)) + ctx.rank}
    local = {"w": shard(torch.zeros(5, 4), mesh, Shard(0))}
    ours._distribute_state_dict(full, local, CPU)
    same(local["w"]._local_tensor, shard(full["w"], mesh, Shard(0))._local_tensor)
    ctx.barrier()


def case_offload_equals_torch(ctx):
    mesh = mesh_of(ctx.size)
    state = {
        "p": torch.nn.Parameter(value("p", (3,))),
        "d": [shard(value("d", (5, 2)), mesh, Shard(0)), (1, None)],
        "s": sharded_tensor(ctx, value("s", (7, 2))),
    }
    for ranks in ((), (0,)):
        want = stock._offload_state_dict_to_cpu(state, ranks_only=ranks)
        got = ours._offload_state_dict_to_cpu(state, ranks_only=ranks)
        assert list(got) == list(want)
        if got:
            assert got["p"] is want["p"] is state["p"]
            assert got["d"][0] is want["d"][0] is state["d"][0]
            assert type(got["d"][1]) is tuple and got["s"] is want["s"]


def case_streams_are_the_same_for_equal_meshes(ctx):
    """Many mesh objects of the same groups, as wrappers make them, are one stream."""
    names = DeviceMesh("cpu", torch.arange(ctx.size).view(1, ctx.size), mesh_dim_names=("a", "b"))
    gathering = _full_gather.Gathering(None, None, None, False)
    for i in range(3):
        gathering.add(shard(value(f"{i}", (ctx.size, 2)), names["b"], Shard(0)))
    assert len(gathering._streams) == 1
    same(gathering.run(None), [value(f"{i}", (ctx.size, 2)) for i in range(3)])
