"""Shared by the tests: where the golden checkpoints lie, and quiet warnings of torch."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

import dcp_native

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden"
sys.path.insert(0, str(ROOT / "tests" / "py" / "ranks"))  # `common`: values and comparisons
sys.path.insert(0, str(ROOT / "tests" / "py" / "kill"))  # jobs whose processes are killed

warnings.filterwarnings("ignore", message="torch.distributed is disabled")
warnings.filterwarnings("ignore", message="Detected an existing checkpoint")


@pytest.fixture(autouse=True)
def native_settings_are_restored():
    before = dcp_native.config()
    yield
    dcp_native.configure(**vars(before))
