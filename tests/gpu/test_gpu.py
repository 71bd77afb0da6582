"""The properties of tests/cuda on real devices, and what only a real device can show.

Everything is skipped where torch sees no GPU.  Written and compiled, run on fakes as far as they
go, not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import dcp_native as dcp

CASES = Path(__file__).resolve().parents[1] / "cuda"
DEVICES = torch.cuda.device_count()
RUNS = [  # module, ranks (0: no process group), backend; NCCL wants a device for each rank
    ("cases_values", 0, ""),
    ("cases_hsdp", 4, "cpu:gloo,cuda:nccl"),
    ("cases_models", 4, "cpu:gloo,cuda:nccl"),
]
OPTIONS = StagingOptions(
    use_pinned_memory=True,
    use_shared_memory=True,
    use_async_staging=True,
    use_non_blocking_copy=True,
)

pytestmark = [
    pytest.mark.skipif(DEVICES == 0, reason="torch sees no GPU: see docs/gpu.md"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    @functools.cache
    def run(module: str, size: int, backend: str) -> dict[str, list[str | None]]:
        out = tmp_path_factory.mktemp(f"{module}-{size}")
        return jobs.run_cases(CASES / f"{module}.py", size, out, backend)

    return run


@pytest.mark.parametrize(
    ("module", "size", "backend", "case"),
    [(*run, case) for run in RUNS for case in jobs.case_names(CASES / f"{run[0]}.py")],
)
def test_case_holds_on_every_rank(results, module, size, backend, case):
    if size > DEVICES:
        pytest.skip(f"needs {size} GPUs, and there are {DEVICES}")
    jobs.assert_held(results(module, size, backend), case, size)


def loaded(path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    target = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in state.items()}
    dcp.load(target, checkpoint_id=path)
    return target


def assert_loads(path, want: dict[str, torch.Tensor]) -> None:
    got = loaded(path, want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor.cpu().resolve_conj().resolve_neg()), name


def many_small(count: int = 20000) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {f"t{i:05}": torch.randn(7 + i % 5, 9, device="cuda") for i in range(count)}


def test_kernels_gather_small_and_strided_tensors(tmp_path):
    state = {name: t.t() if i % 3 else t for i, (name, t) in enumerate(many_small().items())}
    dcp.save(state, checkpoint_id=tmp_path)
    report = dcp.last_report()
    assert report["device_reason"] is None and report["device_packed_count"] == len(state)
    assert_loads(tmp_path, state)


def test_kernels_scatter_what_is_loaded(tmp_path):
    state = many_small()
    dcp.save(state, checkpoint_id=tmp_path)
    target = {name: torch.zeros_like(tensor.t()).t() for name, tensor in state.items()}
    dcp.load(target, checkpoint_id=tmp_path)
    assert all(torch.equal(target[name], tensor) for name, tensor in state.items())


def test_conj_and_neg_views(tmp_path):
    base = torch.randn(40, 30, dtype=torch.complex64, device="cuda")
    state = {"conj": base.conj(), "neg": base.conj().imag, "plain": base}
    dcp.save(state, checkpoint_id=tmp_path)
    assert_loads(tmp_path, state)


def test_checksums_of_the_device_are_those_of_the_host(tmp_path):
    state = {"x": torch.randn(64 << 20, device="cuda"), "y": torch.randn(12345, 77, device="cuda")}
    dcp.save(state, checkpoint_id=tmp_path)
    assert dcp.verify(tmp_path).ok
    assert_loads(tmp_path, state)


def test_staging_runs_behind_the_callers_work_and_beside_what_comes_after(tmp_path):
    """The call returns while the device is still busy with what it was given before."""
    state = {"x": torch.zeros(32 << 20, device="cuda")}
    stager = DefaultStager(OPTIONS)
    dcp.async_save(
        state, checkpoint_id=tmp_path / "first", async_stager=stager
    ).upload_completion.result()
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 31)  # about a second
    state["x"].fill_(7)
    response = dcp.async_save(state, checkpoint_id=tmp_path / "x", async_stager=stager)
    assert not response.staging_completion.done()
    response.staging_completion.result(timeout=60)
    state["x"].fill_(9)
    response.upload_completion.result(timeout=60)
    assert bool((loaded(tmp_path / "x", state)["x"] == 7).all())


def test_an_optimizer_step_after_staging_does_not_reach_the_files(tmp_path):
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8))).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    stager = DefaultStager(OPTIONS)
    for step in range(4):
        model(torch.randn(64, 512, device="cuda")).sum().backward()
        want = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        response = dcp.async_save(
            model.state_dict(), checkpoint_id=tmp_path / str(step), async_stager=stager
        )
        response.staging_completion.result(timeout=60)
        optimizer.step()
        response.upload_completion.result(timeout=60)
        assert_loads(tmp_path / str(step), want)


def test_the_capture_of_a_graph_is_refused_and_survives(tmp_path):
    x = torch.zeros(1000, device="cuda")
    dcp.save({"x": x}, checkpoint_id=tmp_path)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.add_(1)
        with pytest.raises(dcp.CheckpointException, match="captur"):
            dcp.save({"x": x}, checkpoint_id=tmp_path)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((x == 1).all())


@contextlib.contextmanager
def full_device():
    torch.cuda.synchronize()
    hoard, size_bytes = [], 1 << 34
    while size_bytes > 1 << 16:
        try:
            hoard.append(torch.empty(size_bytes, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size_bytes //= 2
    yield
    hoard.clear()
    torch.cuda.empty_cache()


def test_without_memory_for_a_slab_the_save_does_without(tmp_path):
    state = many_small(2000)
    with full_device():
        dcp.save(state, checkpoint_id=tmp_path)
    assert_loads(tmp_path, state)


def test_without_memory_for_a_slab_a_load_copies_rows(tmp_path):
    whole = {name: torch.randn(4000, 640) for name in ("columns", "steps", "turned")}

    def seen(tensors):
        return {
            "columns": tensors["columns"][:, 3:20],
            "steps": tensors["steps"][:, ::2],
            "turned": tensors["turned"].t(),
        }

    dcp.save(seen(whole), checkpoint_id=tmp_path)
    there = {name: torch.zeros(4000, 640, device="cuda") for name in whole}
    with full_device():
        dcp.load(seen(there), checkpoint_id=tmp_path)
        report = dcp.last_report()
    assert "slab" in report["device_reason"] and report["device_copies_count"] < 10000
    want = {name: torch.zeros(4000, 640) for name in whole}
    for name, tensor in seen(want).items():
        tensor.copy_(seen(whole)[name])
    assert all(torch.equal(there[name].cpu(), want[name]) for name in whole)


def run_alone(text: str, tmp_path: Path, **env: str) -> None:
    script = tmp_path / "alone.py"
    script.write_text(text)
    path = os.pathsep.join(filter(None, (str(jobs.ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")],
        check=True, timeout=300, env={**os.environ, "PYTHONPATH": path, **env},
    )  # fmt: skip


def test_no_context_is_created_by_saves_of_the_cpu(tmp_path):
    run_alone(
        """
import sys, torch, dcp_native as dcp
state = {"x": torch.arange(1000.0)}
dcp.save(state, checkpoint_id=sys.argv[1])
dcp.async_save(state, checkpoint_id=sys.argv[1] + "2").result()
dcp.load(state, checkpoint_id=sys.argv[1])
assert not any(torch._C._cuda_hasPrimaryContext(i) for i in range(torch.cuda.device_count()))
""",
        tmp_path,
    )


@pytest.mark.skipif(DEVICES < 2, reason="needs 2 GPUs")
def test_a_save_creates_contexts_only_on_devices_that_hold_tensors(tmp_path):
    run_alone(
        """
import sys, torch, dcp_native as dcp
with torch.cuda.device(1):
    state = {"x": torch.arange(1000.0).to("cuda:1").reshape(10, 100).t()}
    dcp.save(state, checkpoint_id=sys.argv[1])
    dcp.async_save(state, checkpoint_id=sys.argv[1] + "2").result()
    dcp.load(state, checkpoint_id=sys.argv[1])
assert not torch._C._cuda_hasPrimaryContext(0)
""",
        tmp_path,
    )


def test_memory_of_expandable_segments(tmp_path):
    run_alone(
        """
import sys, torch, dcp_native as dcp
state = {f"t{i}": torch.randn(100 + i, 64, device="cuda").t() for i in range(500)}
dcp.save(state, checkpoint_id=sys.argv[1])
target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
dcp.load(target, checkpoint_id=sys.argv[1])
assert all(torch.equal(target[name], tensor) for name, tensor in state.items())
""",
        tmp_path,
        PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
        PYTORCH_ALLOC_CONF="expandable_segments:True",
    )
