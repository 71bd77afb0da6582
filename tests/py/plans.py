"""What torch's own planners would plan, as `_native._debug_plan` shows it, and fake ranks."""

from __future__ import annotations

import io
from collections import UserDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcp_native import _bridge, _native  # noqa: F401  (the bridge must be importable first)

KINDS = {
    WriteItemType.TENSOR: "tensor",
    WriteItemType.SHARD: "shard",
    WriteItemType.BYTE_IO: "bytes",
}


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """A process group that believes to be one rank of many; its collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def torch_planner(state_dict: dict, **options: bool) -> tuple[DefaultSavePlanner, list[WriteItem]]:
    planner = DefaultSavePlanner(**options)
    planner.set_up_planner(state_dict, is_coordinator=True)
    return planner, planner.create_local_plan().items


def shown(item: WriteItem) -> tuple:
    """A WriteItem as `_debug_plan` shows items, without the slot."""
    data = item.tensor_data
    if data is None:
        return (item.index.fqn, "bytes", None, (), (), (), False)
    return (
        item.index.fqn,
        KINDS[item.type],
        str(data.properties.dtype).removeprefix("torch."),
        tuple(data.size),
        tuple(data.chunk.offsets),
        tuple(data.chunk.sizes),
        data.properties.requires_grad,
    )


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Row-major bytes of the value."""
    return raw_bytes_of(tensor.detach().resolve_conj().resolve_neg().contiguous())


def raw_bytes_of(tensor: torch.Tensor) -> bytes:
    """The same of a contiguous tensor, also for dtypes that no operator knows."""
    start = tensor.storage_offset() * tensor.element_size()
    return bytes(tensor.untyped_storage()[start : start + tensor.numel() * tensor.element_size()])


def same_value(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (dict, UserDict)):
        return type(a) is type(b) and list(a) == list(b) and all(same_value(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, float) and a != a:
        return isinstance(b, float) and b != b
    return type(a) is type(b) and a == b


def load_record(record: bytes) -> Any:
    return torch.load(io.BytesIO(record), weights_only=False)


def compare_plans(state_dict: dict, check_data: bool = True, **options: bool) -> dict:
    """Asserts that our plan is torch's: items, order, names, paths, and the bytes of every item."""
    planner, items = torch_planner(state_dict, **options)
    ours = _native._debug_plan(state_dict, with_data=check_data, **options)
    assert [item[:7] for item in ours["items"]] == [shown(item) for item in items]
    if options.get("flatten_state_dict", True):
        assert dict(ours["names"]) == dict(planner.mappings)
        assert [name for name, _ in ours["names"]] == list(planner.mappings)
    else:
        assert all(path is None for _, path in ours["names"])
    if check_data:
        for item, shown_item, payload in zip(items, ours["items"], ours["payloads"], strict=True):
            data = find_state_dict_object(planner.state_dict, item.index)
            if item.type is WriteItemType.BYTE_IO:
                assert shown_item[7] == len(payload)
                assert same_value(load_record(payload), data)
            elif shown_item[7]:
                assert shown_item[7] == len(payload)
            else:
                assert payload == raw_bytes(data), item.index.fqn
    return ours
