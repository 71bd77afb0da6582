"""Hugging Face checkpoints, sharded over ranks by the target: what each rank gets is torch's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, mesh_of, shard, value
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader as TorchReader
from torch.distributed.checkpoint.quantized_hf_storage import (
    QuantizedHuggingFaceStorageReader as TorchQuantizedReader,
)
from torch.distributed.tensor import Replicate, Shard

import dcp_native as dcp
from dcp_native._hf_reader import HuggingFaceStorageReader
from dcp_native.quantized_hf_storage import QuantizedHuggingFaceStorageReader

SHAPE = (1030, 517)


def written(path: Path, files: dict[str, dict[str, torch.Tensor]]) -> str:
    """Written by rank 0, seen by all."""
    if dist.get_rank() == 0:
        for name, tensors in files.items():
            save_file(tensors, path / name)
        weight_map = {fqn: name for name, tensors in files.items() for fqn in tensors}
        text = json.dumps({"weight_map": weight_map})
        (path / "model.safetensors.index.json").write_text(text)
    dist.barrier()
    return str(path)


def targets(dtype: torch.dtype) -> dict[str, Any]:
    """Rows, columns, everything, and a plain tensor that every rank wants."""
    mesh = mesh_of(dist.get_world_size())
    blank = torch.zeros(SHAPE, dtype=dtype)
    return {
        "rows": shard(blank, mesh, Shard(0)),
        "columns": shard(blank, mesh, Shard(1)),
        "few": shard(torch.zeros(1, 5, dtype=dtype), mesh, Shard(0)),
        "replicated": shard(blank, mesh, Replicate()),
        "plain": torch.zeros(SHAPE, dtype=dtype),
        "zero": torch.zeros((), dtype=dtype),
    }


def case_shards_of_any_kind(ctx: Any) -> None:
    names = ("rows", "columns", "replicated", "plain")
    saved = {name: value(name, SHAPE, torch.bfloat16) for name in names}
    saved["few"], saved["zero"] = value("few", (1, 5)), value("zero", ())
    files = {
        "a.safetensors": {n: saved[n] for n in ("rows", "few", "plain", "zero")},
        "b.safetensors": {n: saved[n] for n in ("columns", "replicated")},
    }
    root = written(ctx.dir, files)
    for dtype in (torch.bfloat16, torch.float32):
        loaded = []
        for module, cls in ((torch_dcp, TorchReader), (dcp, HuggingFaceStorageReader)):
            target = targets(dtype)
            module.load(target, storage_reader=cls(root))
            loaded.append(target)
        assert_equal(*loaded)
        assert_equal(loaded[1]["plain"], saved["plain"].to(dtype))


def case_quantised_shards(ctx: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    names = ("rows.weight", "columns.weight", "plain.weight")
    weight = {
        n: torch.randint(0, 126, SHAPE, dtype=torch.uint8, generator=generator) for n in names
    }
    files = {
        "a.safetensors": {n: w.view(torch.float8_e4m3fn) for n, w in weight.items()},
        "b.safetensors": {f"{n}_scale_inv": torch.rand(9, 5, generator=generator) for n in names},
    }
    root = written(ctx.dir, files)
    loaded = []
    for module, cls in (
        (torch_dcp, TorchQuantizedReader), (dcp, QuantizedHuggingFaceStorageReader)
    ):  # fmt: skip
        made = targets(torch.bfloat16)
        target = {name: made[name.split(".")[0]] for name in names}
        module.load(target, storage_reader=cls(root, target_dtype=torch.bfloat16))
        loaded.append(target)
    assert_equal(*loaded)


def case_a_rank_that_meets_damage_is_named(ctx: Any) -> None:
    """Every rank raises, also those whose file is whole."""
    root = written(ctx.dir, {"a.safetensors": {"rows": value("rows", SHAPE)}})
    reader = HuggingFaceStorageReader(root)
    if dist.get_rank() == 1:
        read = reader.read_data

        def cut(plan: Any, planner: Any) -> Any:
            file = ctx.dir / "a.safetensors"
            file.write_bytes(file.read_bytes()[:-4096])
            return read(plan, planner)

        reader.read_data = cut
    target = {"rows": targets(torch.float32)["rows"]}
    try:
        dcp.load(target, storage_reader=reader)
    except dcp.CheckpointException as error:
        assert "cut short" in str(error.failures[1][0]), error
    else:
        raise AssertionError("nobody noticed")
