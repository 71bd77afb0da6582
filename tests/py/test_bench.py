"""test_bench.py: the benchmarks run, compare what they load, count right, and leave nothing behind.

Only small sizes are run: they prove that the programs work, not any figure.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BENCH = ROOT / "benchmarks" / "bench.py"


def run_bench(tmp_path, *arguments):
    disk, tmpfs = tmp_path / "disk", tmp_path / "tmpfs"
    tmpfs.mkdir()
    argv = [sys.executable, str(BENCH), "--size", "small", "--dir", str(disk)]
    argv += ["--tmpfs", str(tmpfs), "--json", str(tmp_path / "result.json"), *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
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
    for case in result["cases"].values():
        summary = case["summary"]
        assert summary.keys() >= {"dcp_native", "torch1", "torch4", "limit", "memcpy"}
        assert {"torch1 reads dcp_native", "dcp_native reads torch1"} <= summary.keys()
        assert all(
            s["wall_s"] > 0 for s in (*summary["dcp_native"].values(), *summary["limit"].values())
        )
        assert case["loads_verified"] == 5  # three contenders, and both read the other's once
    assert result["loads_verified"] == 20
    assert result["wrong"] == []
    assert "0 values differ" in done.stdout
    assert "ours : torch : limit" in done.stdout


def test_a_load_that_does_nothing_is_reported_as_wrong(tmp_path, monkeypatch):
    sabotage = "import torch.distributed.checkpoint as dcp\ndcp.load = lambda *a, **k: None\n"
    (tmp_path / "sitecustomize.py").write_text(sabotage)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = run_bench(
        tmp_path, "--cases", "many_plain", "--where", "disk", "--contenders", "torch1,torch4"
    )
    assert done.returncode == 1
    assert "WRONG" in done.stdout
    assert "800 values differ" in done.stdout  # 200 tensors on 2 ranks by 2 contenders


@pytest.fixture(scope="module")
def build_scaling(tmp_path_factory):
    """Compiles a C benchmark with the core; gives the program's path."""
    folder = tmp_path_factory.mktemp("scaling")
    cc = ["cc", "-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror"]
    cc += ["-I", str(ROOT / "csrc" / "include"), "-I", str(ROOT / "csrc" / "core")]
    core = sorted(str(path) for path in (ROOT / "csrc" / "core").glob("*.c"))
    subprocess.run([*cc, "-c", *core], check=True, timeout=300, cwd=folder)
    objects = sorted(str(path) for path in folder.glob("*.o"))

    def build(name):
        program = folder / name
        source = str(ROOT / "benchmarks" / f"{name}.c")
        argv = [*cc, source, *objects, "-lpthread", "-o", str(program)]
        subprocess.run(argv, check=True, timeout=300)
        return program

    return build


def test_save_scaling_counts_right_and_sends_names_only_where_they_are_news(build_scaling):
    program = build_scaling("save_scaling")
    sent = {}
    for own_keys in ("0", "1"):
        argv = [str(program), "8", "100", "1", own_keys]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        sent[own_keys] = [
            float(line.split("sends ")[1].split(";")[0])
            for line in done.stdout.splitlines()
            if "a rank sends" in line
        ]
        assert "FAST round" in done.stdout
    assert len(sent["0"]) == len(sent["1"]) == 2
    assert all(3 * without < named for without, named in zip(sent["0"], sent["1"], strict=True))


def test_plan_scaling_passes_plans_unchanged_and_counts_right(build_scaling):
    program = build_scaling("plan_scaling")
    done = subprocess.run([str(program), "8", "100"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split(",")[0] for line in done.stdout.splitlines() if " ranks x " in line] == [
        "fsdp",
        "ddp",
        "hsdp",
    ]


def test_split_benchmark_halves_what_one_rank_writes(tmp_path):
    argv = [sys.executable, str(BENCH.with_name("split_replicated.py")), "--dir", str(tmp_path)]
    argv += ["--large-mib", "64", "--small-count", "0", "--repeats", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert lines["off"][1:4] == ["64.0", "MiB", "32.0"]
    assert lines["auto"][1:4] == ["32.0", "MiB", "32.0"]
    assert "0 values differ" in done.stdout
    assert os.listdir(tmp_path) == [], "the benchmark left files behind"
