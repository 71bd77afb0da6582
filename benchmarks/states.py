"""states.py: the state dicts that the benchmark saves and loads, and the digests that prove what
came back.

`llama`: the shapes of a Llama (grouped-query attention, SwiGLU, untied head), bf16 parameters and
fp32 AdamW moments, DTensors sharded by rows over all ranks, with the scalars and objects an
optimizer carries: few large tensors. `many_dtensor` and `many_plain`: many small tensors, where the
cost per tensor is everything. Plain ones are the same on every rank, so a save writes each of them
once. `objects`: few tensors and some large Python objects. `replicated`: few large plain tensors,
the same on every rank. `mixed`: sharded tensors of 1 MiB on average, every tenth a plain one.

Values are random bits from a fixed seed. Every tensor owns its storage, as those of a real model
do.
"""

import ctypes
import hashlib
from collections.abc import Callable, Iterator

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

POISON = 0x5C


def _llama_shapes(
    dim: int, layers: int, ffn: int, vocab: int, kv_dim: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "tok_embeddings.weight", (vocab, dim)
    for i in range(layers):
        p = f"layers.{i}."
        yield p + "attention.wq.weight", (dim, dim)
        yield p + "attention.wk.weight", (kv_dim, dim)
        yield p + "attention.wv.weight", (kv_dim, dim)
        yield p + "attention.wo.weight", (dim, dim)
        yield p + "feed_forward.w1.weight", (ffn, dim)
        yield p + "feed_forward.w2.weight", (dim, ffn)
        yield p + "feed_forward.w3.weight", (ffn, dim)
        yield p + "attention_norm.weight", (dim,)
        yield p + "ffn_norm.weight", (dim,)
    yield "norm.weight", (dim,)
    yield "output.weight", (vocab, dim)


LLAMA = {
    "full": {
        "dim": 1024,
        "layers": 12,
        "ffn": 2816,
        "vocab": 32000,
        "kv_dim": 256,
    },  # 201 M parameters, 2.0 GB
    "small": {"dim": 64, "layers": 2, "ffn": 176, "vocab": 512, "kv_dim": 16},
}
MANY = {"full": 20_000, "small": 200}
REPLICATED = {"full": (8, (4096, 8192)), "small": (2, (64, 32))}  # how many, shape; float32
# How many, columns: with 1024 of float32 the local tensors have 1 MiB on average. On 2 ranks, where
# each keeps half of the plain ones, "full" is 1.09 GB a rank.
MIXED = {"full": (1095, 1024), "light": (1095, 64), "small": (12, 1024)}
MIXED_ROWS, MIXED_PLAIN = (128, 256, 384), 10  # in turn; every which is plain
OBJECTS = {"full": (4, 32 << 20), "small": (2, 1 << 16)}  # how many, bytes of each


def _sharded(
    mesh: DeviceMesh, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> DTensor:
    ranks, rank = mesh.size(), mesh.get_local_rank()
    rows = -(-shape[0] // ranks)
    mine = max(0, min(rows, shape[0] - rank * rows))
    local = torch.empty((mine, *shape[1:]), dtype=dtype)
    local.view(torch.int16 if dtype is torch.bfloat16 else torch.int32).random_(generator=generator)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def _objects(size: str, generator: torch.Generator) -> dict[str, bytes]:
    count, object_bytes = OBJECTS[size]
    return {
        f"object.{i}": torch.empty(object_bytes, dtype=torch.uint8)
        .random_(generator=generator)
        .numpy()
        .tobytes()
        for i in range(count)
    }


def _mixed(size: str, mesh: DeviceMesh, count: int | None, generator: torch.Generator) -> dict:
    stock_count, columns = MIXED[size]
    replicated = torch.Generator().manual_seed(1000)
    out = {}
    for i in range(count or stock_count):
        rows = MIXED_ROWS[i % len(MIXED_ROWS)]
        if i % MIXED_PLAIN == MIXED_PLAIN - 1:
            out[f"weight.{i}"] = torch.empty(rows, columns).uniform_(generator=replicated)
        else:
            shape = (rows * mesh.size(), columns)
            out[f"weight.{i}"] = _sharded(mesh, shape, torch.float32, generator)
    return {"model": out}


def build(case: str, size: str, mesh: DeviceMesh, count: int | None = None) -> dict:
    """Returns the state dict of `case` ("llama", "many_dtensor", "many_plain", "objects",
    "replicated", "mixed") in `size` ("full", "small"; of "mixed" also "light"); `count`: of the
    tensors of "many" and "mixed", instead of what `size` says.
    """
    generator = torch.Generator().manual_seed(
        1000 if case in ("many_plain", "objects", "replicated") else 2000 + mesh.get_local_rank()
    )
    if case == "mixed":
        return _mixed(size, mesh, count, generator)
    count = MANY.get(size) if count is None else count
    if case == "many_plain":
        new = {}
        for i in range(count):
            new[f"block.{i}.weight"] = torch.empty(64, 8).uniform_(generator=generator)
        return {"model": new}
    if case == "many_dtensor":
        shape = (64 * mesh.size(), 8)
        return {
            "model": {
                f"block.{i}.weight": _sharded(mesh, shape, torch.float32, generator)
                for i in range(count)
            }
        }
    if case == "replicated":
        tensors_count, shape = REPLICATED[size]
        return {
            f"weight.{i}": torch.empty(shape, dtype=torch.float32)
            .view(torch.int32)
            .random_(generator=generator)
            .view(torch.float32)
            for i in range(tensors_count)
        }
    if case == "objects":
        tensors = {f"{i}": _sharded(mesh, (64, 8), torch.float32, generator) for i in range(16)}
        return {"model": tensors, "extra": _objects(size, generator)}
    model, state = {}, {}
    for name, shape in _llama_shapes(**LLAMA[size]):
        model[name] = _sharded(mesh, shape, torch.bfloat16, generator)
        state[name] = {
            "step": torch.tensor(1000.0),
            "exp_avg": _sharded(mesh, shape, torch.float32, generator),
            "exp_avg_sq": _sharded(mesh, shape, torch.float32, generator),
        }
    groups = [
        {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": list(model)}
    ]
    return {"model": model, "optim": {"state": state, "param_groups": groups}, "step": 1000}


def leaves(tree: dict | list, prefix: str = "") -> Iterator[tuple]:
    """Yields (container, key in it, full name, value) of every leaf.

    As in DCP, a list is a leaf unless it holds a dict or a tensor.
    """
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        inner = isinstance(value, list) and any(isinstance(v, (dict, torch.Tensor)) for v in value)
        if isinstance(value, dict) or inner:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield tree, key, f"{prefix}{key}", value


def local_tensor(value: object) -> torch.Tensor | None:
    if isinstance(value, DTensor):
        return value.to_local()
    return value if isinstance(value, torch.Tensor) else None


def local_tensors(tree: dict, replicas: bool = True) -> list[torch.Tensor]:
    """This rank's tensors, with or without those that every rank holds."""
    values = [value for *_, value in leaves(tree) if replicas or isinstance(value, DTensor)]
    return [t for t in map(local_tensor, values) if t is not None]


def local_bytes(tree: dict, replicas: bool = True) -> int:
    return sum(t.nbytes for t in local_tensors(tree, replicas))


def count_tensors(tree: dict) -> int:
    return len(local_tensors(tree))


def digests(tree: dict) -> dict[str, str]:
    """SHA-256 of every local tensor's bytes and of every other value's text, by name."""
    out = {}
    for _, _, name, value in leaves(tree):
        t = local_tensor(value)
        if t is None:
            text = value if isinstance(value, bytes) else repr(value).encode()
            out[name] = hashlib.sha256(text).hexdigest()
            continue
        assert t.is_contiguous(), name
        data = (ctypes.c_char * t.nbytes).from_address(t.data_ptr()) if t.nbytes else b""
        out[name] = hashlib.sha256(data).hexdigest()
    return out


def poison(tree: dict) -> None:
    """Spoils every leaf, so that a load that leaves one untouched is caught."""
    for container, key, _, value in leaves(tree):
        t = local_tensor(value)
        if t is None:
            container[key] = None
        elif t.nbytes:
            ctypes.memset(t.data_ptr(), POISON, t.nbytes)


def _mapped(tree: dict | list, change: Callable[[DTensor], DTensor]) -> dict | list:
    """The same tree with every DTensor changed."""
    if isinstance(tree, dict):
        return {key: _mapped(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_mapped(value, change) for value in tree]
    return change(tree) if isinstance(tree, DTensor) else tree


def resharded(tree: dict) -> dict:
    """The same values, matrices sharded by columns instead of rows."""

    def by_columns(t: DTensor) -> DTensor:
        if t.ndim < 2:
            return t
        moved = t.redistribute(placements=[Shard(1)])
        local = moved.to_local().contiguous()
        return DTensor.from_local(
            local, t.device_mesh, [Shard(1)], run_check=False, shape=t.shape, stride=t.stride()
        )

    return _mapped(tree, by_columns)


def converted(tree: dict, old: torch.dtype, new: torch.dtype) -> dict:
    """The same values, DTensors of one dtype as those of another."""
    return _mapped(tree, lambda t: t.to(new) if t.dtype is old else t)


def change(tree: dict, share: float) -> int:
    """Flips bits in whole sharded tensors that hold `share` of this rank's bytes; returns how many
    bytes those are. Ranks of equal shares change the same tensors.
    """
    sharded = [value for *_, value in leaves(tree) if isinstance(value, DTensor)]
    room = share * sum(t.to_local().nbytes for t in sharded)
    changed = 0
    for t in map(local_tensor, sharded):
        if 0 < t.nbytes <= room - changed:
            t.view(torch.int16 if t.dtype is torch.bfloat16 else torch.int32).bitwise_xor_(1)
            changed += t.nbytes
    return changed
