"""Hugging Face exports by several ranks: what others read in them, what a failure leaves."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, full, like, mesh_of, shard, value
from dcp_native._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint._consolidate_hf_safetensors import (
    consolidate_safetensors_files_on_every_rank as torch_consolidate,
)
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.tensor import Replicate, Shard

import dcp_native as dcp
from dcp_native import _native
from dcp_native._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank
from dcp_native._hf_layout import PREFIX
from dcp_native.hf_storage import HuggingFaceStorageWriter


def state(size: int, bump: int = 0) -> dict[str, object]:
    mesh = mesh_of(size)
    return {
        "rows": shard(value("rows", (517, 600)) + bump, mesh, Shard(0)),
        "columns": shard(value("columns", (300, 771), torch.bfloat16) + bump, mesh, Shard(1)),
        "middle": shard(value("middle", (7, 130, 33)) + bump, mesh, Shard(1)),
        "uneven": shard(value("uneven", (size + 1, 5), torch.int64) + bump, mesh, Shard(0)),
        "replicated": shard(value("replicated", (400, 50)) + bump, mesh, Replicate()),
        "plain": value("plain", (1000,)) + bump,
        "scalar": torch.tensor(3 + bump, dtype=torch.int32),
        "flags": value("flags", (9,), torch.bool),
        "empty": torch.empty(0, 3),
    }


def mapping(state_dict: dict[str, object]) -> dict[str, int]:
    return {fqn: 1 + i % 3 for i, fqn in enumerate(state_dict)}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """By the index, as transformers does."""
    index = json.loads((path / "model.safetensors.index.json").read_text())
    found = {}
    for fqn, name in index["weight_map"].items():
        with safe_open(path / name, "pt") as file:
            assert file.metadata()["format"] == "pt"
            found[fqn] = file.get_tensor(fqn)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path)) if path.exists() else []


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_export(path: Path, state_dict: dict[str, object]) -> None:
    found = read_all(path)
    assert set(found) == set(state_dict)
    for fqn, tensor in state_dict.items():
        assert torch.equal(found[fqn], full(tensor)), fqn
    assert [n for n in names(path) if n.startswith(".")] == []


def save_one_pass(context, state_dict, save=dcp.save, path: Path | None = None) -> Path:
    path = path or context.dir / "export"
    writer = HuggingFaceStorageWriter(
        str(path),
        fqn_to_index_mapping=mapping(state_dict),
        save_distributed=True,
        enable_consolidation=True,
    )
    save(state_dict, storage_writer=writer)
    return path


def case_one_pass_makes_the_final_files(context):
    for save in (dcp.save, torch_dcp.save):
        state_dict = state(context.size)
        path = save_one_pass(context, state_dict, save)
        check_export(path, state_dict)
        assert names(path) == [
            "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors", "model.safetensors.index.json",
        ]  # fmt: skip
        target = like(state_dict)
        torch_dcp.load(target, storage_reader=HuggingFaceStorageReader(str(path)))
        assert_equal(target, state_dict)
        context.barrier()


def case_an_export_replaces_the_one_before(context):
    path = save_one_pass(context, state(context.size))
    newer = {fqn: tensor for fqn, tensor in state(context.size, 5).items() if fqn != "plain"}
    writer = HuggingFaceStorageWriter(str(path), save_distributed=True, enable_consolidation=True)
    dcp.save(newer, storage_writer=writer)
    check_export(path, newer)
    assert names(path) == ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    context.barrier()


def case_shard_files_are_those_that_torch_consolidates(context):
    state_dict, out = state(context.size), context.dir / "out"
    columns = mapping(state_dict)
    # Torch's consolidation knows no integers and no scalars.
    floats = {
        k: v for k, v in state_dict.items()
        if v.dtype.is_floating_point and v.dim() > 0 and v.numel() > 0
    }  # fmt: skip
    for number, some in enumerate((floats, state_dict)):
        path = context.dir / f"shards{number}"
        writer = HuggingFaceStorageWriter(
            str(path), fqn_to_index_mapping=columns, save_distributed=True
        )
        dcp.save(some, storage_writer=writer)
        assert all(n.startswith("shard-0000") for n in names(path))
        target = like(some)
        torch_dcp.load(target, storage_reader=HuggingFaceStorageReader(str(path)))
        assert_equal(target, some)
        wanted = {fqn: columns[fqn] for fqn in some}
        if context.rank == 0:
            out.mkdir(exist_ok=True)
        context.barrier()
        for consolidate in (torch_consolidate, consolidate_safetensors_files_on_every_rank):
            if consolidate is torch_consolidate and some is not floats:
                continue
            consolidate(str(path), str(out), wanted)
            if consolidate is not torch_consolidate:
                check_export(out, some)
            context.barrier()


def case_shards_that_torch_wrote_are_consolidated(context):
    state_dict = state(context.size)
    path, out = context.dir / "shards", context.dir / "out"
    writer = torch_dcp.HuggingFaceStorageWriter(
        str(path), fqn_to_index_mapping=mapping(state_dict), save_distributed=True
    )
    torch_dcp.save(state_dict, storage_writer=writer)
    consolidate_safetensors_files_on_every_rank(str(path), str(out), mapping(state_dict))
    check_export(out, state_dict)
    context.barrier()


def case_ranks_without_a_shared_directory_write_shard_files(context):
    state_dict = state(context.size)
    with mock.patch.object(HuggingFaceStorageWriter, "_is_shared", return_value=False):
        path = save_one_pass(context, state_dict)
    check_export(path, state_dict)
    shards = names(path / "sharded")
    assert shards and all(n.startswith("shard-") for n in shards)
    context.barrier()


def case_a_failure_of_one_rank_leaves_the_export_before(context):
    state_dict = state(context.size)
    path = save_one_pass(context, state_dict)
    failing = mock.patch(
        "dcp_native.hf_storage._native.export_write", side_effect=OSError(28, "No space left")
    )
    write = HuggingFaceStorageWriter._write
    last = context.rank == context.size - 1

    def late(self, *arguments):
        """Begins when the files that the failing rank had are gone."""
        if not last:
            wait_until(lambda: not any(name.endswith(".part") for name in names(path)))
        return write(self, *arguments)

    slow = mock.patch.object(HuggingFaceStorageWriter, "_write", late)
    try:
        with failing if last else mock.MagicMock(), slow:
            save_one_pass(context, state(context.size, 9))
    except CheckpointException as error:
        assert set(error.failures) == {context.size - 1}, error
        cause, _ = error.failures[context.size - 1]
        assert isinstance(cause, OSError) and cause.errno == 28, cause
    else:
        raise AssertionError("no failure")
    context.barrier()
    check_export(path, state_dict)
    context.barrier()


def case_consolidation_fails_on_all_ranks_when_a_shard_is_missing(context):
    state_dict = state(context.size)
    path, out = context.dir / "shards", context.dir / "out"
    writer = HuggingFaceStorageWriter(
        str(path), fqn_to_index_mapping=mapping(state_dict), save_distributed=True
    )
    dcp.save(state_dict, storage_writer=writer)
    context.barrier()
    if context.rank == 0:
        (path / next(n for n in names(path) if n.startswith("shard-00002-model-00001"))).unlink()
    context.barrier()
    try:
        consolidate_safetensors_files_on_every_rank(str(path), str(out), mapping(state_dict))
    except RuntimeError as error:
        assert "a shard file is missing" in str(error), error
    else:
        raise AssertionError("no failure")
    context.barrier()
    assert names(out) == []
    context.barrier()


def case_another_export_that_took_over_is_told_of(context):
    state_dict = state(context.size)
    write = HuggingFaceStorageWriter._write

    def taken_over(self, order, *rest):
        if context.rank == context.size - 1:
            _native.export_sweep(order.path)
        return write(self, order, *rest)

    try:
        with mock.patch.object(HuggingFaceStorageWriter, "_write", taken_over):
            save_one_pass(context, state_dict)
    except CheckpointException as error:
        assert set(error.failures) == {0}, error
        assert error.failures[0][0].dcp_code == "SUPERSEDED", error
    else:
        raise AssertionError("no failure")
    context.barrier()
    assert names(context.dir / "export") == []
    context.barrier()


def case_ranks_without_a_shared_directory_join_what_this_save_wrote(context):
    """Shard files of ranks that are no more, and what a killed save left, do not get in."""
    state_dict = state(context.size)
    path = context.dir / "export"
    stale = path / "sharded" / "shard-00009-model-00001-of-00001.safetensors"
    other = path / "sharded" / f"{PREFIX}0-shard-00009-model-00001-of-00001.safetensors.part"
    if context.rank == 0:
        stale.parent.mkdir(parents=True)
        info = {"rows": {SAVED_OFFSETS_KEY: [0, 0]}, "alien": {SAVED_OFFSETS_KEY: [0]}}
        tensors = {"rows": torch.full((517, 600), -1.0), "alien": torch.ones(3)}
        save_file(tensors, stale, metadata={CUSTOM_METADATA_KEY: json.dumps(info)})
        other.touch()
        (path / f"{PREFIX}probe-0-0").touch()
        for rank in range(context.size):
            old = f"{PREFIX}0-shard-{rank + 1:05d}-model-00001-of-00001.safetensors.part"
            (path / "sharded" / old).touch()
    context.barrier()
    with mock.patch.object(HuggingFaceStorageWriter, "_is_shared", return_value=False):
        save_one_pass(context, state_dict)
    context.barrier()
    check_export(path, state_dict)
    hidden = [name for name in names(path / "sharded") if name.startswith(".")]
    assert hidden == [other.name], hidden
    context.barrier()


def case_nothing_to_consolidate_changes_nothing(context):
    """[hf-empty]"""
    state_dict = state(context.size)
    path, empty = save_one_pass(context, state_dict), context.dir / "empty"
    empty.mkdir(exist_ok=True)
    context.barrier()
    before = names(path)
    try:
        consolidate_safetensors_files_on_every_rank(str(empty), str(path), mapping(state_dict))
    except ValueError as error:
        assert "nothing was changed" in str(error), error
    else:
        raise AssertionError("no failure")
    context.barrier()
    assert names(path) == before
    check_export(path, state_dict)
    context.barrier()


def case_ranks_that_do_not_plan_together_are_refused(context):
    """[hf-collectives]"""
    writer = HuggingFaceStorageWriter(str(context.dir / "export"))
    try:
        dcp.save({"w": torch.ones(3)}, storage_writer=writer, use_collectives=False)
    except (ValueError, CheckpointException) as error:
        assert "use_collectives=True" in str(error), error
    else:
        raise AssertionError("no failure")
    context.barrier()
    assert not any(n.endswith(".safetensors") for n in names(context.dir / "export"))
    context.barrier()


def case_a_planner_that_keeps_plans_finds_the_directory_shared(context):
    """The rank whose plan did not change is given a plan made of the one that was kept."""
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    for bump in range(4):
        state_dict = state(context.size, bump)
        if bump > 1:  # what one rank leaves out another one writes
            del state_dict["plain" if bump == 2 else "replicated"]
        if bump == 1 and context.rank == context.size - 1:
            state_dict["mine"] = torch.ones(100_000)
        path = context.dir / "export"
        writer = HuggingFaceStorageWriter(str(path), save_distributed=True,
                                          enable_consolidation=True)  # fmt: skip
        dcp.save(state_dict, storage_writer=writer, planner=planner)
        assert not (path / "sharded").exists(), bump
        context.barrier()
        if bump != 1:
            check_export(path, state_dict)
        context.barrier()


def case_an_object_is_refused_by_name(context):
    try:
        save_one_pass(context, {**state(context.size), "step": 3})
    except CheckpointException as error:
        assert any("step is not a tensor" in str(e) for e, _ in error.failures.values())
    else:
        raise AssertionError("no failure")
    dist.barrier()
