"""Tests for a machine with a GPU: docs/gpu.md says how to run them and what they print."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "py" / "ranks"))
sys.path.insert(0, str(ROOT / "tests" / "cuda"))
