"""One native save, driven step by step: open, claim, plan, agree, write, finish."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import socket
import warnings
from typing import Any

from torch.distributed.checkpoint.default_planner import SavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemWriter
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, Metadata

from . import _native
from ._clock import Clock, phase
from ._config import DIRECT_IO, IO_URING, LINK_MODE, SPLIT_REPLICATED, config, io_priority
from ._failures import as_record, raise_alone, raise_failures
from ._group_comm import take_error
from ._lazy_metadata import lazy_metadata
from ._plan_cache import plan_installed, plan_number
from ._progress import Progress
from ._python_planner import PythonPlanning
from ._report import logger, role_report, set_report, tell
from ._roles import save_planner_reason

KEPT_IMAGE_BYTES = 1 << 20
"""The Metadata that a coordinator returns holds an image of at most this size.  A larger one is
read from the checkpoint when it is looked at, as on all other ranks: few look, and the memory is
the trainer's."""


_LISTED_FILES = 64
"""Of which the core tells how they were written (direct_files_mask)."""

ORPHAN_WAIT_S = 60.0
"""How long a save waits for one of the same directory that outlived its trainer."""


def hash64(*parts: object) -> int:
    """A 64-bit number that equal parts share on every rank."""
    text = "\0".join(map(repr, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@functools.cache
def _warn_of_priority() -> None:
    """Once per process: every save would say it again."""
    logger.warning(
        "the writer's priority could not be set (writer_nice=%s, writer_io_class=%r); saves go on "
        "without it",
        config().writer_nice,
        config().writer_io_class,
    )


class SavesElsewhere(Exception):
    """A rank has a writer of the program's own: every rank raises this where they agree, with
    nothing left behind, and saves by torch's implementation."""


class NativeSave:
    """A save by stock roles.  Each step that fails here still takes part in the next agreement."""

    def __init__(
        self,
        writer: FileSystemWriter,
        planner: SavePlanner | None,
        group: _native.Group,
        *,
        use_collectives: bool,
        kind: str,
        base: str | os.PathLike | None = None,
        mapped: tuple[int, int] = (0, 0),
    ) -> None:
        self.writer = writer
        self.planner = planner
        self.group = group
        self.use_collectives = use_collectives
        self.kind = kind
        self.clock = Clock(kind, os.fspath(writer.path), group.rank, group.size)
        self._comm_before = group.comm_stats()
        self._comm: tuple[int, ...] | None = None  # once its last collective is behind it
        _native.peak_bytes(True)
        self.base = None if base is None else os.fspath(base)
        self.error = take_error(group)
        self.in_background = False
        self._metadata_path = ""  # absolute, for the program may change its directory
        meta = writer.storage_meta()
        checkpoint_id = None if meta is None else meta.checkpoint_id
        self._planner_reason = save_planner_reason(planner)
        in_python = self._planner_reason is not None
        self._plan_number = 0 if in_python else plan_number(planner)
        lowest = getattr(planner, "dedup_save_to_lowest_rank", False)
        flatten = getattr(planner, "flatten_state_dict", True)
        split = config().split_replicated
        self._native = _native.Save(
            group,
            os.fspath(writer.path),
            checkpoint_id=None if checkpoint_id is None else os.fspath(checkpoint_id),
            checkpoint_id_is_path=isinstance(checkpoint_id, pathlib.PurePath),
            save_id=None if meta is None else meta.save_id,
            version=CURRENT_DCP_VERSION,
            identity=f"host {socket.gethostname()} pid {os.getpid()} rank {group.rank}",
            call_hash=hash64(
                kind, os.fspath(writer.path), use_collectives, writer.overwrite, self.base
            ),
            plan_salt=hash64(lowest, flatten, split, self._plan_number),
            use_collectives=use_collectives,
            dedup_save_to_lowest_rank=lowest,
            planned_outside=in_python,
            split_bytes=SPLIT_REPLICATED[split] if isinstance(split, str) else split,
            sync_files=writer.sync_files,
            broadcast_metadata=config().broadcast_metadata and kind == "save",
            direct=DIRECT_IO[config().direct_io],
            base=None if in_python else self.base,
            link_mode=LINK_MODE[config().incremental_links],
            content_hash=config().content_hash,
            io_uring=IO_URING[config().io_uring],
            writer_nice=config().writer_nice,
            writer_io_priority=io_priority(config().writer_io_class),
            write_limit_bytes_s=config().write_limit_bytes_s,
            mapped_from=mapped[0],
            mapped_to=mapped[1],
        )
        self._planning = self._python_planning() if in_python else None
        self._state_dict: STATE_DICT_TYPE = {}  # until it is agreed who plans

    def _python_planning(self) -> PythonPlanning:
        return PythonPlanning(
            self._native, self.writer, self.planner, self.group, self.use_collectives
        )

    # ---- local steps: errors wait for the next agreement ----

    def fail(self, error: BaseException) -> None:
        """Remember the first thing that went wrong on this rank."""
        if self.error is None:
            self.error = error

    @phase("open")
    def plan(self, state_dict: STATE_DICT_TYPE) -> None:
        """Open and claim the directory, make this rank's plan of ``state_dict``.

        A planner of the program's own is not asked before the ranks agree to go by its plan: its
        hooks run once in a save.  Nothing where something has failed already: a claim would fence
        older saves.
        """
        writer = self.writer
        if self.error is not None:
            return
        self._state_dict = state_dict
        try:
            if self._planning is None:
                writer.set_up_storage_writer(
                    self.group.rank == self.group.coordinator_rank,
                    rank=self.group.rank,
                    use_collectives=self.use_collectives,
                )
            name = ".metadata" if self.use_collectives else f"__{self.group.rank}.metadata"
            self._metadata_path = os.path.abspath(os.path.join(writer.path, name))
            if self._native.open():
                self._check_overwrite()
            self._native.wait_for_orphan(ORPHAN_WAIT_S)
            self._native.claim()
            if self._planning is None:
                self._add(state_dict)
            elif not self.use_collectives:
                self._planning.make_local_plan(state_dict)
                self._planning.decide_alone()
        except BaseException as error:
            self.fail(error)

    @phase("flatten")
    def _add(self, state_dict: STATE_DICT_TYPE) -> None:
        writer, planner = self.writer, self.planner
        self._native.add(
            state_dict,
            rank=self.group.rank,
            thread_count=writer.thread_count,
            single_file_per_rank=writer.single_file_per_rank,
            flatten_state_dict=getattr(planner, "flatten_state_dict", True),
            flatten_sharded_tensors=getattr(planner, "flatten_sharded_tensors", True),
        )

    def _check_overwrite(self) -> None:
        overwrite = self.writer.overwrite
        if not overwrite:
            raise RuntimeError(f"Checkpoint already exists and self.{overwrite=}.")
        warnings.warn(
            f"Detected an existing checkpoint in {self.writer.path}, overwriting since "
            f"self.{overwrite=}. Past version 2.5 of PyTorch, `overwrite` will default to False. "
            "Set this variable to True to maintain this functionality or False to raise when an "
            "existing checkpoint is found.",
            stacklevel=7,
        )

    def write(self) -> None:
        """Write this rank's files; from here on nothing but the commit is missing."""
        if self.error is None:
            try:
                with self.clock("write"), self._progress():
                    self._native.write()
            except BaseException as error:
                self.fail(error)

    def _progress(self) -> Progress:
        return Progress(
            self.kind,
            self._native.progress,
            rank=self.group.rank,
            ranks_count=self.group.size,
            ranks_bytes=self._native.info()["ranks_bytes"],
            begin_ns=self.clock.begin_ns,
        )

    # ---- background saves ----

    @phase("agree")
    def meet(self) -> None:
        """Collective, once per group: which ranks share a host, and can watch each other."""
        if self.use_collectives and self.group.size > 1:
            self._native.meet()

    def meet_late(self) -> None:
        """After an interrupt: the others may wait in ``meet``, if they have gone that far."""
        if self._native.planned():
            try:
                self.meet()
            except BaseException as error:
                self.fail(error)

    @phase("stage")
    def stage(self, *, shared: bool, survive: bool, background: bool) -> str:
        """Build this rank's files in memory, so that the caller may go on.

        One that is to survive the trainer must be in memory: a rank that streams could not say
        when its files are whole.

        Args:
            background: where tensors lie on devices their copies are only begun: see
                :meth:`is_staging`.

        Returns:
            ``"arena"``; ``"streamed"`` where there is no memory for that: then they are written and
            durable on return.
        """
        if self.error is not None:
            return "failed"
        try:
            reason = self._native.stage(
                shared=shared, cap_bytes=config().arena_cap_bytes, background=background
            )
            if reason is None:
                return "arena"
            if survive:
                raise MemoryError(f"survive_trainer needs memory to stage in: {reason}")
            logger.warning("staging in the foreground instead of in memory: %s", reason)
        except BaseException as error:
            self.fail(error)
            return "failed"
        self.write()
        return "streamed"

    def is_staging(self) -> bool:
        """Whether tensors are still read: the upload copies them, and says when it has."""
        return self._native.is_staging()

    def warm_up(
        self,
        state_dict: STATE_DICT_TYPE,
        *,
        shared: bool,
        process: _native.WriterProcess | None,
    ) -> str | None:
        """Collective: plan as a save would, touch the memory it would take, keep no plan.

        Args:
            process: maps that memory as well.

        Returns:
            None, or why there is no memory for it, or what became of the process.
        """
        try:
            self._add(state_dict)
        except BaseException as error:
            self.fail(error)
        try:
            self.agree()
            self.meet()
            return self._native.warm_up(
                shared=shared,
                cap_bytes=config().arena_cap_bytes,
                arenas=config().arenas,
                process=process,
            )
        finally:
            # It was made without a directory: the first save must find out who shares it.
            self.group.forget_plan()

    def upload(self, watch: _native.Watch, **how: Any) -> None:
        """Write, agree and commit on threads of the core."""
        self._comm = self._comm_so_far()
        self.in_background = True
        try:
            self._native.upload(
                watch, failure=as_record(self.error), host_timeout_s=config().host_timeout_s, **how
            )
        except BaseException:  # an interrupt may also come when it has started
            self.in_background = self._is_uploading()
            raise

    def _is_uploading(self) -> bool:
        try:
            self._native.upload_state()
        except RuntimeError:
            return False
        return True

    def upload_state(self) -> str:
        """``"running"``, ``"settled"`` (there is a result) or ``"ended"``."""
        return self._native.upload_state()

    def upload_staged(self) -> bool:
        """Whether the tensors may change.  Raises once, then, what their copy met."""
        return self._native.upload_staged()

    def upload_result(self) -> list[tuple[int, Any]] | None:
        """None when it was committed, or what failed where."""
        return self._native.upload_result()

    def upload_stats(self) -> dict[str, Any]:
        """``writing``, ``settle_ns``; once ended also ``store_calls`` and ``in_touch``."""
        return self._native.upload_stats()

    def upload_left_s(self) -> float:
        """Seconds until the upload is to be expired."""
        return self._native.upload_left_s()

    def expire(self) -> None:
        """End an upload that is stuck behind its deadline."""
        self._native.expire()

    def cancel(self) -> bool:
        """Stop writing; False when there is nothing left to stop."""
        return self._native.cancel()

    def progress_bytes(self) -> int:
        """Payload bytes that the upload has handed to the disk."""
        return self._native.upload_progress()

    # ---- agreements ----

    @phase("agree")
    def agree(self) -> None:
        """Collective: every rank has a plan and knows what it keeps, or every rank raises."""
        if self.use_collectives:
            self._agree_with_the_others()
        elif self.error is None:
            try:
                self._native.agree(None)
            except BaseException as error:
                self.fail(error)
        self._state_dict = {}
        if self.error is None and self.kind != "warm_up":
            ranks = self.group.size if self.use_collectives else 1
            decides = self._native.info()["is_coordinator"]
            plan_installed(self.planner, self._plan_number, ranks, decides)

    def _agree_with_the_others(self) -> None:
        try:
            failures = self._native.agree(as_record(self.error))
        except BaseException as error:
            raise_alone("plan", self.group.rank, error, self._native.interrupt())
        raise_failures("plan", failures, self.group.rank, self.error, self._native.interrupt())
        info = self._native.info()
        if info["elsewhere"]:
            raise SavesElsewhere("the writer of another rank is not native")
        if not info["call_agrees"]:
            warnings.warn(
                "the ranks of this save were called differently: checkpoint id, kind of save, "
                "use_collectives, overwrite, base and config.broadcast_metadata must agree. This "
                f"rank's checkpoint id is {self.writer.path}, its base {self.base}; only the "
                "coordinator's directory is committed.",
                stacklevel=7,
            )
        if info["planned_outside"]:
            self._agree_in_python()

    def _agree_in_python(self) -> None:
        """A rank has a planner of its own: so the vote told all."""
        if self._planning is None:
            self._planning = self._python_planning()
        try:
            step = self._planning.decide(self._state_dict, self.fail)
            failures = self._native.settle(as_record(self.error))
        except BaseException as error:
            raise_alone("plan", self.group.rank, error, self._native.interrupt())
        raise_failures(step, failures, self.group.rank, self.error, self._native.interrupt())

    @phase("compare")
    def compare(self) -> None:
        """With a base, collective: what has not changed since is linked, not written."""
        if not self.use_collectives:
            if self.error is None:
                try:
                    self._native.compare(None)
                except BaseException as error:
                    self.fail(error)
            return
        try:
            failures = self._native.compare(as_record(self.error))
        except BaseException as error:
            raise_alone("plan", self.group.rank, error, self._native.interrupt())
        raise_failures("plan", failures, self.group.rank, self.error, self._native.interrupt())

    def leave(self, error: BaseException) -> None:
        """This rank breaks off with ``error``: let the others fail by name where they wait for it.

        Nothing is to be told after an agreement that failed: then all have heard of it.
        """
        self.fail(error)
        try:
            self._native.leave(as_record(error))
        except Exception as exchange_error:
            logger.warning("the other ranks could not be told of %r: %s", error, exchange_error)
        self.error = None  # its traceback holds this object

    def finish(self) -> Metadata:
        """Collective: commit, or every rank raises and the previous checkpoint is what it was."""
        try:
            with self.clock("commit"):
                failures = self._native.finish(as_record(self.error))
        except BaseException as error:
            raise_alone("write", self.group.rank, error, self._native.interrupt())
        if failures is not None and not self.use_collectives and self.error is not None:
            raise self.error
        raise_failures("write", failures, self.group.rank, self.error, self._native.interrupt())
        return self.result()

    def result(self, **facts: Any) -> Metadata:
        """Report a committed save, with ``facts`` more; its Metadata, not yet read."""
        info = self.info()
        report = {**self.facts(facts.get("settle_ns", 0)), **info, **facts}
        set_report(report)
        tell(report)
        self._warn_if_nothing_was_trained(info)
        if info["priority_failures"] > 0:
            _warn_of_priority()
        if self._planning is not None and self._planning.metadata is not None:
            return self._planning.metadata
        alone = self.group.size == 1
        keep = alone or config().broadcast_metadata or info["metadata_bytes"] <= KEPT_IMAGE_BYTES
        image = self._native.metadata() if keep else None
        return lazy_metadata(image, self._metadata_path, info["save_id"])

    def _warn_if_nothing_was_trained(self, info: dict[str, Any]) -> None:
        count = info["trainable_items"]
        if (
            info["is_coordinator"]
            and info["trainable_bytes"] > 0
            and info["trainable_unchanged"] == count
        ):
            logger.warning(
                "%s: not one of the %d trainable tensors that rank %d saves has changed since the "
                "checkpoint before; that is nearly always a bug in the trainer (an optimizer that "
                "never steps, a state dict taken from another model)",
                self.writer.path, count, self.group.rank,
            )  # fmt: skip

    def info(self) -> dict[str, Any]:
        """Facts of the native save, and over what its ranks agreed."""
        info = self._native.info()
        del info["elsewhere"]  # of a save that ended there
        direct = info.pop("direct_files_mask")
        info["files"] = [
            {
                "name": f"__{self.group.rank}_{n}.distcp",
                "bytes": length_bytes,
                "direct": bool(direct >> i & 1),
            }
            for i, (n, length_bytes) in enumerate(self._native.files()[:_LISTED_FILES])
        ]
        return {"comm": self.group.kind, "comm_reason": self.group.reason, **info}

    def facts(self, settle_ns: int = 0) -> dict[str, Any]:
        """Facts of the call around it, and of its background once that has ended."""
        info = self._native.info()
        phases = dict(self.clock.phases_ns)
        if self.in_background:
            phases.setdefault("write", info["write_ns"])
            phases["settle"] = settle_ns
        calls, sent_bytes, ns = self._comm or self._comm_so_far()
        return {
            **self.clock.facts(),
            "path": "native",
            "reason": None,
            **role_report(None, self._planner_reason, info["planned_outside"]),
            "total_ns": self.clock.total_ns,
            "phases": phases,
            "comm_calls_count": calls,
            "comm_bytes": sent_bytes,
            "comm_ns": ns,
            "peak_memory_bytes": _native.peak_bytes(),
        }

    def _comm_so_far(self) -> tuple[int, ...]:
        pairs = zip(self.group.comm_stats(), self._comm_before, strict=True)
        return tuple(now - before for now, before in pairs)

    def agreed(self) -> bool:
        """Whether every rank is past planning: a background save has no collective left."""
        return self._native.agreed()

    def interrupt(self) -> BaseException | None:
        """What a signal handler raised during a step of this save, if any."""
        if isinstance(self.error, (KeyboardInterrupt, SystemExit)):
            return self.error
        return self._native.interrupt()
