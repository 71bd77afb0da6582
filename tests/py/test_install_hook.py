"""DCP_NATIVE_INSTALL=1 through dcp_native.pth: no line of a program changes, and no start breaks.

The packages are stand-ins, but for one test: what is shown is when who imports what.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from conftest import ROOT

START = """
import site, sys
finders = list(sys.meta_path)
site.addsitedir(sys.argv[1])  # as the interpreter does with its own at start
"""

OURS = """
import os
import torch.distributed.checkpoint as theirs
import torch.distributed
assert torch.distributed.checkpoint is theirs
if os.environ["DCP_NATIVE_INSTALL"] == "1":
    theirs.save = "ours"
"""


@pytest.fixture
def start(tmp_path):
    """Runs a program with dcp_native.pth in its only site directory, with stand-ins of both."""
    (tmp_path / "dcp_native.pth").write_text((ROOT / "dcp_native.pth").read_text())
    (tmp_path / "_dcp_native_hook.py").write_text((ROOT / "_dcp_native_hook.py").read_text())
    checkpoint = tmp_path / "torch" / "distributed" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text("")
    (tmp_path / "torch" / "distributed" / "__init__.py").write_text("")
    (checkpoint / "__init__.py").write_text("from .saver import save\n")
    (checkpoint / "saver.py").write_text("save = 'torchs'\n")

    def run(program, install="1", ours=OURS):
        (tmp_path / "dcp_native.py").write_text(ours)
        environment = {k: v for k, v in os.environ.items() if k != "DCP_NATIVE_INSTALL"}
        if install is not None:
            environment["DCP_NATIVE_INSTALL"] = install
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", START + program, tmp_path],
            env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    return run


def assert_quiet(done):
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.parametrize("install", [None, "", "0"])
def test_nothing_happens_unless_it_is_asked_for(start, install):
    assert_quiet(start("""
assert sys.meta_path == finders and "_dcp_native_hook" not in sys.modules
import torch.distributed.checkpoint as dcp
assert dcp.save == "torchs" and "dcp_native" not in sys.modules
""", install))  # fmt: skip


def test_nothing_is_imported_before_torchs_package_is(start):
    assert_quiet(start("""
assert not {"torch", "dcp_native"} & set(sys.modules)
import torch.distributed
assert "dcp_native" not in sys.modules
"""))  # fmt: skip


@pytest.mark.parametrize(
    "statement",
    [
        "import torch.distributed.checkpoint as dcp; save = dcp.save",
        "from torch.distributed.checkpoint import save",
        "from torch.distributed import checkpoint; save = checkpoint.save",
        "import torch.distributed.checkpoint.saver; save = torch.distributed.checkpoint.save",
        "import dcp_native, torch.distributed.checkpoint; save = torch.distributed.checkpoint.save",
        "import importlib.util as u; u.find_spec('torch.distributed.checkpoint'); "
        "from torch.distributed.checkpoint import save",
    ],
)
def test_the_first_import_of_torchs_package_installs(start, statement):
    assert_quiet(start(f"""
{statement}
assert save == "ours", save
assert sys.meta_path == finders
spec = sys.modules["torch.distributed.checkpoint"].__spec__
assert "exec_module" not in vars(spec.loader)
"""))  # fmt: skip


def test_threads_that_import_at_once_all_see_ours(start):
    assert_quiet(start("""
import threading
seen, together = [], threading.Barrier(8)
def work():
    together.wait()
    from torch.distributed.checkpoint import save
    seen.append(save)
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert seen == ["ours"] * 8, seen
"""))  # fmt: skip


@pytest.mark.parametrize(
    "ours", ["raise ImportError('built for another torch')", "1 / 0", "import no_such_module"]
)
def test_a_package_that_fails_is_named_and_torchs_stays(start, ours):
    done = start("""
from torch.distributed.checkpoint import save
assert save == "torchs"
""", ours=ours)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "DCP_NATIVE_INSTALL is set" in done.stderr and "stays torch's own" in done.stderr


def test_a_torch_that_fails_raises_its_own_error(start, tmp_path):
    (tmp_path / "torch/distributed/checkpoint/saver.py").write_text("raise KeyError('torch')")
    done = start("""
for _ in range(2):
    try:
        import torch.distributed.checkpoint
    except KeyError:
        pass
    else:
        raise AssertionError
""")  # fmt: skip
    assert_quiet(done)


def test_without_the_hook_module_the_interpreter_still_starts(start, tmp_path):
    (tmp_path / "_dcp_native_hook.py").unlink()
    done = start("import torch.distributed.checkpoint")
    assert done.returncode == 0 and "_dcp_native_hook" in done.stderr


REAL = """
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import save
import torch.distributed.checkpoint.state_dict_saver as saver
import sys, tempfile, warnings, torch
warnings.simplefilter("ignore")
import dcp_native
assert save is dcp.save is saver.save is dcp_native.save
with tempfile.TemporaryDirectory() as path:
    save({"w": torch.ones(3)}, checkpoint_id=path)
    target = {"w": torch.zeros(3)}
    dcp.load(target, checkpoint_id=path)
assert target["w"].sum() == 3 and dcp_native.last_report()["path"] == "native"
"""


@pytest.mark.parametrize("first", ["", "import dcp_native\n"], ids=["torch-first", "ours-first"])
def test_a_real_program_runs_natively_without_a_changed_line(tmp_path, first):
    (tmp_path / "dcp_native.pth").write_text((ROOT / "dcp_native.pth").read_text())
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", START + first + REAL, tmp_path],
        env={**os.environ, "DCP_NATIVE_INSTALL": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert_quiet(done)


def test_a_value_that_is_neither_yes_nor_no_is_named(monkeypatch):
    from dcp_native import _install

    monkeypatch.setenv("DCP_NATIVE_INSTALL", "maybe")
    with pytest.raises(ValueError, match="DCP_NATIVE_INSTALL: expected 0 or 1"):
        _install.install_if_asked()


def test_the_hook_can_be_loaded_late_and_then_does_nothing():
    """torch's package is there already: there is no import to wait for."""
    import torch.distributed.checkpoint  # noqa: F401

    before = list(sys.meta_path)
    spec = importlib.util.spec_from_file_location("_late_hook", ROOT / "_dcp_native_hook.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert sys.meta_path == before
