"""Every case of this folder, over fake devices: alone, and as ranks that talk over a fake NCCL."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from device_values import assert_same, raw

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
    [
        (module, size, backend, case)
        for module, size, backend in RUNS
        for case in jobs.case_names(HERE / f"{module}.py")
        if case not in jobs.skipped(HERE / f"{module}.py", size)
    ],
)
def test_case_holds_on_every_rank(results, module, size, backend, case):
    jobs.assert_held(results(module, size, backend), case, size)


def test_every_module_of_cases_is_run():
    assert {run[0] for run in RUNS} == {path.stem for path in HERE.glob("cases_*.py")}


def test_a_rank_that_dies_is_an_error_of_the_others_and_the_checkpoint_before_stays(
    fakes, tmp_path
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join((str(jobs.ROOT), str(jobs.HERE)))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "dying_rank.py"), str(tmp_path / "x")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={
                **os.environ, **fakes, "PYTHONPATH": path, "RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 7], said
    assert "SAW" in said[0] and "nccl" in said[0].lower()
    target = {f"x{rank}": torch.zeros(10, 6) for rank in range(2)}
    torch_dcp.load(target, checkpoint_id=tmp_path / "x", no_dist=True)
    assert_same(target, {f"x{rank}": raw(torch.float32, 10, 6, seed=rank) for rank in range(2)})


def test_without_a_driver_the_package_saves_and_loads(tmp_path):
    """Torch's CUDA build on a machine without one: the real libraries, and no device."""
    script = (
        "import sys, torch, dcp_native as dcp\n"
        "assert not torch.cuda.is_initialized()\n"
        "x = torch.arange(100.0)\n"
        "dcp.save({'x': x}, checkpoint_id=sys.argv[1])\n"
        "dcp.async_save({'x': x}, checkpoint_id=sys.argv[1] + '2').result()\n"
        "y = torch.zeros(100)\n"
        "dcp.load({'x': y}, checkpoint_id=sys.argv[1])\n"
        "assert torch.equal(x, y) and not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "x")],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(jobs.ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
