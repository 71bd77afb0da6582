"""_optimizer_state.py: optimizer state by FQN: made, renamed, flattened, split, loaded.

An optimizer numbers its parameters; a checkpoint names them. Both directions are one dict lookup
per parameter here: torch looks every name up in the lists of all parameter groups, and compares
every state tensor's number with those lists once more when it loads.

Values are never copied: what comes out are the optimizer's own state dicts and tensors, and what
goes in is taken over if type and device fit, as in torch. Runs on the calling thread.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

PARAM_GROUPS = "param_groups"
PARAMS = "params"
STATE = "state"

_LOAD_STATE_DICT = Optimizer.load_state_dict
_PROCESS_VALUE = Optimizer._process_value_according_to_param_policy
_TENSORS = (Tensor, Parameter, DTensor)


def init_optim_state(optim: Optimizer) -> None:
    """Lets a fresh optimizer create its state: one step with zero gradients and a zero lr.

    Nothing happens where there is state or a gradient. Gradients are None afterwards.
    """
    if optim.state:
        return
    params = [param for group in optim.param_groups for param in group[PARAMS]]
    if any(param.grad is not None for param in params):
        return  # a stateless optimizer, such as SGD, in the middle of training
    for param in params:
        if param.requires_grad:
            param.grad = torch.zeros_like(param)
    rates = [(group, group["lr"]) for group in optim.param_groups if "lr" in group]
    for group, rate in rates:
        group["lr"] = torch.tensor(0.0) if isinstance(rate, Tensor) else 0.0
    optim.step(closure=None)
    for group, rate in rates:
        group["lr"] = rate
    optim.zero_grad(set_to_none=True)


def name_state(osd: dict[str, Any], optim: Optimizer, fqn_of: Mapping[int, str]) -> None:
    """Replaces the numbers in what optim.state_dict() returned by FQNs, in place.

    `fqn_of` is by the id() of a parameter.

    Raises:
        KeyError: state or a parameter that is not the model's.
    """
    numbers = {
        id(param): number
        for number, param in enumerate(chain.from_iterable(g[PARAMS] for g in optim.param_groups))
    }
    names: dict[Any, Any] = {}
    for key, number in numbers.items():
        fqn = fqn_of.get(key)
        if fqn is not None:
            names[number] = fqn
            names[fqn] = number  # state that has names already gets numbers, in torch too
    state = osd[STATE]
    for key in list(state):
        state[names[key]] = state.pop(key)
    for group in osd[PARAM_GROUPS]:
        group[PARAMS] = [names[number] for number in group[PARAMS]]


def flatten(state_dict: dict[str, Any]) -> dict[str, Any]:
    """{"state.FQN.NAME": value, ..., "param_groups.FQN.NAME": value, ...}; takes "params" out of
    the groups of `state_dict`.

    Raises:
        NotImplementedError: state that is no tensor, number or dict of them.
    """
    flat: dict[str, Any] = {}

    def put(items: Mapping[Any, Any], prefix: str) -> None:
        for key, value in items.items():
            if isinstance(value, dict):
                put(value, f"{prefix}{key}.")
            elif isinstance(value, (Tensor, int, float)):
                flat[f"{prefix}{key}"] = value
            else:
                raise NotImplementedError(
                    "Flattening optimizer state_dict only supports "
                    "tensor, int, float, dict states now. "
                    f"Type is {type(value)}."
                )

    for fqn, state in state_dict[STATE].items():
        put(state, f"{STATE}.{fqn}.")
    for group in state_dict[PARAM_GROUPS]:
        fqns = group.pop(PARAMS)
        for fqn in fqns:
            prefix = f"{PARAM_GROUPS}.{fqn}."
            for key, value in group.items():
                flat[prefix + key] = value
    return flat


class NestedState:
    """State dicts inside a flat state dict, found by the prefix of their keys.

    The index is built when the first one is asked for: most optimizers have none.
    """

    def __init__(self, flat: Mapping[str, Any]) -> None:
        self.flat = flat
        self._below: dict[str, list[str]] | None = None

    def at(self, key: str) -> dict[str, Any]:
        """The dict below `key`; empty where nothing is."""
        if self._below is None:
            self._below = defaultdict(list)
            for name in self.flat:
                dot = name.find(".")
                while dot >= 0:
                    self._below[name[:dot]].append(name)
                    dot = name.find(".", dot + 1)
        nested: dict[str, Any] = {}
        for name in self._below.get(key, ()):
            *parents, leaf = name[len(key) + 1 :].split(".")
            at = nested
            for part in parents:
                at = at.setdefault(part, {})
                if not isinstance(at, dict):
                    raise AssertionError
            at[leaf] = self.flat[name]
        return nested


def unflatten(
    optim: Optimizer, flat: Mapping[str, Any], fqns_of: Mapping[Any, Any], shared: Mapping[Any, Any]
) -> dict[str, Any]:
    """The optimizer's part of a flat state dict; `fqns_of` and `shared` are torch's mappings."""
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    nested = NestedState(flat)
    for group in optim.param_groups:
        options = [key for key in group if key != PARAMS]
        fqns: list[str] = []
        groups.append({PARAMS: fqns})
        for param in group[PARAMS]:
            for fqn in fqns_of[param]:
                # Of a shared parameter's FQNs those count under which it was saved.
                if fqn in shared and not (options and f"{PARAM_GROUPS}.{fqn}.{options[0]}" in flat):
                    continue
                fqns.append(fqn)
                if not param.requires_grad:
                    continue
                own = state[fqn] = {}
                for name in optim.state[param]:
                    key = f"{STATE}.{fqn}.{name}"
                    own[name] = flat[key] if key in flat else nested.at(key)
        prefix = f"{PARAM_GROUPS}.{fqns[0]}."
        for key in options:
            groups[-1][key] = flat[prefix + key]
    return {STATE: state, PARAM_GROUPS: groups}


class LoadedState:
    """A state dict by FQN, of one or several optimizers, indexed once for all of them."""

    def __init__(self, osd: dict[str, Any]) -> None:
        self.osd = osd
        self.state = osd[STATE]
        self.groups = osd[PARAM_GROUPS]
        self.numbered = all(isinstance(key, int) for key in self.state)
        self.groups_of: dict[str, list[int]] = defaultdict(list)
        if not self.numbered:
            for at, group in enumerate(self.groups):
                for fqn in dict.fromkeys(group[PARAMS]):
                    self.groups_of[fqn].append(at)

    def part_of(
        self, optim: Optimizer, fqns_of: Mapping[Any, Any], shared: Mapping[Any, Any], strict: bool
    ) -> dict[str, Any]:
        """The part of one optimizer, with its groups in its order.

        Raises:
            RuntimeError: strict, and a parameter that is trained has no state.
            ValueError: the optimizer has an empty group, and not exactly one was saved.
        """
        if self.numbered:
            return self.osd
        state: dict[str, Any] = {}
        parts: list[dict[str, Any]] = []
        part_of: dict[int, int] = {}  # index of the saved group to index of the optimizer's
        for number, group in enumerate(optim.param_groups):
            fqns: list[str] = []
            parts.append({PARAMS: fqns})
            for param in group[PARAMS]:
                for fqn in fqns_of[param]:
                    if fqn in shared and fqn not in self.groups_of:
                        continue
                    fqns.append(fqn)
                    if param.requires_grad:
                        if fqn in self.state:
                            state[fqn] = self.state[fqn]
                        elif strict:
                            raise RuntimeError(
                                f"Missing optimizer state for parameter '{fqn}' in checkpoint. "
                                "The parameter requires gradients but has no saved optimizer "
                                "state. To load anyway, use StateDictOptions(strict=False)."
                            )
                    for at in self.groups_of.get(fqn, ()):
                        part_of[at] = number
            if not group[PARAMS]:
                self._check_empty_group(optim)
                part_of[len(self.groups) - 1] = number  # the last group, empty or not, as in torch
        for at in sorted(part_of):
            part = parts[part_of[at]]
            part.update((key, value) for key, value in self.groups[at].items() if key != PARAMS)
        return {STATE: state, PARAM_GROUPS: parts}

    def _check_empty_group(self, optim: Optimizer) -> None:
        if sum(not group[PARAMS] for group in self.groups) != 1:
            raise ValueError(
                "There are param groups that have zero parameters. "
                "In such a case, DSD only support exactly one param group "
                "with zero parameters."
                "But the loaded state_dict has zero or more than one param groups "
                "that have zero parameters."
            )
        if len(self.groups) != len(optim.param_groups):
            raise ValueError(
                "When there is a parameter group that has zero parameters, "
                "multiple optimizers are not supported."
            )


def can_load(optim: Any, state_dict: dict[str, Any]) -> bool:
    """Whether `load` may stand in for optim.load_state_dict: it is torch's and will not fail."""
    return (
        getattr(type(optim), "load_state_dict", None) is _LOAD_STATE_DICT
        and Optimizer._process_value_according_to_param_policy is _PROCESS_VALUE
        and not optim._optimizer_load_state_dict_pre_hooks
        and _groups_match(optim, state_dict)
    )


def load(optim: Optimizer, state_dict: dict[str, Any]) -> None:
    """optim.load_state_dict(state_dict), where `can_load`."""
    groups, saved = optim.param_groups, state_dict[PARAM_GROUPS]
    # One deepcopy, so that what groups share stays shared; names are only replaced in its place.
    copies = deepcopy([{k: None if k == PARAMS else v for k, v in g.items()} for g in saved])
    hosted: dict[Any, bool] = {}  # whether the step counter lives with the parameter
    params: dict[Any, Tensor] = {}
    for group, old, new in zip(groups, saved, copies, strict=True):
        on_device = bool(old.get("fused", False) or old.get("capturable", False))
        for key, param in zip(old[PARAMS], group[PARAMS], strict=True):
            params[key] = param
            hosted.setdefault(key, on_device)
        new[PARAMS] = group[PARAMS]
        if "param_names" in group and "param_names" not in new:
            new["param_names"] = group["param_names"]
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, value in state_dict[STATE].items():
        param = params.get(key)
        if param is None:
            state[key] = value
        else:
            state[param] = _Cast(param, hosted[key]).of(value)
    optim.__setstate__({STATE: state, PARAM_GROUPS: copies})
    for hook in optim._optimizer_load_state_dict_post_hooks.values():
        hook(optim)


def _groups_match(optim: Optimizer, state_dict: dict[str, Any]) -> bool:
    groups, saved = optim.param_groups, state_dict.get(PARAM_GROUPS, ())
    return len(groups) == len(saved) and all(
        len(group[PARAMS]) == len(other[PARAMS]) for group, other in zip(groups, saved, strict=True)
    )


class _Cast:
    """Brings state to the type and device of its parameter, by torch's rules for step counters."""

    __slots__ = ("device", "dtype", "hosted")

    def __init__(self, param: Tensor, hosted: bool) -> None:
        self.device = param.device
        self.dtype = param.dtype if param.is_floating_point() else None
        self.hosted = hosted

    def of(self, value: Any, key: Any = None) -> Any:
        if isinstance(value, Tensor):
            if key == "step":
                return value.to(dtype=torch.float32, device=self.device) if self.hosted else value
            dtype = self.dtype
            if (
                type(value) in _TENSORS
                and (dtype is None or value.dtype is dtype)
                and value.device == self.device
            ):
                return value  # as to() would
            if dtype is None:
                return value.to(device=self.device)
            return value.to(dtype=dtype, device=self.device)
        if isinstance(value, dict):
            return {name: self.of(item, name) for name, item in value.items()}
        if isinstance(value, Iterable):
            return type(value)(self.of(item) for item in value)  # type: ignore[call-arg]
        return value
