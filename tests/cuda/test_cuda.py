"""Every case of this folder, over fake devices: alone, and as ranks that talk over a fake NCCL."""

from __future__ import annotations

from pathlib import Path

import jobs
import pytest

HERE = Path(__file__).resolve().parent
BOTH = "cpu:gloo,cuda:nccl"
RUNS = [  # module, ranks (0: no process group), backend
    ("cases_no_context", 0, ""),
    ("cases_values", 0, ""),
    ("cases_staging", 0, ""),
    ("cases_contract", 0, ""),
    ("cases_faults", 0, ""),
    ("cases_comm", 2, BOTH),
    ("cases_comm", 3, BOTH),
    ("cases_ranks", 2, BOTH),
    ("cases_ranks", 2, "nccl"),
    ("cases_hsdp", 4, BOTH),
]


@pytest.mark.parametrize(
    ("module", "size", "backend", "case"),
    [(*run, case) for run in RUNS for case in jobs.case_names(HERE / f"{run[0]}.py")],
)
def test_case_holds_on_every_rank(results, module, size, backend, case):
    jobs.assert_held(results(module, size, backend), case, size)


def test_every_module_of_cases_is_run():
    assert {run[0] for run in RUNS} == {path.stem for path in HERE.glob("cases_*.py")}
