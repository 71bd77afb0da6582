"""gpu_steps.py: how long a training step takes alone, while it is copied, and while it is written.

A step that is copied begins with async_save, runs forward and backward beside the copies, waits for
staging_completion, since the optimizer is what changes the tensors, and ends with the optimizer.
Every step is timed until the device has done it, so no step hides behind another one.  The call
itself is timed behind a step that the device has not done yet, as trainers run ahead of it: a save
that waits for the device shows there, and nowhere else.
"""

from __future__ import annotations

import math
import statistics
import time

import torch
from gpu_measure import (
    WARM_UPS,
    Machine,
    Sample,
    by_turns,
    compare,
    figure,
    on_host,
    seconds,
    size_bytes,
)
from gpu_saving import STALL, Saver, savers
from limits import settle

import dcp_native as dcp

LAYERS = 16
MOST_STEPS = 200  # beside one upload


class Trainer:
    """A model whose parameters and moments have about `total_bytes`."""

    def __init__(self, total_bytes: int, batch: int) -> None:
        width = max(256, int((total_bytes / 4 / 3 / LAYERS) ** 0.5) // 64 * 64)
        layers = (torch.nn.Linear(width, width) for _ in range(LAYERS))
        self._model = torch.nn.Sequential(*layers).cuda()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), fused=True)
        self._batch = torch.randn(batch, width, device="cuda")
        self.step()

    def backward(self) -> None:
        self._optimizer.zero_grad()
        self._model(self._batch).square().mean().backward()

    def update(self) -> None:
        self._optimizer.step()

    def step(self) -> None:
        self.backward()
        self.update()

    def state(self) -> dict[str, torch.Tensor]:
        names = {id(p): name for name, p in self._model.named_parameters()}
        state = dict(self._model.state_dict())
        for parameter, slots in self._optimizer.state.items():
            state |= {f"{names[id(parameter)]}.{slot}": value for slot, value in slots.items()}
        return state


def saved_meanwhile(trainer: Trainer, saver: Saver) -> tuple[Sample, list[float]]:
    """The step that was copied, and those beside the upload."""
    settle(str(saver.path.parent))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    response = saver.start()
    staged: list[float] = []
    response.staging_completion.add_done_callback(lambda _: staged.append(time.perf_counter()))
    trainer.backward()
    response.staging_completion.result()
    trainer.update()
    torch.cuda.synchronize()
    step_s = time.perf_counter() - begin
    beside: list[float] = []
    while not response.upload_completion.done() and len(beside) < MOST_STEPS:
        beside.append(seconds(trainer.step))
    response.upload_completion.result()
    return {"step_s": step_s, "staged_s": staged[0] - begin}, beside


def stall_behind_a_step(trainer: Trainer, saver: Saver) -> Sample:
    settle(str(saver.path.parent))
    torch.cuda.synchronize()
    trainer.step()
    begin = time.perf_counter()
    response = saver.start()
    call_s = time.perf_counter() - begin
    response.staging_completion.result()
    response.upload_completion.result()
    return {"call_s": call_s}


def steps(machine: Machine, total_bytes: int, batch: int, rounds: int) -> None:
    trainer = Trainer(total_bytes, batch)
    alone: list[float] = []
    machine.reserve(size_bytes(trainer.state()))
    with savers(trainer.state(), machine.path) as pair:
        stalls(machine, trainer, pair, rounds)
        samples: dict[str, list[Sample]] = {"ours": [], "torch": []}
        beside: dict[str, list[float]] = {"ours": [], "torch": []}
        for turn in range(WARM_UPS + rounds):
            order = list(zip(samples, pair, strict=True))[:: 1 if turn % 2 else -1]
            free = [seconds(trainer.step) for _ in range(10)]
            for name, saver in order:
                sample, others = saved_meanwhile(trainer, saver)
                if turn >= WARM_UPS:
                    samples[name].append(sample)
                    beside[name] += others
            alone += free if turn >= WARM_UPS else []
        saved_is_what_was(trainer, pair[0])
    machine.release()
    alone_s = statistics.median(alone)
    copied = {name: statistics.median(s["step_s"] for s in samples[name]) for name in samples}
    staged_s = statistics.median(s["staged_s"] for s in samples["ours"])
    longer_s = copied["ours"] - alone_s
    figure(
        "a training step that is copied", copied["ours"], copied["torch"], alone_s,
        "shorter than torch's", copied["ours"] < copied["torch"],
        f"limit: a step alone; {longer_s * 1e3:+.3f} ms, {longer_s / staged_s:+.1%} of the "
        f"staging time of {staged_s * 1e3:.3f} ms",
    )  # fmt: skip
    if not all(beside.values()):
        print("a training step beside an upload: no step began before the upload had ended")
        return
    written = {name: statistics.median(times) for name, times in beside.items()}
    figure(
        "a training step that is written beside", written["ours"], written["torch"], alone_s,
        "no longer than torch's", written["ours"] <= written["torch"],
        f"limit: a step alone; the worst of ours {max(beside['ours']) * 1e3:.3f} ms",
    )  # fmt: skip


def stalls(machine: Machine, trainer: Trainer, pair: tuple[Saver, Saver], rounds: int) -> None:
    found = by_turns(
        rounds, trainer.step,
        ours=lambda: stall_behind_a_step(trainer, pair[0]),
        torch=lambda: stall_behind_a_step(trainer, pair[1]),
        copy=machine.to_host,
    )  # fmt: skip
    ours_s, copy = found["ours"]["call_s"], found["copy"]
    part = ours_s / copy["copy_s"] if copy["copy_s"] else math.inf
    figure(
        "stall behind a step that is under way", ours_s, found["torch"]["call_s"], copy["call_s"],
        f"below {STALL:.0%} of one copy's time", part < STALL, f"{part:.2%}",
    )  # fmt: skip


def saved_is_what_was(trainer: Trainer, saver: Saver) -> None:
    want = on_host(saver.state)
    saved_meanwhile(trainer, saver)
    target = {name: torch.zeros_like(tensor) for name, tensor in saver.state.items()}
    dcp.load(target, checkpoint_id=saver.path)
    compare("a training step", target, want)
