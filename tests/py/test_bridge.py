"""The bridge alone: tensors as torch describes them, collectives on real ranks, releases apart."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bridge_table import (
    DTYPES,
    NOT_A_TENSOR,
    PLAIN,
    SUBCLASS,
    BridgeTable,
    Comm,
    CommError,
    Flag,
    table_of,
    view_of,
)
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from dcp_native import _bridge, _native

TABLE = table_of(_bridge)
HERE = Path(__file__).resolve().parent
RELEASE = torch.__version__.split("+")[0]


def test_the_table_has_the_layout_of_the_header():
    assert TABLE.version == 4
    assert TABLE.table_bytes == ctypes.sizeof(BridgeTable)
    assert TABLE.torch_version.decode() == _bridge.torch_version == RELEASE


# ---- tensors ----


class Subclass(torch.Tensor):
    """Has memory of its own, as plain tensors have."""


class Wrapper(torch.Tensor):
    """A wrapper subclass that answers every question about its shape by Python code, and fails."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            dtype=inner.dtype,
            device=inner.device,
            dispatch_sizes_strides_policy="sizes",
            dispatch_device=True,
            dispatch_layout=True,
        )

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        raise RuntimeError(f"{func} was called")


def base() -> torch.Tensor:
    return torch.arange(24.0).reshape(4, 6)


def resized(bytes_count: int) -> torch.Tensor:
    tensor = torch.ones(100)
    tensor.untyped_storage().resize_(bytes_count)
    return tensor


def inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3)


def complex_pair() -> torch.Tensor:
    return torch.tensor([1 + 2j, 3 - 4j])


STRIDED: dict[str, Callable[[], torch.Tensor]] = {
    "plain": base,
    "scalar": lambda: torch.tensor(3),
    "empty": lambda: torch.empty(0, 3),
    "no elements, offset": lambda: base()[4:],
    "transposed": lambda: base().t(),
    "stepped slice": lambda: base()[1:3, ::2],
    "offset": lambda: base().view(-1)[7:],
    "two rows apart": lambda: base().as_strided((2, 3), (12, 2)),
    "channels last": lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "64 dims": lambda: torch.ones((1,) * 63 + (2,)),
    "parameter": lambda: torch.nn.Parameter(base()),
    "requires grad": lambda: base().requires_grad_(),
    "not a leaf": lambda: base().requires_grad_() * 2,
    "inference": inference,
    "other type's view": lambda: base().view(torch.int32),
    "conj": lambda: complex_pair().conj(),
    "neg": lambda: complex_pair().conj().imag,
    "larger storage": lambda: torch.ones(100).resize_(3),
    "resized to no elements": lambda: torch.ones(100).resize_(0),
}
OVERLAPPING: dict[str, Callable[[], torch.Tensor]] = {
    "expanded": lambda: torch.ones(1).expand(5),
    "expanded rows": lambda: base()[:1].expand(7, 6),
    "sliding windows": lambda: torch.arange(10).unfold(0, 3, 1),
    "as_strided": lambda: base().as_strided((3, 3), (1, 1)),
}
WITHOUT_MEMORY: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.empty(3, 4, device="meta"),
    "storage of 0 bytes": lambda: resized(0),
    "storage too short": lambda: resized(396),
}
WITHOUT_STRIDES: dict[str, Callable[[], torch.Tensor]] = {
    "sparse coo": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(base(), 0.1, 0, torch.qint8),
    "mkldnn": lambda: base().to_mkldnn(),
}


def check(tensor: torch.Tensor, tensor_class: int, extra: Flag) -> None:
    """All that the view says against torch's own words; `extra`: what torch has no word for."""
    flags = extra | Flag.HAS_TYPE
    strided = Flag.STRIDED in extra
    flags |= Flag.CONTIGUOUS if strided and tensor.is_contiguous() else Flag(0)
    flags |= Flag.REQUIRES_GRAD if tensor.requires_grad else Flag(0)
    flags |= Flag.CONJ if tensor.is_conj() else Flag(0)
    flags |= Flag.NEG if tensor.is_neg() else Flag(0)
    flags |= Flag.META if tensor.is_meta else Flag.CPU
    view = view_of(TABLE, tensor)
    assert view.tensor_class == tensor_class
    assert view.flags == flags
    assert (view.dtype, view.item_bytes) == (DTYPES[tensor.dtype], tensor.element_size())
    assert view.sizes == list(tensor.shape)
    assert view.strides == (list(tensor.stride()) if strided else None)
    if Flag.HAS_MEMORY in extra:
        assert view.storage_bytes == tensor.untyped_storage().nbytes()
        assert (view.storage or 0) == tensor.untyped_storage().data_ptr()
        assert view.data == (tensor.data_ptr() if tensor.numel() else None)
    else:
        assert view.data is None


@pytest.mark.parametrize("kind", STRIDED)
def test_strided_tensors_are_what_torch_says(kind):
    check(STRIDED[kind](), PLAIN, Flag.STRIDED | Flag.HAS_MEMORY)


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_tensors_that_alias_themselves_are_marked(kind):
    check(OVERLAPPING[kind](), PLAIN, Flag.STRIDED | Flag.HAS_MEMORY | Flag.OVERLAPS)


@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_no_pointer_where_not_all_elements_have_memory(kind):
    check(WITHOUT_MEMORY[kind](), PLAIN, Flag.STRIDED)


@pytest.mark.parametrize("kind", WITHOUT_STRIDES)
def test_layouts_without_strides_give_their_sizes_only(kind):
    check(WITHOUT_STRIDES[kind](), PLAIN, Flag(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_its_number(dtype):
    if str(dtype).startswith("torch.q"):
        tensor = torch.quantize_per_tensor(base(), 0.1, 0, dtype)
        check(tensor, PLAIN, Flag(0))
    else:
        check(torch.empty(3, dtype=dtype), PLAIN, Flag.STRIDED | Flag.HAS_MEMORY)


def test_types_without_whole_elements_have_no_number():
    view = view_of(TABLE, torch.empty(3, dtype=torch.uint4))
    assert view.dtype == 0 and Flag.HAS_TYPE not in view.flags


def test_nested_tensors_give_no_sizes():
    view = view_of(TABLE, torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    assert (view.tensor_class, view.sizes, view.strides, view.data) == (PLAIN, None, None, None)
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    view = view_of(TABLE, jagged)
    assert view.tensor_class == SUBCLASS and view.data is None
    assert Flag.HAS_MEMORY not in view.flags


def test_subclasses_are_told_from_tensors():
    check(base().as_subclass(Subclass), SUBCLASS, Flag.STRIDED | Flag.HAS_MEMORY)
    with FakeTensorMode():
        fake = torch.ones(3, 4)
    view = view_of(TABLE, fake)
    assert (view.tensor_class, view.data) == (SUBCLASS, None)
    assert Flag.HAS_MEMORY not in view.flags


def test_a_wrapper_that_raises_leaves_no_exception_and_no_pointer():
    view = view_of(TABLE, Wrapper(base()))
    assert view.tensor_class == SUBCLASS and view.data is None
    assert Flag.HAS_MEMORY not in view.flags and Flag.STRIDED not in view.flags


@pytest.mark.parametrize(
    "thing",
    [None, 3, object(), torch.Tensor, [torch.ones(1)]],
    ids=["None", "int", "object", "class", "list"],
)
def test_other_objects_are_no_tensors(thing):
    assert view_of(TABLE, thing).tensor_class == NOT_A_TENSOR
    assert TABLE.tensor_mutable_data(thing) is None


def test_memory_to_write_is_where_the_elements_are():
    tensor = base()
    for view in (tensor, tensor[2:, 1:], tensor.t()):
        assert TABLE.tensor_mutable_data(view) == view.data_ptr()
    assert TABLE.tensor_mutable_data(torch.empty(3, device="meta")) is None
    assert TABLE.tensor_mutable_data(resized(0)) is None


def test_reading_shares_lazy_copies_and_writing_makes_them():
    original = base()
    lazy = torch._lazy_clone(original)
    assert view_of(TABLE, lazy).data == view_of(TABLE, original).data
    address = TABLE.tensor_mutable_data(lazy)
    assert address not in (None, view_of(TABLE, original).data)
    assert view_of(TABLE, lazy).data == address
    assert torch.equal(lazy, original)


# ---- process groups ----


def run_ranks(out: Path, *arguments: str) -> dict[str, list[str | None]]:
    """Case -> failure (or None) of each rank that finished it."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    job = subprocess.run(
        [sys.executable, str(HERE / "bridge_ranks.py"), str(out), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    outcome: dict[str, list[str | None]] = {"output": [job.stderr[-4000:]]}
    for log in sorted(out.glob("rank*.jsonl")):
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            outcome.setdefault(entry["case"], []).append(entry["failure"])
    return outcome


def check_case(outcome: dict[str, list[str | None]], case: str) -> None:
    failures = outcome.get(case, [])
    assert len(failures) == 3, f"not every rank finished: {outcome['output'][0]}"
    for rank, failure in enumerate(failures):
        assert failure is None, f"rank {rank}:\n{failure}"


CASES = re.findall(r"^def (case_\w+)", (HERE / "bridge_ranks.py").read_text(), re.M)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(tmp_path_factory.mktemp("bridge_ranks"))


@pytest.mark.parametrize("case", CASES)
def test_collectives_on_three_ranks(ranks, case):
    check_case(ranks, case)


@pytest.mark.parametrize("thing", [None, object(), torch.ones(1)], ids=["None", "object", "tensor"])
def test_what_is_no_group_is_refused_by_its_type(thing):
    with pytest.raises(CommError, match=f"is a (torch.)?{type(thing).__name__}, not a torch"):
        Comm(TABLE, thing)


@pytest.mark.skipif(
    not os.environ.get("DCP_NATIVE_SLOW_TESTS"), reason="builds the bridge once more (slow)"
)
def test_messages_longer_than_one_call_are_split(tmp_path):
    """A bridge whose calls carry 4096 bytes at most gives the same answers."""
    spec = importlib.util.spec_from_file_location("dcp_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    sys.modules["dcp_setup"] = setup  # its dataclasses look for themselves there
    spec.loader.exec_module(setup)
    module = setup.bridge_module(Path(torch.__file__).parent)
    library = tmp_path / "_bridge.so"
    subprocess.run(
        [
            "g++", "-shared", "-fPIC", "-O0", *module.compile_args, "-DDCP_BRIDGE_CALL_BYTES=4096",
            f"-I{sysconfig.get_path('include')}", *(f"-I{d}" for d in module.include_dirs),
            *module.sources, *(f"-L{d}" for d in module.library_dirs),
            *(f"-l{name}" for name in module.libraries), "-o", str(library),
        ],
        cwd=ROOT, check=True,
    )  # fmt: skip
    outcome = run_ranks(tmp_path, str(library), str(2 << 20))
    for case in CASES:
        check_case(outcome, case)


# ---- releases ----


def import_bridge_again() -> None:
    """Runs the module's own checks in a module that is then thrown away."""
    loader = importlib.machinery.ExtensionFileLoader("dcp_native._bridge", _bridge.__file__)
    spec = importlib.util.spec_from_file_location(
        "dcp_native._bridge", _bridge.__file__, loader=loader
    )
    loader.exec_module(importlib.util.module_from_spec(spec))


def import_package_again() -> None:
    """The same for what of the package imports torch first, with the extensions that are loaded."""
    spec = importlib.util.spec_from_file_location(
        "dcp_native._stock", ROOT / "dcp_native" / "_stock.py"
    )
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("again", [import_bridge_again, import_package_again])
@pytest.mark.parametrize("release", ["2.12.9", "2.99.0+cpu", RELEASE + "1", RELEASE[:-1]])
def test_another_release_is_refused_by_both_names(monkeypatch, again, release):
    monkeypatch.setattr(torch, "__version__", release)
    with pytest.raises(ImportError, match=r"uild (it|dcp_native) again") as caught:
        again()
    assert f"built for torch {RELEASE}, but torch {release} is installed" in str(caught.value)


@pytest.mark.parametrize("again", [import_bridge_again, import_package_again])
@pytest.mark.parametrize("local", ["", "+cpu", "+cu999"])
def test_another_build_of_the_release_is_accepted(monkeypatch, again, local):
    monkeypatch.setattr(torch, "__version__", RELEASE + local)
    again()


def test_both_extensions_are_built_for_the_same_release():
    assert _native.built_for_torch == _bridge.torch_version == RELEASE


LAST_TO_HOLD_A_GROUP = """
import sys
import torch
import torch.distributed as dist
from dcp_native._native import Group

for i in range(30):
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/{i}", rank=0, world_size=1)
    group = Group(dist.distributed_c10d._get_default_group())
    for _ in range(50):
        dist.all_gather([torch.zeros(1000)], torch.ones(1000), async_op=True)
    dist.destroy_process_group()
    del group
"""


def test_the_last_to_hold_a_process_group_lets_its_threads_use_python_while_they_end(tmp_path):
    argv = [sys.executable, "-c", LAST_TO_HOLD_A_GROUP, str(tmp_path)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run(argv, check=True, timeout=120, env={**os.environ, "PYTHONPATH": path})
