"""Torch's CUDA build over the fake libraries of tests/fake, preloaded under their real names.

The tests themselves run without them; every case runs in processes of their own that have them
(tests/py/ranks/runner.py).  No GPU is needed, and none is used where there is one.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.spread import pytest_xdist_make_scheduler  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "py" / "ranks"))

import jobs  # noqa: E402

LIBRARIES = ("libcuda.so.1", "libcudart.so.13", "libcufile.so.0", "libnccl.so.2")
BACKENDS = {0: "", 2: "cpu:gloo,cuda:nccl"}


def pytest_configure(config) -> None:
    if not (torch.version.cuda or "").startswith("13"):
        raise pytest.UsageError(
            f"these tests need a build of torch for CUDA 13, and torch {torch.__version__} is "
            "installed: make test-cuda"
        )


@pytest.fixture(scope="session")
def fakes(tmp_path_factory) -> dict[str, str]:
    """The environment in which a process has the fake libraries."""
    out = tmp_path_factory.mktemp("fake")
    subprocess.run([ROOT / "tests" / "fake" / "build.sh", out], check=True, timeout=120)
    preload = ":".join(str(out / name) for name in LIBRARIES)
    return {
        "LD_PRELOAD": ":".join(filter(None, (preload, os.environ.get("LD_PRELOAD")))),
        "DCP_FAKE_LIBRARIES": str(out),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="session")
def results(tmp_path_factory, fakes):
    """Runs a module once per number of ranks and backend, when its first case is asked for."""

    @functools.cache
    def run(module: str, size: int, backend: str) -> dict[str, list[str | None]]:
        out = tmp_path_factory.mktemp(f"{module}-{size}")
        path = Path(__file__).parent / f"{module}.py"
        return jobs.run_cases(path, size, out, backend, fakes)

    return run
