"""hugging_face_cases.py: what hugging_face.py saves and loads, and how it is compared.

A model of bfloat16 blocks, sharded over the ranks along one dim, all values made from seeds; and a
checkpoint of fp8 weights with the scales of their blocks, as model hubs have them.
"""

import json
import pathlib

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

BLOCK = 128
QUANTISED_FILE = "model.safetensors"


def build(dim: int, quick: bool, mesh: DeviceMesh) -> dict[str, DTensor]:
    """Weights sharded along `dim`, norms among them; 2 GB, or 3 MB when quick."""
    width, blocks = (256, 2) if quick else (4096, 7)
    ranks = mesh.size()
    shapes = {}
    for i in range(blocks):
        for name in ("q", "k", "v", "o"):
            shapes[f"layers.{i}.{name}.weight"] = (width, width)
        shapes[f"layers.{i}.up.weight"] = (2 * width, width)
        shapes[f"layers.{i}.down.weight"] = (width, 2 * width)
        shapes[f"layers.{i}.norm.weight"] = (width,)
    shapes["embed.weight"] = (8 * width, width)
    state = {}
    for number, (name, shape) in enumerate(shapes.items()):
        own_dim = min(dim, len(shape) - 1)
        local = list(shape)
        local[own_dim] //= ranks
        generator = torch.Generator().manual_seed(number * ranks + dist.get_rank())
        values = torch.empty(local, dtype=torch.bfloat16)
        values.view(torch.int16).random_(-(1 << 14), 1 << 14, generator=generator)
        state[name] = DTensor.from_local(values, mesh, [Shard(own_dim)], run_check=False)
    return state


def blank(state: dict[str, DTensor]) -> dict[str, DTensor]:
    """The same without the values, in memory that is touched."""
    return {
        name: DTensor.from_local(
            torch.ones_like(tensor.to_local()), tensor.device_mesh, tensor.placements
        )
        for name, tensor in state.items()
    }


def local_bytes(state: dict[str, DTensor]) -> int:
    return sum(tensor.to_local().nbytes for tensor in state.values())


def spread(state: dict[str, DTensor], files: int) -> dict[str, int]:
    """Which of `files` files each tensor goes to, about as much into each."""
    sizes = dict.fromkeys(range(1, files + 1), 0)
    mapping = {}
    for name, tensor in state.items():
        mapping[name] = min(sizes, key=sizes.__getitem__)
        sizes[mapping[name]] += tensor.to_local().nbytes
    return mapping


def differing_files(path: str, state: dict[str, DTensor]) -> list[str]:
    """Tensors of which this rank's part is not what the files have, by the safetensors package."""
    with open(f"{path}/model.safetensors.index.json", encoding="utf-8") as f:
        weight_map = json.load(f)["weight_map"]
    wrong = [name for name in state if name not in weight_map]
    for file in set(weight_map.values()):
        with safe_open(f"{path}/{file}", "pt") as f:
            for name in (n for n in state if weight_map.get(n) == file):
                local, dim = state[name].to_local(), state[name].placements[0].dim
                saved = f.get_tensor(name).chunk(dist.get_world_size(), dim)[dist.get_rank()]
                if not torch.equal(saved.view(torch.int16), local.view(torch.int16)):
                    wrong.append(name)
    return wrong


def differing(state: dict[str, DTensor], found: dict[str, DTensor]) -> list[str]:
    """Tensors of which this rank's part was not loaded."""
    return [
        name
        for name, tensor in state.items()
        if not torch.equal(
            tensor.to_local().view(torch.int16), found[name].to_local().view(torch.int16)
        )
    ]


def write_quantised(where: pathlib.Path, total_bytes: int) -> dict[str, tuple[int, int]]:
    """fp8 matrices with the scales of their blocks, in one file; shapes by name."""
    where.mkdir()
    columns, names = 4096, [f"layers.{i}.weight" for i in range(8)]
    rows = max(total_bytes // (len(names) * columns) // BLOCK, 1) * BLOCK
    tensors: dict[str, torch.Tensor] = {}
    for i, name in enumerate(names):
        generator = torch.Generator().manual_seed(i)
        made = torch.randint(0, 120, (rows, columns), dtype=torch.uint8, generator=generator)
        tensors[name] = made.view(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(
            rows // BLOCK, columns // BLOCK, generator=generator
        )
    save_file(tensors, where / QUANTISED_FILE)
    index = {"weight_map": dict.fromkeys(tensors, QUANTISED_FILE)}
    (where / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return dict.fromkeys(names, (rows, columns))
