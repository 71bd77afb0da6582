/*
 * share_agree.c: whether a rank shares what it reads with others of its host, and which of its
 * items.
 *
 * Nothing here is a failure of the load: a rank that cannot take part, or had better not, says why
 * and reads for itself.
 *
 * Threads: the calling thread.
 */
#include "share_run.h"

#include <string.h>

/* Splits the plan: what is shared, and `rest`.  False when there is no memory for that. */
static bool
split_items(struct dcp_share_run *run)
{
    const struct dcp_share_wants *wants = &run->wants;
    const struct dcp_read_plan *plan = run->plan;
    uint8_t *shared = dcp_calloc(1, dcp_keep_bytes((uint32_t)plan->items_count) + 1);
    struct dcp_share_cursor cursor;
    uint64_t v = 0, shared_count = 0;

    if (shared == NULL) {
        return false;
    }
    dcp_share_cursor_init(&cursor, run->share, plan->md);
    while (dcp_share_next_chunk(&cursor)) {
        run->anything_shared = true;
        if (!dcp_share_is_user(cursor.chunk.users, run->share->self)) {
            continue;
        }
        while (wants->visits[v].chunk != cursor.chunk.chunk) {
            v++;
        }
        for (; v < wants->visits_count && wants->visits[v].chunk == cursor.chunk.chunk; v++) {
            dcp_keep_set(shared, (uint32_t)wants->visits[v].item);
            shared_count++;
        }
    }
    run->rest = dcp_malloc_array(plan->items_count - shared_count, sizeof *run->rest);
    for (uint64_t i = 0; run->rest != NULL && i < plan->items_count; i++) {
        if (!dcp_keep_test(shared, (uint32_t)i)) {
            run->rest[run->rest_count++] = plan->items[i];
        }
    }
    dcp_free(shared);
    return run->rest != NULL;
}

/* Slots of this rank, given the ranks of the host that may take part. */
static void
choose_slots(const struct dcp_share_run *run, uint32_t *ret_count, uint32_t *ret_bytes)
{
    uint32_t readers = run->share->members_count < DCP_SHARE_MOST_READERS
                           ? run->share->members_count
                           : DCP_SHARE_MOST_READERS;
    uint32_t bytes = readers * 2 * DCP_SHARE_LARGE_SLOT_BYTES <= DCP_SHARE_HOST_BYTES
                         ? DCP_SHARE_LARGE_SLOT_BYTES
                         : DCP_SHARE_SLOT_BYTES;
    uint64_t count =
        dcp_min_u64(DCP_SHARE_HOST_BYTES / readers / bytes, run->wants.wanted_bytes / bytes + 1);
    if (run->share->slot_bytes != 0) {
        bytes = run->share->slot_bytes;
        count = 2;
    }
    *ret_bytes = bytes;
    *ret_count = run->share->self < DCP_SHARE_MOST_READERS ? (uint32_t)count : 0;
}

/* Whether the first, the middle and the last of what this rank wants lie in the page cache. */
static bool
is_hot(const struct dcp_share_run *run)
{
    const struct dcp_share_wants *wants = &run->wants;
    struct dcp_reader reader = {.io = run->io,
                                .dirfd = run->dirfd,
                                .dir_path = run->dir_path,
                                .plan = run->plan,
                                .options = run->options};
    uint32_t last = DCP_NO_FILE;
    bool hot = true;
    for (uint64_t i = 0; hot && i < 3; i++) {
        struct dcp_error err;
        struct dcp_read_file *file = NULL;
        uint32_t index = wants->visits[(wants->visits_count - 1) * i / 2].file;
        if (index == last) {
            continue;
        }
        last = index;
        dcp_error_clear(&err);
        /* A file that cannot be opened fails where it is read. */
        hot =
            dcp_read_file_open(&reader, index, wants->wanted_bytes, &file, &err) == 0 && file->hot;
        dcp_read_file_release(&reader, file);
    }
    return hot;
}

bool
dcp_share_prepare(struct dcp_share_run *run)
{
    struct dcp_share *share = run->share;
    struct dcp_share_wants *wants = &run->wants;
    uint64_t details_count, wants_bytes;
    uint32_t slots_count, slot_bytes;
    struct dcp_error why;

    dcp_error_clear(&why);
    if (!dcp_share_find(share)) {
        return false;
    }
    if (!run->plan->md->is_native || run->plan->items_count > UINT32_MAX) {
        dcp_share_because(share, "only records that dcp_native wrote are shared");
        return false;
    }
    if (dcp_share_wants_build(run->plan, run->options, wants, &why) != 0) {
        dcp_share_because(share, "%.160s", why.message);
        return false;
    }
    details_count = wants->details.len / sizeof(uint64_t);
    wants_bytes = wants->wants_count * sizeof *wants->wants + wants->details.len;
    if (wants->wanted_bytes < DCP_SHARE_LEAST_WANTED_BYTES) {
        dcp_share_because(share, "tensors of %u KiB and more make up less than %u MiB of the load",
                          DCP_SHARE_LEAST_PAYLOAD_BYTES >> 10, DCP_SHARE_LEAST_WANTED_BYTES >> 20);
        return false;
    }
    if (wants_bytes > DCP_SHARE_MOST_WANTS_BYTES) {
        dcp_share_because(share, "the load reads too many chunks to agree on them");
        return false;
    }
    choose_slots(run, &slots_count, &slot_bytes);
    if (!dcp_share_grow(share, wants->wants_count, details_count, slots_count, slot_bytes)) {
        return false;
    }
    share->own.header->hot = is_hot(run);
    memcpy(dcp_share_own_wants(share), wants->wants, wants->wants_count * sizeof *wants->wants);
    if (wants->details.len > 0) {
        memcpy(dcp_share_own_details(share), wants->details.data, wants->details.len);
    }
    return true;
}

/* Memory for the reading threads, before anybody counts on them. */
static bool
take_ring(struct dcp_share_run *run)
{
    struct dcp_error why;
    dcp_error_clear(&why);
    if (run->share->own.header->slots_count > 0 && dcp_ring_acquire(0, 0, &run->ring, &why) != 0) {
        dcp_share_because(run->share, "%.160s", why.message);
        return false;
    }
    return true;
}

int
dcp_share_agree(struct dcp_share_run *run, bool *ret_ready, struct dcp_error *err)
{
    struct dcp_share *share = run->share;
    const struct dcp_engine_options *options = run->options;
    uint32_t settings = options->verify ? (options->verify_all ? 2 : 1) : 0;
    bool joined = false;

    *ret_ready = false;
    int rc = dcp_share_join(share, settings, options->cancel, &joined, err);
    if (rc != 0 || !joined) {
        return rc;
    }
    bool able = dcp_share_check_wants(share, run->plan->md) && split_items(run) && take_ring(run);
    if (able && !run->anything_shared) {
        /* So all the others conclude, too. */
        dcp_share_because(share, "no two ranks of this host want the same data");
        dcp_share_leave(share, DCP_SHARE_REFUSED);
        return 0;
    }
    return dcp_share_ready(share, able, options->cancel, ret_ready, err);
}
