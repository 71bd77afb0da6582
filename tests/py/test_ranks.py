"""Real processes under torchrun and gloo: every case of tests/py/ranks on 2, 3 and 4 ranks."""

from __future__ import annotations

import functools
from pathlib import Path

import conftest  # noqa: F401  (puts tests/py/ranks on the path)
import jobs
import pytest

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


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Runs a module once per world size, when its first case is asked for."""

    @functools.cache
    def run(module: str, size: int) -> dict[str, list[str | None]]:
        out = tmp_path_factory.mktemp(f"{module}-{size}")
        return jobs.run_cases(RANKS / f"{module}.py", size, out)

    return run


@pytest.mark.parametrize(
    ("module", "size", "case"),
    [
        (module, size, case)
        for module, sizes in MODULES.items()
        for size in sizes
        for case in jobs.case_names(RANKS / f"{module}.py")
    ],
)
def test_case_holds_on_every_rank(results, module, size, case):
    outcome = results(module, size)
    if case not in outcome and case in jobs.skipped(RANKS / f"{module}.py", size):
        pytest.skip(f"meant for other sizes than {size}")
    jobs.assert_held(outcome, case, size)
