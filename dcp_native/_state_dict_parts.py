"""_state_dict_parts.py: state of a model and of its optimizers under the options of one call.

Mirrors the private half of torch/distributed/checkpoint/state_dict.py under torch's names and
signatures, which clients call. What torch does per module and per optimizer is in _module_state.py
and _optimizer_state.py; here is what the options mean. Runs on the calling thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._state_dict_utils import _flatten_state_dict, _unflatten_state_dict
from torch.distributed.checkpoint.state_dict import (
    _PARAMS,
    _PG,
    _STATE,
    OptimizerStateType,
    ValueType,
    _patched_state_dict,
    _state_dict_fn,
)
from torch.distributed.checkpoint.state_dict import _StateDictInfo as Info
from torch.nn.modules.module import _IncompatibleKeys
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from . import _module_state, _optimizer_state
from ._fqns import Tree
from ._full_broadcast import before_broadcast
from ._full_state_dict import (
    _broadcast_state_dict,
    _distribute_state_dict,
    _gather_state_dict,
    _offload_state_dict_to_cpu,
)
from ._optimizer_state import flatten as _flatten_optim_state_dict
from ._optimizer_state import init_optim_state as _init_optim_state
from ._state_dict_info import fsdp_optim_state_dict, fsdp_optim_state_to_load, tree_of


def _is_own(obj: Any, api: str) -> bool:
    """Whether `api` is the method of the object's class, or one of our patches over it."""
    own = vars(obj).get(api)
    return own is None or own in _patched_state_dict


def _maybe_full_or_cpu_state_dict(state_dict: dict[str, Any], info: Info) -> dict[str, Any]:
    if info.full_state_dict:
        rank0_only = info.cpu_offload and dist.is_initialized()
        return _gather_state_dict(
            state_dict, cpu_offload=info.cpu_offload, ranks_only=(0,) if rank0_only else ()
        )
    if info.cpu_offload:
        return _offload_state_dict_to_cpu(state_dict)
    return state_dict


def _is_unwrapped(key: str, fqn: str) -> bool:
    """Whether `fqn` is `key` without names that wrappers are known to add."""
    if len(fqn) >= len(key):
        return False
    wanted, names = fqn.split("."), key.split(".")
    at = 0
    for i, name in enumerate(names):
        if name == wanted[at]:
            at += 1
            if at == len(wanted):
                return i == len(names) - 1
        elif name not in ("module", "_orig_mod"):
            return False
    return True


@torch.no_grad()
def _get_model_state_dict(model: nn.Module, info: Info) -> dict[str, ValueType]:
    if not info.handle_model:
        return {}
    tree = tree_of(model, info)
    with info.fsdp_context():
        if tree.plain:
            state_dict = _module_state.save_tree(tree)
        else:
            state_dict = _state_dict_fn(model, "state_dict")()
    if tree.wrapped or tree.hooked or not tree.regular:
        for key, fqn in tree.fqns_of(list(state_dict)):
            if fqn != key:
                if not _is_unwrapped(key, fqn):
                    raise RuntimeError(f"An unexpected key, {key}, exists. FQN is {fqn}")
                state_dict[fqn] = state_dict.pop(key)
    if info.submodule_prefixes:
        chosen: dict[str, ValueType] = {}
        for fqn, value in state_dict.items():
            for prefix in info.submodule_prefixes:
                if fqn.startswith(prefix):
                    chosen[fqn if info.keep_submodule_prefixes else fqn[len(prefix) :]] = value
        state_dict = chosen
    if info.ignore_frozen_params:
        for fqn in tree.frozen():
            state_dict.pop(fqn)
    return _maybe_full_or_cpu_state_dict(state_dict, info)


def _target_device(tensors: Iterable[Any]) -> tuple[torch.device, bool]:
    """(the device of the tensors with dimensions, whether some are on meta besides).

    Raises:
        ValueError: they are on several.
    """
    devices = {t.device for t in tensors if torch.is_tensor(t) and t.dim() > 0}
    meta = torch.device("meta") in devices
    devices.discard(torch.device("meta"))
    if len(devices) > 1:
        raise ValueError("Multiple devices found")
    return devices.pop() if devices else dist.distributed_c10d._get_pg_default_device(), meta


@torch.no_grad()
def _load_model_state_dict(
    model: nn.Module, state_dict: dict[str, ValueType], info: Info
) -> _IncompatibleKeys:
    if not info.handle_model or (not state_dict and not info.broadcast_from_rank0):
        return _IncompatibleKeys({}, {})
    tree = tree_of(model, info, info.dsd_fqn_modifiers)
    spread = info.broadcast_from_rank0 or info.full_state_dict
    assign = False
    if spread or tree.wrapped or not tree.regular:
        with before_broadcast(info.broadcast_from_rank0):
            local = _add_wrappers(state_dict, tree, info)
            if spread:
                device, assign = _target_device(local.values())
        if spread:
            if info.broadcast_from_rank0:
                _broadcast_state_dict(
                    state_dict,
                    local,
                    device=device,
                    strict=info.strict,
                    cpu_offload=info.cpu_offload,
                )
            else:
                _distribute_state_dict(state_dict, local, device=device)
            state_dict.update(local)
    with info.fsdp_context():
        if _is_own(model, "load_state_dict") and _module_state.loads_as_module(type(model)):
            return _module_state.load_tree(model, state_dict, info.strict, assign, tree.facts)
        return _state_dict_fn(model, "load_state_dict")(
            state_dict=state_dict, strict=info.strict, assign=assign
        )


def _add_wrappers(state_dict: dict[str, ValueType], tree: Tree, info: Info) -> dict[str, Any]:
    """Renames FQNs of `state_dict` to the keys that load_state_dict takes, in place; returns the
    model's tensors by those keys.
    """
    local: dict[str, Any] = {}
    loads_here = not info.broadcast_from_rank0 or dist.get_rank() == 0
    for fqns, keys, value in tree.valid_state():
        for fqn, key in zip(fqns, keys, strict=False):
            if loads_here and fqn != key:
                loaded = state_dict.pop(fqn, None)
                if loaded is not None:
                    state_dict[key] = loaded
                elif info.strict:
                    raise RuntimeError(f"Missing key: {fqn}.")
            local[key] = value
    return local


def _unflatten_optim_state_dict(
    optim: Optimizer, state_dict: dict[str, ValueType], info: Info
) -> OptimizerStateType:
    return _optimizer_state.unflatten(
        optim, state_dict, info.fqn_param_mapping, info.shared_params_mapping
    )


def _split_optim_state_dict(
    model: nn.Module,
    optim: Optimizer,
    optim_state_dict: OptimizerStateType,
    info: Info,
) -> OptimizerStateType:
    """The part of `optim_state_dict` that is of `optim`."""
    loaded = _optimizer_state.LoadedState(optim_state_dict)
    return loaded.part_of(optim, info.fqn_param_mapping, info.shared_params_mapping, info.strict)


@torch.no_grad()
def _get_optim_state_dict(
    model: nn.Module, optimizers: tuple[Optimizer, ...], info: Info
) -> OptimizerStateType:
    if not info.handle_optim:
        return {}
    result: dict[str, Any] = {_STATE: {}, _PG: []}
    fqn_of: dict[int, str] | None = None
    for optim in optimizers:
        _init_optim_state(optim)
        osd = _state_dict_fn(optim, "state_dict")()
        if info.fsdp_modules:
            osd = fsdp_optim_state_dict(model, optim, osd, info)
        else:
            if fqn_of is None:
                fqn_of = {id(param): fqn for fqn, param in tree_of(model, info).parameters()}
            _optimizer_state.name_state(osd, optim, fqn_of)
        if osd:
            result[_STATE].update(osd[_STATE])
            result[_PG].extend(osd[_PG])
    if info.flatten_optimizer_state_dict:
        result = _flatten_optim_state_dict(result)
    return _maybe_full_or_cpu_state_dict(result, info)


@torch.no_grad()
def _load_optim_state_dict(
    model: nn.Module,
    optimizers: tuple[Optimizer, ...],
    state_dict: OptimizerStateType,
    info: Info,
) -> None:
    if not info.handle_optim:
        return
    fqns_of, shared = info.fqn_param_mapping, info.shared_params_mapping
    loaded: _optimizer_state.LoadedState | None = None
    for optim in optimizers:
        part: dict[str, Any]
        with before_broadcast(info.broadcast_from_rank0 and not info.fsdp_modules):
            _init_optim_state(optim)
            if not state_dict:
                part = {}
            elif _STATE in state_dict:
                loaded = loaded or _optimizer_state.LoadedState(state_dict)
                part = loaded.part_of(optim, fqns_of, shared, info.strict)
            else:
                part = _optimizer_state.unflatten(optim, state_dict, fqns_of, shared)
        if info.fsdp_modules:
            part = fsdp_optim_state_to_load(model, optim, part, info)
        elif info.full_state_dict:
            part = _spread_optim_state(model, optim, part, info)
        if _is_own(optim, "load_state_dict") and _optimizer_state.can_load(optim, part):
            _optimizer_state.load(optim, part)
        else:
            _state_dict_fn(optim, "load_state_dict")(state_dict=part)


def _spread_optim_state(
    model: nn.Module, optim: Optimizer, osd: dict[str, Any], info: Info
) -> dict[str, Any]:
    """Whole state, of rank 0 or of every rank, cut to what the optimizer holds here."""
    with before_broadcast(info.broadcast_from_rank0):
        info.full_state_dict = False
        local = _get_optim_state_dict(model, (optim,), info)
        info.full_state_dict = True
        devices = dict.fromkeys(
            leaf.device for leaf in tree_leaves(local) if torch.is_tensor(leaf) and leaf.dim() > 0
        )
        if len(devices) > 1:
            raise ValueError("Device mismatch")
        if not devices:
            raise AssertionError("Expected device to be set")
        (device,) = devices
        flat, paths = _flatten_state_dict(osd)
        flat_local, local_paths = _flatten_state_dict(local)
    if info.broadcast_from_rank0:
        _broadcast_state_dict(flat, flat_local, device=device)
    else:
        _distribute_state_dict(flat, flat_local, device=device)
    # What was saved beyond the state that the optimizer has so far is loaded as well.
    for key, value in flat.items():
        if key not in flat_local:
            flat_local[key] = value
            local_paths[key] = paths[key]
    whole = _unflatten_state_dict(flat_local, local_paths)
    for group in whole[_PG]:
        group.setdefault(_PARAMS, [])
    return whole
