"""Shared by the tests: where the golden checkpoints lie, and quiet warnings of torch."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path

import pytest

import dcp_native
from tests.spread import pytest_xdist_make_scheduler  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "golden"
sys.path.insert(0, str(ROOT / "tests" / "py" / "ranks"))  # `common`: values and comparisons
sys.path.insert(0, str(ROOT / "tests" / "py" / "kill"))  # jobs whose processes are killed

# A shell ignores Ctrl-C for what it starts in the background, and all processes below do then.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

warnings.filterwarnings("ignore", message="torch.distributed is disabled")
warnings.filterwarnings("ignore", message="Detected an existing checkpoint")


@pytest.fixture(autouse=True)
def native_settings_are_restored():
    before = dcp_native.config()
    yield
    dcp_native.configure(**vars(before))
