"""Real clients, unchanged, once over stock torch and once over dcp_native, and across.

Not part of `make test`: `make test-clients` installs them from the registry, beside the package as
a user would install it.  Every job is two processes under torchrun with gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

CLIENTS = {
    "accelerate": ("accelerate_job", {}),
    "lightning": ("lightning_job", {}),
    "transformers": ("transformers_job", {}),
    "torchtitan": ("torchtitan_job", {"TITAN_MODE": "disabled"}),
    "torchtitan-async": ("torchtitan_job", {"TITAN_MODE": "async"}),
    "torchtitan-process": ("torchtitan_job", {"TITAN_MODE": "async_with_pinned_mem"}),
    "torchtitan-export": ("torchtitan_job", {"TITAN_MODE": "disabled", "TITAN_LAST": "one"}),
    "torchtitan-export-split": (
        "torchtitan_job",
        {"TITAN_MODE": "disabled", "TITAN_LAST": "split"},
    ),
}
NEEDS_US = {"torchtitan-process"}
"""Torch's DefaultStager refuses hosts without an accelerator: only ours can save there."""
LOADS_THROUGH_HOOKS = {"transformers", "torchtitan-export", "torchtitan-export-split"}
"""The last call is of another storage than the file system's."""


def run(client: str, what: str, path: Path, by: str) -> dict:
    """The facts that rank 0 of the job told."""
    job, extra = CLIENTS[client]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DCP_NATIVE_INSTALL")}
    if by == "dcp_native":
        env["DCP_NATIVE_INSTALL"] = "1"
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    argv += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    argv += [str(HERE / f"{job}.py"), what, str(path)]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=300, env={**env, **extra}, cwd=HERE
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    facts = json.loads(lines[-1])
    assert facts.pop("installed") == (by == "dcp_native")
    way = facts.pop("path")
    if by == "dcp_native" and client not in LOADS_THROUGH_HOOKS:
        assert way == "native"
    return facts


@pytest.mark.parametrize("by", ["torch", "dcp_native"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_saves_and_both_load_what_it_saved(client, by, tmp_path):
    if by == "torch" and client in NEEDS_US:
        pytest.skip("torch's stager needs an accelerator")
    saved = run(client, "save", tmp_path / "checkpoint", by)
    for reader in ("torch", "dcp_native"):
        if reader == "torch" and client in NEEDS_US:
            continue
        loaded = run(client, "load", tmp_path / "checkpoint", reader)
        assert loaded == saved, f"saved by {by}, loaded by {reader}"
