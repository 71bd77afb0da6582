"""What the tests of the command line share: a checkpoint, and ways to run commands on it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import GOLDEN, ROOT

import dcp_native as dcp
from dcp_native._cli.main import main

STOCK = sorted(path.parent for path in GOLDEN.glob("*/*/.metadata"))
"""Checkpoints that stock releases of torch wrote."""


class Done(NamedTuple):
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*argv: Any) -> Done:
    """A command in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = dcp.config()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as ended:  # argparse
            status = ended.code if isinstance(ended.code, int) else 1
        finally:
            dcp.configure(**vars(before))
    return Done(status, out.getvalue(), err.getvalue())


def run_alone(*argv: Any, program: tuple[str, ...] = ("-m", "dcp_native"), **env: str) -> Done:
    """A command in a process of its own, its output a pipe."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, *program, *map(str, argv)],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def state(seed: int = 0, step: int = 100) -> dict[str, Any]:
    """Nested, with layers that are alike, three types, scalars, an empty tensor and objects."""
    generator = torch.Generator().manual_seed(seed)
    model = {"embed.weight": torch.randn(40, 8, generator=generator)}
    for layer in range(4):
        model[f"layers.{layer}.w"] = torch.randn(16, 8, generator=generator).bfloat16()
        model[f"layers.{layer}.norm"] = torch.randn(8, generator=generator)
    return {
        "model": model,
        "optim": {"count": torch.tensor(step), "none": torch.zeros(0, 3), "lr": [0.1, 0.2]},
        "step": step,
        "name": "a run",
    }


def save(path: Path, values: dict[str, Any] | None = None, module: Any = dcp) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = state() if values is None else values
        module.save(values, checkpoint_id=str(path), no_dist=True)
    return path


def flip(path: Path, at: int) -> None:
    """Change one byte of a file."""
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0xFF]))
