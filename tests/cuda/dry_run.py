"""Runs a program that is written for a GPU on the fakes: dry_run.py PROGRAM ARGUMENTS."""

from __future__ import annotations

import os
import runpy
import sys

import host_kernels  # noqa: F401 (so that torch's kernels run)

if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
