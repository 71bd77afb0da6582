"""_module_state.py: Module.state_dict and Module.load_state_dict of a whole tree at a lower price.

Saving detaches parameters and buffers straight into the state dict, for a tree in which nobody has
a say in it (`Tree.plain`); where there are hooks or overridden methods, torch's own runs.

Loading does what torch's recursion does, in its order: every hook, every overridden method and
every extra state is called where torch calls it, with what torch passes. It hands to each child the
keys below it, in one pass over the keys of its parent, where torch filters all keys of the parent
once for every child. A module whose keys, shapes and types are as expected gets its values copied;
in any other case, and if a copy fails, the module's own _load_from_state_dict runs: missing and
unexpected keys and the texts of errors are torch's.

Runs on the calling thread, under its no_grad.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter
from torch.nn.modules.module import _IncompatibleKeys

from ._fqns import EXTRA_STATE_KEY, Facts, Tree

_TENSORS = (Parameter, Tensor)
_LOAD_STATE_DICT = Module.load_state_dict
_ASSIGN = "assign_to_params_buffers"


def loads_as_module(cls: type) -> bool:
    return cls.load_state_dict is _LOAD_STATE_DICT


def save_tree(tree: Tree) -> dict[str, Any]:
    """tree.model.state_dict() of a tree that is `plain`."""
    facts = tree.facts
    state_dict: OrderedDict[str, Any] = OrderedDict()
    metadata = state_dict._metadata = OrderedDict()  # type: ignore[attr-defined]
    for module, _, prefix, _ in tree.nodes:
        own = module.__dict__
        metadata[prefix[:-1]] = {"version": module._version}
        for name, param in own["_parameters"].items():
            if param is not None:
                state_dict[prefix + name] = param.detach()
        if buffers := own["_buffers"]:
            transient = own["_non_persistent_buffers_set"]
            for name, buffer in buffers.items():
                if buffer is not None and name not in transient:
                    state_dict[prefix + name] = buffer.detach()
        if facts[type(module)].has_extra_state:
            state_dict[prefix + EXTRA_STATE_KEY] = module.get_extra_state()
    return state_dict


def load_tree(
    model: Module, state_dict: Mapping[str, Any], strict: bool, assign: bool, facts: Facts
) -> _IncompatibleKeys:
    """model.load_state_dict(state_dict, strict, assign) of a model whose class has torch's.

    Raises:
        TypeError: `state_dict` is no mapping.
        RuntimeError: strict and keys are missing or unexpected, or a value could not be loaded.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"Expected state_dict to be dict-like, got {type(state_dict)}.")
    loader = _Loader(getattr(state_dict, "_metadata", None), assign, facts)
    top: OrderedDict[str, Any] = OrderedDict(state_dict)  # hooks change it
    if loader.metadata is not None:
        top._metadata = loader.metadata  # type: ignore[attr-defined]
    loader.load(model, top, "")
    return loader.finish(model, strict)


class _Loader:
    """One load: the lists that modules and their hooks append to."""

    def __init__(self, metadata: Any, assign: bool, facts: Facts) -> None:
        self.metadata = metadata
        self.assign = assign
        self.facts = facts
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.errors: list[str] = []
        # Swapping replaces parameters, and so does assigning, which is not done here.
        self.copies = not torch.__future__.get_swap_module_params_on_conversion()

    def load(self, module: Module, local: dict[str, Any], prefix: str) -> None:
        """Loads a module and its subtree from `local`: all items whose keys start with `prefix`."""
        children = module._modules
        metadata = {} if self.metadata is None else self.metadata.get(prefix[:-1], {})
        if self.assign:
            metadata[_ASSIGN] = True  # stays with the state dict for the loads to come, as in torch
        if _ASSIGN in metadata or not self._copied(module, local, prefix):
            module._load_from_state_dict(
                local, prefix, metadata, True, self.missing, self.unexpected, self.errors
            )
        if children:
            below = _by_child(local, len(prefix))
            for name, child in children.items():
                if child is not None:
                    self.load(child, below.get(name) or {}, f"{prefix}{name}.")
        if module._load_state_dict_post_hooks:
            incompatible = _IncompatibleKeys(self.missing, self.unexpected)
            for hook in module._load_state_dict_post_hooks.values():
                if hook(module, incompatible) is not None:
                    raise AssertionError(
                        "Hooks registered with ``register_load_state_dict_post_hook`` are not "
                        "expected to return new values, if incompatible_keys need to be modified, "
                        "it should be done inplace."
                    )

    def _copied(self, module: Module, local: dict[str, Any], prefix: str) -> bool:
        """Copies the values of a module with nothing unusual; False if there is, or a copy failed,
        and _load_from_state_dict has to say what.
        """
        of = self.facts[type(module)]
        if (
            not self.copies
            or not of.loads_as_module
            or module._load_state_dict_pre_hooks
            or "_load_from_state_dict" in module.__dict__
        ):
            return False
        pairs = []
        transient = module._non_persistent_buffers_set
        for members in (module._parameters, module._buffers):
            for name, target in members.items():
                if target is None or (name in transient and members is not module._parameters):
                    continue
                value = local.get(prefix + name)
                if not _copies_as_is(target, value):
                    return False
                pairs.append((target, value))
        own = len(pairs)
        if of.takes_extra_state:
            if prefix + EXTRA_STATE_KEY not in local:
                return False
            own += 1
        if own != _own_keys(local, len(prefix), module._modules):
            return False
        try:
            for target, value in pairs:
                target.copy_(value)
        except Exception:
            return False
        if of.takes_extra_state:
            module.set_extra_state(local[prefix + EXTRA_STATE_KEY])
        return True

    def finish(self, model: Module, strict: bool) -> _IncompatibleKeys:
        errors = self.errors
        if strict:
            for kind, keys in (("Unexpected", self.unexpected), ("Missing", self.missing)):
                if keys:
                    names = ", ".join(f'"{key}"' for key in keys)
                    errors.insert(0, f"{kind} key(s) in state_dict: {names}. ")
        if errors:
            text = "\n\t".join(errors)
            name = type(model).__name__
            raise RuntimeError(f"Error(s) in loading state_dict for {name}:\n\t{text}")
        return _IncompatibleKeys(self.missing, self.unexpected)


def _copies_as_is(target: Tensor, value: object) -> bool:
    """Whether a parameter takes a value by copy_ without a check that could fail or warn."""
    if type(target) in _TENSORS:
        return type(value) in _TENSORS and target.shape == value.shape and not target.is_meta
    return (
        type(target) is DTensor
        and type(value) is DTensor
        and target.shape == value.shape
        and not target.is_meta
    )


def _own_keys(local: dict[str, Any], start: int, children: Mapping[str, Any]) -> int:
    """Number of keys that are no child's."""
    if not children:
        return len(local)
    count = 0
    for key in local:
        dot = key.find(".", start)
        if dot < 0 or key[start:dot] not in children:
            count += 1
    return count


def _by_child(local: dict[str, Any], start: int) -> dict[str, dict[str, Any]]:
    """The items below each child, by the first component of their keys after `start`."""
    below: dict[str, dict[str, Any]] = {}
    for key, value in local.items():
        dot = key.find(".", start)
        if dot >= 0:
            name = key[start:dot]
            items = below.get(name)
            if items is None:
                items = below[name] = {}
            items[key] = value
    return below
