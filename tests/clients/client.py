"""What the jobs of the clients share: a model, its training, a digest of what they hold.

No job knows dcp_native: it comes in by DCP_NATIVE_INSTALL=1 or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

FEATURES = 32


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, FEATURES))


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, FEATURES, generator=generator) for _ in range(count)]


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        return [str(value.dtype), list(value.shape), value.flatten().view(torch.uint8).tolist()]
    if isinstance(value, dict):
        return {str(key): _whole(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, (list, tuple)):
        return [_whole(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)


def digest(state: Any) -> str:
    """Of every value, sharded ones gathered; collective."""
    return hashlib.sha256(json.dumps(_whole(state), sort_keys=True).encode()).hexdigest()[:16]


def say(**facts: Any) -> None:
    """One line of JSON from rank 0: the facts, and how dcp_native took part."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    ours = sys.modules.get("dcp_native")
    report = None if ours is None else ours.last_report()
    path = None if not report else report.get("path", "native")
    print(json.dumps({**facts, "installed": ours is not None, "path": path}), flush=True)


def asked() -> tuple[str, str]:
    """("save" or "load", directory)"""
    return sys.argv[1], sys.argv[2]


def rank() -> int:
    return int(os.environ.get("RANK", "0"))
