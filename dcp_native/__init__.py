"""dcp_native: torch.distributed.checkpoint with planner, engine and commit in C.

``import dcp_native as dcp`` and use ``dcp.save``, ``dcp.async_save`` and ``dcp.load`` as with
``torch.distributed.checkpoint``, whose names, classes and file formats they keep.

The names are in _api.py, which imports torch (2 s) when the first of them is asked for (PEP 562).
So the command line looks at checkpoints without it; every other program is none the wiser.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from ._modules import modules_of

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ._api import *  # noqa: F403
    from ._api import __all__ as __all__


def __getattr__(name: str) -> Any:
    if name in modules_of(__name__):
        if not name.startswith("_"):
            # One by one: a module's import waits for another thread that imports the same module,
            # and not for one that is importing its package.
            for first in ("torch", "torch.distributed.checkpoint"):
                importlib.import_module(first)
        return importlib.import_module(f"{__name__}.{name}")
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    api = importlib.import_module(f"{__name__}._api")
    names = vars(api).get("__all__", ())  # of a part of it, while it is being imported
    if name != "__all__" and name not in names:
        return api.rest(name)
    for each in ("__all__", *names):  # those that only a newer torch has are torch's own
        globals().setdefault(each, vars(api)[each] if each in vars(api) else api.rest(each))
    return globals()[name]


def __dir__() -> list[str]:
    api = importlib.import_module(f"{__name__}._api")
    return sorted({*globals(), *api.__all__, *api.names_of_rest()})


# What asks for install() has to have it before the program goes on.
if os.environ.get("DCP_NATIVE_INSTALL", "") not in ("", "0"):
    importlib.import_module(f"{__name__}._api")
