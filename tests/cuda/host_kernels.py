"""Torch's kernels for CUDA, computed on the host: with this imported whole models run on fakes.

The fake libraries copy and fill and run this package's own kernels; torch's they refuse by name.
Here every operator of torch that has a kernel for CUDA gets one that copies what it reads to the
host, computes it with torch's kernel for the CPU and copies what it wrote back, in the order of the
current stream.  Allocation, views, transfers, streams, events and NCCL stay torch's own, over the
fakes, and so does a copy_ that needs no kernel.  Random numbers are the CPU's.
"""

from __future__ import annotations

import warnings

import torch

# What launches nothing: it allocates, looks, or copies as the fakes do.
KEPT = {
    "_efficientzerotensor", "_local_scalar_dense", "_pin_memory", "_reshape_alias", "as_strided",
    "copy_", "empty", "empty_strided", "is_pinned", "is_set_to", "record_stream", "resize_",
    "set_", "unfold", "view", "view_as_complex", "view_as_real",
}  # fmt: skip


ALL_DEVICES = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def is_cuda(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def span(tensor: torch.Tensor) -> torch.Tensor:
    """The memory from the tensor's first element to its last, as bytes."""
    size = tensor.element_size()
    count = 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * size,
        (count * size if tensor.numel() else 0,),
        (1,),
    )


def dense_in_memory(tensor: torch.Tensor) -> bool:
    return span(tensor).numel() == tensor.nbytes


def host_copy(tensor: torch.Tensor) -> torch.Tensor:
    memory = copy_plainly(torch.empty(span(tensor).numel(), dtype=torch.uint8), span(tensor))
    return torch.empty(0, dtype=tensor.dtype).set_(
        memory.untyped_storage(), 0, tensor.shape, tensor.stride()
    )


def device_copy(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    copy_plainly(span(there), span(tensor))
    return there


def copy_plainly(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Torch's own copy_, which is one and the same for all devices."""
    return torch.ops.aten.copy_.default.redispatch(ALL_DEVICES, dst, src, non_blocking)


def copy(dst: torch.Tensor, src: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """copy_, and where that would take a kernel, through the host."""
    alike = dst.dtype == src.dtype and dst.shape == src.shape
    alike = alike and dst.is_conj() == src.is_conj() and dst.is_neg() == src.is_neg()
    dense = dst.is_contiguous() and src.is_contiguous()
    same = dst.stride() == src.stride() and dense_in_memory(dst)
    if alike and (dense or same):
        return copy_plainly(dst, src, non_blocking)
    here = host_copy(dst) if dst.is_cuda else dst
    here.copy_(host_copy(src) if src.is_cuda else src)
    if dst.is_cuda:
        copy_plainly(span(dst), span(here))
    return dst


def on_host(op: torch._ops.OpOverload):
    """The operator on copies of the host, and what it wrote brought back."""
    written = {
        arg.name for arg in op._schema.arguments if arg.alias_info and arg.alias_info.is_write
    }
    names = [arg.name for arg in op._schema.arguments]

    def run(*args, **kwargs):
        copies: dict[int, torch.Tensor] = {}
        device = None

        def down(value):
            nonlocal device
            if is_cuda(value):
                device = device or value.device
                if id(value) not in copies:
                    copies[id(value)] = host_copy(value)
                return copies[id(value)]
            if isinstance(value, torch.device) and value.type == "cuda":
                device = device or value
                return torch.device("cpu")
            if isinstance(value, torch.Generator):
                return None
            return type(value)(map(down, value)) if isinstance(value, (list, tuple)) else value

        given = dict(zip(names, args, strict=False)) | kwargs
        result = op(*map(down, args), **{name: down(value) for name, value in kwargs.items()})
        outs = {}
        for name in written & given.keys():
            value = given[name]
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if is_cuda(tensor):
                    here = copies[id(tensor)]
                    if here.shape != tensor.shape:
                        tensor.resize_(here.shape)
                    copy_plainly(span(tensor), span(here))
                    outs[id(here)] = tensor

        def up(value):
            if isinstance(value, torch.Tensor):
                return outs[id(value)] if id(value) in outs else device_copy(value, device)
            return type(value)(map(up, value)) if isinstance(value, (list, tuple)) else value

        return up(result)

    return run


def install() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        space, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if space == "aten" and base not in KEPT:
            op = getattr(getattr(torch.ops.aten, base), overload or "default")
            library.impl(rest, on_host(op), "CUDA", allow_override=True)
    library.impl("copy_", copy, "CUDA", allow_override=True)
    return library


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    LIBRARY = install()
