"""Model and optimizer state by FQN: get_state_dict, set_state_dict and their parts.

Mirrors torch/distributed/checkpoint/state_dict.py.

A call walks the module tree once (_fqns.py) and asks the tables of that walk from then on;
_state_dict_parts.py does the work. The options and small helpers are torch's objects, and so is
the set of patched methods: state dicts patched by either implementation are known to both.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, no_type_check

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    _FLAT_PARAM,
    FQNS_T,
    DictValueType,
    ListDictValueType,
    OptimizerStateType,
    PrimitiveType,
    StateDictOptions,
    ValueType,
    _gc_context,
    _get_fqns,
    _patched_state_dict,
    _verify_state_dict,
)
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer

from ._mirror import rest_of_torchs
from ._state_dict_info import _StateDictInfo, info_of  # noqa: F401
from ._state_dict_info import verify_options as _verify_options
from ._state_dict_parts import (  # noqa: F401
    _flatten_optim_state_dict,
    _get_model_state_dict,
    _get_optim_state_dict,
    _init_optim_state,
    _load_model_state_dict,
    _load_optim_state_dict,
    _maybe_full_or_cpu_state_dict,
    _split_optim_state_dict,
    _unflatten_optim_state_dict,
)

__all__ = [
    "FQNS_T",
    "DictValueType",
    "ListDictValueType",
    "OptimizerStateType",
    "PrimitiveType",
    "StateDictOptions",
    "ValueType",
    "get_model_state_dict",
    "get_optimizer_state_dict",
    "get_state_dict",
    "set_model_state_dict",
    "set_optimizer_state_dict",
    "set_state_dict",
]


def _tuple_of(optimizers: Optimizer | Iterable[Optimizer]) -> tuple[Optimizer, ...]:
    return (optimizers,) if isinstance(optimizers, Optimizer) else tuple(optimizers)


def get_model_state_dict(
    model: nn.Module,
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> dict[str, ValueType]:
    """The model's state by FQN: its live tensors, detached, unless `options` ask for whole tensors
    or for the CPU.

    Mirrors torch.distributed.checkpoint.state_dict.get_model_state_dict; `submodules` (deprecated)
    selects by module.

    Raises:
        RuntimeError: a key of model.state_dict() has no FQN, or there is no state at all.
        ValueError: `options` contradict each other.
    """
    with _gc_context():
        info = info_of(model, (), False, submodules, options)
        state_dict = _get_model_state_dict(model, info)
        # It looks into key after key; they have nothing to find if all of them together have not.
        if info.fsdp_modules or not state_dict or _FLAT_PARAM in "".join(state_dict):
            _verify_state_dict(state_dict, {}, info)
        return state_dict


def get_optimizer_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> OptimizerStateType:
    """The state of one or several optimizers of the model by FQN, {"state": ..., "param_groups":
    ...}, or flat if `options` say so. State that was never made is made first, by a step that
    changes nothing.

    Mirrors torch.distributed.checkpoint.state_dict.get_optimizer_state_dict.

    Raises:
        KeyError: an optimizer has a parameter that the model has not.
        NotImplementedError: the state can not be flattened.
    """
    with _gc_context():
        optimizers = _tuple_of(optimizers)
        info = info_of(model, optimizers, True, submodules, options)
        osd = _get_optim_state_dict(model, optimizers, info)
        _verify_state_dict({}, osd, info)
        return osd


def get_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> tuple[dict[str, ValueType], OptimizerStateType]:
    """(state of the model, state of the optimizers), as get_model_state_dict and
    get_optimizer_state_dict return them.

    Mirrors torch.distributed.checkpoint.state_dict.get_state_dict.
    """
    with _gc_context():
        optimizers = _tuple_of(optimizers)
        info = info_of(model, optimizers, False, submodules, options)
        state_dict = _get_model_state_dict(model, info)
        osd = _get_optim_state_dict(model, optimizers, info)
        _verify_state_dict(state_dict, osd, info)
        return state_dict, osd


def _unflatten_model_state_dict(
    model: nn.Module,
    state_dict: dict[nn.Module, dict[str, ValueType]] | dict[str, ValueType],
) -> dict[str, ValueType]:
    """State by FQN from state by submodule, which is deprecated."""
    if not state_dict or not isinstance(next(iter(state_dict)), nn.Module):
        return state_dict or {}
    warnings.warn(
        "Passing model_state_dict as a ``Dict[nn.Module, Dict[str, Any]]``"
        "is deprecated and will be removed in 2.5. If you need this "
        "feature, please preprocess the model_state_dict to achieve the "
        "same functionality.",
        FutureWarning,
        stacklevel=3,
    )
    whole: dict[str, ValueType] = {}
    for submodule, part in state_dict.items():
        for name, module in model.named_modules():
            if module != submodule:
                continue
            fqns = _get_fqns(model, name)
            if len(fqns) != 1:
                raise AssertionError("FQNs for a submodule should only have 1 element")
            prefix = f"{next(iter(fqns))}."
            whole.update((prefix + name, value) for name, value in part.items())
    return whole


def set_model_state_dict(
    model: nn.Module,
    model_state_dict: dict[str, ValueType],
    *,
    options: StateDictOptions | None = None,
) -> _IncompatibleKeys:
    """Loads state by FQN into the model; returns its missing and unexpected keys.

    Mirrors torch.distributed.checkpoint.state_dict.set_model_state_dict. As there, FQNs in
    `model_state_dict` are replaced by the names of wrapped modules where the model has some.

    Raises:
        RuntimeError: keys are missing or unexpected (unless `options.strict` is off), or a value
            does not fit.
        ValueError: `options` contradict each other, or the model is on several devices and whole
            tensors are to be distributed.
    """
    model_state_dict = _unflatten_model_state_dict(model, model_state_dict)
    with _gc_context():
        info = info_of(model, (), False, options=options)
        _verify_state_dict(model_state_dict, {}, info)
        return _load_model_state_dict(model, model_state_dict, info)


def set_optimizer_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    optim_state_dict: OptimizerStateType,
    *,
    options: StateDictOptions | None = None,
) -> None:
    """Loads state by FQN, nested or flat, into one or several optimizers of the model. No gradient
    may be left from a backward, for the optimizers' state is made here where it is missing.

    Mirrors torch.distributed.checkpoint.state_dict.set_optimizer_state_dict.

    Raises:
        RuntimeError: a trained parameter has no state (unless `options.strict` is off).
        ValueError: parameter groups do not match.
    """
    with _gc_context():
        optimizers = _tuple_of(optimizers)
        info = _verify_options(model, optimizers, True, options=options)
        _verify_state_dict({}, optim_state_dict, info)
        _load_optim_state_dict(model, optimizers, optim_state_dict, info)


def set_state_dict(
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    *,
    model_state_dict: dict[str, ValueType],
    optim_state_dict: OptimizerStateType,
    options: StateDictOptions | None = None,
) -> _IncompatibleKeys:
    """Loads the optimizers, then the model, as set_optimizer_state_dict and set_model_state_dict
    do; an empty `model_state_dict` leaves the model alone.

    Mirrors torch.distributed.checkpoint.state_dict.set_state_dict.
    """
    model_state_dict = _unflatten_model_state_dict(model, model_state_dict)
    with _gc_context():
        optimizers = _tuple_of(optimizers)
        info = _verify_options(model, optimizers, not model_state_dict, options=options)
        _verify_state_dict(model_state_dict, optim_state_dict, info)
        _load_optim_state_dict(model, optimizers, optim_state_dict, info)
        return _load_model_state_dict(model, model_state_dict, info)


@no_type_check
def _patch_model_state_dict(model: nn.Module, *, options: StateDictOptions | None = None) -> None:
    """Makes model.state_dict() and model.load_state_dict(state_dict) the functions above."""

    def state_dict_call():
        return get_model_state_dict(model, options=options)

    def load_state_dict_call(state_dict: dict[str, Any]):
        set_model_state_dict(model, state_dict, options=options)

    model.state_dict = state_dict_call
    model.load_state_dict = load_state_dict_call
    _patched_state_dict.update((state_dict_call, load_state_dict_call))


@no_type_check
def _patch_optimizer_state_dict(
    model: nn.Module,
    *,
    optimizers: tuple[Optimizer, ...],
    options: StateDictOptions | None = None,
) -> None:
    """The same for optimizers: each of them then gives and takes the state of all of them."""

    def state_dict_call():
        return get_optimizer_state_dict(model, optimizers, options=options)

    def load_state_dict_call(state_dict: dict[str, Any]):
        set_optimizer_state_dict(model, optimizers, state_dict, options=options)

    _patched_state_dict.update((state_dict_call, load_state_dict_call))
    for optim in _tuple_of(optimizers):
        optim.state_dict = state_dict_call
        optim.load_state_dict = load_state_dict_call


__getattr__, __dir__ = rest_of_torchs(__name__)
