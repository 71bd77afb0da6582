"""Torch's own implementation, whatever :func:`dcp_native.install` has put in its place.

    from ._stock import state_dict_saver as _torch

gives a view of torch's module in which every function and class is torch's, for ever: install()
replaces them in the module itself.  All code of ours that calls torch's implementation takes it
from here, for the module's name may lead back to us.

So too where somebody had wrapped a function before: ours replace what torch made, not the wrapper.

What torch's function calls by its module's names is what install() put there; that ends, because
whatever ours hands to torch comes back with the reason why it was handed there.
"""

from __future__ import annotations

import importlib
import sys
from types import FunctionType
from typing import Any

import torch
import torch.distributed.checkpoint

from . import _native
from ._modules import PACKAGE

if _native.built_for_torch != torch.__version__.split("+")[0]:
    raise ImportError(
        f"dcp_native was built for torch {_native.built_for_torch}, but torch {torch.__version__} "
        "is installed: build it again in this environment (pip install --no-build-isolation "
        "--force-reinstall --no-deps dcp-native, or `make build` in its tree)"
    )

__all__ = ["PACKAGE", "UNINSTALL", "StockModule", "is_foreign", "originals", "stock"]

UNINSTALL = "_dcp_native_uninstall"
"""Attribute of torch's package while install() is in force: what takes it back."""

originals: dict[int, Any] = {}
"""id of ours -> torch's, of all that install() has ever replaced; ours live as long as this."""

_views: dict[str, StockModule] = {}

_KNOWN = ("torch", "dcp_native", "typing_extensions")


class StockModule:
    """One of torch's modules: functions and classes as torch made them, the rest as it now is."""

    def __init__(self, name: str) -> None:
        module = importlib.import_module(f"{PACKAGE}.{name}" if name else PACKAGE)
        self._module = module
        self._kept = {
            name: originals.get(id(value), value)
            for name, value in ((n, _unwrapped(v)) for n, v in list(vars(module).items()))
            if isinstance(value, (type, FunctionType))
        }

    def __getattr__(self, name: str) -> Any:
        if name in self._kept:
            return self._kept[name]
        return getattr(self._module, name)

    def __dir__(self) -> list[str]:
        return dir(self._module)


def is_foreign(value: Any) -> bool:
    """Whether a function, class or callable object was made by neither torch nor us.

    By where it was made: a wrapper says of itself that it is what it wraps.  Decorators of the
    standard library, and typing_extensions' ``deprecated``, are torch's own choice.
    """
    if type(value) is FunctionType:
        maker = value.__globals__.get("__name__", "")
    elif isinstance(value, type):
        maker = value.__module__
    else:
        maker = type(value).__module__ if callable(value) else PACKAGE
    package = str(maker).partition(".")[0]
    return package not in _KNOWN and package not in sys.stdlib_module_names


def _unwrapped(value: Any) -> Any:
    """``value``, or what torch made, where others have wrapped it and say so."""
    inner = value
    while is_foreign(inner):
        try:
            inner = inner.__wrapped__
        except AttributeError:
            return value
    return inner


def stock(name: str) -> StockModule:
    """The view of ``torch.distributed.checkpoint.<name>``, or of the package itself for ``""``.

    Raises:
        ModuleNotFoundError: torch has no such module.
    """
    view = _views.get(name)
    return view if view is not None else _views.setdefault(name, StockModule(name))


def __getattr__(name: str) -> StockModule:
    if name.startswith("__"):
        raise AttributeError(name)
    try:
        return stock(name)
    except ModuleNotFoundError as error:
        raise AttributeError(str(error)) from None


def _capture() -> None:
    """All that torch has loaded, as it is before anything of ours replaces it."""
    package = torch.distributed.checkpoint
    if UNINSTALL in vars(package):  # another copy of dcp_native, dropped from sys.modules
        vars(package)[UNINSTALL]()
    for name in list(sys.modules):
        if name == PACKAGE or name.startswith(f"{PACKAGE}."):
            stock(name[len(PACKAGE) + 1 :])


_capture()
