/*
 * group_agree.c: which chunks every rank of a group wants whole.
 *
 * All ranks have the same metadata, so they list the same chunks in the same order; what each wants
 * of them are lanes of 0 and 1, and MIN says what all want.  A rank that cannot take part says so
 * in the first lane of the first round, and then nobody goes on.
 *
 * Threads: the comm table's rule, one caller at a time.
 */
#include "group_read.h"

#include <string.h>

uint64_t
dcp_group_chunks(const struct dcp_metadata *md, struct dcp_share_visit *chunks)
{
    uint64_t count = 0, offset, payload;
    for (uint64_t e = 0; md->is_native && e < md->entries_count && e <= UINT32_MAX; e++) {
        const struct dcp_md_entry *entry = &md->entries[e];
        for (uint64_t i = 0; i < entry->chunks_count; i++) {
            uint64_t chunk = entry->first_chunk + i;
            if (chunk > UINT32_MAX ||
                !dcp_share_payload(md, (uint32_t)e, (uint32_t)chunk, &offset, &payload)) {
                continue;
            }
            if (chunks != NULL) {
                chunks[count] =
                    (struct dcp_share_visit){.offset_bytes = md->chunks[chunk].offset_bytes,
                                             .file = md->chunks[chunk].file,
                                             .chunk = (uint32_t)chunk,
                                             .item = e};
            }
            count++;
        }
    }
    if (chunks != NULL) {
        dcp_share_sort_visits(chunks, count);
    }
    return count;
}

/* One all-reduce over `count` chunks in `lanes` + 1.  *ret_ok false: some rank takes no part. */
static int
agree_batch(struct dcp_group_read *read, bool ok, uint64_t count, bool *ret_ok,
            struct dcp_error *err)
{
    read->lanes[0] = ok;
    int rc = read->comm->all_reduce_min(read->comm->ctx, read->lanes, (size_t)count + 1, err);
    *ret_ok = rc == 0 && read->lanes[0] == 1;
    return rc;
}

static uint64_t
batch_count(uint64_t left)
{
    return dcp_min_u64(left, DCP_GROUP_READ_LANES - 1);
}

int
dcp_group_read_decline(struct dcp_group_read *read, const struct dcp_metadata *md,
                       struct dcp_error *err)
{
    uint64_t count = batch_count(dcp_group_chunks(md, NULL));
    bool ok;
    memset(read->lanes, 0, (count + 1) * sizeof *read->lanes);
    return agree_batch(read, false, count, &ok, err);
}

int
dcp_group_agree(struct dcp_group_read *read, const struct dcp_share_visit *chunks,
                uint64_t chunks_count, const struct dcp_share_wants *wants,
                struct dcp_share_want *ret_agreed, uint64_t *ret_count, struct dcp_error *err)
{
    uint64_t agreed = 0, at = 0, from = 0, count;
    bool ok = false;
    *ret_count = 0;
    do {
        count = batch_count(chunks_count - from);
        memset(read->lanes, 0, (count + 1) * sizeof *read->lanes);
        for (uint64_t i = 0; wants != NULL && i < count; i++) {
            /* Both lists are sorted alike, and the wants are among the chunks. */
            bool here = at < wants->wants_count && wants->wants[at].chunk == chunks[from + i].chunk;
            read->lanes[i + 1] = here && wants->wants[at].detail == 0;
            at += here;
        }
        int rc = agree_batch(read, wants != NULL, count, &ok, err);
        if (rc != 0 || !ok) {
            return rc;
        }
        for (uint64_t i = 0; i < count; i++) {
            if (read->lanes[i + 1] == 1) {
                ret_agreed[agreed++] = (struct dcp_share_want){
                    .chunk = chunks[from + i].chunk, .entry = (uint32_t)chunks[from + i].item};
            }
        }
        from += count;
    } while (from < chunks_count);
    *ret_count = agreed;
    return 0;
}
