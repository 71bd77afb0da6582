/*
 * incremental_message.c: what a rank reuses, as it tells the coordinator, and the coordinator's
 * view of all ranks.
 *
 *     [items][links][reused items] 4 bytes each  [per link: file of the base 4, n 8, save id 16]
 *     [bitmap of reused items]
 *
 * Where a reused record lies follows from the base's metadata, which both have, so it does not
 * travel.  What does travel decides what a checkpoint refers to, and is therefore believed only as
 * far as plans and base bear it out: reused items are kept ones, the base has each of them in a
 * file that the rank linked, and links have numbers above everything the rank could write.
 *
 * Threads: no state.
 */
#include "incremental.h"

#include <string.h>

enum { LINK_BYTES = 4 + 8 + 16 };

int
dcp_reuse_encode(const struct dcp_plan *plan, const struct dcp_reuse *reuse, struct dcp_buf *buf,
                 struct dcp_error *err)
{
    dcp_buf_put_u32(buf, plan->items_count);
    dcp_buf_put_u32(buf, reuse->links_count);
    dcp_buf_put_u32(buf, (uint32_t)reuse->items);
    for (uint32_t i = 0; i < reuse->links_count; i++) {
        const struct dcp_link *link = &reuse->links[i];
        dcp_buf_put_u32(buf, link->from.file);
        dcp_buf_put_u64(buf, link->n);
        dcp_buf_put(buf, link->from.written_by.bytes, sizeof link->from.written_by.bytes);
    }
    dcp_buf_put(buf, reuse->reused, dcp_keep_bytes(plan->items_count));
    return dcp_buf_check(buf, err);
}

/* ---- the coordinator ---- */

/* One rank's message. */
struct told {
    uint32_t links_count, items_count;
    uint32_t base_files[DCP_MOST_LINKS];
    uint64_t ns[DCP_MOST_LINKS];
    struct dcp_save_id written_by[DCP_MOST_LINKS];
    const uint8_t *reused; /* borrows */
};

static int
refuse(uint32_t rank, const char *why, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_COMM, 0, NULL,
                         "what rank %u says it reuses of the base can not be: %s", rank, why);
}

/* NULL, or what is wrong with a link that was read. */
static const char *
link_fault(const struct told *told, uint32_t i, const struct dcp_metadata *md, uint64_t first_n)
{
    if (told->base_files[i] >= md->files_count) {
        return "the base has no such file";
    }
    for (uint32_t k = 0; k < i; k++) {
        if (told->base_files[k] == told->base_files[i]) {
            return "a file is linked twice";
        }
    }
    if (told->ns[i] != first_n + i) {
        return "a link has a number that is not its own";
    }
    return dcp_metadata_accepts(md, &told->written_by[i]) ? NULL : "a file is of another save";
}

static int
read_message(const struct dcp_span *message, const struct dcp_metadata *md,
             const struct dcp_plan *plan, const struct dcp_layout *full, struct told *ret_told,
             struct dcp_error *err)
{
    struct dcp_cursor c = {.data = message->data, .len = message->len};
    struct told told = {0};
    uint32_t items_count = dcp_cursor_u32(&c);

    told.links_count = dcp_cursor_u32(&c);
    told.items_count = dcp_cursor_u32(&c);
    if (c.failed || items_count != plan->items_count || told.links_count > DCP_MOST_LINKS ||
        c.len - c.pos != told.links_count * LINK_BYTES + dcp_keep_bytes(plan->items_count)) {
        return refuse(plan->rank, "its length or its counts are wrong", err);
    }
    for (uint32_t i = 0; i < told.links_count; i++) {
        const uint8_t *id;
        const char *fault;

        told.base_files[i] = dcp_cursor_u32(&c);
        told.ns[i] = dcp_cursor_u64(&c);
        id = dcp_cursor_bytes(&c, sizeof told.written_by[i].bytes);
        DCP_ASSERT(id != NULL);
        memcpy(told.written_by[i].bytes, id, sizeof told.written_by[i].bytes);
        fault = link_fault(&told, i, md, full->files_count);
        if (fault != NULL) {
            return refuse(plan->rank, fault, err);
        }
    }
    told.reused = message->data + c.pos;
    *ret_told = told;
    return 0;
}

/* The links and records of plan `p`, and in `write` the kept items that are left. */
static int
join_items(const struct told *told, const struct dcp_metadata *md, const struct dcp_plan *plan,
           uint32_t p, struct dcp_links *links, uint8_t *write, struct dcp_error *err)
{
    struct dcp_base_finder finder = {0};
    uint32_t items_count = 0;

    for (uint32_t i = 0; i < plan->items_count; i++) {
        const struct dcp_md_chunk *chunk;
        uint32_t link = 0;

        if (!dcp_keep_test(told->reused, i)) {
            continue;
        }
        chunk = dcp_base_find(md, plan, &plan->items[i], &finder);
        if (!dcp_keep_test(write, i) || chunk == NULL || ++items_count > told->items_count) {
            return refuse(plan->rank, "it does not keep the item, or the base has none like it",
                          err);
        }
        while (link < told->links_count && told->base_files[link] != chunk->file) {
            link++;
        }
        if (link == told->links_count) {
            return refuse(plan->rank, "an item lies in a file that it did not link", err);
        }
        dcp_keep_clear(write, i);
        links->records[links->records_count++] =
            (struct dcp_linked_record){.plan = p,
                                       .item = i,
                                       .file = links->files_count + link,
                                       .offset_bytes = chunk->offset_bytes,
                                       .length_bytes = chunk->length_bytes};
    }
    if (items_count != told->items_count) {
        return refuse(plan->rank, "it counted other items than it named", err);
    }
    for (uint32_t i = 0; i < told->links_count; i++) {
        links->files[links->files_count++] =
            (struct dcp_linked_file){.plan = p, .n = told->ns[i], .save_id = told->written_by[i]};
    }
    return 0;
}

static int
join_plan(const struct told *told, const struct dcp_metadata *md,
          const struct dcp_global_plan *global, uint32_t p, struct dcp_joined_reuse *joined,
          struct dcp_error *err)
{
    const struct dcp_plan *plan = &global->plans[p];
    uint8_t *write = dcp_malloc(dcp_keep_bytes(plan->items_count));
    int rc;

    if (write == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a plan's bitmap");
    }
    memcpy(write, global->keep.bits[p], dcp_keep_bytes(plan->items_count));
    rc = join_items(told, md, plan, p, &joined->links, write, err);
    if (rc == 0) {
        rc = dcp_layout_build(plan, write, &joined->layouts[p], err);
    }
    dcp_free(write);
    return rc;
}

static int
read_messages(const struct dcp_metadata *md, const struct dcp_global_plan *global,
              const struct dcp_span *messages, struct told *told, struct dcp_joined_reuse *joined,
              struct dcp_error *err)
{
    uint64_t links_count = 0, records_count = 0;

    for (uint32_t p = 0; p < global->plans_count; p++) {
        int rc =
            read_message(&messages[p], md, &global->plans[p], &global->layouts[p], &told[p], err);
        if (rc != 0) {
            return rc;
        }
        links_count += told[p].links_count;
        records_count += dcp_min_u64(told[p].items_count, global->plans[p].items_count);
    }
    joined->links.files = dcp_malloc_array(links_count, sizeof *joined->links.files);
    joined->links.records = dcp_malloc_array(records_count, sizeof *joined->links.records);
    joined->layouts = dcp_calloc(global->plans_count, sizeof *joined->layouts);
    joined->layouts_count = global->plans_count;
    return joined->links.files == NULL || joined->links.records == NULL || joined->layouts == NULL
               ? dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for %llu linked records",
                               (unsigned long long)records_count)
               : 0;
}

int
dcp_reuse_join(const struct dcp_metadata *md, const struct dcp_global_plan *global,
               const struct dcp_span *messages, struct dcp_joined_reuse *ret_joined,
               struct dcp_error *err)
{
    struct told *told = dcp_malloc_array(global->plans_count, sizeof *told);
    int rc = 0;

    if (told == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the messages of %u ranks",
                             global->plans_count);
    }
    rc = read_messages(md, global, messages, told, ret_joined, err);
    for (uint32_t p = 0; rc == 0 && p < global->plans_count; p++) {
        rc = join_plan(&told[p], md, global, p, ret_joined, err);
    }
    dcp_free(told);
    return rc;
}

void
dcp_joined_reuse_clean_up(struct dcp_joined_reuse *joined)
{
    for (uint32_t i = 0; joined->layouts != NULL && i < joined->layouts_count; i++) {
        dcp_layout_clean_up(&joined->layouts[i]);
    }
    dcp_free(joined->layouts);
    dcp_links_clean_up(&joined->links);
    memset(joined, 0, sizeof *joined);
}
