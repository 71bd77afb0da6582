"""test_bench.py: the benchmarks run, compare what they make, and leave nothing behind.

Only their small sizes are run: that proves that the programs work, not any figure.
"""

import json
import os
import pathlib
import subprocess
import sys
from importlib.util import find_spec

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
HANGS_S = 600  # some take a minute of two processors, which other tests may want, too
BENCH = BENCHMARKS / "bench.py"
VARIANTS = {"dcp_native first", "torch1 cached"}
RIVALS = {
    "torch.save": None,
    "safetensors": "safetensors",
    "torch_checkpointing": "torch_checkpointing",
    "torchsnapshot": "torchsnapshot",
}


def run_bench(tmp_path, *arguments):
    disk, tmpfs = tmp_path / "disk", tmp_path / "tmpfs"
    tmpfs.mkdir()
    argv = [sys.executable, str(BENCH), "--size", "small", "--dir", str(disk)]
    argv += ["--tmpfs", str(tmpfs), "--json", str(tmp_path / "result.json"), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=HANGS_S)
    assert os.listdir(disk) == os.listdir(tmpfs) == [], "the benchmark left files behind"
    return done


def test_small_benchmark_verifies_every_load(tmp_path):
    done = run_bench(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["cases"]) == {
        "llama on disk",
        "llama on tmpfs",
        "many_dtensor on disk",
        "many_plain on disk",
    }
    others = {name for name, package in RIVALS.items() if package is None or find_spec(package)}
    assert {"torch.save", "safetensors"} <= others
    total = 0
    for name, case in result["cases"].items():
        summary = case["summary"]
        many = name.startswith("many")
        taking_part = others - {"torchsnapshot"} if many else others
        assert summary.keys() >= {"dcp_native", "torch1", "limit", "memcpy", *taking_part}
        assert {"torch1 reads dcp_native", "dcp_native reads torch1"} <= summary.keys()
        assert all(
            s["wall_s"] > 0 for s in (*summary["dcp_native"].values(), *summary["limit"].values())
        )
        # Every contender loads what it saved, both kinds read the other's once; then the variants.
        assert summary.keys() >= VARIANTS if many else "torch4" in summary
        loads = (4 if many else 5) + len(taking_part) + len(summary.keys() & VARIANTS)
        assert case["loads_verified"] == loads
        total += loads
    assert result["loads_verified"] == total
    assert result["wrong"] == []
    assert "0 values differ" in done.stdout
    assert "ours : torch : limit" in done.stdout
    assert "their time over ours: torch.save " in done.stdout
    for name in RIVALS.keys() - others:
        assert f"{name} is not installed: left out" in done.stderr


RIVAL = """
import torch.distributed as dist
class StateDict(dict):
    def __init__(self, **items):
        super().__init__(items)
class Snapshot:
    def __init__(self, path):
        pass
    def restore(self, app):
        pass
    @staticmethod
    def take(path, app):
        import os
        os.makedirs(path, exist_ok=True)
        {take}
"""


def run_beside_a_rival(tmp_path, monkeypatch, take):
    package = tmp_path / "site" / "torchsnapshot"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(RIVAL.format(take=take))
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, (str(package.parent), inherited)))
    )
    names = "dcp_native,torchsnapshot"
    return run_bench(tmp_path, "--cases", "llama", "--where", "disk", "--contenders", names)


def test_a_rival_that_loads_nothing_is_reported_as_wrong(tmp_path, monkeypatch):
    done = run_beside_a_rival(tmp_path, monkeypatch, "dist.barrier()")
    assert done.returncode == 1
    wrong = json.loads((tmp_path / "result.json").read_text())["wrong"]
    assert any("torchsnapshot load: rank 1: model.norm.weight" in w for w in wrong)
    assert all("torchsnapshot load" in w for w in wrong)


def test_a_rival_that_does_not_run_is_left_out_and_said_so(tmp_path, monkeypatch):
    take = "raise RuntimeError('not with this torch')"
    done = run_beside_a_rival(tmp_path, monkeypatch, take)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torchsnapshot does not run here: left out" in done.stderr
    assert "not with this torch" in done.stderr
    assert "torchsnapshot" not in done.stdout


def test_a_load_that_does_nothing_is_reported_as_wrong(tmp_path, monkeypatch):
    sabotage = "import torch.distributed.checkpoint as dcp\ndcp.load = lambda *a, **k: None\n"
    (tmp_path / "sitecustomize.py").write_text(sabotage)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_bench(
        tmp_path, "--cases", "many_plain", "--where", "disk", "--contenders", "torch1,torch4"
    )
    assert done.returncode == 1
    assert "WRONG" in done.stdout
    assert "800 values differ" in done.stdout  # 200 tensors on 2 ranks, with cached plans, too


def run_figures(program, tmp_path, *arguments, environment=None):
    """Runs a program of figures with its tiny size; returns (exit status, its JSON)."""
    path = tmp_path / "result.json"
    argv = [sys.executable, str(BENCHMARKS / f"{program}.py"), "--quick", "--repeats", "1"]
    argv += ["--json", str(path), *map(str, arguments)]
    inherited = os.environ.get("PYTHONPATH")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), inherited)))}
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=HANGS_S, env={**env, **(environment or {})}
    )
    assert path.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(path.read_text())


@pytest.mark.parametrize(
    ("program", "figures"),
    [
        ("local_plan", ["200 DTensors", "200 HSDP DTensors", "200 plain tensors"]),
        ("coordinator", ["8 x 100, all steps", "16 x 64 simulated", "growth"]),
        (
            "state_dict",
            [
                *(
                    f"{way}_{what}_state_dict, 176"
                    for way in ("get", "set")
                    for what in ("model", "optimizer")
                ),
                *(
                    f"{case}, {what}"
                    for case in ("gather", "gather to rank 0", "broadcast", "distribute")
                    for what in ("60 x 2 KiB", "0 MiB")
                ),
            ],
        ),
        (
            "tracing",
            [
                "save, 256 MiB of 4 MiB tensors: ",
                "load, 1 MiB of 1 KiB tensors: ",
                "- CPU of the trace's thread",
            ],
        ),
        ("metadata_file", ["737 chunks, whole file", "stock torch reads it", "ready to plan, our"]),
        (
            "load_planning",
            [
                "64 chunks of a tensor -> 1 of 8 shards",
                "100 tensors x 8 -> 1 rank",
                "grid -> 64 slabs of columns",
                "resident memory to read `.metadata`, stock file",
                "resident memory to read `.metadata`, our own file",
            ],
        ),
    ],
)
def test_a_program_of_figures_checks_its_own_output(program, figures, tmp_path):
    status, result = run_figures(program, tmp_path)
    assert (status, result["wrong"]) == (0, [])
    for figure in figures:
        assert any(figure in row["what"] for row in result["rows"]), figure


def test_a_wrong_plan_is_reported_as_wrong(tmp_path):
    sabotage = """
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
stock = DefaultSavePlanner.create_local_plan
def short(self):
    plan = stock(self)
    del plan.items[0]
    return plan
DefaultSavePlanner.create_local_plan = short
"""
    (tmp_path / "sitecustomize.py").write_text(sabotage)
    status, result = run_figures(
        "local_plan", tmp_path, environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    )
    assert status == 1
    assert result["wrong"][0].endswith("200 items, torch has 199")


def test_a_wrong_state_dict_is_reported_as_wrong(tmp_path):
    sabotage = """
from torch import nn
stock = nn.Module.load_state_dict
nn.Module.load_state_dict = lambda self, state_dict, **more: stock(
    self, {name: value + 1 for name, value in state_dict.items()}, **more)
import dcp_native._module_state
dcp_native._module_state._LOAD_STATE_DICT = nn.Module.load_state_dict
"""
    (tmp_path / "sitecustomize.py").write_text(sabotage)
    status, result = run_figures(
        "state_dict", tmp_path, environment={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    )
    assert (status, result["wrong"]) == (1, ["set_model_state_dict: not what torch gives"])


def test_saving_has_a_row_for_every_target_and_leaves_nothing(tmp_path):
    disk, tmpfs = tmp_path / "disk", tmp_path / "tmpfs"
    tmpfs.mkdir()
    status, result = run_figures("saving", tmp_path, "--dir", disk, "--tmpfs", tmpfs)
    assert (status, result["wrong"]) == (0, [])
    assert os.listdir(disk) == os.listdir(tmpfs) == [], "the benchmark left files behind"
    what = "\n".join(row["what"] for row in result["rows"])
    for figure in (
        "Llama-shaped, 2 ranks, disk",
        "Llama-shaped, 2 ranks, tmpfs",
        "dtensor tensors, 2 ranks, first save",
        "plain tensors, 2 ranks, steady save",
        "before the first byte",
        "extra memory of a save, llama",
        "extra memory of a save, objects",
        "incremental save",
        "flatten + local plan",
        "all steps, plan changed",
        "`.metadata`",
    ):
        assert figure in what, figure


def test_loading_has_a_row_for_every_target_and_leaves_nothing(tmp_path):
    disk, tmpfs = tmp_path / "disk", tmp_path / "tmpfs"
    tmpfs.mkdir()
    parts = "llama,hot,cast,reshard,many,replicated"  # planning is a program of its own, above
    arguments = ("--dir", disk, "--tmpfs", tmpfs, "--only", parts)
    status, result = run_figures("loading", tmp_path, *arguments)
    assert (status, result["wrong"]) == (0, [])
    assert os.listdir(disk) == os.listdir(tmpfs) == [], "the benchmark left files behind"
    what = "\n".join(row["what"] for row in result["rows"])
    for figure in (
        "Llama-shaped, 2 ranks, cold, verified",
        "- CPU",
        "- verification",
        "page cache hot",
        "Shard(0) of 2 -> Shard(1) of 2, cold",
        "- bytes read",
        "dtensor tensors, 2 ranks",
        "plain tensors, 2 ranks",
        "wanted by 4 ranks, cold",
        "extra memory of a load, llama, cold",
        "extra memory of a load, llama, bf16 -> f32",
    ):
        assert figure in what, figure
    for found in result["details"].values():
        assert all(n["wall_s"] > 0 for n in found.values())
        ours = found["dcp_native"]
        assert ours["read_bytes"] + ours["shared_bytes"] >= ours["wanted_bytes"] > 0


def test_async_saving_has_a_row_for_every_target_and_leaves_nothing(tmp_path):
    disk, tmpfs = tmp_path / "disk", tmp_path / "tmpfs"
    tmpfs.mkdir()
    parts = "thread,process,torch,memory"  # cold is run by the test below
    arguments = ("--dir", disk, "--tmpfs", tmpfs, "--saves", 12, "--only", parts)
    status, result = run_figures("async_saving", tmp_path, *arguments)
    assert (status, result["wrong"]) == (0, [])
    assert os.listdir(disk) == os.listdir(tmpfs) == [], "the benchmark left files behind"
    what = "\n".join(row["what"] for row in result["rows"])
    for mode in ("THREAD", "PROCESS"):
        for figure in (
            "call -> safe to mutate, warm",
            "first save after warm_up",
            "Python loop during the upload, of its free rate",
            "matmul during the upload, of its free rate",
            "finished after the return",
            "CPU of the background",
            "memory beside the arena",
            "arena over staged bytes",
            "calls of the store",
            "memory after 1, 10, 12 saves of 13 MB a rank",
        ):
            assert f"{figure}, {mode}" in what, figure
    assert "first save over the tenth, PROCESS" in what
    details = result["details"]
    assert [s["what"] for s in details["thread"][0]["saves"]].count("idle") == 2
    assert details["process"][0]["saves"][9]["what"] == "tenth"
    for name in ("thread", "process", "torch"):
        shares = [x for s in details[name][0]["saves"] for x in s["shares"]]
        assert len(shares) == 4 and min(shares) > 0  # 2 ranks beside 2 trainers


# Saves soon after it returned, when the trainer has changed what it was given.
LATE = """
import concurrent.futures, threading, time
import dcp_native
def late(state_dict, *, checkpoint_id, async_checkpointer_type):
    upload = concurrent.futures.Future()
    upload.report = {}
    def save():
        time.sleep(0.3)
        upload.set_result(dcp_native.save(state_dict, checkpoint_id=checkpoint_id))
    threading.Thread(target=save).start()
    return upload
dcp_native.async_save = late
"""


# Says of a save that was committed that it failed, on the second rank only.
ALONE = """
import concurrent.futures, sys
import dcp_native
stock = dcp_native.async_save
def alone(*args, **kwargs):
    upload, failed = stock(*args, **kwargs), concurrent.futures.Future()
    upload.result()
    failed.set_exception(dcp_native.CheckpointException("write", {}))
    return failed if sys.argv[1] == "1" else upload
dcp_native.async_save = alone
"""


def sabotaged(tmp_path, sabotage):
    (tmp_path / "sitecustomize.py").write_text(sabotage)
    return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def test_a_background_save_that_copies_late_is_reported_as_wrong(tmp_path):
    arguments = ("--dir", tmp_path / "disk", "--only", "cold")
    environment = sabotaged(tmp_path, LATE)
    status, result = run_figures("async_saving", tmp_path, *arguments, environment=environment)
    assert status == 1
    assert "is not what it was when the save was called" in result["wrong"][0]
    what = [row["what"].partition(" (")[0] for row in result["rows"]]
    assert what == [f"first save without warm-up, {mode}" for mode in ("THREAD", "PROCESS")]


def run_soak(tmp_path, *arguments, environment=None):
    """Returns (exit status, the results) of a few small saves."""
    disk, path = tmp_path / "disk", tmp_path / "result.json"
    argv = [sys.executable, str(BENCHMARKS / "async_soak.py"), "--mib", "20", "--dir", str(disk)]
    argv += ["--json", str(path), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=HANGS_S, env=env)
    assert path.exists(), done.stdout + done.stderr
    assert os.listdir(disk) == [], "the soak left files behind"
    return done.returncode, json.loads(path.read_text())


def test_a_soak_keeps_its_promise_and_counts_every_save(tmp_path):
    status, result = run_soak(tmp_path, "--saves", "10")
    assert (status, result["wrong"]) == (0, [])
    assert result["has_writer"]
    counts = result["counts"]
    assert counts["committed"] + counts["failed"] == 10
    assert counts["failed"] <= counts["with_kills"]


@pytest.mark.parametrize(
    ("sabotage", "wrong"), [(LATE, "is not of save"), (ALONE, "the ranks disagree")]
)
def test_a_soak_sees_a_broken_promise(sabotage, wrong, tmp_path):
    environment = sabotaged(tmp_path, sabotage)
    status, result = run_soak(tmp_path, "--saves", "2", environment=environment)
    assert status == 1
    assert any(wrong in text for text in result["wrong"])


def run_c(program, *arguments):
    """Builds and runs a benchmark in C; returns what it prints."""
    path = pathlib.Path("build", "bench", program)
    subprocess.run(["make", "--silent", str(path)], cwd=ROOT, check=True, timeout=HANGS_S)
    argv = [str(path), *map(str, arguments)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_save_scaling_counts_right_and_sends_names_only_where_they_are_news():
    sent = {}
    for own_keys in (0, 1):
        lines = run_c("save_scaling", "--json", 8, 100, 1, own_keys).splitlines()
        sent[own_keys] = [json.loads(line)["gathered_bytes"] for line in lines]
    assert "FAST round" in run_c("save_scaling", 8, 100, 1)
    assert len(sent[0]) == len(sent[1]) == 2
    assert all(3 * without < named for without, named in zip(sent[0], sent[1], strict=True))


def test_plan_scaling_passes_plans_unchanged_and_counts_right():
    lines = run_c("plan_scaling", 8, 100).splitlines()
    shapes = [line.split(",")[0] for line in lines if " ranks x " in line]
    assert shapes == ["fsdp", "ddp", "hsdp"]
    figures = [json.loads(line) for line in run_c("plan_scaling", "--json", 8, 100).splitlines()]
    assert [f["shape"] for f in figures] == shapes


def test_engine_limits_reads_what_it_wrote(tmp_path):
    assert "our writer" in run_c("engine_limits", tmp_path, 8, 1)


def test_reader_limits_reads_what_it_wrote(tmp_path):
    out = run_c("reader_limits", tmp_path / "files", 8, 1, 50)
    assert "hot: reader" in out and "cut: halves of 64 KiB" in out
    assert not list((tmp_path / "files").rglob("*.distcp"))


def test_writer_limits_compares_what_it_wrote_and_leaves_nothing(tmp_path):
    out = run_c("writer_limits", tmp_path / "files", 16, 2, 1, 20)
    assert "writer, io_uring" in out and "image, io_uring" in out
    assert os.listdir(tmp_path / "files") == []


@pytest.mark.parametrize("item_bytes", [2048, 1 << 20])
def test_image_limits_fills_what_the_tensors_hold(item_bytes):
    lines = run_c("image_limits", 8, item_bytes, 2, 1).splitlines()
    assert [line for line in lines if line.startswith("fill, fresh shared")]


def test_device_limits_stages_what_the_tensors_hold():
    out = run_c("device_limits", "--quick")
    assert "stage from a device" in out and "the same without kernels" in out


def test_split_benchmark_halves_what_one_rank_writes(tmp_path):
    argv = [sys.executable, str(BENCHMARKS / "split_replicated.py"), "--dir", str(tmp_path)]
    argv += ["--large-mib", "64", "--small-count", "0", "--repeats", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=HANGS_S)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert lines["off"][1:4] == ["64.0", "MiB", "32.0"]
    assert lines["auto"][1:4] == ["32.0", "MiB", "32.0"]
    assert "0 values differ" in done.stdout
    assert os.listdir(tmp_path) == [], "the benchmark left files behind"


def test_conversions_have_a_row_for_every_target_and_leave_nothing(tmp_path):
    disk = tmp_path / "disk"
    status, result = run_figures("format_utils", tmp_path, "--dir", disk)
    assert status == 0
    assert result["wrong"] == []
    assert [row["target"][:2] for row in result["rows"]] == [">=", "<="] * 2
    assert not any(disk.iterdir())


def test_hugging_face_benchmark_compares_everything_and_leaves_nothing(tmp_path):
    disk = tmp_path / "disk"
    status, result = run_figures("hugging_face", tmp_path, "--dir", disk)
    assert (status, result["wrong"]) == (0, [])
    assert not any(disk.iterdir())
    what = "\n".join(row["what"] for row in result["rows"])
    for case in ("rows", "columns"):
        for figure in (
            f"HF export, {case}, ",
            f"HF export, {case}: extra memory of a rank",
            f"HF consolidation, {case}",
            f"HF load, {case}, cold",
            f"HF load, {case}, hot",
        ):
            assert figure in what, figure
    assert "HF dequantisation" in what


def test_a_load_of_other_values_is_reported_as_wrong(tmp_path):
    sabotage = """
import dcp_native
stock = dcp_native.load
def shifted(state_dict, **more):
    stock(state_dict, **more)
    next(iter(state_dict.values())).to_local().add_(1)
dcp_native.load = shifted
"""
    arguments = ("--dir", tmp_path / "disk", "--only", "load")
    environment = sabotaged(tmp_path, sabotage)
    status, result = run_figures("hugging_face", tmp_path, *arguments, environment=environment)
    assert status == 1
    assert result["wrong"][0] == "load, rows, cold, ours: layers.0.q.weight"


def test_the_benchmark_of_collectives_over_nccl_runs_and_verifies(tmp_path):
    """Over the fake libraries; it exits with 1 where a result is wrong."""
    root = BENCHMARKS.parent
    subprocess.run(["make", "-s", "build/bench/nccl_comm"], cwd=root, check=True, timeout=HANGS_S)
    job = subprocess.run(
        ["build/bench/nccl_comm", "--quick"], cwd=root, capture_output=True, text=True, timeout=100
    )
    assert job.returncode == 0, job.stderr
    assert len(job.stdout.splitlines()) == 3
