/*
 * metadata_index.h: the flat form as bytes, behind the pickle in a `.metadata` of ours (private to
 * metadata_index_encode.c and metadata_index_decode.c).
 *
 *     entries, chunks, dims, files, strings: counts (varint each)
 *     the strings: names of all entries, then of all files, without gaps
 *     per entry: name length | kind, dtype, props, ndim (a byte each) | chunks | size
 *     per chunk: head byte | [file + 1] | where | [length] | [box offsets] | [box sizes]
 *     per file: name length
 *
 * Numbers are LEB128, and a chunk says only what is new (enum chunk_head): shards follow each other
 * along the first dimension and from file to file, records follow each other in a file.  So `where`
 * is the distance from the end of the file's record before (zigzag), or the offset itself where
 * there is no file.  256,000 chunks take 1 MB where the arrays take 16, and decoding costs less
 * than reading the difference.  Positions (first chunk, index in dims, offset in strings) are not
 * stored; they follow from the order, so no stored number can point out of bounds, and every count
 * is checked against the bytes that are left before anything is allocated for it.
 */
#ifndef DCP_CORE_METADATA_INDEX_H
#define DCP_CORE_METADATA_INDEX_H

#include "metadata_private.h"

/* Boxes of more dimensions are spelled out, so that dims, too, are bounded by bytes: a chunk of two
 * bytes stands for 16 of them at most. */
enum { SHORT_BOX_DIMS = 8 };

enum chunk_head {
    HEAD_TRANSFORMS = 1 << 0,
    HEAD_SPELLED_FILE = 1 << 1, /* else that of the chunk before */
    HEAD_NEXT_FILE = 1 << 2,    /* that of the chunk before, and one */
    HEAD_SAME_LENGTH = 1 << 3,  /* as the chunk before */
    HEAD_WHOLE = 1 << 4,        /* the box is the whole tensor */
    HEAD_NEXT_ROWS = 1 << 5,    /* it begins where the one before of this entry ends, along dim 0 */
    HEAD_SAME_SIZES = 1 << 6,   /* its sizes are that one's */
    HEAD_ALL = (1 << 7) - 1,
};

/* What both sides know when they come to a chunk. */
struct known {
    uint32_t file;         /* of the chunk before */
    uint64_t length_bytes; /* of the chunk before */
    uint64_t *ends;        /* owned, per file: where its last record so far ends */
};

int dcp_index_known_init(struct known *known, uint64_t files_count,
                         struct dcp_error *err) DCP_MUST_CHECK;

static inline void
known_add(struct known *known, const struct dcp_md_chunk *chunk)
{
    known->file = chunk->file;
    known->length_bytes = chunk->length_bytes;
    if (chunk->file != DCP_NO_FILE) {
        known->ends[chunk->file] = chunk->offset_bytes + chunk->length_bytes;
    }
}

#endif
