"""Which names of torch.distributed.checkpoint are ours, and where the rest comes from.

A module of this package that has the name of one of torch's mirrors it: what it defines is ours,
every other name is torch's object.  A module of torch's without a counterpart here is imported
under our name as torch's own module object.  Both rules are here and nowhere else; install() asks
the same question the other way round.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from ._modules import OURS, PACKAGE, modules_of
from ._stock import stock

__all__ = ["mirrored", "ours_of", "rest_of_torchs", "stands_for"]


def mirrored() -> frozenset[str]:
    """Names of torch's modules that have a counterpart of our own."""
    return modules_of(OURS) & modules_of(PACKAGE)


def ours_of(value: Any) -> Any:
    """What this package has in place of torch's function, class or module ``value``, else it."""
    if isinstance(value, ModuleType):
        if value.__name__.startswith(f"{PACKAGE}."):
            return importlib.import_module(OURS + value.__name__[len(PACKAGE) :])
        return value
    if not isinstance(value, (type, FunctionType)):
        return value
    package, _, module = value.__module__.rpartition(".")
    if package != PACKAGE or module not in mirrored():
        return value
    if getattr(stock(module), value.__name__, None) is not value:  # a local of a function, say
        return value
    return vars(importlib.import_module(f"{OURS}.{module}")).get(value.__name__, value)


def rest_of_torchs(module: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of the module of ours with this ``__name__``.

    Names that it does not define are torch's, those that another module of ours defines are ours.
    """
    view = stock(module[len(OURS) + 1 :])

    def __getattr__(name: str) -> Any:
        if not name.startswith("__"):
            try:
                return ours_of(getattr(view, name))
            except AttributeError:
                pass
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[module]), *dir(view)})

    return __getattr__, __dir__


def stands_for(torchs: type) -> Callable[[type], type]:
    """Class decorator: what derives from torch's class counts as derived from ours, too.

    Under install() ours has the name of torch's: FsspecReader is to stay a FileSystemReader.  For
    classes whose metaclass asks ``__subclasshook__``.
    """

    def decorate(ours: type) -> type:
        def hook(asked: type, other: type) -> Any:
            # No issubclass(): torch's class would ask its subclasses, and so ours.
            return True if asked is ours and torchs in other.__mro__ else NotImplemented

        ours.__subclasshook__ = classmethod(hook)  # type: ignore[assignment]
        return ours

    return decorate
