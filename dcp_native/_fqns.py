"""_fqns.py: the FQNs of a module tree, all of them found in one walk.

An FQN is a parameter's path without what wrappers put into it: the module of DDP, the _orig_mod of
torch.compile, the _checkpoint_wrapped_module of activation checkpointing. torch walks from the root
once for every name it wants to know; here the walk carries both prefixes of a module down (the FQN
without wrappers, and the one that load_state_dict understands), so a name costs one concatenation.

Nothing is kept between calls. A table would have to be checked against every dict of the tree to be
trusted, which is the walk itself: parameters are replaced in place (fully_shard, to_empty, swapped
tensors), modules renamed, hooks added, all without notice. Within a call only modules are held and
their dicts are read when asked for, as hooks may exchange parameters in between.

Trees in which a path alone does not say the FQN (`Tree.regular` is False: FSDP1 with its flat
parameters, modules with FQN modifiers or with traversal methods of their own) are asked name by
name, by torch's own functions. A Tree belongs to one call, hence to one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    _CHECKPOINT_PREFIX,
    _CHECKPOINT_WRAPPED_MODULE,
    ActivationWrapper,
)
from torch.distributed.checkpoint.state_dict import (
    _EXTRA_STATE,
    _get_fqns,
    _iterate_valid_model_state,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn import Module
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX
from torch.nn.parallel import DistributedDataParallel as DDP

MODIFIERS = "_fqn_modifiers"
EXTRA_STATE_KEY = _EXTRA_STATE_KEY_SUFFIX

_TRAVERSAL = {
    name: vars(Module)[name]
    for name in (
        "named_children",
        "named_modules",
        "named_parameters",
        "named_buffers",
        "_named_members",
        "__getattr__",
    )
}
_SAVING = {name: vars(Module)[name] for name in ("state_dict", "_save_to_state_dict")}
_LOADING = {name: vars(Module)[name] for name in ("_load_from_state_dict",)}
_GET_EXTRA, _SET_EXTRA = Module.get_extra_state, Module.set_extra_state


class ClassFacts(NamedTuple):
    """What a module's class says about all of its instances."""

    special: bool  # a walk has to look at the instance
    elided: str | None  # the one child whose name is no part of an FQN
    irregular: bool
    fsdp: bool
    own_getattr: bool  # may forward to another object
    wraps_activations: bool
    saves_as_module: bool
    loads_as_module: bool
    has_extra_state: bool
    takes_extra_state: bool


def _is_stock(cls: type, methods: dict[str, Any], but: tuple[str, ...] = ()) -> bool:
    return all(getattr(cls, name) is method for name, method in methods.items() if name not in but)


def facts_of(cls: type, modifiers: str = MODIFIERS) -> ClassFacts:
    """Never kept longer than a call: classes are patched, too."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # no compiled module without it
    elided = None
    fsdp = issubclass(cls, FSDP)
    own: tuple[str, ...] = ("__getattr__",)
    wraps = issubclass(cls, ActivationWrapper)
    if issubclass(cls, DDP):
        elided = "module"
    elif dynamo is not None and issubclass(cls, dynamo.OptimizedModule):
        elided = "_orig_mod"
    elif wraps and cls.named_parameters is ActivationWrapper.named_parameters:
        own += ("named_parameters",)  # takes its prefix out of names, as FQNs do
    irregular = fsdp or hasattr(cls, modifiers) or not _is_stock(cls, _TRAVERSAL, own)
    own_getattr = cls.__getattr__ is not _TRAVERSAL["__getattr__"]
    saves_as_module = _is_stock(cls, _SAVING)
    return ClassFacts(
        special=irregular or own_getattr or wraps or elided is not None or not saves_as_module,
        elided=elided,
        irregular=irregular,
        fsdp=fsdp,
        own_getattr=own_getattr,
        wraps_activations=wraps,
        saves_as_module=saves_as_module,
        loads_as_module=_is_stock(cls, _LOADING),
        has_extra_state=getattr(cls, "get_extra_state", _GET_EXTRA) is not _GET_EXTRA,
        takes_extra_state=getattr(cls, "set_extra_state", _SET_EXTRA) is not _SET_EXTRA,
    )


class Facts(dict[type, ClassFacts]):
    """The facts of every class met in one call."""

    def __init__(self, modifiers: str = MODIFIERS) -> None:
        self.modifiers = modifiers

    def __missing__(self, cls: type) -> ClassFacts:
        found = self[cls] = facts_of(cls, self.modifiers)
        return found


Node = tuple[Module, str, str, int]
"""A module at its first path, the prefix of its FQNs, the prefix of its keys of load_state_dict
(with the names of wrappers) and its depth. Prefixes are empty or end in a dot.
"""


class Tree:
    """The modules under `model`, each once, in the order of model.named_modules()."""

    def __init__(self, model: Module, modifiers: str = MODIFIERS) -> None:
        self.model = model
        self.modifiers = modifiers
        self.facts = Facts(modifiers)
        self.regular = True
        self.fsdp = False
        self.wrapped = False  # some path differs from its FQN
        self.hooked = False  # state_dict() may give other keys than the tree has
        self.plain = True  # state_dict() gives the tensors of the nodes in order, and calls nobody
        self.nodes: list[Node] = []
        self._walk()

    def _walk(self) -> None:
        facts, modifiers, append = self.facts, self.modifiers, self.nodes.append
        seen: set[int] = set()

        def visit(module: Module, fqn: str, full: str, in_wrapper: bool, depth: int) -> None:
            seen.add(id(module))
            append((module, fqn, full, depth))
            of = facts[type(module)]
            own = module.__dict__  # looked up once: Module's __getattr__ makes its attributes slow
            elided = None
            if (
                of.special
                or in_wrapper
                or own["_state_dict_hooks"]
                or "state_dict" in own  # written out: a third of isdisjoint's time
                or "_save_to_state_dict" in own
                or "named_parameters" in own
                or "named_buffers" in own
                or "named_children" in own
                or "named_modules" in own
                or modifiers in own
            ):
                # torch looks through an activation wrapper without seeing what it wraps.
                elided = None if in_wrapper else of.elided
                self._note(module, of, elided)
            if own["_state_dict_pre_hooks"]:
                self.plain = False
            for name, child in own["_modules"].items():
                if child is None:
                    continue
                if id(child) in seen:
                    self.plain = False
                    continue
                if elided is None and name != _CHECKPOINT_WRAPPED_MODULE:
                    path = f"{fqn}{name}."
                    visit(child, path, path if fqn is full else f"{full}{name}.", False, depth + 1)
                elif elided is None:
                    self.wrapped, self.plain = True, False
                    visit(child, fqn, full, True, depth + 1)
                else:
                    self.regular &= name == elided
                    visit(child, fqn, f"{full}{name}.", False, depth + 1)

        visit(self.model, "", "", False, 0)

    def _note(self, module: Module, of: ClassFacts, elided: str | None) -> None:
        """What is special about a module."""
        own = module.__dict__.keys()
        if of.irregular or not own.isdisjoint({*_TRAVERSAL, self.modifiers}):
            self.regular = False
        self.fsdp |= of.fsdp
        if module._state_dict_hooks or not (of.saves_as_module and own.isdisjoint(_SAVING)):
            self.hooked, self.plain = True, False
        if elided is not None or of.wraps_activations:
            self.wrapped = True
            self.regular &= not any(True for _ in own_tensors(module))
        elif of.own_getattr and hasattr(module, self.modifiers):
            self.regular = False

    def _children_first(self) -> Iterator[Node]:
        parents: list[Node] = []
        for node in self.nodes:
            while len(parents) > node[3]:
                yield parents.pop()
            parents.append(node)
        yield from reversed(parents)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(FQN, parameter), each parameter once, in the order of model.named_parameters().

        Raises:
            AssertionError: a name has several FQNs, as a flat parameter of FSDP1.
        """
        if not self.regular:
            for name, param in self.model.named_parameters():
                yield only(_get_fqns(self.model, name), name), param
            return
        seen: set[int] = set()
        for module, prefix, _, _ in self.nodes:
            for name, param in module._parameters.items():
                if param is not None and id(param) not in seen:
                    seen.add(id(param))
                    yield prefix + name, param

    def frozen(self) -> Iterator[str]:
        """FQNs of parameters that are not trained; of a flat parameter all it consists of."""
        if self.regular:
            yield from (fqn for fqn, param in self.parameters() if not param.requires_grad)
            return
        for name, param in self.model.named_parameters():
            if not param.requires_grad:
                yield from _get_fqns(self.model, name)

    def valid_state(self) -> Iterator[tuple[set[str], set[str], Any]]:
        """(FQNs, keys of load_state_dict, value) in torch's order: children first, then buffers,
        parameters and the extra state, whose value is an _EXTRA_STATE.
        """
        if not self.regular:
            yield from self._valid_state_by_name()
            return
        for module, prefix, full, _ in self._children_first():
            transient = module._non_persistent_buffers_set
            for name, value in own_tensors(module):
                if name not in transient:
                    yield {prefix + name}, {full + name}, value
            if self.facts[type(module)].has_extra_state:
                yield {prefix + EXTRA_STATE_KEY}, {full + EXTRA_STATE_KEY}, _EXTRA_STATE()

    def _valid_state_by_name(self) -> Iterator[tuple[set[str], set[str], Any]]:
        model, modifiers = self.model, self.modifiers
        for name, value in _iterate_valid_model_state(model, modifiers):
            yield (
                _get_fqns(model, name, modifiers),
                _get_fqns(
                    model, name, modifiers, skip_ddp_prefix=False, skip_compiler_prefix=False
                ),
                value,
            )

    def fqns_of(self, keys: Iterable[str]) -> Iterator[tuple[str, str]]:
        """(key, FQN) for keys of a state dict of the model, which may have come from hooks."""
        places = _places(self.model, self.facts) if self.regular else {}
        for key in keys:
            prefix, dot, leaf = key.replace(_CHECKPOINT_PREFIX, "").rpartition(".")
            place = places.get(prefix + dot)
            if place is not None and _has(place[0], leaf):
                yield key, place[1] + leaf
            else:
                yield key, only(_get_fqns(self.model, key), key, shown=True)


def own_tensors(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, then parameters of the module alone, each tensor once among its like."""
    for members in (module._buffers, module._parameters):
        if len(members) < 2:
            for name, value in members.items():
                if value is not None:
                    yield name, value
        else:
            seen: set[int] = set()
            for name, value in members.items():
                if value is not None and id(value) not in seen:
                    seen.add(id(value))
                    yield name, value


def only(fqns: set[str], key: str, shown: bool = False) -> str:
    """The single FQN of a name.

    Raises:
        AssertionError: there are none or several.
    """
    if len(fqns) != 1:
        more = f": {fqns}" if shown else ""
        raise AssertionError(f"Expected 1 FQN for key '{key}', got {len(fqns)}{more}")
    return next(iter(fqns))


def _has(module: Module, leaf: str) -> bool:
    return leaf in module._parameters or leaf in module._buffers or leaf == EXTRA_STATE_KEY


def _places(model: Module, facts: Facts) -> dict[str, tuple[Module, str]]:
    """(module, prefix of its FQNs) by every path, also where one module has several."""
    places: dict[str, tuple[Module, str]] = {}

    def visit(module: Module, path: str, fqn: str, in_wrapper: bool) -> None:
        places[path] = module, fqn
        elided = None if in_wrapper else facts[type(module)].elided
        for name, child in module._modules.items():
            if child is None:
                continue
            if name == _CHECKPOINT_WRAPPED_MODULE:
                visit(child, path, fqn, True)
            else:
                visit(child, f"{path}{name}.", fqn if name == elided else f"{fqn}{name}.", False)

    visit(model, "", "", False)
    return places


def fqn_mappings(tree: Tree) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """torch's fqn_param_mapping (tensor to FQNs, FQN to tensor) and, of it, the shared ones."""
    mapping: dict[Any, Any] = {}
    shared: dict[Any, Any] = {}
    for fqns, _, value in tree.valid_state():
        if type(value) is _EXTRA_STATE:
            continue
        known = mapping.get(value)
        if known is None:
            mapping[value] = set(fqns)
        else:
            known.update(fqns)
            shared[value] = known
        for fqn in fqns:
            mapping[fqn] = value
    shared.update([(fqn, tensor) for tensor, fqns in shared.items() for fqn in fqns])
    return mapping, shared
