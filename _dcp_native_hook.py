"""Imported by dcp_native.pth when DCP_NATIVE_INSTALL is set: waits for torch's package.

Imports neither torch nor dcp_native, and changes nothing, until a program imports
torch.distributed.checkpoint; then dcp_native is imported, which installs itself.  Whatever goes
wrong is said on stderr, and the program goes on with stock torch.
"""

import sys

PACKAGE = "torch.distributed.checkpoint"


class _WhenImported:
    """Finder that has others find torch's package, and is told when it was executed."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != PACKAGE:
            return None
        for finder in list(sys.meta_path):
            find = None if finder is cls else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                _call_after(spec.loader, cls._executed)
                return spec
        return None

    @classmethod
    def _executed(cls, module):
        if cls in sys.meta_path:
            sys.meta_path.remove(cls)
        # The import system does this next; the modules of ours that are imported now need it.
        sys.modules["torch.distributed"].checkpoint = module
        try:
            import dcp_native  # noqa: F401
        except Exception as error:
            sys.stderr.write(
                "dcp_native: DCP_NATIVE_INSTALL is set, but it can not be installed "
                f"({type(error).__name__}: {error}); torch.distributed.checkpoint stays torch's "
                "own\n"
            )


def _call_after(loader, called):
    """Have the loader of one module call ``called`` once it has executed it."""
    execute = loader.exec_module

    def exec_module(module):
        execute(module)
        del loader.exec_module
        called(module)

    loader.exec_module = exec_module


if PACKAGE not in sys.modules:
    sys.meta_path.insert(0, _WhenImported)
