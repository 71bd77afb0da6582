"""Nothing of the package creates a CUDA context before a CUDA tensor is met: half a GiB of a real
device for every process of a job.  No case here may make one."""

from __future__ import annotations

import fake
import torch

import dcp_native as dcp


def no_context() -> bool:
    return fake.count("contexts") == 0 and not torch.cuda.is_initialized()


def case_import_creates_none(c):
    assert torch.cuda.device_count() == 2
    assert no_context()


def case_saves_and_loads_of_the_cpu_create_none(c):
    state = {"a": torch.arange(100.0), "b": torch.arange(12).reshape(3, 4).t(), "n": 3}
    dcp.save(state, checkpoint_id=c.dir / "save")
    for mode in (dcp.AsyncCheckpointerType.THREAD, dcp.AsyncCheckpointerType.PROCESS):
        dcp.async_save(
            state, checkpoint_id=c.dir / mode.value, async_checkpointer_type=mode
        ).result(timeout=60)
    target = {"a": torch.zeros(100), "b": torch.zeros(3, 4, dtype=torch.int64).t(), "n": 0}
    dcp.load(target, checkpoint_id=c.dir / "save")
    assert torch.equal(target["a"], state["a"]) and torch.equal(target["b"], state["b"])
    assert no_context()


def case_warm_up_for_the_cpu_creates_none(c):
    dcp.warm_up({"a": torch.zeros(1000)})
    assert no_context()
