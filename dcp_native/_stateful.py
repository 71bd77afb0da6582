"""Stateful values of a state dict, told from the rest without asking every tensor.

torch's protocol looks for its methods in every class of each value's ancestry, and torch's
``_stateful_to_state_dict`` makes two events of each key: together 40 us for a tensor, which is more
than planning and writing a small one cost.
"""

from __future__ import annotations

import logging
from typing import Any, TypeGuard

import torch
from torch.distributed.checkpoint.logger import _dcp_logger
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from ._stock import state_dict_saver as _torch

__all__ = ["_stateful_to_state_dict", "is_stateful"]

_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter, DTensor})
_VALUES = frozenset({dict, list, tuple, int, float, bool, str, bytes, type(None)})
"""Exactly these: what derives from them may have the methods."""


def is_stateful(value: Any) -> TypeGuard[Stateful]:
    """``isinstance(value, Stateful)``, quick for what states are made of."""
    kind = type(value)
    if kind in _VALUES:
        return False
    if kind in _TENSORS and "state_dict" not in vars(value):
        return False
    return isinstance(value, Stateful)


def _stateful_to_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A shallow copy of ``state_dict`` in which every Stateful is what its ``state_dict()`` gives.

    torch's own, with its events, where somebody hears them.
    """
    if _is_heard(_dcp_logger):
        return _torch._stateful_to_state_dict(state_dict)
    return {
        key: value.state_dict() if is_stateful(value) else value
        for key, value in state_dict.items()
    }


def _is_heard(logger: logging.Logger) -> bool:
    """Whether an event goes anywhere: to a filter, or to a handler that does something."""
    link: logging.Logger | None = logger
    if logger.filters or logger.disabled:
        return not logger.disabled
    while link is not None:
        if any(type(handler) is not logging.NullHandler for handler in link.handlers):
            return True
        link = link.parent if link.propagate else None
    return False
