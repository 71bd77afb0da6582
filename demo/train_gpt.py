"""train_gpt.py: the training job of the demo, one rank of it; started by torchrun.

Trains from the newest complete checkpoint, or from the start, to `--steps`. Saves every
`--save-every` steps, sync and async in turn. The losses of every step go to a log as exact
hexadecimal numbers; at the end the digests of the full state go to a file.
"""

import argparse
import json
import os
import pathlib

import torch
import torch.distributed as dist
from app import App, checkpoint_module, newest_complete, path_taken, start_up, write_json


def losses_of_all_ranks(loss: float, ranks: int) -> list[str]:
    got = [torch.zeros(1, dtype=torch.float64) for _ in range(ranks)]
    dist.all_gather(got, torch.tensor([loss], dtype=torch.float64))
    return [g.item().hex() for g in got]


class Saver:
    """Saves sync and async in turn; at most one async save is under way."""

    def __init__(self, dcp_name: str, checkpoints: str, every: int, note) -> None:
        self.dcp = checkpoint_module(dcp_name)
        self._checkpoints, self._every, self._note = checkpoints, every, note
        # An async save of stock torch runs collectives beside the training step: own group.
        self._group = dist.new_group(backend="gloo")
        self._pending = None

    def after_step(self, app: App) -> None:
        step = app.progress.step
        if self._every == 0 or step % self._every != 0:
            return
        self.finish()
        where = {"checkpoint_id": f"{self._checkpoints}/step-{step}", "process_group": self._group}
        if step // self._every % 2 == 0:
            self._pending = self.dcp.async_save(app.state(), **where)
        else:
            self.dcp.save(app.state(), **where)
            self._note({"path": path_taken(self.dcp)})

    def finish(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None
            self._note({"path": path_taken(self.dcp)})


def train(args: argparse.Namespace, rank: int, ranks: int) -> None:
    app = App(rank, ranks)
    with open(args.losses if rank == 0 else os.devnull, "a", encoding="utf-8") as log:

        def note(entry: dict) -> None:
            print(json.dumps(entry), file=log, flush=True)

        saver = Saver(args.dcp, args.checkpoints, args.save_every, note)
        newest = [newest_complete(args.checkpoints)]
        dist.broadcast_object_list(newest)  # no rank decides for itself
        note({"resumed_from": newest[0]})
        if newest[0] is not None:
            app.load(saver.dcp, f"{args.checkpoints}/step-{newest[0]}")
            note({"path": path_taken(saver.dcp)})
        while app.progress.step < args.steps:
            losses = losses_of_all_ranks(app.step(), ranks)
            note({"step": app.progress.step, "losses": losses})
            saver.after_step(app)
        saver.finish()
    digests = app.digests()
    if rank == 0:
        write_json(args.digests, digests)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--dcp", default="dcp_native", help="or torch.distributed.checkpoint")
    p.add_argument("--checkpoints", required=True, help="the directory of the step-N directories")
    p.add_argument("--steps", type=int, required=True)
    p.add_argument("--save-every", type=int, default=0, help="0: never")
    p.add_argument("--losses", required=True, help="the log; appended to")
    p.add_argument("--digests", required=True)
    args = p.parse_args()
    rank, ranks = start_up()
    # Whoever wants to kill the job finds the ranks here: torchrun starts them in own sessions.
    pathlib.Path(f"{args.losses}.pid{rank}").write_text(str(os.getpid()), encoding="ascii")
    train(args, rank, ranks)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
