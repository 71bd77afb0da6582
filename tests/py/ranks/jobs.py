"""Starts runner.py over a module of cases and reads what its ranks wrote."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
TIMEOUT_S = 300


def case_names(module: Path) -> list[str]:
    return re.findall(r"^def (case_\w+)", module.read_text(), re.M)


def skipped(module: Path, size: int) -> set[str]:
    """Cases that say `@sizes(...)` without this one."""
    found = re.findall(r"@sizes\(([\d, ]+)\)\ndef (case_\w+)", module.read_text())
    return {name for listed, name in found if str(size) not in listed.replace(" ", "").split(",")}


def run_cases(
    module: Path, size: int, out: Path, backend: str = "gloo", env: dict[str, str] | None = None
) -> dict[str, list[str | None]]:
    """What became of each case on each rank (None: it held), and "output", the end of stderr.

    Size 0 is one process that has no process group.
    """
    launcher = [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size),
    ] if size else []  # fmt: skip
    # The package may be built in place and not installed.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    job = subprocess.run(
        [
            sys.executable, *launcher, str(HERE / "runner.py"), str(module), str(out),
            *([backend] if size else []),
        ],
        capture_output=True, text=True, timeout=TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
    )  # fmt: skip
    outcome: dict[str, list[str | None]] = {"output": [job.stderr[-4000:]]}
    for rank in range(size or 1):
        log = out / f"rank{rank}.jsonl"
        for line in log.read_text().splitlines() if log.exists() else ():
            entry = json.loads(line)
            outcome.setdefault(entry["case"], []).append(entry["failure"])
    return outcome


def assert_held(outcome: dict[str, list[str | None]], case: str, size: int) -> None:
    failures = outcome.get(case, [])
    assert len(failures) == (size or 1), f"not every rank finished: {outcome['output'][0]}"
    for rank, failure in enumerate(failures):
        assert failure is None, f"rank {rank}:\n{failure}"
