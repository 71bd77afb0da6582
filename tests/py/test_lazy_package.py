"""The package gives out its names when they are asked for, and is in no other way different."""

from __future__ import annotations

import pkgutil

import cli

import dcp_native


def run(program, **env):
    done = cli.run_alone(program=("-c", program), **{"DCP_NATIVE_INSTALL": "", **env})
    assert done.status == 0, done.err
    return done.out


def test_importing_the_package_does_not_import_torch():
    run("import sys, dcp_native; assert 'torch' not in sys.modules")


def test_checking_checkpoints_needs_no_torch(tmp_path):
    run(
        "import sys; from dcp_native._verify import verify; from dcp_native._find_latest import "
        f"find_latest; assert find_latest({str(tmp_path)!r}) is None; assert not "
        f"verify({str(tmp_path)!r}); assert 'torch' not in sys.modules"
    )


PROGRAMS = [
    "from dcp_native import save, FileSystemReader; assert 'native' in save.__module__",
    "import dcp_native; assert {'save', 'planner', '__version__'} <= set(dir(dcp_native))",
    "from dcp_native import *; assert async_save and load and FileSystemReader",
    "import dcp_native.state_dict as s; assert s.get_model_state_dict",
    "import dcp_native.planner as p, torch.distributed.checkpoint.planner as q; assert p is q",
    "import dcp_native as d; assert d.planner.SavePlan is d.SavePlan; assert d.trim() is None",
    "import dcp_native as d; assert not hasattr(d, 'no') and not hasattr(d, '__no__')",
    "import pickle; from dcp_native._native import NativeError as E; "
    "assert pickle.loads(pickle.dumps(E('x'))).args == ('x',)",
    "import dcp_native as d; d.save = 1; d.load; assert d.save == 1",
    "import inspect, dcp_native; assert len(inspect.getmembers(dcp_native)) > 60",
]


IN_CHILDREN = """
import os, sys, traceback
import torch, torch.distributed.checkpoint, torch.distributed.tensor  # once for all
assert "dcp_native" not in sys.modules
for program in {programs!r}:
    pid = os.fork()
    if pid == 0:
        try:
            exec(program, {{}})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, program
"""


def test_every_way_to_a_name_works_first():
    run(IN_CHILDREN.format(programs=PROGRAMS))


def test_every_module_can_be_imported_first():
    names = [m.name for m in pkgutil.walk_packages(dcp_native.__path__, "dcp_native.")]
    assert len(names) > 60
    programs = [f"import {name}" for name in names if not name.endswith("__main__")]
    run(IN_CHILDREN.format(programs=programs))


def test_a_thread_that_comes_while_another_loads_sees_all_names():
    run("""
import threading, dcp_native
seen, together = [], threading.Barrier(8)
def work(name):
    together.wait()
    seen.append(getattr(dcp_native, name))
names = ["save", "load", "verify", "state_dict", "planner", "FileSystemReader", "trim", "Metadata"]
threads = [threading.Thread(target=work, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(seen) == 8, seen
""")


def test_the_environment_still_installs_at_import():
    run(
        "import dcp_native as d, torch.distributed.checkpoint as t; assert t.save is d.save",
        DCP_NATIVE_INSTALL="1",
    )


def test_a_package_built_for_another_torch_says_so():
    run("""
from dcp_native import _native
_native.built_for_torch = "1.0"
try:
    from dcp_native import save
except ImportError as error:
    assert "built for torch 1.0" in str(error)
else:
    raise AssertionError
""")
