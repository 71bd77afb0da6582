"""What setup.py does with a CUDA toolkit, and without one."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_setup(monkeypatch):
    spec = importlib.util.spec_from_file_location("dcp_native_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.chdir(ROOT)
    return load_setup(monkeypatch)


def compile_c(source, *flags):
    command = ["gcc", "-std=c11", "-D_GNU_SOURCE", "-Icsrc/include", *flags, "-c", source]
    return subprocess.run(
        [*command, "-o", os.devnull], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def parts_of(fat):
    """(is PTX, architecture) of every part of a fat binary."""
    magic, _version, at, bytes_after = struct.unpack_from("<IHHQ", fat)
    assert magic == 0xBA55ED50
    end, parts = at + bytes_after, []
    while at < end:
        kind, _version, header_bytes, payload_bytes = struct.unpack_from("<HHIQ", fat, at)
        parts.append((kind == 1, struct.unpack_from("<I", fat, at + 28)[0]))
        at += header_bytes + payload_bytes
    return parts


def test_kernels_are_compiled_for_each_generation_and_for_those_to_come(setup, tmp_path):
    nvcc = setup.find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc here")
    image = tmp_path / "kernels_image.inc"
    setup.compile_kernels(nvcc, "csrc/cuda/kernels.cu", image)
    words = re.findall(r"0x[0-9a-f]+", image.read_text())
    fat = b"".join(int(word, 16).to_bytes(8, "little") for word in words)
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    wanted = [int(a) for a in setup.CUDA_ARCHITECTURES if f"sm_{a}" in known.stdout.split()]
    assert sorted(parts_of(fat)) == [*((False, a) for a in wanted), (True, wanted[0])]
    for name in (b"dcp_kernel_pack", b"dcp_kernel_unpack", b"dcp_kernel_checksum"):
        assert fat.count(name) >= len(wanted)


def test_a_build_without_a_toolkit_looks_for_none(monkeypatch):
    monkeypatch.setenv("DCP_NATIVE_CUDA", "0")
    setup = load_setup(monkeypatch)
    assert setup.cuda_roots() == []
    assert setup.find_nvcc() is None


def test_a_prototype_that_differs_from_the_header_stops_the_build(setup, tmp_path):
    places = [f"-idirafter{place}" for place in setup.cuda_include_dirs()]
    if not places:
        pytest.skip("there are no headers of CUDA here")
    assert compile_c(setup.PROTOTYPES, "-Icsrc/cuda", *places).returncode == 0
    own = (ROOT / "csrc/cuda/cuda_api.h").read_text()
    (tmp_path / "check.c").write_text((ROOT / setup.PROTOTYPES).read_text())
    changes = {
        "cudaEventQuery, (cuda_event event)": "cudaEventQuery, (cuda_stream event)",
        "DCP_CUDA_ERROR_NOT_READY = 600": "DCP_CUDA_ERROR_NOT_READY = 601",
        "(int *device, int ordinal)": "(int *device, unsigned int ordinal)",
    }
    for before, after in changes.items():
        assert before in own
        (tmp_path / "cuda_api.h").write_text(own.replace(before, after))
        result = compile_c(str(tmp_path / "check.c"), f"-I{tmp_path}", "-Icsrc/cuda", *places)
        assert result.returncode != 0
        assert "static assertion failed" in result.stderr


def test_the_source_distribution_has_what_builds_with_and_without_cuda(setup, tmp_path):
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path],
        cwd=ROOT, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    (archive,) = tmp_path.glob("*.tar.gz")
    listed = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True, check=True)
    names = {name.partition("/")[2] for name in listed.stdout.split()}
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").iterdir()}
    assert own <= names
    assert not [name for name in names if "kernels_image" in name]
