"""test_bench.py: the benchmark runs, compares what it loads, and leaves nothing behind.

Only its small size is run: it proves that the program works, not any figure.
"""

import json
import os
import pathlib
import subprocess
import sys

BENCH = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "bench.py"


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
