"""A reader of checkpoints written from docs/format.md alone: neither torch nor dcp_native.

``Checkpoint(directory)`` checks everything that the document says can be checked; `array` gives a
tensor's bytes, row major, and `value` an object.  Numbers, never types, of torch: a dtype is its
name.  ``python format_reader.py DIRECTORY`` lists what a checkpoint holds, as JSON.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import pickle
import struct
import sys
import zlib
from pathlib import Path

DTYPES: dict[int, tuple[str, int]] = {
    1: ("uint8", 1), 2: ("int8", 1), 3: ("int16", 2), 4: ("int32", 4), 5: ("int64", 8),
    6: ("float16", 2), 7: ("float32", 4), 8: ("float64", 8), 9: ("complex64", 8),
    10: ("complex128", 16), 11: ("bool", 1), 12: ("bfloat16", 2), 13: ("complex32", 4),
    14: ("uint16", 2), 15: ("uint32", 4), 16: ("uint64", 8), 17: ("float8_e4m3fn", 1),
    18: ("float8_e4m3fnuz", 1), 19: ("float8_e5m2", 1), 20: ("float8_e5m2fnuz", 1),
    21: ("float8_e8m0fnu", 1), 22: ("float4_e2m1fn_x2", 1), 23: ("bits8", 1), 24: ("bits16", 2),
    25: ("bits1x8", 1), 26: ("bits2x4", 1), 27: ("bits4x2", 1), 28: ("bcomplex32", 4),
    29: ("qint8", 1), 30: ("quint8", 1), 31: ("qint32", 4),
}  # fmt: skip
"""Number -> name and bytes of an element."""
WIDTHS = dict(DTYPES.values())
STORAGES = dict(
    uint8="Byte", int8="Char", int16="Short", int32="Int", int64="Long", float16="Half",
    float32="Float", float64="Double", complex64="ComplexFloat", complex128="ComplexDouble",
    bool="Bool", bfloat16="BFloat16",
)  # fmt: skip
BLOCK = 1 << 20
TENSOR, OBJECT = 1, 3


class Damaged(Exception):
    """The bytes contradict docs/format.md."""


def need(condition: object, what: str) -> None:
    if not condition:
        raise Damaged(what)


def align(n: int, to: int) -> int:
    return -(-n // to) * to


# ---- .metadata ----


@dataclasses.dataclass
class Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: int  # -1: none
    offset: int
    length: int
    transforms: bool


@dataclasses.dataclass
class Entry:
    name: str
    kind: int
    dtype: str  # "" of objects
    props: int
    size: tuple[int, ...]
    chunks: list[Chunk]

    @property
    def element_bytes(self) -> int:
        return WIDTHS[self.dtype]


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        need(self.at + n <= len(self.data), "cut short")
        self.at += n
        return self.data[self.at - n : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            b = self.byte()
            value |= (b & 0x7F) << shift
            if b < 0x80:
                return value
        raise Damaged("a varint without end")


def read_index(data: bytes) -> tuple[list[Entry], list[str]]:
    b = Bytes(data)
    entries_count, chunks_count, dims_count, files_count, strings_bytes = (
        b.varint() for _ in range(5)
    )
    strings = Bytes(b.take(strings_bytes))
    entries, ends = [], [0] * files_count
    file, length, dims_seen = -1, 0, 0
    for _ in range(entries_count):
        name = strings.take(b.varint()).decode()
        kind, dtype, props, ndim = b.byte(), b.byte(), b.byte(), b.byte()
        count = b.varint()
        size = tuple(b.varint() for _ in range(ndim))
        chunks: list[Chunk] = []
        for _ in range(count):
            head = b.byte()
            need(head < 128, "an unknown bit of a chunk's head")
            if head & 2:
                file = b.varint() - 1
            elif head & 4:
                file += 1
            where = b.varint()
            if file >= 0:
                where = ends[file] + (where >> 1 if where % 2 == 0 else -(where + 1 >> 1))
                where %= 1 << 64
            length = length if head & 8 else b.varint()
            if head & 16:
                offsets, sizes = (0,) * ndim, size
            else:
                if head & 32:
                    last = chunks[-1]
                    offsets = (last.offsets[0] + last.sizes[0], *last.offsets[1:])
                else:
                    offsets = tuple(b.varint() for _ in range(ndim))
                sizes = chunks[-1].sizes if head & 64 else tuple(b.varint() for _ in range(ndim))
            if file >= 0:
                ends[file] = where + length
            chunks.append(Chunk(offsets, sizes, file, where, length, bool(head & 1)))
        dims_seen += ndim * (1 + 2 * count)
        dtype_name = DTYPES[dtype][0] if kind == TENSOR else ""
        entries.append(Entry(name, kind, dtype_name, props, size, chunks))
    files = [strings.take(b.varint()).decode() for _ in range(files_count)]
    need(sum(len(e.chunks) for e in entries) == chunks_count, "chunks are miscounted")
    need(dims_seen == dims_count, "dims are miscounted")
    need(b.at == len(data) and strings.at == strings_bytes, "bytes are left over in the index")
    return entries, files


# ---- content hash ----


def _keys() -> tuple[list[int], int]:
    state, numbers, mask = 0x6463705F68617368, [], (1 << 64) - 1
    for _ in range(538):
        state = state + 0x9E3779B97F4A7C15 & mask
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        numbers.append(z ^ z >> 31)
    return numbers[:536], numbers[536] | numbers[537] >> 1 << 64


KEYS, POINT = _keys()


def content_hash(data: bytes) -> int:
    p, low32, h = (1 << 127) - 1, (1 << 32) - 1, 1
    for at in range(0, len(data), 4096):
        block = data[at : at + 4096]
        block += bytes(align(len(block), 64) - len(block))
        words = struct.unpack(f"<{len(block) // 4}I", block)
        sums = []
        for q in range(4):
            keys = KEYS[8 * q : 8 * q + len(words) // 2]
            sums.append(
                sum(
                    (a + k & low32) * (b + (k >> 32) & low32)
                    for a, b, k in zip(words[::2], words[1::2], keys, strict=True)
                )
                % (1 << 64)
            )
        h = (h + sums[0] + (sums[1] << 64)) * POINT % p
        h = (h + sums[2] + (sums[3] << 64)) * POINT % p
    return (h + len(data)) * POINT % p


# ---- data files ----


def frame_crc(data: bytes) -> int:
    return zlib.crc32(data[12:], zlib.crc32(data[:8]))


class DataFile:
    def __init__(self, path: Path) -> None:
        self.path, self.data = path, path.read_bytes()
        magic, version, crc, self.rank = struct.unpack_from("<4s3I", self.data)
        need(magic == b"\x89DCP" and version == 1, "no data file")
        need(crc == frame_crc(self.data[:64]), "CRC of the header")
        self.save_id = self.data[16:32]
        self.n, flags, self.length, table_at, table_bytes = struct.unpack_from(
            "<2I3Q", self.data, 32
        )
        self.planned_outside = bool(flags & 2)
        need(len(self.data) >= self.length, "cut short")
        self.blocks = self._block_table(self.data[table_at : table_at + table_bytes])
        self.hashes: dict[int, tuple[int, int]] = {}
        self.records_end = table_at
        if flags & 1:
            self.hashes = self._hash_table(
                self.data[align(table_at + table_bytes, 8) : self.length]
            )

    def _table(self, table: bytes, magic: bytes) -> int:
        found, version, crc, count = struct.unpack_from("<4s3I", table)
        need(found == magic and version == 1 and crc == frame_crc(table), "a damaged table")
        need(table[16:32] == self.save_id, "another save's table")
        return count

    def _block_table(self, table: bytes) -> dict[int, tuple[int, int, list[int]]]:
        if not table:
            return {}
        count = self._table(table, b"\x89DCB")
        at = 40 + 24 * count
        blocks: dict[int, tuple[int, int, list[int]]] = {}
        for i in range(count):
            payload_at, payload_bytes, crc, zero = struct.unpack_from("<2Q2I", table, 40 + 24 * i)
            n = align(payload_bytes, BLOCK) // BLOCK
            blocks[payload_at] = payload_bytes, crc, list(struct.unpack_from(f"<{n}I", table, at))
            at += 4 * n
            need(zero == 0, "no zero in an entry of the block table")
        need(len(table) == align(at, 8) and not any(table[at:]), "length of the block table")
        need(struct.unpack_from("<Q", table, 32)[0] == (at - 40 - 24 * count) // 4, "blocks")
        need(list(blocks) == sorted(blocks), "order of the block table")
        return blocks

    def _hash_table(self, table: bytes) -> dict[int, tuple[int, int]]:
        count = self._table(table, b"\x89DCH")
        need(len(table) == 32 + 32 * count, "length of the hash table")
        hashes = {}
        for i in range(count):
            at, record_bytes, low, high = struct.unpack_from("<4Q", table, 32 + 32 * i)
            hashes[at] = record_bytes, low | high << 64
        need(list(hashes) == sorted(hashes), "order of the hash table")
        return hashes


# ---- records ----


def put_local(name: bytes, size: int, crc: int, descriptor: bool) -> bytes:
    big = size >= 0xFFFFFFFF
    known = 0 if descriptor else size
    return struct.pack(
        "<I5H3I2H", 0x04034B50, 45 if big else 0, 0x0808 if descriptor else 0x0800, 0, 0, 0,
        0 if descriptor else crc, *[0xFFFFFFFF if big else known] * 2, len(name), 20 if big else 0,
    ) + name + (struct.pack("<2H2Q", 1, 16, known, known) if big else b"")  # fmt: skip


def put_central(name: bytes, size: int, crc: int, descriptor: bool, offset: int) -> bytes:
    wide = [size, size] if size >= 0xFFFFFFFF else []
    wide += [offset] if offset >= 0xFFFFFFFF else []
    version = 45 if wide else 0
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    short = min(size, 0xFFFFFFFF)
    return struct.pack(
        "<I6H3I5H2I", 0x02014B50, version, version, 0x0808 if descriptor else 0x0800, 0, 0, 0,
        crc, short, short, len(name), len(extra), 0, 0, 0, 0, min(offset, 0xFFFFFFFF),
    ) + name + extra  # fmt: skip


def central_entries(zip_: bytes) -> list[tuple[str, bytes, int]]:
    """Name, content and CRC of every entry of a record of less than 4 GiB."""
    at = zip_.rindex(b"PK\5\6")
    count, _, start = struct.unpack_from("<H2I", zip_, at + 10)
    entries = []
    for _ in range(count):
        fields = struct.unpack_from("<I6H3I5H2I", zip_, start)
        need(fields[0] == 0x02014B50 and fields[4] == 0, "a directory entry")
        crc, size, name_len, extra_len, comment_len = (
            fields[7], fields[9], *fields[10:13],
        )  # fmt: skip
        name = zip_[start + 46 : start + 46 + name_len].decode()
        local = fields[-1]
        data = local + 30 + sum(struct.unpack_from("<2H", zip_, local + 26))
        entries.append((name, zip_[data : data + size], crc))
        start += 46 + name_len + extra_len + comment_len
    return entries


class _Opaque:
    """Stands for every class and function that a pickle names; remembers what it was given."""

    def __init__(self, *args: object) -> None:
        self.args, self.state = args, None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        return type(name, (_Opaque,), {"path": f"{module}.{name}"})

    def persistent_load(self, pid: object) -> object:
        return pid


def unpickle(data: bytes) -> object:
    """The value; `_Opaque` objects for what is not builtin, so that no code of its runs."""
    return _Unpickler(io.BytesIO(data)).load()


def tensor_of(data_pkl: bytes) -> tuple[str, tuple, tuple, int]:
    """dtype, sizes, strides and storage offset that a record's data.pkl says."""
    call = unpickle(data_pkl)
    storage, offset, sizes, strides, _grad, _hooks, *dtype = call.args
    kind, cls, key, device, count = storage
    need((kind, key, device) == ("storage", "0", "cpu"), "a storage that is not ours")
    if dtype:
        need(type(call).__name__ == "_rebuild_tensor_v3", "a v2 tensor with a dtype")
        name = dtype[0].path.removeprefix("torch.")
        need(cls.path == "torch.storage.UntypedStorage", "a v3 tensor of a typed storage")
    else:
        need(type(call).__name__ == "_rebuild_tensor_v2", "a v3 tensor without a dtype")
        name = next(n for n, s in STORAGES.items() if cls.path == f"torch.{s}Storage")
    width = WIDTHS[name]
    need(count == math.prod(sizes) * (width if dtype else 1), "the storage's count")
    return name, sizes, strides, offset


# ---- the checkpoint ----


class Checkpoint:
    """A directory, with every check of docs/format.md done."""

    def __init__(self, directory: str | Path, metadata: str = ".metadata") -> None:
        self.directory = Path(directory)
        image = (self.directory / metadata).read_bytes()
        magic, version, flags, accepted = struct.unpack_from("<8s2HI", image, len(image) - 64)
        need(magic == b"\x89DCPNMD\n" and version == 2 and flags < 2, "no footer of ours")
        pickle_bytes, index_bytes, pickle_crc, index_crc = struct.unpack_from(
            "<2Q2I", image, len(image) - 48
        )
        self.save_id = image[-24:-8]
        ids_crc, crc = struct.unpack("<2I", image[-8:])
        need(crc == zlib.crc32(image[-64:-4]), "CRC of the footer")
        need(pickle_bytes + index_bytes + 16 * accepted + 64 == len(image), "lengths")
        self.pickle = image[:pickle_bytes]
        index = image[pickle_bytes : pickle_bytes + index_bytes]
        ids = image[pickle_bytes + index_bytes : -64]
        need(zlib.crc32(self.pickle) == pickle_crc, "CRC of the pickle")
        need(zlib.crc32(index) == index_crc, "CRC of the index")
        need(zlib.crc32(ids) == ids_crc, "CRC of the accepted save ids")
        self.accepted = [ids[i : i + 16] for i in range(0, len(ids), 16)]
        need(self.accepted == sorted(set(self.accepted) - {self.save_id}), "order of the ids")
        entries, names = read_index(index)
        self.entries = {e.name: e for e in entries}
        self.files = [self._open(name) for name in names]
        for entry in entries:
            self._check_entry(entry)
        for file in self.files:
            self._check_spaces(file)

    def _open(self, name: str) -> DataFile:
        file = DataFile(self.directory / name)
        need(file.save_id in (self.save_id, *self.accepted), f"{name} is another save's")
        own = file.save_id == self.save_id
        need(not own or name == f"__{file.rank}_{file.n}.distcp", f"{name} was renamed")
        return file

    def _check_entry(self, entry: Entry) -> None:
        if entry.kind == OBJECT:
            (chunk,) = entry.chunks
            for name, content, crc in central_entries(self.record(chunk)):
                need(zlib.crc32(content) == crc, f"CRC of {name} of {entry.name}")
            self._check_hash(chunk, self.record(chunk))
            return
        volume = 0
        for chunk in entry.chunks:
            ends = [o + s for o, s in zip(chunk.offsets, chunk.sizes, strict=True)]
            need(all(e <= s for e, s in zip(ends, entry.size, strict=True)), "a box outside")
            volume += math.prod(chunk.sizes)
            self._check_tensor(entry, chunk)
        need(volume == math.prod(entry.size), f"{entry.name} is not filled")

    def record(self, chunk: Chunk) -> bytes:
        return self.files[chunk.file].data[chunk.offset : chunk.offset + chunk.length]

    def payload(self, entry: Entry, chunk: Chunk) -> bytes:
        size = math.prod(chunk.sizes) * entry.element_bytes
        head = 64 if size >= 0xFFFFFFFF else 44
        return self.record(chunk)[head : head + size]

    def _check_tensor(self, entry: Entry, chunk: Chunk) -> None:
        payload, file = self.payload(entry, chunk), self.files[chunk.file]
        crc = zlib.crc32(payload)
        crcs = [zlib.crc32(payload[at : at + BLOCK]) for at in range(0, len(payload), BLOCK)]
        need(self.record(chunk) == self._frame(entry, chunk, payload, crc, crcs), "a frame")
        data_pkl = dict((n, c) for n, c, _ in central_entries(self.record(chunk)))
        dtype, sizes, strides, offset = tensor_of(data_pkl["archive/data.pkl"])
        want = [math.prod(max(s, 1) for s in sizes[d + 1 :]) for d in range(len(sizes))]
        need((dtype, sizes, offset) == (entry.dtype, chunk.sizes, 0), "what data.pkl says")
        need(list(strides) == want, "strides")
        at = chunk.offset + 44
        if len(payload) > BLOCK:
            need(file.blocks[at] == (len(payload), crc, crcs), "the block table's entry")
        self._check_hash(chunk, payload)
        to = 4096 if len(payload) >= BLOCK else 512 if len(payload) >= 65536 else 1
        need(at % to == 0, "alignment")

    def _check_hash(self, chunk: Chunk, content: bytes) -> None:
        hashes = self.files[chunk.file].hashes
        if hashes:
            need(hashes[chunk.offset] == (chunk.length, content_hash(content)), "content hash")

    def _frame(self, entry: Entry, chunk: Chunk, payload: bytes, crc: int, crcs: list) -> bytes:
        """The whole record, made from shape, dtype and checksums."""
        size = len(payload)
        data_pkl = dict((n, c) for n, c, _ in central_entries(self.record(chunk)))
        parts = [(b"archive/data/0", payload, crc), (b"archive/data.pkl",
            data_pkl["archive/data.pkl"], None), (b"archive/version", b"3\n", None),
            (b"archive/byteorder", b"little", None)]  # fmt: skip
        if size > BLOCK:
            parts.append((b"archive/blocks", struct.pack(f"<{len(crcs)}I", *crcs), None))
        out, directory = b"", b""
        for name, content, known in parts:
            check = zlib.crc32(content) if known is None else known
            streamed = name == b"archive/data/0" and size > 0
            directory += put_central(name, len(content), check, streamed, len(out))
            out += put_local(name, len(content), check, streamed) + content
            if streamed:
                out += struct.pack("<4I", 0x08074B50, check, size, size)
        end = struct.pack(
            "<I4H2IH", 0x06054B50, 0, 0, len(parts), len(parts), len(directory), len(out), 0
        )
        return out + directory + end

    def _check_spaces(self, file: DataFile) -> None:
        """What no record covers, before the tables, is zeros."""
        number = self.files.index(file)
        chunks = [c for e in self.entries.values() for c in e.chunks if c.file == number]
        at = 64
        for chunk in sorted(chunks, key=lambda c: c.offset):
            need(chunk.offset >= at, "records overlap")
            if file.save_id == self.save_id:
                need(not any(file.data[at : chunk.offset]), "a gap that is not zero")
            at = chunk.offset + chunk.length
        if file.save_id == self.save_id:
            need(not any(file.data[at : file.records_end]), "a gap that is not zero")

    # ---- values ----

    def array(self, name: str) -> bytes:
        """A tensor's bytes, row major, put together from its chunks."""
        entry = self.entries[name]
        width, out = entry.element_bytes, bytearray(math.prod(entry.size) * entry.element_bytes)
        for chunk in entry.chunks:
            payload, at = self.payload(entry, chunk), 0
            run = (chunk.sizes[-1] if chunk.sizes else 1) * width
            for rows in itertools.product(*(range(s) for s in chunk.sizes[:-1])):
                place = 0
                index = (*rows, 0) if chunk.sizes else ()
                for i, o, size in zip(index, chunk.offsets, entry.size, strict=True):
                    place = place * size + i + o
                out[place * width : place * width + run] = payload[at : at + run]
                at += run
        return bytes(out)

    def value(self, name: str) -> object:
        """An object; of classes that are not builtins a stand-in."""
        contents = central_entries(self.record(self.entries[name].chunks[0]))
        return unpickle(next(c for n, c, _ in contents if n.endswith("/data.pkl")))


def main() -> None:
    checkpoint = Checkpoint(sys.argv[1])
    listing = {
        name: {"dtype": e.dtype, "size": e.size, "crc": zlib.crc32(checkpoint.array(name))}
        if e.kind == TENSOR
        else {"value": repr(checkpoint.value(name))}
        for name, e in checkpoint.entries.items()
    }
    print(json.dumps(listing))


if __name__ == "__main__":
    main()
