"""The writer's executable is built, found and packaged with the modules."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dcp_native

ROOT = Path(__file__).resolve().parents[2]


def test_it_lies_beside_the_modules_and_says_that_it_is_not_run_by_hand():
    writer = Path(dcp_native.__file__).parent / "_writer"
    done = subprocess.run([writer], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "dcp_native" in done.stderr
    # An argument alone makes no trainer.
    done = subprocess.run([writer, "1"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2


def test_it_needs_libc_alone():
    writer = Path(dcp_native.__file__).parent / "_writer"
    symbols = subprocess.run(["nm", "-u", writer], capture_output=True, text=True, check=True)
    assert symbols.stdout
    bad = [s for s in symbols.stdout.split() if s.startswith(("Py", "_Py", "_Z", "cuda", "nccl"))]
    assert not bad


@pytest.mark.parametrize(
    "command",
    [
        "bdist_wheel",
        pytest.param(
            "editable_wheel",
            marks=pytest.mark.skipif(
                not os.environ.get("DCP_NATIVE_SLOW_TESTS"), reason="compiles all of it (slow)"
            ),
        ),
    ],
)
def test_wheels_have_it_executable(command, tmp_path):
    """An editable wheel points into the tree, where the executable then lies."""
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", command, "--dist-dir", tmp_path],
        cwd=ROOT, check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    assert (ROOT / "dcp_native" / "_writer").stat().st_mode & 0o111 == 0o111
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    if command == "bdist_wheel":
        assert modes["dcp_native/_writer"] & 0o777 == 0o755
    else:
        assert "dcp_native/_writer" not in modes


def test_source_archives_do_not_have_it(tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path],
        cwd=ROOT, check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    names = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True, check=True)
    assert "/csrc/writer/main.c" in names.stdout
    assert "/dcp_native/_writer" not in names.stdout
