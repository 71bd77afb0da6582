"""Loads that cannot read straight into the target: casts, devices, subclasses, odd records."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import textwrap
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import value
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint.filesystem import SerializationFormat

import dcp_native as dcp

NATIVE = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
]
GENERIC = [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint32]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def every_kind_of(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bit patterns, so NaN, infinities and subnormals too, and numbers of usual size."""
    generator = torch.Generator().manual_seed(NATIVE.index(dtype) + 7)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    tensor = torch.empty(count, dtype=dtype)
    raw = torch.randint(
        0, 256, (tensor.untyped_storage().nbytes(),), generator=generator, dtype=torch.uint8
    )
    tensor.untyped_storage().copy_(raw.untyped_storage())
    if dtype.is_floating_point:
        usual = torch.randn(count, generator=generator, dtype=torch.float64) * 100
        exponent = torch.randint(-40, 20, (count,), generator=generator)
        tensor[::2] = (usual * torch.pow(2.0, exponent.double())).to(dtype)[::2]
    return tensor.view(shape)


def assert_bits_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    """The same bits; a NaN is a NaN, whose other bits vary in torch with the memory's layout."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.dtype.is_floating_point:
        nan = want.isnan()
        assert torch.equal(got.isnan(), nan)
        got, want = got.masked_fill(nan, 0), want.masked_fill(nan, 0)
    bits = BITS[want.element_size()]
    assert torch.equal(got.contiguous().view(bits), want.contiguous().view(bits))


# ---- casts ----


@pytest.mark.parametrize("module", [dcp, torch_dcp], ids=["ours", "torchs"])
@pytest.mark.parametrize("saved", NATIVE, ids=str)
def test_casts_give_the_bits_of_copy(saved, module, tmp_path):
    """Large and small, whole and cut, dense and strided, in each dtype the reader converts to."""
    source = {"small": every_kind_of(saved, (5, 7)), "large": every_kind_of(saved, (1500, 1100))}
    module.save(source, checkpoint_id=tmp_path)
    for wanted in NATIVE:
        target = {
            "small": torch.zeros(5, 7, dtype=wanted),
            "large": torch.zeros(1100, 1500, dtype=wanted).t(),
        }
        dcp.load(target, checkpoint_id=tmp_path)
        report = dcp.last_report()
        assert report["path"] == "native" and report["copies_count"] == 0
        assert report["cast_count"] == (2 if wanted != saved else 0)
        for name, tensor in source.items():
            assert_bits_equal(target[name], torch.zeros_like(target[name]).copy_(tensor))


@pytest.mark.parametrize("saved", [torch.float32, torch.int16, *GENERIC], ids=str)
@pytest.mark.parametrize("wanted", GENERIC, ids=str)
def test_other_casts_are_those_of_copy(saved, wanted, tmp_path):
    source = {"small": value("s", (5, 7)).to(saved), "large": value("l", (1500, 700)).to(saved)}
    dcp.save(source, checkpoint_id=tmp_path)
    target = {
        "small": torch.zeros(7, 5, dtype=wanted).t(),
        "large": torch.zeros(1500, 1000, dtype=wanted)[:, 100:800],
    }
    want = {name: torch.zeros_like(target[name]).copy_(source[name]) for name in source}
    dcp.load(target, checkpoint_id=tmp_path)
    for name in source:
        got = target[name].contiguous().view(torch.uint8)
        assert torch.equal(got, want[name].contiguous().view(torch.uint8))
    assert dcp.last_report()["copies_count"] == (0 if saved == wanted else 2)
    assert dcp.last_report()["whole_copies"] == 0


def test_a_parameter_is_cast_without_a_trace_in_its_graph(tmp_path):
    dcp.save({"w": value("w", (30,))}, checkpoint_id=tmp_path)
    for dtype in (torch.bfloat16, torch.complex64):
        parameter = torch.nn.Parameter(torch.zeros(30, dtype=dtype))
        dcp.load({"w": parameter}, checkpoint_id=tmp_path)
        assert parameter.requires_grad and parameter.grad_fn is None
        assert torch.equal(parameter.detach(), value("w", (30,)).to(dtype))


def test_tensors_of_inference_mode_are_loaded_in_it(tmp_path):
    dcp.save({"w": value("w", (30,))}, checkpoint_id=tmp_path)
    with torch.inference_mode():
        target = {"w": torch.zeros(30, dtype=torch.complex64)}
        dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["w"].real, value("w", (30,)))


def test_the_callers_default_device_and_modes_are_not_the_loads(tmp_path):
    """[load-thread]"""
    dcp.save({"w": value("w", (30,)), "n": [1, 2]}, checkpoint_id=tmp_path)
    target = {"w": torch.zeros(30, dtype=torch.complex64), "n": [0, 0]}
    with torch.device("meta"):
        dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["w"].real, value("w", (30,))) and target["n"] == [1, 2]


# ---- copy_ of the destination ----


class Doubling(torch.Tensor):
    """Its copy_ is its own, and sees the shapes that torch's would."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            cls.seen.append(tuple(args[1].shape))
            args = (args[0], args[1] * 2)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("module", [dcp, torch_dcp], ids=["ours", "torchs"])
def test_a_subclass_copies_overlap_by_overlap_as_in_torch(module, tmp_path):
    source = value("w", (900, 700))
    module.save({"w": source, "small": source[:3, :3].contiguous()}, checkpoint_id=tmp_path)
    seen = []
    for load in (torch_dcp.load, dcp.load):
        Doubling.seen = []
        target = {name: torch.zeros(shape).as_subclass(Doubling)
                  for name, shape in (("w", (900, 700)), ("small", (3, 3)))}  # fmt: skip
        load(target, checkpoint_id=tmp_path)
        assert torch.equal(target["w"].as_subclass(torch.Tensor), source * 2)
        seen.append(sorted(Doubling.seen))
    assert seen[0] == seen[1] == [(3, 3), (900, 700)]
    report = dcp.last_report()
    assert report["copies_count"] == report["whole_copies"] == 2


LAZY: dict[str, Callable[[], torch.Tensor]] = {
    "conj": lambda: torch.zeros(700, 400, dtype=torch.complex64).conj(),
    "conj transposed": lambda: torch.zeros(400, 700, dtype=torch.complex64).mH,
    "neg": lambda: torch.zeros(700, 400, dtype=torch.complex64).conj().imag,
    "columns": lambda: torch.zeros(700, 900, dtype=torch.complex64)[:, 3:403],
    "scalar": lambda: torch.zeros(3, dtype=torch.complex128)[1],
    "every other": lambda: torch.zeros(1400, 800, dtype=torch.complex128)[::2, ::2],
}


@pytest.mark.parametrize("kind", LAZY)
def test_views_that_are_not_plain_memory_are_filled_in_pieces(kind, tmp_path):
    target = {"w": LAZY[kind]()}
    source = value("w", tuple(target["w"].shape))
    torch_dcp.save({"w": source}, checkpoint_id=tmp_path)
    dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["w"].resolve_conj().resolve_neg(), source.to(target["w"].dtype))
    assert dcp.last_report()["copies_count"] == 1 and dcp.last_report()["whole_copies"] == 0


def test_an_error_of_copy_is_the_loads_and_names_the_tensor(tmp_path):
    dcp.save({"w": value("w", (600, 700)), "v": value("v", (4,))}, checkpoint_id=tmp_path)
    expanded = {"w": torch.zeros(1, 700).expand(600, 700)}
    failures = []
    for module in (torch_dcp, dcp):
        with pytest.raises(dcp.CheckpointException) as caught:
            module.load(expanded, checkpoint_id=tmp_path)
        failures.append(caught.value.failures[0][0])
    assert type(failures[0]) is type(failures[1]) is RuntimeError
    assert str(failures[1]) == f"w: {failures[0]}"

    class Refusing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.copy_:
                raise KeyError("refused")
            return super().__torch_function__(func, types, args, kwargs or {})

    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load({"w": torch.zeros(600, 700).as_subclass(Refusing)}, checkpoint_id=tmp_path)
    assert type(caught.value.failures[0][0]) is KeyError


def test_a_load_that_fails_sets_no_object(tmp_path):
    """[load-thread]"""
    dcp.save({"n": 1, "w": value("w", (600, 700))}, checkpoint_id=tmp_path)
    target = {"n": 0, "w": torch.zeros(1, 700).expand(600, 700)}
    with pytest.raises(dcp.CheckpointException):
        dcp.load(target, checkpoint_id=tmp_path)
    assert target["n"] == 0


# ---- stock torch's records ----

BASE = value("base", (1300, 900))
STOCK: dict[str, Callable[[], torch.Tensor]] = {
    "rows of a larger storage": lambda: BASE[100:700],
    "columns": lambda: BASE[:, 10:500],
    "transposed": lambda: BASE.t(),
    "every other": lambda: BASE[::2, ::3],
    "permuted": lambda: BASE.view(13, 100, 900).permute(2, 0, 1),
    "expanded": lambda: BASE[:1].expand(700, 900),
    "scalar": lambda: BASE[3, 4],
    "0-d": lambda: torch.tensor(5.0),
    "empty": lambda: BASE[:, :0],
    "storage of several": lambda: BASE.view(-1)[5:9].view(2, 2),
    "bool": lambda: BASE > 0.5,
    "bool view": lambda: (BASE > 0.5)[10:900:2],
    "complex": lambda: torch.complex(BASE, -BASE)[5:],
    "bfloat16 transposed": lambda: BASE.bfloat16().t(),
    "parameter": lambda: torch.nn.Parameter(BASE[1:]),
}


@pytest.mark.parametrize("into", ["as saved", "cast", "copied", "subclass"])
@pytest.mark.parametrize("kind", STOCK)
def test_what_stock_torch_writes_is_loaded_as_it_would(kind, into, tmp_path):
    source = STOCK[kind]()
    torch_dcp.save({"w": source, "other": BASE}, checkpoint_id=tmp_path)

    def target() -> dict[str, torch.Tensor]:
        plain = source.detach()
        w = torch.zeros(plain.shape, dtype=plain.dtype)
        if into == "cast" and not plain.is_complex():
            w = w.to(torch.float64)
        elif into != "as saved":
            w = w.to(torch.complex128)
        return {"w": w.as_subclass(Doubling) if into == "subclass" else w,
                "other": torch.zeros(1300, 900)}  # fmt: skip

    ours, torchs = target(), target()
    torch_dcp.load(torchs, checkpoint_id=tmp_path)
    dcp.load(ours, checkpoint_id=tmp_path)
    assert dcp.last_report()["path"] == "native"
    for name in ours:
        assert torch.equal(ours[name].as_subclass(torch.Tensor),
                           torchs[name].as_subclass(torch.Tensor))  # fmt: skip


def quantised(by_channel: bool, source: torch.Tensor, scale: float) -> torch.Tensor:
    if not by_channel:
        return torch.quantize_per_tensor(source, scale, 3, torch.quint8)
    scales = torch.full((len(source),), scale, dtype=torch.float64)
    zeros = torch.zeros(len(source), dtype=torch.long)
    return torch.quantize_per_channel(source, scales, zeros, 0, torch.qint8)


@pytest.mark.parametrize("by_channel", [False, True], ids=["by tensor", "by channel"])
def test_quantised_tensors_are_loaded_as_torch_would(by_channel, tmp_path):
    source = quantised(by_channel, BASE, 0.02)
    torch_dcp.save({"w": source, "small": source[:3]}, checkpoint_id=tmp_path)
    loaded = []
    for module in (torch_dcp, dcp):
        target = quantised(by_channel, torch.zeros(1300, 900), 0.5)
        module.load({"w": target}, checkpoint_id=tmp_path)
        loaded.append(target)
        with pytest.raises(dcp.CheckpointException, match="non-quantized"):
            module.load({"w": torch.zeros(1300, 900)}, checkpoint_id=tmp_path)
    assert torch.equal(loaded[0].int_repr(), loaded[1].int_repr())
    assert torch.equal(loaded[0].dequantize(), loaded[1].dequantize())
    assert torch.equal(loaded[1].int_repr(), source.int_repr())


# ---- transforms ----


class Deflated(StreamTransformExtension):
    """A stream extension that every Python has."""

    @staticmethod
    def registry_name() -> str:
        return "stream.deflated"

    @staticmethod
    def from_descriptor(version: str) -> Deflated:
        if version != "7":
            raise ValueError(f"unknown version {version!r}")
        return Deflated()

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/7"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        class Writer(io.RawIOBase):
            packer = zlib.compressobj()

            def writable(self) -> bool:
                return True

            def write(self, data: Any) -> int:
                output.write(self.packer.compress(bytes(data)))
                return len(data)

            def close(self) -> None:
                if not self.closed:
                    output.write(self.packer.flush())
                    output.close()
                super().close()

        return Writer()

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        class Reader(io.RawIOBase):
            left = b""
            unpacker = zlib.decompressobj()

            def readable(self) -> bool:
                return True

            def readinto(self, buffer: Any) -> int:
                while not self.left and (packed := input.read(50_000)):
                    self.left = self.unpacker.decompress(packed)
                count = min(len(buffer), len(self.left))
                buffer[:count] = self.left[:count]
                self.left = self.left[count:]
                return count

        return Reader()


class Masked(Deflated):
    """Another, whose stream can seek."""

    @staticmethod
    def registry_name() -> str:
        return "stream.masked"

    @staticmethod
    def from_descriptor(version: str) -> Masked:
        return Masked()

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        class Writer(io.RawIOBase):
            def writable(self) -> bool:
                return True

            def write(self, data: Any) -> int:
                output.write(bytes(b ^ 0x5A for b in bytes(data)))
                return len(data)

            def close(self) -> None:
                if not self.closed:
                    output.close()
                super().close()

        return Writer()

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return io.BytesIO(bytes(b ^ 0x5A for b in input.read()))


def registry(extension: type) -> ExtensionRegistry:
    known = ExtensionRegistry()
    known.register(extension)
    return known


@pytest.mark.parametrize("extension", [Deflated, Masked])
def test_transforms_are_undone_by_the_readers_extensions(extension, tmp_path):
    """One at a time: of two, torch writes the descriptors in an order that it cannot read."""
    source = {"w": value("w", (400, 90)), "n": {"deep": [1, "two"]}, "empty": torch.zeros(0, 3)}
    writer = torch_dcp.FileSystemWriter(tmp_path, _extensions=[extension()])
    torch_dcp.save(source, storage_writer=writer)
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        loaded = []
        for module in (torch_dcp, dcp):
            reader = torch_dcp.FileSystemReader(tmp_path, _extension_registry=registry(extension))
            target = {
                "w": torch.zeros(400, 90, dtype=dtype),
                "n": {"deep": None},
                "empty": torch.zeros(0, 3),
            }
            module.load(target, storage_reader=reader)
            loaded.append(target)
        assert torch.equal(loaded[0]["w"], loaded[1]["w"])
        assert torch.equal(loaded[1]["w"], source["w"].to(dtype))
        assert loaded[1]["n"] == source["n"]
    report = dcp.last_report()
    assert report["path"] == "native" and report["verified_bytes"] == 0
    assert report["unverified_bytes"] > 0


def test_an_unknown_transform_is_torchs_error(tmp_path):
    writer = torch_dcp.FileSystemWriter(tmp_path, _extensions=[Deflated()])
    torch_dcp.save({"w": value("w", (40,))}, storage_writer=writer)
    errors = []
    for module in (torch_dcp, dcp):
        with pytest.raises(dcp.CheckpointException) as caught:
            module.load({"w": torch.zeros(40)}, checkpoint_id=tmp_path)
        errors.append(caught.value.failures[0][0])
    assert type(errors[0]) is type(errors[1]) is ValueError
    assert "stream.deflated" in str(errors[1]) and str(errors[0]) in str(errors[1])


# ---- safetensors ----


def fake_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The format's writer in six lines, so that the test does not need the package."""

    def save(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
        header, body = {"__metadata__": metadata}, b""
        for name, tensor in tensors.items():
            data = tensor.numpy().tobytes()
            span = [len(body), len(body) + len(data)]
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": span}
            body += data
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + body

    package, module = types.ModuleType("safetensors"), types.ModuleType("safetensors.torch")
    module.save = save
    monkeypatch.setitem(sys.modules, "safetensors", package)
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)


@pytest.mark.parametrize("shape", [(50,), (700, 900)], ids=str)
def test_a_safetensors_checkpoint_is_refused_by_name(shape, monkeypatch, tmp_path):
    fake_safetensors(monkeypatch)
    writer = torch_dcp.FileSystemWriter(
        tmp_path, serialization_format=SerializationFormat.SAFETENSORS
    )
    torch_dcp.save({"w": value("w", shape), "n": 5}, storage_writer=writer)
    for module in (torch_dcp, dcp):
        with pytest.raises(dcp.CheckpointException) as caught:
            module.load({"w": torch.zeros(shape)}, checkpoint_id=tmp_path)
    text = str(caught.value.failures[0][0])
    assert text.startswith("w in ") and "safetensors" in text and ".distcp" in text
    target = {"n": None}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target == {"n": 5}


# ---- memory ----

MEASURE = textwrap.dedent(
    """
    import ctypes, sys, warnings
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed.checkpoint as torch_dcp
    import dcp_native as dcp

    path, kind = sys.argv[1:]
    made = {
        "cast": lambda: torch.zeros(2048, 4096, dtype=torch.bfloat16),
        "pieces": lambda: torch.zeros(2048, 4096, dtype=torch.complex64).conj(),
        "columns": lambda: torch.zeros(2048, 8192, dtype=torch.float16)[:, ::2],
        "whole": lambda: torch.zeros(2048, 4096).as_subclass(type("Sub", (torch.Tensor,), {})),
        "quantised": lambda: torch.quantize_per_tensor(
            torch.zeros(2048, 4096), 0.5, 0, torch.qint32
        ),
    }[kind]

    def status(field):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(field)) << 10

    warm = {"warm": made()}
    dcp.load(warm, checkpoint_id=path)
    target = {f"w{i}": made() for i in range(8)}
    for tensor in target.values():
        tensor.fill_(1)  # every page is there
    del warm
    dcp._native.trim()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    before = status("VmRSS")
    dcp.load(target, checkpoint_id=path)
    assert dcp.last_report()["path"] == "native"
    print(status("VmHWM") - before)
    """
)
MIB = 1 << 20
RECORD = 32 * MIB
ENGINE = 40 * MIB
"""The reader's ring (32) and a slab (1); the rest is for the allocator."""
BOUNDS = {
    "cast": ENGINE,
    "pieces": ENGINE,
    "columns": ENGINE,
    "whole": ENGINE + RECORD,  # one overlap
    "quantised": ENGINE + 2 * RECORD,  # one record, and what torch makes of it
}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> dict[str, Path]:
    paths = {}
    for kind in ("plain", "quantised"):
        paths[kind] = tmp_path_factory.mktemp(kind)
        tensor = value("w", (2048, 4096))
        if kind == "quantised":
            tensor = torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint32)
        names = [f"w{i}" for i in range(8)] + ["warm"]
        module = dcp if kind == "plain" else torch_dcp
        module.save(dict.fromkeys(names, tensor), checkpoint_id=paths[kind])
    return paths


@pytest.mark.parametrize("kind", BOUNDS)
def test_extra_memory_does_not_grow_with_what_is_loaded(kind, large):
    """256 MiB of targets, none of which is read straight into place."""
    path = large["quantised" if kind == "quantised" else "plain"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), kind],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    extra = int(done.stdout)
    print(f"{kind}: {extra / MIB:.1f} MiB")
    assert extra <= BOUNDS[kind], f"{extra / MIB:.1f} MiB"
