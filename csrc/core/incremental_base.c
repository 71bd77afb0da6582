/*
 * incremental_base.c: reading the checkpoint that a save is incremental to.
 *
 * Nothing about a base can fail a save: what is absent, damaged or somebody else's is a state, and
 * the items that would have come from there are written.  Everything read is checked before it is
 * used, for a base may be replaced or cut while we look at it: a file counts only when its header's
 * save id is one that the base's metadata accepts, its length is what the header says, and its hash
 * table parses under that id.
 *
 * Threads: a base belongs to one thread.
 */
#include "incremental.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>

/* ---- metadata ---- */

static enum dcp_base_state
state_of(int rc, const struct dcp_metadata *md)
{
    if (rc == 0) {
        return md->is_native ? DCP_BASE_OK : DCP_BASE_FOREIGN;
    }
    return rc == DCP_E_UNSUPPORTED ? DCP_BASE_FOREIGN : DCP_BASE_DAMAGED;
}

static int
read_image(const struct dcp_io *io, const char *path, const char *name, struct dcp_buf *buf,
           enum dcp_base_state *ret_state, struct dcp_error *err)
{
    struct dcp_error local;
    int rc, dirfd = io->open_dir(io->ctx, path);

    if (dirfd < 0) {
        *ret_state = dirfd == -ENOENT ? DCP_BASE_ABSENT : DCP_BASE_UNREADABLE;
        return 0;
    }
    dcp_error_clear(&local);
    rc = dcp_io_read_file(io, dirfd, name, DCP_MAX_METADATA_BYTES - 1, buf, &local);
    io->close(io->ctx, dirfd);
    if (rc == DCP_E_NOMEM) {
        return dcp_error_set(err, rc, 0, path, "%s", local.message);
    }
    *ret_state = rc == 0               ? DCP_BASE_OK
                 : rc == DCP_E_NOENT   ? DCP_BASE_ABSENT
                 : rc == DCP_E_LIMIT   ? DCP_BASE_FOREIGN
                 : rc == DCP_E_CORRUPT ? DCP_BASE_DAMAGED
                                       : DCP_BASE_UNREADABLE;
    return 0;
}

int
dcp_base_read(const struct dcp_io *io, const char *path, const char *name,
              struct dcp_buf *ret_message, struct dcp_error *err)
{
    enum dcp_base_state state = DCP_BASE_ABSENT;
    size_t start = ret_message->len;
    int rc;

    dcp_buf_put_u8(ret_message, DCP_BASE_OK);
    rc = dcp_buf_check(ret_message, err);
    if (rc == 0) {
        rc = read_image(io, path, name, ret_message, &state, err);
    }
    if (rc == 0 && state == DCP_BASE_OK) {
        struct dcp_metadata md = {0};
        struct dcp_error local;

        dcp_error_clear(&local);
        rc = dcp_metadata_read(ret_message->data + start + 1, ret_message->len - start - 1, &md,
                               &local);
        state = state_of(rc, &md);
        rc = rc == DCP_E_NOMEM ? dcp_error_set(err, rc, 0, path, "%s", local.message) : 0;
        dcp_metadata_clean_up(&md);
    }
    if (rc == 0) {
        ret_message->data[start] = (uint8_t)state;
        /* An image that nobody can use is not sent to thousands of ranks. */
        ret_message->len = state == DCP_BASE_OK ? ret_message->len : start + 1;
    }
    return rc;
}

int
dcp_base_open(struct dcp_base *base, const struct dcp_io *io, const char *path,
              const struct dcp_buf *message, enum dcp_base_state *ret_state, struct dcp_error *err)
{
    struct dcp_error local;
    int rc;

    if (message->len == 0 || message->data[0] >= DCP_BASE_STATES) {
        return dcp_error_set(err, DCP_E_COMM, 0, path,
                             "the coordinator's message about the base %s is not understood", path);
    }
    *ret_state = (enum dcp_base_state)message->data[0];
    if (*ret_state != DCP_BASE_OK) {
        return 0;
    }
    dcp_error_clear(&local);
    rc = dcp_metadata_read(message->data + 1, message->len - 1, &base->md, &local);
    if (rc == 0 && !base->md.is_native) {
        rc = dcp_error_set(&local, DCP_E_COMM, 0, path, "no index");
    }
    if (rc != 0) {
        return dcp_error_set(err, rc, 0, path,
                             "the metadata of the base %s, as the coordinator sent it: %s", path,
                             local.message);
    }
    base->io = io;
    base->dirfd = io->open_dir(io->ctx, path);
    return 0;
}

void
dcp_base_close(struct dcp_base *base)
{
    if (base->dirfd >= 0) {
        base->io->close(base->io->ctx, base->dirfd);
    }
    base->dirfd = -1;
    dcp_metadata_clean_up(&base->md);
}

/* ---- chunks ---- */

static uint64_t
record_bytes(const struct dcp_plan *plan, const struct dcp_item *item)
{
    struct dcp_tensor_shape shape = {.dtype = item->dtype,
                                     .ndim = item->ndim,
                                     .sizes = dcp_item_sizes(plan, item),
                                     .payload_bytes = dcp_item_payload_bytes(plan, item)};

    if (item->slot_bytes != 0) {
        return item->slot_bytes;
    }
    return dcp_record_head_bytes(shape.payload_bytes) + shape.payload_bytes +
           dcp_record_tail_bytes(&shape);
}

static bool
is_same_tensor(const struct dcp_metadata *md, const struct dcp_md_entry *entry,
               const struct dcp_plan *plan, const struct dcp_item *item)
{
    if (item->kind == DCP_ITEM_BYTES) {
        return entry->kind == DCP_ITEM_BYTES;
    }
    if (md->planned_outside && !dcp_record_length_tells(item->dtype)) {
        return false; /* bytes alike may be elements of another dtype there */
    }
    return entry->kind == DCP_ITEM_TENSOR && entry->dtype == item->dtype &&
           entry->ndim == item->ndim &&
           (item->ndim == 0 || memcmp(md->dims + entry->size, dcp_item_global_size(plan, item),
                                      item->ndim * sizeof(uint64_t)) == 0);
}

/* Offsets, then sizes: neighbours in both. */
static bool
is_same_box(const struct dcp_metadata *md, const struct dcp_md_chunk *chunk,
            const struct dcp_plan *plan, const struct dcp_item *item)
{
    return item->ndim == 0 || memcmp(md->dims + chunk->dims, dcp_item_offsets(plan, item),
                                     2 * item->ndim * sizeof(uint64_t)) == 0;
}

const struct dcp_md_chunk *
dcp_base_find(const struct dcp_metadata *md, const struct dcp_plan *plan,
              const struct dcp_item *item, struct dcp_base_finder *finder)
{
    const struct dcp_name *name = &plan->names[item->name];
    const struct dcp_md_entry *entry = dcp_metadata_find(md, name->fqn, name->fqn_len);

    if (entry == NULL || !is_same_tensor(md, entry, plan, item)) {
        return NULL;
    }
    if (finder->entry != entry && entry->chunks_count > 0) {
        /* Chunks come in the order of ranks: where this one's may well be. */
        *finder =
            (struct dcp_base_finder){.entry = entry, .next = plan->rank % entry->chunks_count};
    }
    for (uint64_t i = 0; i < entry->chunks_count; i++) {
        uint64_t at = (finder->next + i) % entry->chunks_count;
        const struct dcp_md_chunk *chunk = &md->chunks[entry->first_chunk + at];
        if (is_same_box(md, chunk, plan, item)) {
            finder->next = at + 1;
            return chunk->file != DCP_NO_FILE && chunk->transforms == 0 &&
                           chunk->length_bytes == record_bytes(plan, item)
                       ? chunk
                       : NULL;
        }
    }
    return NULL;
}

/* ---- data files ---- */

/* Only names as we make them, so that no metadata leads out of its directory. */
static int
copy_name(const struct dcp_base *base, struct dcp_base_file *file, struct dcp_error *err)
{
    const struct dcp_md_file *md_file = &base->md.files[file->file];
    uint32_t rank;
    uint64_t n;

    if (md_file->name_len < sizeof file->name) {
        memcpy(file->name, base->md.strings + md_file->name, md_file->name_len);
        file->name[md_file->name_len] = '\0';
        if (dcp_data_file_parse(file->name, &rank, &n)) {
            return 0;
        }
    }
    return dcp_error_set(err, DCP_E_CORRUPT, 0, NULL, "not the name of a data file");
}

static int
read_header(const struct dcp_base *base, int fd, struct dcp_base_file *file,
            struct dcp_file_header *ret_header, struct dcp_error *err)
{
    const struct dcp_io *io = base->io;
    struct dcp_stat st;
    int rc = dcp_io_read_all(io, fd, file->header, sizeof file->header, 0, file->name, err);

    if (rc == 0) {
        rc = dcp_file_parse_header(file->header, ret_header, err);
    }
    if (rc != 0) {
        return rc;
    }
    if (!dcp_metadata_accepts(&base->md, &ret_header->save_id)) {
        return dcp_error_set(err, DCP_E_STALE, 0, file->name, "%s is of another save", file->name);
    }
    rc = io->fstat(io->ctx, fd, &st);
    if (rc != 0) {
        return dcp_error_set(err, DCP_E_IO, -rc, file->name, "asking for the length of %s failed",
                             file->name);
    }
    if (st.size_bytes != ret_header->length_bytes) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, file->name, "%s has another length than it had",
                             file->name);
    }
    file->written_by = ret_header->save_id;
    file->length_bytes = ret_header->length_bytes;
    return 0;
}

static int
read_table(const struct dcp_base *base, int fd, const struct dcp_base_file *file,
           const struct dcp_file_header *header, struct dcp_hash_table *ret_table,
           struct dcp_error *err)
{
    uint8_t *bytes;
    int rc;

    if (header->hash_bytes == 0) {
        return dcp_error_set(err, DCP_E_MISSING, 0, file->name, "%s has no hashes", file->name);
    }
    if (header->hash_bytes > dcp_hash_table_bytes(DCP_MAX_ITEMS_PER_RANK)) {
        return dcp_error_set(err, DCP_E_CORRUPT, 0, file->name,
                             "%s has %llu bytes of hashes, more than any plan has items",
                             file->name, (unsigned long long)header->hash_bytes);
    }
    bytes = dcp_malloc(header->hash_bytes);
    if (bytes == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, file->name, "no memory for the hashes of %s",
                             file->name);
    }
    rc = dcp_io_read_all(base->io, fd, bytes, header->hash_bytes, header->hash_offset_bytes,
                         file->name, err);
    if (rc == 0) {
        rc = dcp_hash_table_parse(bytes, header->hash_bytes, &header->save_id, ret_table, err);
    }
    dcp_free(bytes);
    return rc;
}

int
dcp_base_file_read(const struct dcp_base *base, uint32_t file, struct dcp_base_file *ret_file,
                   struct dcp_hash_table *ret_table, struct dcp_error *err)
{
    const struct dcp_io *io = base->io;
    struct dcp_file_header header;
    int fd, rc;

    *ret_file = (struct dcp_base_file){.file = file};
    rc = copy_name(base, ret_file, err);
    if (rc != 0) {
        return rc;
    }
    do {
        fd = io->open_at(io->ctx, base->dirfd, ret_file->name, O_RDONLY, 0);
    } while (fd == -EINTR);
    if (fd < 0) {
        return dcp_error_set(err, DCP_E_IO, -fd, ret_file->name, "opening %s failed",
                             ret_file->name);
    }
    rc = read_header(base, fd, ret_file, &header, err);
    if (rc == 0) {
        rc = read_table(base, fd, ret_file, &header, ret_table, err);
    }
    io->close(io->ctx, fd);
    return rc;
}
