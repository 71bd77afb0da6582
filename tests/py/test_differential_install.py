"""The differential tests once more, with ours reached by torch's names while install() is in force.

Torch's side of each comparison runs uninstalled.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch.distributed.checkpoint as torch_dcp

import dcp_native
from dcp_native import _install

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def patches():
    """What install() changes: setting that for each call, and not the search for it, is quick."""
    dcp_native.install()
    found = tuple(_install._patches.values())
    dcp_native.uninstall()
    return found


@pytest.fixture(scope="module", autouse=True)
def patches_are_known():
    """install() warns of every test module that bound torch's names: not in what is compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patches()


@contextlib.contextmanager
def installed():
    for patch in patches():
        patch.namespace[patch.name] = patch.ours
    try:
        yield
    finally:
        for patch in patches():
            patch.namespace[patch.name] = patch.torchs


class ThroughInstall:
    """``torch.distributed.checkpoint``, in force from a look-up or call to its end."""

    def __getattr__(self, name):
        with installed():
            value = getattr(torch_dcp, name, None)
        if value is None:
            return getattr(dcp_native, name)
        if not isinstance(value, FunctionType):
            return value

        @functools.wraps(value)
        def call(*args, **kwargs):
            with installed():
                assert torch_dcp.save is dcp_native.save
                return value(*args, **kwargs)

        return call


def once_more(name: str) -> ModuleType:
    """Another copy of a test module, whose ours comes through install()."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_install", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.dcp = ThroughInstall()
    return module


results, loads = once_more("test_differential"), once_more("test_load_differential")
loads.MODULES = (torch_dcp, loads.dcp)

group_of_one = loads.group_of_one  # a fixture of theirs
for module in (results, loads):
    tests = {n: t for n, t in vars(module).items() if n.startswith("test_") and callable(t)}
    tests.pop("test_every_difference_is_met_by_a_test", None)
    globals().update(tests)
