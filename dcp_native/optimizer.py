"""load_sharded_optimizer_state_dict, which loads through our ``load_state_dict``.

Mirrors torch/distributed/checkpoint/optimizer.py.  How FSDP1's optimizer state is laid out is
torch's knowledge; only what reads it is ours.
"""

from __future__ import annotations

import functools
from types import FunctionType

from ._mirror import rest_of_torchs
from ._stock import optimizer as _torch
from .state_dict_loader import load_state_dict

__all__ = ["load_sharded_optimizer_state_dict"]


def _with_our_load(function: FunctionType) -> FunctionType:
    """Torch's function, in whose globals ``load_state_dict`` is ours."""
    names = {**function.__globals__, "load_state_dict": load_state_dict}
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    functools.update_wrapper(made, function)
    made.__module__ = __name__
    return made


load_sharded_optimizer_state_dict = _with_our_load(_torch.load_sharded_optimizer_state_dict)

__getattr__, __dir__ = rest_of_torchs(__name__)
