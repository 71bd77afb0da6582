"""install(): torch.distributed.checkpoint is ours; uninstall(): it is torch's again.

Wherever a module of torch's holds a function or class that we have our own of (_mirror.py), ours is
put in its place: in the module that defines it, and in those of torch's that imported it.  So
attributes of modules that were imported before lead to us, and so does every import after it.

Three bindings stay what they are.  A module whose own classes derive from a class keeps it, for
such code calls ``Base.__init__(self)``.  Modules that are not torch's are not touched: what they
bound by ``from ... import`` before is warned of.  And so is what others have put in torch's
modules, say a wrapper around ``save``: it goes on to call torch's.

Torch's modules that we mirror are imported first, all of them; one that another thread is importing
is waited for.  So none is left to be patched later, and classes of torch's never derive from ours.

Thread rule: both functions may be called from any thread; a thread that reads names meanwhile gets
torch's or ours of each.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import warnings
from typing import Any, NamedTuple

import torch.distributed.checkpoint

from ._config import _as_bool
from ._fork import fork_safe
from ._mirror import mirrored, ours_of
from ._stock import PACKAGE, UNINSTALL, is_foreign, originals, stock

__all__ = ["install", "install_if_asked", "uninstall"]

VARIABLE = "DCP_NATIVE_INSTALL"
_OURS = __name__.rpartition(".")[0]

_lock = fork_safe(threading.RLock)


class Patch(NamedTuple):
    """One name of one module of torch's that holds ours."""

    module: str
    namespace: dict[str, Any]
    name: str
    torchs: Any
    ours: Any


_patches: dict[tuple[str, str], Patch] = {}
_warned: set[tuple[str, str]] = set()


def install() -> None:
    """Make ``torch.distributed.checkpoint`` and its submodules use this implementation.

    Holds for ``import torch.distributed.checkpoint as dcp``, before or after, and for every
    ``from torch.distributed.checkpoint... import`` after it.  A module that bound names by
    ``from ... import`` before keeps torch's: a warning lists those modules and names, each once;
    another one what others have put in place of torch's functions, which stays too.
    Calling it again does no harm.  The environment variable ``DCP_NATIVE_INSTALL=1`` does the same
    when a program first imports ``torch.distributed.checkpoint``, without any change to it.
    """
    with _lock():
        replaced = _replacements()
        originals.update((id(ours), torchs) for torchs, ours in replaced.values())
        stale, others = (keys - _warned for keys in _patch(replaced))
        setattr(torch.distributed.checkpoint, UNINSTALL, uninstall)
        _warned.update(stale, others)
    if stale:
        warnings.warn(
            f"dcp_native.install() came after {_listed(stale)}: these names stay torch's own "
            "there. Call install() before the modules are imported, or let them import "
            "torch.distributed.checkpoint and use its attributes, or set the environment "
            f"variable {VARIABLE}=1 instead.",
            stacklevel=2,
        )
    if others:
        warnings.warn(
            f"dcp_native.install() found that others have replaced {_listed(others)}: what they "
            "put there is left as it is, and goes on to call torch's own. Call install() before "
            "them.",
            stacklevel=2,
        )


def uninstall() -> None:
    """Take :func:`install` back: every module of torch's holds what it held before.

    A name that others have replaced since is left as it is, with a warning.  Modules that bound
    ours meanwhile keep it, and it goes on to work.
    """
    with _lock():
        changed = set()
        for key, patch in _patches.items():
            value = patch.namespace.get(patch.name)
            if value is patch.ours:
                patch.namespace[patch.name] = patch.torchs
            elif value is not patch.torchs:
                changed.add(key)
        _patches.clear()
        for _, namespace in _namespaces(torchs=True):  # imported, and so bound, since then
            for name, value in list(namespace.items()):
                if id(value) in originals:  # no look at the value, which may warn of itself
                    namespace[name] = originals[id(value)]
        vars(torch.distributed.checkpoint).pop(UNINSTALL, None)
    if changed:
        warnings.warn(
            f"dcp_native.uninstall() found that others have replaced {_listed(changed)} since "
            "install(): what they put there is left as it is, and may still call dcp_native.",
            stacklevel=2,
        )


def install_if_asked() -> None:
    """What ``DCP_NATIVE_INSTALL`` says.

    Raises:
        ValueError: it says neither yes nor no.
    """
    text = os.environ.get(VARIABLE, "")
    try:
        asked = bool(text) and _as_bool(text)
    except ValueError as error:
        raise ValueError(f"environment variable {VARIABLE}: {error}") from None
    if asked:
        install()


def _replacements() -> dict[int, tuple[Any, Any]]:
    """id of torch's -> (torch's, ours), with every module imported that either is defined in."""
    with contextlib.suppress(ImportError):  # it derives from classes that we replace
        importlib.import_module(f"{PACKAGE}._fsspec_filesystem")  # and needs fsspec
    replaced = {}
    for module in sorted(mirrored()):
        importlib.import_module(f"{PACKAGE}.{module}")  # waits for a thread that imports it now
        view = stock(module)
        for name in dir(view):
            torchs = getattr(view, name)
            if getattr(torchs, "__module__", None) != f"{PACKAGE}.{module}":
                continue
            if (ours := ours_of(torchs)) is not torchs:
                replaced[id(torchs)] = (torchs, ours)
    return replaced


def _names() -> set[str]:
    """Names of torch's that ours stand for."""
    return {
        name
        for module in mirrored()
        for name, value in vars(importlib.import_module(f"{_OURS}.{module}")).items()
        if getattr(value, "__module__", None) == f"{_OURS}.{module}"
        and hasattr(stock(module), name)
    }


def _patch(replaced: dict[int, tuple[Any, Any]]) -> tuple[set[tuple[str, str]], ...]:
    """Put ours in place in torch's modules.

    Returns:
        (module, name) where modules that are not torch's hold torch's; where those of torch's hold
        what others put there.
    """
    stale, others, names = set(), set(), _names()
    for module, namespace in _namespaces(torchs=True):
        for name, value in list(namespace.items()):
            torchs, ours = replaced.get(id(value), (None, None))
            if ours is not None and value is torchs and not _derives(module, namespace, torchs):
                _patches[module, name] = Patch(module, namespace, name, torchs, ours)
                namespace[name] = ours
            elif name in names and module.startswith(PACKAGE) and is_foreign(value):
                others.add((module, name))
    for module, namespace in _namespaces(torchs=False):
        for name, value in list(namespace.items()):
            if id(value) in replaced:
                stale.add((module, name))
    return stale, others


def _derives(module: str, namespace: dict[str, Any], base: Any) -> bool:
    """Whether a module that does not define a class defines classes that derive from it."""
    if not isinstance(base, type) or base.__module__ == module:
        return False
    return any(
        isinstance(value, type)
        and value is not base
        and value.__module__ == module
        and base in value.__mro__
        for value in namespace.values()
    )


def _namespaces(*, torchs: bool) -> list[tuple[str, dict[str, Any]]]:
    """Name and globals of every module: of torch's, or of all others but ours."""
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    for name, module in list(sys.modules.items()):
        package = name.partition(".")[0]
        if (package == "torch") is not torchs or package == _OURS:
            continue
        with contextlib.suppress(AttributeError):  # a lazy module must not be loaded by this look
            namespace = object.__getattribute__(module, "__dict__")
            if isinstance(namespace, dict):
                found.setdefault(id(namespace), (name, namespace))  # __main__ has two names
    return list(found.values())


def _listed(names: set[tuple[str, str]]) -> str:
    modules: dict[str, list[str]] = {}
    for module, name in sorted(names):
        modules.setdefault(module, []).append(name)
    return "; ".join(f"{module} ({', '.join(names)})" for module, names in modules.items())
