/*
 * export_join.c: tensors of an export put together from shard files.
 *
 * The output decides the order: it is filled front to back, in windows of at most a few MiB that
 * are boxes of the tensor and, because a window's leading dims are fixed and its trailing ones
 * whole, one range of the output.  For the same reason what a chunk gives to a window is one range
 * of the chunk's file: whatever dim was sharded, reads and writes are long.  A window that one
 * chunk covers is read straight into the writer's buffer; else the parts are read one by one into a
 * buffer of their own and copied to their places in the window.
 *
 * Chunks are told by files of others and are checked against the sizes of the tensor and of the
 * file before a byte moves.
 *
 * Threads: reading and copying on the caller's, writing on the stream's.
 */
#include "export.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "box.h"
#include "box_cover.h"
#include "plan_private.h"

/* Two of these beside the ring of buffers keep all memory below 64 MiB. */
static const uint64_t WINDOW_BYTES = 8u << 20;

struct join {
    struct dcp_export run;
    struct dcp_export_dir from;
    const struct dcp_export_sources *sources;
    int *fds;              /* per source */
    uint64_t *sizes_bytes; /* per source */
    uint8_t *window;       /* WINDOW_BYTES, then as much for a part of a chunk */
    uint64_t read_bytes;
};

/* A box [offsets, offsets + lengths) of a tensor. */
struct part {
    uint64_t offsets[DCP_MAX_DIMS], lengths[DCP_MAX_DIMS];
    uint64_t items;
};

static void
sources_close(struct join *join)
{
    const struct dcp_io *io = join->from.io;
    for (uint32_t i = 0; join->fds != NULL && i < join->sources->count; i++) {
        if (join->fds[i] >= 0) {
            io->close(io->ctx, join->fds[i]);
        }
    }
    dcp_free(join->fds);
    dcp_free(join->sizes_bytes);
    dcp_export_dir_close(&join->from);
}

static int
sources_open(struct join *join, const struct dcp_io *io, struct dcp_error *err)
{
    uint32_t count = join->sources->count;
    int rc = dcp_export_dir_open(&join->from, io, join->sources->dir_path, err);
    if (rc != 0) {
        return rc;
    }
    join->fds = dcp_malloc_array((size_t)count + 1, sizeof *join->fds);
    join->sizes_bytes = dcp_calloc((size_t)count + 1, sizeof *join->sizes_bytes);
    if (join->fds == NULL || join->sizes_bytes == NULL) {
        dcp_free(join->fds);
        join->fds = NULL;
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for files to join");
    }
    for (uint32_t i = 0; i < count; i++) {
        join->fds[i] = -1;
    }
    for (uint32_t i = 0; i < count; i++) {
        const char *name = join->sources->names[i];
        struct dcp_stat stat = {0};
        do {
            join->fds[i] = io->open_at(io->ctx, join->from.fd, name, O_RDONLY, 0);
        } while (join->fds[i] == -EINTR);
        rc = join->fds[i] < 0 ? dcp_export_fail(&join->from, name, -join->fds[i], "opening", err)
                              : dcp_export_fstat(&join->from, join->fds[i], name, &stat, err);
        if (rc != 0) {
            return rc;
        }
        join->sizes_bytes[i] = stat.size_bytes;
    }
    return 0;
}

static int
read_range(struct join *join, uint32_t source, uint64_t offset, uint8_t *to, uint64_t len,
           struct dcp_error *err)
{
    char path[DCP_ERROR_PATH_BYTES];
    snprintf(path, sizeof path, "%s/%s", join->from.path, join->sources->names[source]);
    join->read_bytes += len;
    return dcp_io_read_all(join->from.io, join->fds[source], to, (size_t)len, offset, path, err);
}

/* ---- what chunks must be ---- */

static int
damaged(const struct dcp_export_tensor *tensor, const char *what, const char *file,
        struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_CORRUPT, 0, file, "joining %s from %s: %s", tensor->name, file,
                         what);
}

static int
check_chunk(const struct join *join, const struct dcp_export_tensor *tensor,
            const struct dcp_export_chunk *chunk, struct dcp_error *err)
{
    if (chunk->source >= join->sources->count) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL, "joining %s: a chunk is in no file",
                             tensor->name);
    }
    const char *file = join->sources->names[chunk->source];
    for (uint32_t d = 0; d < tensor->ndim; d++) {
        uint64_t end;
        if (dcp_add_overflows_u64(chunk->box[d], chunk->box[tensor->ndim + d], &end) ||
            end > tensor->sizes[d]) {
            return damaged(tensor, "the shard does not lie in the tensor", file, err);
        }
    }
    /* No more elements than the tensor, whose bytes were checked. */
    uint64_t len = dcp_volume_of(chunk->box + tensor->ndim, tensor->ndim) * tensor->item_bytes, end;
    if (dcp_add_overflows_u64(chunk->offset_bytes, len, &end) ||
        end > join->sizes_bytes[chunk->source]) {
        return damaged(tensor, "the file ends before the shard does; it is cut short", file, err);
    }
    return 0;
}

/* A hole would be published as zeros. */
static int
check_cover(const struct dcp_export_tensor *tensor, uint64_t volume, struct dcp_error *err)
{
    uint32_t width = 2 * tensor->ndim;
    uint64_t *numbers =
        dcp_malloc_array((size_t)tensor->chunks_count + 1, (width + 1) * sizeof *numbers);
    if (numbers == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for the shards of a tensor");
    }
    struct dcp_box_list list = {.numbers = numbers, .ndim = tensor->ndim};
    for (uint64_t i = 0; i < tensor->chunks_count; i++) {
        if (dcp_volume_of(tensor->chunks[i].box + tensor->ndim, tensor->ndim) > 0) {
            memcpy(numbers + list.boxes_count * width, tensor->chunks[i].box,
                   width * sizeof *numbers);
            list.boxes_count++;
        }
    }
    uint64_t covered = 0;
    int rc = dcp_boxes_union_volume(&list, &covered, err);
    dcp_free(numbers);
    if (rc == 0 && covered != volume) {
        rc = dcp_error_set(err, DCP_E_HOLE, 0, NULL,
                           "joining %s: the shard files have %" PRIu64 " of its %" PRIu64
                           " elements; a shard file is missing",
                           tensor->name, covered, volume);
    }
    return rc;
}

static int
check_tensor(const struct join *join, const struct dcp_export_tensor *tensor,
             const struct dcp_export_file *files, uint32_t files_count, struct dcp_error *err)
{
    uint64_t volume = tensor->ndim > DCP_MAX_DIMS ? 0 : dcp_volume_of(tensor->sizes, tensor->ndim);
    uint64_t bytes, end;
    if (tensor->file >= files_count || tensor->ndim > DCP_MAX_DIMS || tensor->item_bytes == 0 ||
        tensor->item_bytes > 16 || dcp_mul_overflows_u64(volume, tensor->item_bytes, &bytes) ||
        dcp_add_overflows_u64(tensor->offset_bytes, bytes, &end) ||
        end > files[tensor->file].length_bytes) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "joining %s: its place is not in the file", tensor->name);
    }
    for (uint64_t i = 0; i < tensor->chunks_count; i++) {
        int rc = check_chunk(join, tensor, &tensor->chunks[i], err);
        if (rc != 0) {
            return rc;
        }
    }
    return volume == 0 ? 0 : check_cover(tensor, volume, err);
}

/* ---- windows ---- */

/* The largest window that begins at element `from` of the tensor. */
static void
window_at(const struct dcp_export_tensor *tensor, uint64_t from, struct part *ret)
{
    uint64_t room = WINDOW_BYTES / tensor->item_bytes, inner = 1;
    uint32_t d = tensor->ndim;
    ret->items = 1;
    /* Trailing dims that are whole ... */
    while (d > 0 && from % (inner * tensor->sizes[d - 1]) == 0 &&
           inner * tensor->sizes[d - 1] <= room) {
        ret->offsets[d - 1] = 0;
        ret->lengths[d - 1] = tensor->sizes[d - 1];
        inner *= tensor->sizes[d - 1];
        d--;
    }
    ret->items = inner;
    /* ... a range of one dim ... */
    if (d > 0) {
        uint64_t at = from / inner % tensor->sizes[d - 1];
        uint64_t n = dcp_min_u64(room / inner, tensor->sizes[d - 1] - at);
        ret->offsets[d - 1] = at;
        ret->lengths[d - 1] = n;
        ret->items = inner * n;
        inner *= tensor->sizes[d - 1];
        d--;
    }
    /* ... and one position of all before. */
    for (; d > 0; d--) {
        ret->offsets[d - 1] = from / inner % tensor->sizes[d - 1];
        ret->lengths[d - 1] = 1;
        inner *= tensor->sizes[d - 1];
    }
}

/* What of the window the chunk has, as a box of the tensor, and where that begins in the chunk's
 * row-major image (elements).  False: nothing. */
static bool
meet(const struct dcp_export_tensor *tensor, const struct dcp_export_chunk *chunk,
     const struct part *window, struct part *ret, uint64_t *ret_first)
{
    uint32_t ndim = tensor->ndim;
    uint64_t first = 0;
    ret->items = 1;
    for (uint32_t d = 0; d < ndim; d++) {
        uint64_t begin = dcp_max_u64(window->offsets[d], chunk->box[d]);
        uint64_t end = dcp_min_u64(window->offsets[d] + window->lengths[d],
                                   chunk->box[d] + chunk->box[ndim + d]);
        if (begin >= end) {
            return false;
        }
        ret->offsets[d] = begin;
        ret->lengths[d] = end - begin;
        ret->items *= end - begin;
        first = first * chunk->box[ndim + d] + (begin - chunk->box[d]);
    }
    *ret_first = first;
    return true;
}

/* Bytes of the output that one chunk has in one range: no copy of ours. */
static int
pass_through(struct join *join, const struct dcp_export_tensor *tensor, uint64_t from,
             const struct dcp_export_chunk *chunk, uint64_t first, uint64_t items,
             struct dcp_error *err)
{
    uint64_t to_offset = tensor->offset_bytes + from * tensor->item_bytes;
    uint64_t at = chunk->offset_bytes + first * tensor->item_bytes;
    uint64_t left = items * tensor->item_bytes;
    while (left > 0) {
        uint8_t *to;
        uint64_t len;
        int rc = dcp_export_room(&join->run, to_offset, left, &to, &len);
        rc = rc == 0 ? read_range(join, chunk->source, at, to, len, err) : rc;
        if (rc != 0) {
            return rc;
        }
        to_offset += len;
        at += len;
        left -= len;
    }
    return 0;
}

static void
place(const struct join *join, const struct dcp_export_tensor *tensor, const struct part *window,
      const struct part *part)
{
    int64_t window_strides[DCP_MAX_DIMS], part_strides[DCP_MAX_DIMS], origin = 0;
    dcp_box_row_major(tensor->ndim, window->lengths, tensor->item_bytes, window_strides);
    dcp_box_row_major(tensor->ndim, part->lengths, tensor->item_bytes, part_strides);
    for (uint32_t d = 0; d < tensor->ndim; d++) {
        origin += (int64_t)(part->offsets[d] - window->offsets[d]) * window_strides[d];
    }
    struct dcp_box_side to = {origin, window_strides}, from = {0, part_strides};
    dcp_box_copy_range(join->window, &to, join->window + WINDOW_BYTES, &from, tensor->ndim,
                       part->lengths, tensor->item_bytes, 0, part->items);
}

static int
put_window(struct join *join, const struct dcp_export_tensor *tensor, uint64_t from, uint64_t items)
{
    uint64_t offset = tensor->offset_bytes + from * tensor->item_bytes;
    uint64_t done = 0, all = items * tensor->item_bytes;
    while (done < all) {
        uint8_t *to;
        uint64_t len;
        int rc = dcp_export_room(&join->run, offset + done, all - done, &to, &len);
        if (rc != 0) {
            return rc;
        }
        memcpy(to, join->window + done, len);
        done += len;
    }
    return 0;
}

static int
join_window(struct join *join, const struct dcp_export_tensor *tensor, uint64_t from,
            const struct part *window, struct dcp_error *err)
{
    for (uint64_t i = 0; i < tensor->chunks_count; i++) {
        const struct dcp_export_chunk *chunk = &tensor->chunks[i];
        struct part part;
        uint64_t first;
        if (!meet(tensor, chunk, window, &part, &first)) {
            continue;
        }
        if (part.items == window->items) {
            return pass_through(join, tensor, from, chunk, first, part.items, err);
        }
        int rc = read_range(join, chunk->source, chunk->offset_bytes + first * tensor->item_bytes,
                            join->window + WINDOW_BYTES, part.items * tensor->item_bytes, err);
        if (rc != 0) {
            return rc;
        }
        place(join, tensor, window, &part);
    }
    return put_window(join, tensor, from, window->items);
}

static int
join_tensors(struct join *join, const struct dcp_export_file *files,
             const struct dcp_export_tensor *tensors, uint64_t count, struct dcp_error *err)
{
    for (uint64_t i = 0; i < count; i++) {
        const struct dcp_export_tensor *tensor = &tensors[i];
        if (i == 0 || tensor->file != tensors[i - 1].file) {
            int rc = dcp_export_enter(&join->run, &files[tensor->file], err);
            if (rc != 0) {
                return rc;
            }
        }
        uint64_t volume = dcp_volume_of(tensor->sizes, tensor->ndim);
        for (uint64_t from = 0; from < volume;) {
            struct part window;
            window_at(tensor, from, &window);
            int rc = dcp_export_check_cancel(join->run.options->cancel, err);
            rc = rc == 0 ? join_window(join, tensor, from, &window, err) : rc;
            if (rc != 0) {
                return rc;
            }
            from += window.items;
        }
    }
    return 0;
}

int
dcp_export_join(const struct dcp_io *io, const struct dcp_export_sources *sources,
                const char *dir_path, const struct dcp_export_file *files, uint32_t files_count,
                const struct dcp_export_tensor *tensors, uint64_t tensors_count,
                const struct dcp_engine_options *options, struct dcp_export_stats *ret_stats,
                struct dcp_error *err)
{
    struct join join = {.from = {.io = io, .fd = -1}, .sources = sources};
    int rc = sources_open(&join, io, err);
    for (uint64_t i = 0; rc == 0 && i < tensors_count; i++) {
        rc = check_tensor(&join, &tensors[i], files, files_count, err);
    }
    if (rc == 0 && (join.window = dcp_map_huge(2 * WINDOW_BYTES, err)) == NULL) {
        rc = DCP_E_NOMEM;
    }
    if (rc == 0) {
        rc = dcp_export_begin(&join.run, io, dir_path, options, err);
        if (rc == 0) {
            rc = join_tensors(&join, files, tensors, tensors_count, err);
            rc = dcp_export_end(&join.run, rc, ret_stats, err);
        }
    }
    if (rc == 0 && ret_stats != NULL) {
        ret_stats->read_bytes = join.read_bytes;
        ret_stats->memory_bytes += 2 * WINDOW_BYTES;
    }
    if (join.window != NULL) {
        dcp_unmap_huge(join.window, 2 * WINDOW_BYTES);
    }
    sources_close(&join);
    return rc;
}
