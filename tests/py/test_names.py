"""Every name of the installed torch.distributed.checkpoint is here: same signature, same identity.

The walk is over torch's package as it is installed, so a new release is held to at once.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed.checkpoint as torch_dcp
from conftest import ROOT

import dcp_native

TORCHS = torch_dcp.__name__
OURS = dcp_native.__name__
Import = Callable[[str], types.ModuleType]

EXTRA_KEYWORDS = {"base", "keys", "verify"}
"""Ours, after all of torch's parameters."""


def module_names() -> list[str]:
    """Of torch's package and all its submodules, relative to it, with the dot: "", ".planner"."""
    found = [""]
    for module in pkgutil.walk_packages(torch_dcp.__path__, f"{TORCHS}."):
        found.append(module.name[len(TORCHS) :])
    return found


def problems(module: str, ours_named: Import) -> Iterator[str]:
    """What is missing or wrong in our counterpart of a module of torch's."""
    theirs = importlib.import_module(TORCHS + module)
    try:
        ours = ours_named(module)
    except ImportError as error:
        yield f"{module}: {error}"
        return
    for name, value in list(vars(theirs).items()):
        if name.startswith("__"):
            continue
        where = f"{module}.{name}"
        try:
            own = getattr(ours, name)
        except AttributeError:
            yield f"{where}: absent"
            continue
        if name not in dir(ours):
            yield f"{where}: not in dir()"
        yield from differences(where, value, own)
    public = set(getattr(theirs, "__all__", ()))
    if absent := public - set(getattr(ours, "__all__", public)):
        yield f"{module}.__all__: lacks {sorted(absent)}"


def differences(where: str, theirs: Any, own: Any) -> Iterator[str]:
    if own is theirs:
        return
    if not (getattr(theirs, "__module__", "") or "").startswith(TORCHS):
        return  # an import or a constant of theirs: ours has its own under this name
    if inspect.isclass(theirs):
        yield from class_differences(where, theirs, own)
    elif callable(theirs):
        yield from signature_differences(where, theirs, own)


def class_differences(where: str, theirs: type, own: Any) -> Iterator[str]:
    if must_be_torchs(theirs):
        yield f"{where}: must be torch's own"
    elif not (inspect.isclass(own) and issubclass(own, theirs)):
        yield f"{where}: no subclass of torch's"
    else:
        for name, method in vars(own).items():
            torchs = getattr(theirs, name, None)
            inherited = getattr(object, name, None)
            if inspect.isfunction(method) and torchs is not None and torchs is not inherited:
                yield from signature_differences(f"{where}.{name}", torchs, method)


def must_be_torchs(cls: type) -> bool:
    """Data classes, enums, exceptions and protocols: others test and compare by them."""
    return (
        dataclasses.is_dataclass(cls)
        or issubclass(cls, (enum.Enum, BaseException))
        or getattr(cls, "_is_protocol", False)
        or inspect.isabstract(cls)
    )


def signature_differences(where: str, theirs: Any, own: Any) -> Iterator[str]:
    try:
        wanted = list(inspect.signature(theirs).parameters.values())
        got = list(inspect.signature(own).parameters.values())
    except (TypeError, ValueError) as error:
        yield f"{where}: {error}"
        return
    for ours, torchs in zip(got, wanted, strict=False):
        if (ours.name, ours.kind, ours.default) != (torchs.name, torchs.kind, torchs.default):
            yield f"{where}: {ours} where torch has {torchs}"
    if len(got) < len(wanted):
        yield f"{where}: lacks {[p.name for p in wanted[len(got) :]]}"
    for extra in got[len(wanted) :]:
        private = where.rpartition(".")[2].startswith("_") and extra.default is not extra.empty
        if extra.kind is not extra.KEYWORD_ONLY or not (private or extra.name in EXTRA_KEYWORDS):
            yield f"{where}: {extra} is not torch's"


def ours_named(module: str) -> types.ModuleType:
    return importlib.import_module(OURS + module)


@pytest.mark.parametrize("module", module_names(), ids=lambda name: name or "top")
def test_every_name_is_here(module):
    assert list(problems(module, ours_named)) == []


PRIVATE = {
    ".state_dict_saver": ["_save_state_dict", "_stateful_to_state_dict"],
    ".state_dict_loader": ["_load_state_dict", "_load_state_dict_from_keys"],
    ".default_planner": ["_EmptyStateDictLoadPlanner"],
    ".format_utils": ["_EmptyStateDictLoadPlanner"],
    ".filesystem": [
        "_StorageInfo", "_StoragePrefix", "_write_item", "DEFAULT_SUFFIX", "SerializationFormat",
    ],
    ".api": ["_wrap_exception", "WRAPPED_EXCEPTION"],
    ".utils": ["_DistWrapper", "_get_failure_dict", "_all_gather_keys"],
    ".logger": ["_dcp_method_logger"],
    "._consolidate_hf_safetensors": ["consolidate_safetensors_files_on_every_rank"],
    ".planner": ["SavePlanner._cached_save_plan", "SavePlanner._cached_metadata"],
}  # fmt: skip
"""What clients use beyond the public names; a torch that lacks one of them has no such client."""


@pytest.mark.parametrize("module", PRIVATE)
def test_private_names_that_clients_use_are_here(module):
    for name in PRIVATE[module]:
        found = ours_named(module)
        for part in name.split("."):
            found = getattr(found, part)


class Mutilated(types.ModuleType):
    """A copy of our module with some names changed, or gone."""

    def __init__(self, original: types.ModuleType, **changes: Any) -> None:
        super().__init__(original.__name__)
        names = {name: getattr(original, name) for name in dir(original) if hasattr(original, name)}
        vars(self).update({**names, **changes})
        for name in [name for name, value in changes.items() if value is GONE]:
            delattr(self, name)


GONE = object()


def mutilations() -> dict[str, tuple[str, dict[str, Any]]]:
    def save(state_dict, *, checkpoint_id=".", **kwargs):
        """Another default, and the rest in kwargs."""

    def load(state_dict, checkpoint_id=None):
        """Keywords have become positional."""

    @dataclasses.dataclass
    class Metadata:
        """A copy."""

    class FileSystemReader:
        """No subclass."""

    class DefaultStager(dcp_native.staging.DefaultStager):
        def stage(self, state_dict, surprise):
            """Takes what torch's does not."""

    return {
        "absent": (".planner", {"SavePlan": GONE}),
        "absent-private": (".utils", {"_DistWrapper": GONE}),
        "default": (".state_dict_saver", {"save": save}),
        "kind": (".state_dict_loader", {"load": load}),
        "copied-dataclass": (".metadata", {"Metadata": Metadata}),
        "no-subclass": (".filesystem", {"FileSystemReader": FileSystemReader}),
        "method": (".staging", {"DefaultStager": DefaultStager}),
        "all": (".staging", {"__all__": ["DefaultStager"]}),
    }


@pytest.mark.parametrize("which", mutilations())
def test_a_mutilated_copy_is_found_out(which):
    module, changes = mutilations()[which]
    clean = Mutilated(ours_named(module))
    assert list(problems(module, lambda _: clean)) == []
    broken = Mutilated(ours_named(module), **changes)
    found = list(problems(module, lambda _: broken))
    assert found and all(next(iter(changes)) in problem for problem in found)


def test_a_module_that_is_absent_is_found_out():
    def absent(module: str) -> types.ModuleType:
        raise ModuleNotFoundError(f"no {module}")

    assert len(list(problems(".planner", absent))) == 1


def test_modules_without_a_counterpart_are_torchs_own_however_they_are_imported():
    import dcp_native._experimental.barriers as barriers
    import dcp_native.planner as imported
    import torch.distributed.checkpoint._experimental.barriers as torchs_barriers
    import torch.distributed.checkpoint.planner as torchs
    from dcp_native.planner import SavePlan

    from dcp_native import planner as attribute

    assert imported is attribute is torchs is sys.modules["dcp_native.planner"]
    assert barriers is torchs_barriers
    assert pickle.loads(pickle.dumps(SavePlan)) is torchs.SavePlan
    # The import system still knows torch's modules as what they are.
    assert torchs.__spec__.name == torchs.__name__ == f"{TORCHS}.planner"
    assert torchs_barriers.__spec__.name == f"{TORCHS}._experimental.barriers"


def test_what_torch_does_not_have_is_not_here():
    with pytest.raises(ModuleNotFoundError, match=r"dcp_native\.nothing"):
        importlib.import_module("dcp_native.nothing")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("dcp_native.planner.nothing")
    with pytest.raises(AttributeError, match=r"dcp_native\.staging.*nothing"):
        _ = dcp_native.staging.nothing
    with pytest.raises(ImportError):
        exec("from dcp_native import nothing")


def test_names_of_other_modules_of_ours_are_ours_everywhere():
    assert dcp_native.state_dict_saver.DefaultStager is dcp_native.staging.DefaultStager
    assert dcp_native.filesystem.BlockingAsyncStager is dcp_native.staging.BlockingAsyncStager
    assert dcp_native._extension is importlib.import_module(f"{TORCHS}._extension")


def test_a_star_import_has_the_public_names_of_both():
    names: dict[str, Any] = {}
    exec("from dcp_native import *", names)
    public = {n for n, v in vars(torch_dcp).items() if not n.startswith("_") and callable(v)}
    assert public <= set(names)
    assert names["save"] is dcp_native.save


@pytest.mark.parametrize(
    "module", ["state_dict", "format_utils", "hf_storage", "_checkpointer", "_experimental.staging"]
)
def test_each_module_can_be_the_first_import(module):
    """No order of imports is needed, and torch's own module is untouched by ours."""
    program = f"""
import importlib, sys
theirs = importlib.import_module("{TORCHS}.{module}")
before = dict(vars(theirs))
ours = importlib.import_module("dcp_native.{module}")
assert dict(vars(theirs)) == before
assert ours is sys.modules["dcp_native.{module}"]
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
