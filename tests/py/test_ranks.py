"""Real processes under torchrun and gloo: every case of tests/py/ranks on 2, 3 and 4 ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

RANKS = Path(__file__).resolve().parent / "ranks"
MODULES = {
    "cases_values": (2, 4),
    "cases_failures": (2, 3),
    "cases_async": (2,),
    "cases_incremental": (2, 3),
    "cases_split": (2, 4),
    "cases_plan_changes": (2, 3),
    "cases_metadata": (2,),
    "cases_load_report": (2,),
    "cases_load_roles": (2, 3),
    "cases_find_latest": (2,),
    "cases_foreign": (2,),
    "cases_format": (2,),
    "cases_reshard": (4,),
    "cases_read_once": (2, 4),
    "cases_checkpointer": (2,),
    "cases_install": (2,),
    "cases_state_dict": (2,),
    "cases_full_state_dict": (2, 4),
    "cases_save_roles": (2, 3),
    "cases_hf_reader": (2, 3),
    "cases_format_utils": (2,),
    "cases_hf_writer": (2, 3),
    "cases_checkpointable": (2, 3),
}


def case_names(module: str) -> list[str]:
    return re.findall(r"^def (case_\w+)", (RANKS / f"{module}.py").read_text(), re.M)


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Runs a module once per world size, when its first case is asked for."""
    done: dict[tuple[str, int], dict[str, list[str | None]]] = {}

    def run(module: str, size: int) -> dict[str, list[str | None]]:
        if (module, size) not in done:
            out = tmp_path_factory.mktemp(f"{module}-{size}")
            # The package may be built in place and not installed.
            path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
            job = subprocess.run(
                [
                    sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", str(size), str(RANKS / "runner.py"), module, str(out),
                ],
                capture_output=True, text=True, timeout=300,
                env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
            outcome: dict[str, list[str | None]] = {}
            for rank in range(size):
                log = out / f"rank{rank}.jsonl"
                for line in log.read_text().splitlines() if log.exists() else ():
                    entry = json.loads(line)
                    outcome.setdefault(entry["case"], []).append(entry["failure"])
            outcome["output"] = [job.stderr[-4000:]]
            done[module, size] = outcome
        return done[module, size]

    return run


@pytest.mark.parametrize(
    ("module", "size", "case"),
    [(m, s, c) for m, sizes in MODULES.items() for s in sizes for c in case_names(m)],
)
def test_case_holds_on_every_rank(results, module, size, case):
    outcome = results(module, size)
    if case not in outcome and case in skipped(module, size):
        pytest.skip(f"meant for other sizes than {size}")
    failures = outcome.get(case, [])
    assert len(failures) == size, f"not every rank finished: {outcome['output'][0]}"
    for rank, failure in enumerate(failures):
        assert failure is None, f"rank {rank}:\n{failure}"


def skipped(module: str, size: int) -> set[str]:
    """Cases that say `@sizes(...)` without this one."""
    found = re.findall(r"@sizes\(([\d, ]+)\)\ndef (case_\w+)", (RANKS / f"{module}.py").read_text())
    return {name for listed, name in found if str(size) not in listed.replace(" ", "").split(",")}
