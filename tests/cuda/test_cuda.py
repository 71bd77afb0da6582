"""Every case of this folder, over fake devices: alone, and as ranks that talk over a fake NCCL."""

from __future__ import annotations

import os
import re
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
    ("cases_file", 0, ""),
    ("cases_comm", 2, BOTH),
    ("cases_comm", 3, BOTH),
    ("cases_ranks", 2, BOTH),
    ("cases_ranks", 2, "nccl"),
    ("cases_hsdp", 4, BOTH),
    ("cases_models", 2, BOTH),
    ("cases_models", 4, BOTH),
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


@pytest.mark.parametrize("size", [2, 8])
def test_a_rank_that_dies_is_an_error_of_the_others_and_the_checkpoint_before_stays(
    fakes, tmp_path, size
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
                **os.environ, **fakes, "PYTHONPATH": path, "RANK": str(rank),
                "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
        )
        for rank in range(size)
    ]  # fmt: skip
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * (size - 1) + [7], said
    for text in said[:-1]:
        assert "SAW" in text and "nccl" in text.lower()
    target = {f"x{rank}": torch.zeros(10, 6) for rank in range(size)}
    torch_dcp.load(target, checkpoint_id=tmp_path / "x", no_dist=True)
    assert_same(target, {f"x{rank}": raw(torch.float32, 10, 6, seed=rank) for rank in range(size)})


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


def run_for_gpus(fakes: dict[str, str], *args: str) -> tuple[str, str]:
    """What is written for a GPU, on fakes, with torch's kernels computed on the host."""
    path = os.pathsep.join((str(jobs.ROOT), str(HERE)))
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=280,
        env={**os.environ, **fakes, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout, done.stderr


BENCHMARK = (str(jobs.ROOT / "benchmarks" / "gpu.py"), "--rounds", "1")
NEEDS_A_GPU = ("expandable", "capture", "behind_the_callers_work")
"""Memory mapped by hand, graphs, a kernel that takes its time: the fakes have none of these."""


def figures(said: str) -> dict[str, list[float]]:
    """By the name of a line: milliseconds of ours, torch and the limit; each has a verdict."""
    time = r" *(\d+\.\d+) "
    line = rf"^(.+?) *\|{time}:{time}:{time}ms *\|[\d.: nan]+\| .+: (?:met|MISSED)(?: \| .+)?$"
    return {name: list(map(float, ms)) for name, *ms in re.findall(line, said, re.M)}


def test_the_benchmark_for_gpus_runs_as_far_as_fakes_show(fakes):
    said, logged = run_for_gpus(
        fakes, str(HERE / "dry_run.py"), *BENCHMARK,
        "--bytes", "4e6", "--small", "200", "--medium", "4", "--batch", "16",
    )  # fmt: skip
    states = ("large", "200 small", "4 medium")
    names = [f"{s}: {what}" for s in states for what in ("staged", "stall, async_save returns")]
    names += [f"{s}: {what}" for s in states[:2] for what in ("save", "load")]
    names += ["a training step that is copied", "stall behind a step that is under way"]
    found = figures(said)
    assert found.keys() - {"a training step that is written beside"} == set(names), said
    assert "a training step" in said.splitlines()[-1], said
    assert all(ms > 0 for line in found.values() for ms in line[:2]), said
    assert "does not work here" not in said, "torch's stager was to have all that it can: " + said
    assert "has changed since" not in logged, logged


def test_the_benchmark_of_planning_runs_over_nccl_and_the_cpu(fakes):
    said, logged = run_for_gpus(
        fakes, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(HERE / "dry_run.py"), *BENCHMARK,
    )  # fmt: skip
    assert figures(said).keys() == {f"planned over {c}, 2 ranks" for c in ("nccl", "gloo")}, said
    assert "NOT the steady state" not in said, said
    assert "has changed since" not in logged, logged


def test_the_tests_for_gpus_run_as_far_as_fakes_show(fakes):
    """Not their ranks, which are this folder's cases."""
    left_out = ("test_case_holds", *NEEDS_A_GPU)
    where = jobs.ROOT / "tests" / "gpu"
    names = re.findall(r"^def (test_\w+)", (where / "test_gpu.py").read_text(), re.M)
    count = sum(not any(part in name for part in left_out) for name in names)
    said, _ = run_for_gpus(
        fakes, "-m", "pytest", "-q", "-p", "host_kernels", "-p", "no:cacheprovider",
        "-k", f"not ({' or '.join(left_out)})", str(where),
    )  # fmt: skip
    assert f"{count} passed" in said and "failed" not in said and "skipped" not in said, said
