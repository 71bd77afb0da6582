/*
 * archive_read.c: the bytes of tensors in the order in which an archive has them.
 *
 * A tensor whose chunks are whole rows is its records' payloads one behind the other, whatever the
 * number of ranks that saved it; so is one that a single rank saved.  Their payloads go from file
 * to file through one small ring, read ahead by one thread: direct reads of large pieces, the page
 * cache's read-ahead for small ones.  All others are left to whoever made the entries, who has the
 * loader.  Files are opened, and believed, as a load does it (reader_file.c).
 *
 * Invariants: pieces are taken in the order in which they were pushed; a slot is filled anew only
 * when none of its pieces is left; a piece holds a reference to its file, of which at most
 * OPEN_MOST_FILES are open: fewer pieces than that are in flight, so one of them can be closed.
 * Threads: the calling thread looks ahead and takes pieces, the pump's thread reads them.
 */
#include "archive_read.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "plan_private.h"

/* Half of what the writer's requests have: two are read while one is copied. */
#define READ_BUFFER_BYTES (4u << 20)
/* A piece is not made shorter than this to fill a slot. */
#define LEAST_PIECE_BYTES (256u << 10)
/* Below this a thread costs more than it reads ahead. */
#define ALONE_MOST_BYTES (1u << 20)
/* Files that are open at a time, with one or two descriptors each: jobs have a limit of 1024 as a
 * rule, and others need them. */
#define OPEN_MOST_FILES 64
_Static_assert(OPEN_MOST_FILES <= DCP_PUMP_JOBS, "pieces in flight are fewer than jobs");

/* A chunk and where its rows begin, to be sorted. */
struct row_chunk {
    uint64_t first_row, chunk;
};

/* ---- files ---- */

/* Closes one that no piece needs. */
static void
close_one(struct archive_reader *self)
{
    for (;;) {
        struct dcp_read_file **file = &self->files[self->next_closed];
        self->next_closed = (self->next_closed + 1) % self->md.files_count;
        if (*file != NULL && (*file)->users == 1) {
            dcp_read_file_release(&self->reader, *file);
            *file = NULL;
            self->open_count--;
            return;
        }
    }
}

/* Lends the file, until the next call: whoever keeps it counts himself. */
static int
file_of(struct archive_reader *self, uint32_t index, struct dcp_read_file **ret_file,
        struct dcp_error *err)
{
    int rc = 0;
    if (self->files[index] == NULL) {
        if (self->open_count >= OPEN_MOST_FILES) {
            close_one(self);
        }
        rc = dcp_read_file_open(&self->reader, index, self->wanted_bytes[index],
                                &self->files[index], err);
        self->open_count += rc == 0;
    }
    *ret_file = self->files[index];
    return rc;
}

/* ---- looking ahead ---- */

static int
by_first_row(const void *left, const void *right)
{
    const struct row_chunk *a = left, *b = right;
    return a->first_row < b->first_row ? -1 : a->first_row > b->first_row;
}

/* The tensor's bytes; false when nobody can say. */
static bool
tensor_bytes(const struct dcp_metadata *md, const struct dcp_md_entry *entry, uint64_t *ret)
{
    uint64_t count;
    return entry->kind == DCP_ITEM_TENSOR && dcp_dtype_bytes(entry->dtype) != 0 &&
           !dcp_volume_overflows(md->dims + entry->size, entry->ndim, &count) &&
           !dcp_mul_overflows_u64(count, dcp_dtype_bytes(entry->dtype), ret);
}

/* Whether the chunks, sorted, are the tensor's rows one behind the other; empty ones drop out. */
static bool
sort_rows(const struct dcp_metadata *md, const struct dcp_md_entry *entry, struct row_chunk *rows,
          uint64_t *ret_count)
{
    const uint64_t *size = md->dims + entry->size;
    uint64_t next_row = 0, count = 0;
    for (uint64_t i = 0; i < entry->chunks_count; i++) {
        const struct dcp_md_chunk *chunk = &md->chunks[entry->first_chunk + i];
        const uint64_t *offsets = md->dims + chunk->dims, *sizes = offsets + entry->ndim;
        bool whole = chunk->file != DCP_NO_FILE && chunk->transforms == 0;
        for (uint32_t d = 1; d < entry->ndim; d++) {
            whole = whole && offsets[d] == 0 && sizes[d] == size[d];
        }
        if (!whole) {
            return false;
        }
        if (entry->ndim == 0 || sizes[0] > 0) {
            rows[count++] =
                (struct row_chunk){entry->ndim == 0 ? 0 : offsets[0], entry->first_chunk + i};
        }
    }
    qsort(rows, count, sizeof *rows, by_first_row);
    *ret_count = count;
    if (entry->ndim == 0) {
        return count == 1;
    }
    for (uint64_t i = 0; i < count; i++) {
        if (rows[i].first_row != next_row ||
            dcp_add_overflows_u64(next_row,
                                  (md->dims + md->chunks[rows[i].chunk].dims + entry->ndim)[0],
                                  &next_row)) {
            return false;
        }
    }
    return next_row == size[0];
}

static int
wrong_record(const struct archive_reader *self, const struct dcp_md_entry *entry,
             const struct dcp_read_file *file, const struct dcp_md_chunk *chunk, int code,
             const char *what, struct dcp_error *err)
{
    bool first = err != NULL && err->code == 0;
    dcp_error_set(err, code, 0, file->path, "reading %.*s from %s failed: %s",
                  (int)dcp_min_u64(entry->name_len, 256), self->md.strings + entry->name,
                  file->path, what);
    if (first) {
        err->offset_bytes = chunk->offset_bytes;
    }
    return code;
}

/* Finds the payload of a chunk.  *ret_plain false: only the loader can read it. */
static int
look_at_record(struct archive_reader *self, const struct dcp_md_entry *entry, uint64_t index,
               bool *ret_plain, struct dcp_error *err)
{
    const struct dcp_md_chunk *chunk = &self->md.chunks[index];
    const uint64_t *sizes = self->md.dims + chunk->dims + entry->ndim;
    struct dcp_record_view view;
    struct dcp_read_file *file;
    struct dcp_error why;
    int rc = file_of(self, chunk->file, &file, err);
    if (rc != 0) {
        return rc;
    }
    dcp_error_clear(&why);
    rc = dcp_read_file_parse(&self->reader, file, chunk, &view, &why);
    if (rc == DCP_E_UNSUPPORTED ||
        (rc == 0 && (!view.contiguous || view.dtype != entry->dtype || view.ndim != entry->ndim ||
                     memcmp(view.sizes, sizes, entry->ndim * sizeof *sizes) != 0))) {
        *ret_plain = false;
        return 0;
    }
    if (rc != 0) {
        return rc == DCP_E_CORRUPT || rc == DCP_E_CHECKSUM
                   ? wrong_record(self, entry, file, chunk, rc, why.message, err)
                   : dcp_error_set(err, rc, why.sys_errno, why.path, "%s", why.message);
    }
    self->payloads[self->payloads_count++] = (struct archive_payload){
        .file = chunk->file,
        .offset_bytes = chunk->offset_bytes + view.payload_offset_bytes,
        .bytes = view.payload_bytes,
        .crc = view.payload_crc,
        .has_crc = view.has_crc && self->params->options->verify,
    };
    *ret_plain = true;
    return 0;
}

static void
forget_payloads(struct archive_reader *self)
{
    self->payloads_count = self->payload_at = self->payload_bytes = 0;
}

static int
look_at_rows(struct archive_reader *self, const struct dcp_md_entry *entry, enum archive_way *ret,
             struct dcp_error *err)
{
    uint64_t cap = entry->chunks_count, count = 0;
    struct row_chunk *rows = dcp_malloc_array(cap, sizeof *rows);
    if (cap > self->payloads_cap) {
        dcp_free(self->payloads);
        self->payloads = dcp_malloc_array(cap, sizeof *self->payloads);
        self->payloads_cap = self->payloads != NULL ? cap : 0;
    }
    if (rows == NULL || self->payloads_cap < cap) {
        dcp_free(rows);
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for the chunks of a tensor");
    }
    bool plain = sort_rows(&self->md, entry, rows, &count);
    int rc = 0;
    for (uint64_t i = 0; rc == 0 && plain && i < count; i++) {
        rc = look_at_record(self, entry, rows[i].chunk, &plain, err);
    }
    if (rc != 0 || !plain) {
        forget_payloads(self);
    }
    dcp_free(rows);
    *ret = plain ? ARCHIVE_RECORDS : ARCHIVE_FETCH;
    return rc;
}

/* Decides how the entry at `ahead` comes, and goes on to the next. */
static int
look_ahead(struct archive_reader *self, struct dcp_error *err)
{
    const struct dcp_archive_entry *entry = &self->params->entries[self->ahead];
    enum archive_way way = ARCHIVE_FETCH;
    uint64_t bytes;
    int rc = 0;
    if (entry->data != NULL || entry->bytes == 0) {
        way = ARCHIVE_MEMORY;
    } else if (entry->fqn.len > 0) {
        const struct dcp_md_entry *found =
            dcp_metadata_find(&self->md, (const char *)entry->fqn.data, entry->fqn.len);
        if (found != NULL && tensor_bytes(&self->md, found, &bytes) && bytes == entry->bytes) {
            rc = look_at_rows(self, found, &way, err);
        }
    }
    if (rc == 0) {
        self->ways[self->ahead++] = (uint8_t)way;
    }
    return rc;
}

/* ---- reading ahead ---- */

static int
read_piece(void *ctx, const struct dcp_job *job, bool failed, struct dcp_error *err)
{
    const struct archive_reader *self = ctx;
    const struct archive_piece *piece = job->file;
    const struct dcp_read_file *file = piece->file;
    if (failed) {
        return 0;
    }
    if (piece->direct) {
        struct dcp_read_span span = {
            .from_bytes = piece->from_bytes - (uint64_t)(piece->bytes - piece->memory),
            .to_bytes = piece->from_bytes + piece->len_bytes,
        };
        return dcp_read_file_span(&self->reader, file, &span, piece->memory, err);
    }
    return dcp_io_read_all(self->params->io, file->fd, piece->memory, (size_t)piece->len_bytes,
                           piece->from_bytes, file->path, err);
}

/* A slot with room for a piece of `want_bytes`, or for a part of it; false when all are in use. */
static bool
slot_with_room(struct archive_reader *self, uint64_t want_bytes, uint64_t *ret_at)
{
    uint64_t at = dcp_align_up(self->slots[self->slot].used_bytes, DCP_DIRECT_ALIGN_BYTES);
    uint64_t need =
        dcp_min_u64(want_bytes, LEAST_PIECE_BYTES) + 2 * (uint64_t)DCP_DIRECT_ALIGN_BYTES;
    if (self->slots[self->slot].pieces == 0) {
        at = 0;
    } else if (at + need > READ_BUFFER_BYTES) {
        uint32_t next = (self->slot + 1) % ARCHIVE_READ_BUFFERS;
        if (self->slots[next].pieces > 0) {
            return false;
        }
        self->slot = next;
        at = 0;
    }
    *ret_at = at;
    return true;
}

/* Has the next part of the payloads read; *ret_pushed false when there is no room. */
static int
push_piece(struct archive_reader *self, bool *ret_pushed, struct dcp_error *err)
{
    struct archive_payload *payload = &self->payloads[self->payload_at];
    uint64_t left = payload->bytes - self->payload_bytes, at;
    struct dcp_read_file *file;
    if (self->pushed - self->popped == OPEN_MOST_FILES - 1 || !slot_with_room(self, left, &at)) {
        *ret_pushed = false;
        return 0;
    }
    int rc = file_of(self, payload->file, &file, err);
    if (rc != 0) {
        return rc;
    }
    uint64_t from = payload->offset_bytes + self->payload_bytes;
    bool direct = file->direct_fd >= 0 && left >= LEAST_PIECE_BYTES;
    uint64_t lead = direct ? from % file->align_bytes : 0;
    uint64_t len = dcp_min_u64(left, READ_BUFFER_BYTES - at - lead);
    if (direct && len < left) {
        len -= (from + len) % file->align_bytes;
    }
    struct archive_piece *piece = &self->pieces[self->pushed % DCP_PUMP_JOBS];
    *piece = (struct archive_piece){.payload = *payload,
                                    .file = file,
                                    .entry = self->ahead - 1,
                                    .from_bytes = from,
                                    .len_bytes = len,
                                    .first = self->payload_bytes == 0,
                                    .last = len == left,
                                    .memory = dcp_ring_buffer(self->ring, self->slot) + at,
                                    .direct = direct,
                                    .slot = self->slot};
    piece->bytes = piece->memory + lead;
    file->users++;
    self->slots[self->slot].pieces++;
    self->slots[self->slot].used_bytes = at + lead + len;
    self->payload_bytes += len;
    if (piece->last) {
        self->payload_at++;
        self->payload_bytes = 0;
    }
    self->pushed++;
    self->reader.stats.read_bytes += len;
    self->reader.stats.hot_bytes += file->hot ? len : 0;
    struct dcp_job job = {.file = piece};
    piece->job = dcp_pump_push(&self->pump, &job);
    *ret_pushed = true;
    return 0;
}

/* Looks and reads as far ahead as there is room. */
static int
run_ahead(struct archive_reader *self, struct dcp_error *err)
{
    bool pushed = true;
    int rc = 0;
    for (;;) {
        while (rc == 0 && pushed && self->payload_at < self->payloads_count) {
            rc = push_piece(self, &pushed, err);
        }
        if (rc != 0 || !pushed) {
            return rc;
        }
        forget_payloads(self);
        if (self->ahead == self->params->entries_count) {
            return 0;
        }
        rc = look_ahead(self, err);
    }
}

/* The piece that the caller had is his no more. */
static void
take_back(struct archive_reader *self)
{
    if (self->taken) {
        const struct archive_piece *piece = &self->pieces[self->popped++ % DCP_PUMP_JOBS];
        self->slots[piece->slot].pieces--;
        dcp_read_file_release(&self->reader, piece->file);
        self->taken = false;
    }
}

/* ---- for archive.c ---- */

static int
reader_open(struct archive_reader *self, struct dcp_error *err)
{
    const struct dcp_archive_params *params = self->params;
    uint64_t total_bytes = 0;
    int rc = dcp_metadata_read(params->image.data, params->image.len, &self->md, err);
    if (rc != 0) {
        return rc;
    }
    self->files = dcp_calloc(self->md.files_count, sizeof *self->files);
    self->wanted_bytes = dcp_calloc(self->md.files_count, sizeof *self->wanted_bytes);
    self->ways = dcp_calloc(params->entries_count, sizeof *self->ways);
    if (self->files == NULL || self->wanted_bytes == NULL || self->ways == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "out of memory for a list of files");
    }
    for (uint64_t i = 0; i < self->md.chunks_count; i++) {
        const struct dcp_md_chunk *chunk = &self->md.chunks[i];
        if (chunk->file != DCP_NO_FILE) {
            self->wanted_bytes[chunk->file] += chunk->length_bytes; /* at most a wrong guess */
            total_bytes += chunk->length_bytes;
        }
    }
    int fd = params->io->open_dir(params->io->ctx, params->source_path);
    if (fd < 0) {
        return dcp_error_set(err, fd == -ENOENT ? DCP_E_NOENT : DCP_E_IO, -fd, params->source_path,
                             "opening the checkpoint %s failed: %s", params->source_path,
                             strerror(-fd));
    }
    self->reader.dirfd = fd;
    rc = dcp_ring_acquire(ARCHIVE_READ_BUFFERS, READ_BUFFER_BYTES, &self->ring, err);
    if (rc == 0) {
        rc = dcp_pump_init(&self->pump, read_piece, self, err);
    }
    if (rc == 0 && total_bytes > ALONE_MOST_BYTES) {
        dcp_pump_start(&self->pump);
    }
    return rc;
}

int
archive_reader_init(struct archive_reader *self, const struct dcp_archive_params *params,
                    struct dcp_error *err)
{
    *self = (struct archive_reader){.params = params};
    self->plan.md = &self->md;
    self->reader = (struct dcp_reader){.io = params->io,
                                       .dirfd = -1,
                                       .dir_path = params->source_path,
                                       .plan = &self->plan,
                                       .options = params->options};
    int rc = reader_open(self, err);
    if (rc != 0) {
        (void)!archive_reader_clean_up(self, err);
    }
    return rc;
}

int
archive_reader_clean_up(struct archive_reader *self, struct dcp_error *err)
{
    if (self->params == NULL) {
        return 0;
    }
    int rc = dcp_pump_clean_up(&self->pump, err);
    while (self->popped < self->pushed) {
        self->taken = true;
        take_back(self);
    }
    forget_payloads(self);
    for (uint32_t i = 0; self->files != NULL && i < self->md.files_count; i++) {
        dcp_read_file_release(&self->reader, self->files[i]);
    }
    if (self->reader.dirfd >= 0) {
        /* Nothing was written: a failing close has nothing to say. */
        self->params->io->close(self->params->io->ctx, self->reader.dirfd);
    }
    dcp_ring_release(self->ring);
    dcp_free(self->payloads);
    dcp_free(self->files);
    dcp_free(self->wanted_bytes);
    dcp_free(self->ways);
    dcp_metadata_clean_up(&self->md);
    *self = (struct archive_reader){.params = NULL};
    return rc;
}

int
archive_read_way(struct archive_reader *self, uint64_t entry, enum archive_way *ret_way,
                 struct dcp_error *err)
{
    take_back(self);
    int rc = entry < self->ahead ? 0 : run_ahead(self, err);
    if (rc != 0) {
        return rc;
    }
    /* All pieces before it were taken, so nothing was in the way. */
    DCP_ASSERT(entry < self->ahead);
    *ret_way = self->ways[entry];
    return 0;
}

int
archive_read_next(struct archive_reader *self, uint64_t entry,
                  const struct archive_piece **ret_piece, struct dcp_error *err)
{
    take_back(self);
    int rc = run_ahead(self, err);
    if (rc != 0) {
        return rc;
    }
    const struct archive_piece *piece = &self->pieces[self->popped % DCP_PUMP_JOBS];
    if (self->popped == self->pushed || piece->entry != entry) {
        return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL,
                             "the records of an entry have fewer bytes than it should");
    }
    self->taken = true;
    *ret_piece = piece;
    return dcp_pump_wait(&self->pump, piece->job); /* the pump keeps the error */
}

int
archive_read_mismatch(const struct archive_reader *self, const struct archive_piece *piece,
                      uint32_t crc, struct dcp_error *err)
{
    const struct dcp_archive_entry *entry = &self->params->entries[piece->entry];
    const struct archive_payload *payload = &piece->payload;
    bool first = err != NULL && err->code == 0;
    int code = dcp_error_set(err, DCP_E_CHECKSUM, 0, piece->file->path,
                             "reading %.*s from %s failed: its bytes have CRC %08x, its record "
                             "says %08x; the file is damaged",
                             (int)dcp_min_u64(entry->fqn.len, 256), (const char *)entry->fqn.data,
                             piece->file->path, crc, payload->crc);
    if (first) {
        err->offset_bytes = payload->offset_bytes;
    }
    return code;
}
