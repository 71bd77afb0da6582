"""install() and uninstall(): who sees what, in every order; all of it can be taken back."""

from __future__ import annotations

import importlib
import inspect
import io
import os
import pickle
import subprocess
import sys
import threading
import types
import warnings

import pytest
import torch.distributed.checkpoint as bound_before
import torch.distributed.checkpoint.filesystem as submodule_bound_before
from common import assert_equal, like, value
from conftest import ROOT
from torch.distributed.checkpoint.state_dict import StateDictOptions

import dcp_native as dcp
from dcp_native import _install, _stock

TORCHS = "torch.distributed.checkpoint"

pytestmark = pytest.mark.filterwarnings("ignore:.*dcp_native.install.. came after:UserWarning")


@pytest.fixture
def installed():
    dcp.install()
    yield
    dcp.uninstall()


@pytest.fixture(autouse=True)
def is_uninstalled_afterwards():
    yield
    dcp.uninstall()
    assert not hasattr(bound_before, _stock.UNINSTALL)


def replaced_names():
    """(module, name, torch's, ours) of everything that install() replaces where it is defined."""
    for torchs, ours in _install._replacements().values():
        yield torchs.__module__, torchs.__name__, torchs, ours


def namespaces():
    return {
        name: dict(vars(module))
        for name, module in sys.modules.items()
        if name == "torch" or name.startswith("torch.")
    }


def assert_same_objects(after, before):
    for module in before:
        assert list(after[module]) == list(before[module]), module
        for name in before[module]:
            assert after[module][name] is before[module][name], (module, name)


def run(program, *arguments, env=None, **how):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        capture_output=True, text=True, timeout=120, **how,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_every_way_to_a_name_leads_to_ours(installed):
    seen = set()
    for module, name, torchs, ours in replaced_names():
        assert getattr(importlib.import_module(module), name) is ours, name
        assert ours is not torchs and ours.__module__.startswith("dcp_native.")
        seen.add(name)
    assert {"save", "async_save", "load", "FileSystemReader", "DefaultStager"} <= seen
    assert bound_before.save is dcp.save
    assert submodule_bound_before.FileSystemReader is dcp.FileSystemReader
    names = {}
    exec(f"from {TORCHS} import *; from {TORCHS}.state_dict_loader import load as deep", names)
    assert names["save"] is dcp.save and names["deep"] is dcp.load
    assert bound_before.load_sharded_optimizer_state_dict is dcp.load_sharded_optimizer_state_dict


def test_what_is_not_ours_stays_torchs(installed):
    for name in ("Metadata", "SavePlan", "SavePlanner", "CheckpointException", "StorageWriter"):
        assert getattr(bound_before, name) is getattr(dcp, name)
        assert getattr(bound_before, name).__module__.startswith(TORCHS)


def test_uninstall_restores_every_namespace_exactly():
    dcp.install()  # modules that it imports are there, before and after
    dcp.uninstall()
    before = namespaces()
    for _ in range(2):
        dcp.install()
        dcp.install()
        assert bound_before.save is dcp.save
        dcp.uninstall()
        assert_same_objects(namespaces(), before)
        dcp.uninstall()
    assert_same_objects(namespaces(), before)


def test_modules_of_torchs_that_are_imported_meanwhile_are_restored_too():
    name = f"{TORCHS}._experimental.staging"
    kept = {key: sys.modules.pop(key) for key in list(sys.modules) if key == name}
    try:
        dcp.install()
        late = importlib.import_module(name)
        assert late.StateDictStager is dcp._state_dict_stager.StateDictStager
        dcp.uninstall()
        assert late.StateDictStager is _stock._state_dict_stager.StateDictStager
    finally:
        sys.modules.update(kept)


def test_what_others_put_on_top_is_left_with_a_warning(tmp_path):
    torchs = bound_before.state_dict_saver._save_state_dict
    dcp.install()
    ours = bound_before.state_dict_saver._save_state_dict

    def wrapper(*args, **kwargs):
        return ours(*args, **kwargs)

    bound_before.state_dict_saver._save_state_dict = wrapper
    try:
        with pytest.warns(UserWarning, match=r"state_dict_saver \(_save_state_dict\)"):
            dcp.uninstall()
        assert bound_before.state_dict_saver._save_state_dict is wrapper
        assert bound_before.save is _stock.state_dict_saver.save
        # Ours, which the wrapper still calls, takes torch's own from elsewhere.
        dcp.configure(native=False)
        wrapper({"a": 1}, bound_before.FileSystemWriter(tmp_path), no_dist=True)
        assert (tmp_path / ".metadata").exists()
    finally:
        bound_before.state_dict_saver._save_state_dict = torchs


def test_names_bound_before_are_warned_of_once_by_module_and_name():
    client = types.ModuleType("a_client")
    client.save, client.mine = bound_before.save, bound_before.load
    sys.modules["a_client"] = client
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dcp.install()
            dcp.install()
            dcp.uninstall()
            dcp.install()
        texts = [str(w.message) for w in caught if "a_client" in str(w.message)]
        assert len(texts) == 1 and "a_client (mine, save)" in texts[0]
        assert caught[-1].filename == __file__
        assert client.save is _stock.state_dict_saver.save
    finally:
        del sys.modules["a_client"]
        _install._warned.difference_update({("a_client", "save"), ("a_client", "mine")})


WRAPPED = """
import functools, sys, warnings
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import state_dict_saver as saver, state_dict_loader as loader
if sys.argv[1] == "after":
    import dcp_native
torchs, called = saver.save, []
def wrap(function, says_so):
    def wrapper(*args, **kwargs):
        called.append(function.__name__)
        return function(*args, **kwargs)
    return functools.wraps(function)(wrapper) if says_so else wrapper
saver.save = on_module = wrap(saver.save, True)  # the package still has torch's
torch_dcp.load = on_package = wrap(torch_dcp.load, True)
torch_dcp.async_save = silent = wrap(torch_dcp.async_save, False)
loader.load_state_dict = silent_too = wrap(loader.load_state_dict, False)
import dcp_native
from dcp_native import _stock
assert _stock.state_dict_saver.save is torchs
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    dcp_native.install()
    dcp_native.install()
text, = [str(w.message) for w in caught if "others have replaced" in str(w.message)]
assert "torch.distributed.checkpoint (async_save, load); " in text, text
assert "torch.distributed.checkpoint.state_dict_loader (load_state_dict); " in text, text
assert "torch.distributed.checkpoint.state_dict_saver (save):" in text, text
assert saver.save is on_module and torch_dcp.load is on_package
assert torch_dcp.async_save is silent and loader.load_state_dict is silent_too
assert torch_dcp.save is dcp_native.save and loader.load is dcp_native.load
dcp_native.uninstall()
assert torch_dcp.save is torchs and saver.save is on_module and torch_dcp.load is on_package
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_wrappers_of_others_around_torchs_stay_and_are_warned_of(when):
    """Put there before or after dcp_native is imported."""
    run(WRAPPED, when)


def test_what_was_made_before_can_be_pickled_again_afterwards(tmp_path):
    """While ours have the names of torch's classes pickle refuses it: docs/install.md."""
    made_before = bound_before.FileSystemReader(tmp_path)
    dcp.install()
    with pytest.raises(pickle.PicklingError, match="not the same object"):
        pickle.dumps(made_before)
    pickle.dumps(bound_before.FileSystemReader(tmp_path))
    dcp.uninstall()
    assert type(pickle.loads(pickle.dumps(made_before))) is type(made_before)


def test_a_lazy_module_is_not_loaded_by_the_search():
    class Lazy(types.ModuleType):
        def __getattribute__(self, name):
            raise AssertionError(f"looked at: {name}")

    sys.modules["a_lazy_module"], sys.modules["no_module"] = Lazy("a_lazy_module"), None
    try:
        dcp.install()
    finally:
        del sys.modules["a_lazy_module"], sys.modules["no_module"]


def test_classes_derived_before_keep_working(installed, tmp_path):
    """They call ``BlockingAsyncStager.__init__(self)``: torch's FileSystemWriter does."""
    writer = bound_before.FileSystemWriter(tmp_path, cache_staged_state_dict=True)
    assert isinstance(writer, bound_before.staging.BlockingAsyncStager)

    class Writer(_stock.filesystem._FileSystemWriter, _stock.staging.BlockingAsyncStager):
        def __init__(self, path):
            super().__init__(path)
            bound_before.staging.BlockingAsyncStager.__init__(self, True)

    assert Writer(tmp_path).cache_staged_state_dict


def test_readers_of_torchs_count_as_ours(installed, tmp_path):
    fsspec = pytest.importorskip(f"{TORCHS}._fsspec_filesystem")
    made_before = _stock.filesystem.FileSystemReader(tmp_path)
    assert isinstance(made_before, bound_before.FileSystemReader)
    assert issubclass(fsspec.FsspecReader, bound_before.FileSystemReader)
    assert fsspec.FsspecReader.__mro__[1] is _stock.filesystem.FileSystemReader
    assert not issubclass(bound_before.StorageReader, bound_before.FileSystemReader)

    class Mine(dcp.FileSystemReader):
        pass

    assert not isinstance(made_before, Mine) and issubclass(Mine, bound_before.FileSystemReader)


def test_a_program_runs_natively_through_torchs_names(installed, tmp_path):
    want = {"m": {"w": value("w", (4, 3))}, "step": 3}
    bound_before.save(want, checkpoint_id=tmp_path)
    assert dcp.last_report()["path"] == "native"
    bound_before.async_save(want, checkpoint_id=tmp_path / "a").result(60)
    for path in (tmp_path, tmp_path / "a"):
        target = like(want)
        bound_before.load(target, checkpoint_id=path)
        assert dcp.last_report()["path"] == "native"
        assert_equal(target, want)


class PythonWriter(bound_before.FileSystemWriter):
    def write_data(self, plan, planner):
        return super().write_data(plan, planner)


FOREIGN = """
import io, pickle, sys
class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "dcp_native":
            raise AssertionError("a checkpoint asks for dcp_native")
sys.meta_path.insert(0, Blocker)
import torch, torch.distributed.checkpoint as dcp
for path in sys.argv[1:3]:
    reader = dcp.FileSystemReader(path)
    for index in reader.read_metadata().storage_data:
        target = {index.fqn: torch.zeros(4, 3) if index.fqn == "w" else None}
        dcp.load(target, storage_reader=reader, no_dist=True)
        assert target[index.fqn] is not None
pickle.load(open(sys.argv[3], "rb"))
"""


def test_files_written_meanwhile_need_torch_alone(installed, tmp_path):
    """.metadata, every object in a file, and whatever torch's classes a program pickles itself."""
    want = {
        "w": value("w", (4, 3)),
        "step": 3,
        "options": StateDictOptions(),
        "config": {"a": (1, "x")},
    }
    metadata = bound_before.save(want, checkpoint_id=tmp_path / "native")
    bound_before.save(want, storage_writer=PythonWriter(tmp_path / "python"))
    planners = bound_before.DefaultSavePlanner(), bound_before.DefaultLoadPlanner()
    (tmp_path / "own").write_bytes(pickle.dumps((metadata, planners, bound_before.Metadata)))
    run(FOREIGN, tmp_path / "native", tmp_path / "python", tmp_path / "own")


def test_every_replaced_name_pickles_where_it_says_it_is(installed):
    for module, name, _, ours in replaced_names():
        file = io.BytesIO(pickle.dumps(ours))
        assert pickle.load(file) is ours, (module, name)
        assert inspect.getmodule(ours).__name__.startswith("dcp_native.")


def test_threads_may_install_and_uninstall_while_others_read():
    valid = {dcp.save, _stock.state_dict_saver.save}
    stop, wrong = threading.Event(), []

    def read():
        while not stop.is_set():
            for name in (bound_before.save, bound_before.state_dict_saver.save):
                if name not in valid:
                    wrong.append(name)

    def change():
        for _ in range(5):
            dcp.install()
            dcp.uninstall()

    before = namespaces()
    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=change) for _ in range(4)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not wrong
    assert_same_objects(namespaces(), before)


def test_a_forked_child_goes_on(installed, tmp_path):
    with _install._lock():  # some thread of the parent installs at that moment
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                dcp.install()
                code = 0 if bound_before.save is dcp.save else 2
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0


SLOW_IMPORT = """
import importlib.machinery, sys, threading, time
import torch.distributed.checkpoint
import dcp_native
name = "torch.distributed.checkpoint._checkpointer"
begun = threading.Event()
class Slow(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        begun.set()
        time.sleep(0.5)
        super().exec_module(module)
class Finder:
    @staticmethod
    def find_spec(fullname, path=None, target=None):
        if fullname == name:
            spec = importlib.machinery.PathFinder.find_spec(fullname, path)
            spec.loader = Slow(name, spec.origin)
            return spec
assert name not in sys.modules
sys.meta_path.insert(0, Finder)
thread = threading.Thread(target=lambda: __import__(name))
thread.start()
begun.wait()
dcp_native.install()
assert sys.modules[name]._Checkpointer is dcp_native._checkpointer._Checkpointer
thread.join()
assert sys.modules[name]._Checkpointer is dcp_native._checkpointer._Checkpointer
"""


def test_a_module_that_another_thread_is_importing_is_waited_for():
    run(SLOW_IMPORT)


SECOND_COPY = """
import sys
import torch.distributed.checkpoint as torch_dcp
torchs = torch_dcp.save
import dcp_native
dcp_native.install()
first = torch_dcp.save
for name in [n for n in sys.modules if n.split(".")[0] == "dcp_native" and "._" not in n]:
    del sys.modules[name]
for name in ("_api", "_stock", "_mirror", "_install"):
    del sys.modules[f"dcp_native.{name}"]
import dcp_native
dcp_native.save  # a package is loaded when its first name is asked for
assert torch_dcp.save is torchs is dcp_native._stock.state_dict_saver.save
dcp_native.install()
assert torch_dcp.save is dcp_native.save is not first
dcp_native.uninstall()
assert torch_dcp.save is torchs
"""


def test_a_second_copy_finds_torchs_own_implementation():
    run(SECOND_COPY)
