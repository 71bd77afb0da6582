"""The Metadata that save returns, on every rank: lazy, read alone, or shared when asked for."""

from __future__ import annotations

import pickle
import shutil
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from common import gather_all, mesh_of, shard, value
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.tensor import Shard

import dcp_native as dcp
from dcp_native import _lazy_metadata
from dcp_native._lazy_metadata import LazyMetadata


def state(ctx):
    return {"w": shard(value("w", (8, 3)), mesh_of(ctx.size), Shard(0)), "step": 4}


class Counted:
    """Counts what _lazy_metadata unpickles, and where it takes it from."""

    def __enter__(self):
        self.images, self.files = 0, 0
        self._read, _lazy_metadata._read = _lazy_metadata._read, self.read
        _lazy_metadata.pickle = self
        return self

    def __exit__(self, *unused):
        _lazy_metadata.pickle, _lazy_metadata._read = pickle, self._read

    def read(self, path, save_id):
        self.files += 1
        return self._read(path, save_id)

    def loads(self, image):
        self.images += 1
        return pickle.loads(image)


def untouched(metadata):
    return type(metadata) is LazyMetadata


def case_every_rank_has_torchs_metadata_and_reads_it_when_touched(ctx):
    theirs = torch_dcp.save(state(ctx), checkpoint_id=ctx.dir / "torch")
    with Counted() as counted:
        ours = dcp.save(state(ctx), checkpoint_id=ctx.dir / "ours")
        assert untouched(ours) and isinstance(ours, Metadata)
        again = dcp.save(state(ctx), checkpoint_id=ctx.dir / "ours")
        async_ = dcp.async_save(state(ctx), checkpoint_id=ctx.dir / "async").result()
        assert untouched(ours) and untouched(again) and untouched(async_)
    assert counted.images == counted.files == 0
    for metadata in (again, async_):
        assert metadata.state_dict_metadata == theirs.state_dict_metadata
        assert set(metadata.storage_data) == set(theirs.storage_data)
        assert type(pickle.loads(pickle.dumps(metadata))) is Metadata
    same = gather_all(again)
    assert all(one == same[0] for one in same)


def case_touching_it_on_one_rank_needs_no_other(ctx):
    """The others are in a collective of the application meanwhile."""
    metadata = dcp.save(state(ctx), checkpoint_id=ctx.dir)
    for rank in range(ctx.size):
        if ctx.rank == rank:
            assert metadata.version and not untouched(metadata)
        else:
            assert untouched(metadata) or ctx.rank < rank
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == ctx.size


def case_a_replaced_checkpoint_is_refused_where_there_is_no_image(ctx):
    first = dcp.save(state(ctx), checkpoint_id=ctx.dir / "x")
    second = dcp.save(state(ctx), checkpoint_id=ctx.dir / "x")
    last = dcp.save(state(ctx), checkpoint_id=ctx.dir / "x")
    ctx.barrier()
    if ctx.rank == 0:
        assert first.version == second.version
    else:
        for look in (repr, pickle.dumps, lambda m: m == second, lambda m: m.version):
            refused(look, first, "now belongs to another save")
    ctx.barrier()
    if ctx.rank == 0:
        shutil.rmtree(ctx.dir / "x")
    ctx.barrier()
    if ctx.rank == 0:
        assert last.version
    else:
        refused(repr, last, "was removed")


def refused(look, metadata, text):
    try:
        look(metadata)
    except RuntimeError as error:
        assert text in str(error), error
    else:
        raise AssertionError("not refused")


def case_without_collectives_every_rank_holds_its_own(ctx):
    before = dcp.save(state(ctx), checkpoint_id=ctx.dir / "x", use_collectives=False)
    theirs = torch_dcp.save(state(ctx), checkpoint_id=ctx.dir / "t", use_collectives=False)
    dcp.save({"other": ctx.rank}, checkpoint_id=ctx.dir / "x", use_collectives=False)
    ctx.barrier()
    if ctx.rank == 0:
        shutil.rmtree(ctx.dir / "x")
    ctx.barrier()
    assert before.state_dict_metadata == theirs.state_dict_metadata


def with_broadcast(on, ctx, **options):
    """(Metadata of a save with the setting ``on`` here, texts of the warnings it gave)"""
    dcp.configure(broadcast_metadata=on)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            metadata = dcp.save(state(ctx), checkpoint_id=ctx.dir / "x", **options)
    finally:
        dcp.configure(broadcast_metadata=False)
    texts = [str(w.message) for w in caught]
    return metadata, [text for text in texts if "called differently" in text]


def case_broadcast_metadata_gives_every_rank_the_image(ctx):
    """Planned anew, by the installed plan, and over another group."""
    kept = []
    for options in ({}, {}, {"process_group": dist.new_group(list(range(ctx.size)))}):
        metadata, texts = with_broadcast(True, ctx, **options)
        assert untouched(metadata) and not texts
        kept.append(metadata)
    ctx.barrier()
    plain = torch_dcp.FileSystemReader(ctx.dir / "x").read_metadata()
    plain.storage_meta.load_id = None
    ctx.barrier()
    if ctx.rank == 0:
        shutil.rmtree(ctx.dir / "x")
    ctx.barrier()
    assert kept[2] == plain
    for metadata in kept[:2]:  # replaced long since
        assert metadata.state_dict_metadata == plain.state_dict_metadata


def case_ranks_that_disagree_on_broadcast_metadata_save_all_the_same(ctx):
    for asking in range(ctx.size):
        metadata, texts = with_broadcast(ctx.rank == asking, ctx)
        assert len(texts) == 1 and "config.broadcast_metadata must agree" in texts[0], texts
        with Counted() as counted:
            assert metadata.version
        assert counted.files == (0 if ctx.rank == 0 else 1)
        ctx.barrier()
    metadata, texts = with_broadcast(False, ctx)
    assert not texts and metadata.version


def case_a_background_save_does_not_broadcast(ctx):
    dcp.configure(broadcast_metadata=True)
    try:
        metadata = dcp.async_save(state(ctx), checkpoint_id=ctx.dir).result()
    finally:
        dcp.configure(broadcast_metadata=False)
    with Counted() as counted:
        assert metadata.version
    assert counted.files == (0 if ctx.rank == 0 else 1)
