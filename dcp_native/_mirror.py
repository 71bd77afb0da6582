"""Which names of torch.distributed.checkpoint are ours, and where the rest comes from.

A module of this package that has the name of one of torch's mirrors it: what it defines is ours,
every other name is torch's object.  A module of torch's without a counterpart here is imported
under our name as torch's own module object.  Both rules are here and nowhere else; install() asks
the same question the other way round.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

from ._stock import PACKAGE, stock

__all__ = ["mirrored", "ours_of", "rest_of_torchs", "stands_for"]

_OURS = __name__.rpartition(".")[0]


@functools.cache
def _modules_of(package: str) -> frozenset[str]:
    """Names of the modules that lie directly in a package, imported or not."""
    return frozenset(m.name for m in pkgutil.iter_modules(sys.modules[package].__path__))


def mirrored() -> frozenset[str]:
    """Names of torch's modules that have a counterpart of our own."""
    return _modules_of(_OURS) & _modules_of(PACKAGE)


def ours_of(value: Any) -> Any:
    """What this package has in place of torch's function, class or module ``value``, else it."""
    if isinstance(value, ModuleType):
        if value.__name__.startswith(f"{PACKAGE}."):
            return importlib.import_module(_OURS + value.__name__[len(PACKAGE) :])
        return value
    if not isinstance(value, (type, FunctionType)):
        return value
    package, _, module = value.__module__.rpartition(".")
    if package != PACKAGE or module not in mirrored():
        return value
    if getattr(stock(module), value.__name__, None) is not value:  # a local of a function, say
        return value
    return vars(importlib.import_module(f"{_OURS}.{module}")).get(value.__name__, value)


def rest_of_torchs(module: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of the module of ours with this ``__name__``.

    Names that it does not define are torch's, those that another module of ours defines are ours.
    """
    view = stock(module[len(_OURS) + 1 :])

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


class _TorchsModules(MetaPathFinder, Loader):
    """Imports ``dcp_native.x`` as torch's ``x`` where there is no file of ours.

    First on the path: the submodules of a package of torch's that was imported so would be found a
    second time, as other modules, by the finder of files.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != _OURS or not name or name.partition(".")[0] in _modules_of(_OURS):
            return None
        try:
            theirs = importlib.util.find_spec(f"{PACKAGE}.{name}")
        except ModuleNotFoundError:  # its parent is no package
            return None
        return None if theirs is None else ModuleSpec(fullname, self, origin=theirs.origin)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = importlib.import_module(PACKAGE + name[len(_OURS) :])


sys.meta_path.insert(0, _TorchsModules())
