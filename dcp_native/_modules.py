"""Which modules this package has of its own; all others of its names are torch's modules.

Imported with the package itself, so it imports nothing: a program that only looks at checkpoints
does not pay for torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["OURS", "PACKAGE", "modules_of"]

OURS = __name__.rpartition(".")[0]
PACKAGE = "torch.distributed.checkpoint"


@functools.cache
def modules_of(package: str) -> frozenset[str]:
    """Names of the modules that lie directly in an imported package, imported or not."""
    return frozenset(m.name for m in pkgutil.iter_modules(sys.modules[package].__path__))


class _TorchsModules(MetaPathFinder, Loader):
    """Imports ``dcp_native.x`` as torch's ``x`` where there is no file of ours.

    First on the path: the submodules of a package of torch's that was imported so would be found a
    second time, as other modules, by the finder of files.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != OURS or not name or name.partition(".")[0] in modules_of(OURS):
            return None
        try:
            theirs = importlib.util.find_spec(f"{PACKAGE}.{name}")
        except ModuleNotFoundError:  # its parent is no package
            return None
        return None if theirs is None else ModuleSpec(fullname, self, origin=theirs.origin)

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = importlib.import_module(PACKAGE + name[len(OURS) :])


sys.meta_path.insert(0, _TorchsModules())
