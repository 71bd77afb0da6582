"""_state_dict_info.py: what a call of state_dict.py is to do, and FSDP1's part of it.

FSDP1 keeps flat parameters that only it can cut up, so for models that have it the state dicts are
made inside its own contexts, and optimizer state goes through its own conversions.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    _PARAMS,
    _PG,
    _STATE,
    StateDictOptions,
    _get_fqns,
    _get_fsdp_process_group,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.optim import Optimizer

from ._fqns import MODIFIERS, Tree, fqn_mappings
from ._stock import state_dict as _torch


@dataclass
class _StateDictInfo(_torch._StateDictInfo):
    """The options of a call and what was found of its model."""

    tree: Tree | None = None


def tree_of(model: nn.Module, info: _torch._StateDictInfo, modifiers: str = MODIFIERS) -> Tree:
    tree = getattr(info, "tree", None)
    if tree is None or tree.model is not model or tree.modifiers != modifiers:
        tree = Tree(model, modifiers)
    return tree


def verify_options(
    model: nn.Module,
    optims: tuple[Optimizer, ...],
    optim_only: bool,
    *,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> _StateDictInfo:
    """What a call is to do, with torch's mappings between tensors and FQNs."""
    info = info_of(model, optims, optim_only, submodules, options)
    info.fqn_param_mapping, info.shared_params_mapping = fqn_mappings(tree_of(model, info))
    return info


def info_of(
    model: nn.Module,
    optims: tuple[Optimizer, ...],
    optim_only: bool,
    submodules: set[nn.Module] | None = None,
    options: StateDictOptions | None = None,
) -> _StateDictInfo:
    """The same without the mappings, which only loading into an optimizer needs."""
    if submodules:
        warnings.warn(
            "Getting submodules only model/optim state_dict is deprecated and "
            "will be removed in 2.5. This feature can be achieved by manually "
            "filtering out the state_dict returned from get_state_dict.",
            FutureWarning,
            stacklevel=3,
        )
    if optim_only and not optims:
        raise RuntimeError("Optimizers are not passed in but optim_only is set to True.")
    options = options or StateDictOptions()
    tree = Tree(model)
    prefixes: set[str] = set()
    if submodules:
        submodules = set(submodules)
        for name, module in model.named_modules():
            if module in submodules:
                fqns = _get_fqns(model, name)
                if len(fqns) != 1:
                    raise AssertionError("Submodule FQN should only have 1 instance")
                prefixes.update(f"{fqn}." for fqn in fqns)
    if options.broadcast_from_rank0 and not options.full_state_dict:
        raise ValueError("full_state_dict must be True when broadcast_from_rank0 is True.")
    fsdp_modules = FSDP.fsdp_modules(model) if tree.fsdp else []
    return _StateDictInfo(
        **asdict(options),
        submodule_prefixes=prefixes,
        fsdp_context=_fsdp_context(model, options) if fsdp_modules else contextlib.nullcontext,
        fsdp_modules=fsdp_modules,
        handle_model=not optim_only,
        handle_optim=len(optims) > 0,
        tree=tree,
    )


def _fsdp_context(model: nn.Module, options: StateDictOptions) -> Callable:
    """FSDP1's own context for whole or sharded state dicts."""
    offload = options.cpu_offload
    if options.full_state_dict:
        kind = StateDictType.FULL_STATE_DICT
        config = FullStateDictConfig(offload_to_cpu=offload, rank0_only=offload)
        optim_config = FullOptimStateDictConfig(
            offload_to_cpu=offload, rank0_only=offload or options.broadcast_from_rank0
        )
    else:
        kind = StateDictType.SHARDED_STATE_DICT
        config = ShardedStateDictConfig(offload_to_cpu=offload)
        optim_config = ShardedOptimStateDictConfig(offload_to_cpu=offload)

    @contextlib.contextmanager
    def context() -> Generator[None]:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="FSDP.state_dict_type", category=FutureWarning
            )
            with FSDP.state_dict_type(
                module=model,
                state_dict_type=kind,
                state_dict_config=config,
                optim_state_dict_config=optim_config,
            ):
                yield

    return context


def fsdp_optim_state_dict(
    model: nn.Module, optim: Optimizer, osd: dict[str, Any], info: _torch._StateDictInfo
) -> dict[str, Any]:
    """FSDP1 names the state itself, with the names of compiled modules in it."""
    with info.fsdp_context():
        osd = FSDP.optim_state_dict(model, optim, osd, group=_get_fsdp_process_group(model, info))
    if osd:
        for key in list(osd[_STATE]):
            if "_orig_mod" in key:
                osd[_STATE][key.replace("_orig_mod.", "")] = osd[_STATE].pop(key)
        for group in osd[_PG]:
            group[_PARAMS] = [key.replace("_orig_mod.", "") for key in group[_PARAMS]]
    return osd


def fsdp_optim_state_to_load(
    model: nn.Module, optim: Optimizer, osd: dict[str, Any], info: _torch._StateDictInfo
) -> dict[str, Any]:
    """State by FQN as FSDP1 takes it: with the names of compiled modules, flattened, sharded."""
    for name, _ in model.named_parameters():
        fqns = _get_fqns(model, name)
        compiled = _get_fqns(model, name, skip_compiler_prefix=False)
        if fqns == compiled:
            continue
        if len(fqns) != 1:
            raise AssertionError(f"Expected 1 FQN for '{name}', got {len(fqns)}")
        fqn, with_compiler = fqns.pop(), compiled.pop()
        for group in osd[_PG]:
            group[_PARAMS] = [key.replace(fqn, with_compiler) for key in group[_PARAMS]]
        state = osd[_STATE]
        for key in list(state):
            if fqn in key:
                state[key.replace(fqn, with_compiler)] = state.pop(key)
    with info.fsdp_context():
        return FSDP.optim_state_dict_to_load(
            model, optim, osd, group=_get_fsdp_process_group(model, info)
        )
