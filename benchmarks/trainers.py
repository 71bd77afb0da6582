"""trainers.py: what a trainer does while its save is written in the background, and how fast.

A trainer is a chunk of work of about a millisecond that is repeated; after each it looks at the
clock and at the save's future. Its free rate is taken by the same loop, with a future that nobody
ends.
"""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch

PYTHON_ITERATIONS = 20_000
MATRIX_SIZE = 384

Chunk = Callable[[], None]


def _python() -> Chunk:
    def chunk() -> None:
        total = 0
        for i in range(PYTHON_ITERATIONS):
            total += i

    return chunk


def _matmul() -> Chunk:
    left, right = torch.rand(2, MATRIX_SIZE, MATRIX_SIZE)
    out = torch.empty(MATRIX_SIZE, MATRIX_SIZE)
    return lambda: torch.mm(left, right, out=out)


TRAINERS: dict[str, Callable[[], Chunk]] = {"python": _python, "matmul": _matmul}


def train(chunk: Chunk, upload: Future, at_most_s: float) -> list[float]:
    """Repeats `chunk` until the upload is done; returns when the loop and each chunk ended."""
    stamps = [time.monotonic()]
    deadline = stamps[0] + at_most_s
    while True:
        chunk()
        stamps.append(time.monotonic())
        if upload.done() or stamps[-1] >= deadline:
            return stamps


def free_rate(chunk: Chunk, duration_s: float) -> float:
    """Chunks per second with nothing in the background."""
    return rate(train(chunk, Future(), duration_s))


def rate(stamps: list[float], until: float = float("inf")) -> float:
    """Chunks per second of those that ended by then, or of all where none did."""
    inside = [t for t in stamps if t <= until]
    if len(inside) < 2:
        inside = stamps
    return (len(inside) - 1) / (inside[-1] - inside[0])


def share(during: float, *free: float) -> float:
    """Of the free rate that was left to the trainer."""
    return during / statistics.mean(free)
