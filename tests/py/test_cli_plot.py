"""plot: what the pictures of files are coloured by."""

from __future__ import annotations

import cli
import pytest
import torch

from dcp_native._cli.checkpoint import Checkpoint

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ({"model.a": 5, "optim.b": 9, "ema.c": 4}, {"optim", "model", "ema"}),
        ({"train.model.a": 5, "train.optim.b": 9, "step": 0}, {"train.optim", "train.model"}),
        ({"model.layers.0.w": 5, "model.layers.1.w": 5, "model.head": 3},
         {"model.layers.0", "model.layers.1", "model.head"}),
        ({"w": 3}, {"w"}),
        ({}, set()),
    ],
)  # fmt: skip
def test_groups_are_prefixes_that_tell_the_bytes_apart(tmp_path, sizes, wanted):
    from matplotlib import pyplot

    from dcp_native._cli import plot

    state = {key: torch.ones(100_000 * size) for key, size in sizes.items() if size}
    state |= {key: 1 for key, size in sizes.items() if not size}
    checkpoint = Checkpoint(cli.save(tmp_path / "c", state))
    groups, colors = plot._groups(pyplot, checkpoint)
    assert set(groups) - {"other"} == wanted == colors.keys() - {"other"}
    done = cli.run("plot", checkpoint.path, "-o", tmp_path / "x.png")
    assert done.status == 0 and (tmp_path / "x.png").stat().st_size > 1000
