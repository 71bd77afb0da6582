/*
 * incremental.c: which items of one rank have not changed since the base, and where they stay.
 *
 * An item is unchanged when the base has a record of the same name, form and length whose stored
 * content hash, all 128 bits of it, is that of the item's memory now.  What is unchanged stays
 * where it is, and its whole file comes along under a name of this save.  So a chain of incremental
 * saves must not drag bytes along for ever that only the first of them needed, nor more and more
 * files:
 *   - a file of which this rank needs less than half is not linked; its items are written anew.
 *     Dead bytes are never more than live ones.
 *   - at most DCP_MOST_LINKS files are linked, those with the most bytes of use.
 * Whatever else stands in the way (no such file, no hashes, no links on this file system) makes
 * items changed too.  The bytes lost to each cause are counted, and the costliest one is reported.
 *
 * Where anything was compared the hashes of all kept items are known afterwards, and the writer
 * stores them with what it writes.
 *
 * What lies on devices is hashed as it comes off a stream (device_stream.c).  What has changed
 * comes over the bus once more when it is staged or written: where a record goes is known only
 * after the comparison, and to keep all bytes meanwhile would take the memory that a base saves.
 *
 * Threads: one.  Memory: 16 bytes per item, 32 per candidate, the hashes of one file, a scratch
 * buffer for strided tensors.
 */
#include "incremental.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "group.h"

enum {
    /* Of a hash, between looks at `cancel`: a few milliseconds. */
    PIECE_BYTES = 16 << 20,
    /* Strided tensors are made contiguous in pieces that stay in the cache. */
    SCRATCH_BYTES = 256 << 10,
};

/* What became of an item.  In the order in which a text is preferred when equally many bytes are
 * lost. */
enum fate {
    FATE_SAME,    /* and stays where it is, if nothing comes in between */
    FATE_CHANGED, /* the base is not to blame */
    FATE_LINK,
    FATE_UNSEEN,
    FATE_FILE,
    FATE_HASHES,
    FATE_HALF_DEAD,
    FATE_TOO_MANY,
    FATE_FORM,
    FATES,
};

struct candidate {
    uint32_t item, file; /* `file`: in the base's metadata */
    uint64_t offset_bytes, record_bytes;
};

/* Candidates of one file that is worth a link. */
struct worthy {
    struct dcp_base_file from;
    uint32_t first, count; /* candidates */
    uint64_t live_bytes;
};

struct decision {
    const struct dcp_reuse_request *request;
    struct dcp_reuse *reuse;
    struct candidate *candidates; /* owned; by file and offset */
    uint32_t candidates_count;
    uint8_t *fates; /* owned; per item, enum fate */
    struct worthy worthies[DCP_MOST_LINKS];
    uint32_t worthies_count;
    int link_errno; /* of the first link that failed */
};

static bool
is_kept(const struct decision *d, uint32_t item)
{
    return dcp_keep_test(d->request->keep, item);
}

/* ---- what the base might have ---- */

static int
compare_candidates(const void *left, const void *right)
{
    const struct candidate *a = left, *b = right;

    if (a->file != b->file) {
        return a->file < b->file ? -1 : 1;
    }
    return a->offset_bytes < b->offset_bytes ? -1 : a->offset_bytes > b->offset_bytes;
}

static int
find_candidates(struct decision *d, struct dcp_error *err)
{
    const struct dcp_plan *plan = d->request->plan;
    struct dcp_base_finder finder = {0};

    d->candidates = dcp_malloc_array(plan->items_count, sizeof *d->candidates);
    d->fates = dcp_calloc(plan->items_count == 0 ? 1 : plan->items_count, sizeof *d->fates);
    if (d->candidates == NULL || d->fates == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "comparing %u items with a base: no memory",
                             plan->items_count);
    }
    for (uint32_t i = 0; i < plan->items_count; i++) {
        const struct dcp_md_chunk *chunk =
            !is_kept(d, i) ? NULL
                           : dcp_base_find(&d->request->base->md, plan, &plan->items[i], &finder);
        if (chunk == NULL) {
            d->fates[i] = FATE_FORM;
        } else if (d->request->base->dirfd < 0) {
            d->fates[i] = FATE_UNSEEN;
        } else {
            d->candidates[d->candidates_count++] =
                (struct candidate){i, chunk->file, chunk->offset_bytes, chunk->length_bytes};
        }
    }
    qsort(d->candidates, d->candidates_count, sizeof *d->candidates, compare_candidates);
    return 0;
}

/* ---- hashes of what is in memory ---- */

static int
check_cancel(const struct decision *d, struct dcp_error *err)
{
    if (d->request->cancel != NULL && atomic_load(d->request->cancel) != 0) {
        return dcp_error_set(err, DCP_E_CANCELLED, 0, NULL,
                             "the save was cancelled while it compared with its base");
    }
    return 0;
}

/* What hashing works with. */
struct hashing {
    const struct decision *d;
    uint8_t *scratch;
    struct dcp_device_stream *stream; /* NULL without devices */
};

/* The payloads on devices, in the order in which they are hashed. */
static bool
next_on_device(const void *ctx, uint64_t *cursor, struct dcp_device_payload *ret)
{
    const struct decision *d = ctx;
    const struct dcp_reuse_request *request = d->request;

    while (*cursor < request->plan->items_count) {
        uint32_t i = (uint32_t)(*cursor)++;
        const struct dcp_item *item = &request->plan->items[i];
        if (is_kept(d, i) && request->sources[i].device != 0 &&
            dcp_item_payload_bytes(request->plan, item) > 0 &&
            dcp_device_check_source(request->devices, request->plan, item, &request->sources[i],
                                    NULL) == 0) {
            *ret =
                dcp_device_payload_of(request->devices, request->plan, item, &request->sources[i]);
            return true;
        }
    }
    return false;
}

/* The next bytes of an item, contiguous; `n` of them at most. */
static int
next_piece(const struct hashing *h, uint32_t i, uint64_t from, uint64_t n,
           const uint8_t **ret_piece, uint64_t *ret_len, struct dcp_error *err)
{
    const struct dcp_plan *plan = h->d->request->plan;
    const struct dcp_item *item = &plan->items[i];
    const struct dcp_source *source = &h->d->request->sources[i];

    if (source->device != 0) {
        return dcp_device_stream_peek(h->stream, (uint64_t)(uintptr_t)source->data, n,
                                      h->d->request->cancel, ret_piece, ret_len, err);
    }
    *ret_piece = source->data + from;
    *ret_len = dcp_min_u64(n, PIECE_BYTES);
    if (item->slot_bytes == 0 && source->strides_bytes != NULL) {
        *ret_piece = h->scratch;
        *ret_len = dcp_min_u64(n, SCRATCH_BYTES);
        dcp_box_gather(h->scratch, source->data, item->ndim, dcp_item_sizes(plan, item),
                       source->strides_bytes, dcp_dtype_bytes(item->dtype), from, *ret_len);
    }
    return 0;
}

static int
hash_item(const struct hashing *h, uint32_t i, struct dcp_hash128 *ret_hash, struct dcp_error *err)
{
    const struct dcp_reuse_request *request = h->d->request;
    const struct dcp_plan *plan = request->plan;
    const struct dcp_item *item = &plan->items[i];
    const struct dcp_source *source = &request->sources[i];
    uint64_t len = item->slot_bytes != 0 ? item->slot_bytes : dcp_item_payload_bytes(plan, item);
    struct dcp_content_hash hash;
    int rc;

    rc = dcp_device_check_source(request->devices, plan, item, source, err);
    dcp_content_hash_begin(&hash);
    for (uint64_t at = 0, n = 0; at < len && rc == 0; at += n) {
        const uint8_t *piece;
        rc = next_piece(h, i, at, len - at, &piece, &n, err);
        if (rc == 0) {
            dcp_content_hash_add(&hash, piece, (size_t)n);
            if (source->device != 0) {
                dcp_device_stream_take(h->stream, n);
            }
            rc = check_cancel(h->d, err);
        }
    }
    *ret_hash = dcp_content_hash_end(&hash);
    return rc;
}

static int
hash_items(struct decision *d, struct dcp_error *err)
{
    const struct dcp_reuse_request *request = d->request;
    const struct dcp_plan *plan = request->plan;
    struct hashing h = {.d = d, .scratch = dcp_malloc(SCRATCH_BYTES)};
    struct dcp_device_stats stats = {0};
    uint64_t start_ns = dcp_now_ns();
    int rc = 0;

    d->reuse->hashes =
        dcp_calloc(plan->items_count == 0 ? 1 : plan->items_count, sizeof *d->reuse->hashes);
    if (h.scratch == NULL || d->reuse->hashes == NULL) {
        rc = dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the hashes of %u items",
                           plan->items_count);
    }
    if (rc == 0 && request->devices != NULL) {
        rc = dcp_device_stream_new(request->devices, next_on_device, d, &stats, &h.stream, err);
    }
    for (uint32_t i = 0; i < plan->items_count && rc == 0; i++) {
        if (is_kept(d, i)) {
            rc = hash_item(&h, i, &d->reuse->hashes[i], err);
        }
    }
    dcp_device_stream_destroy(h.stream);
    if (request->device_stats != NULL) {
        dcp_device_stats_add(request->device_stats, &stats);
    }
    dcp_free(h.scratch);
    d->reuse->hash_ns = dcp_now_ns() - start_ns;
    return rc;
}

/* ---- file by file ---- */

static void
give_up(struct decision *d, uint32_t first, uint32_t count, enum fate fate)
{
    for (uint32_t i = first; i < first + count; i++) {
        uint8_t *now = &d->fates[d->candidates[i].item];
        *now = *now == FATE_SAME ? (uint8_t)fate : *now;
    }
}

/* Bytes of the records that are the same in the base's file and in memory. */
static uint64_t
compare_hashes(struct decision *d, uint32_t first, uint32_t count,
               const struct dcp_hash_table *table)
{
    uint64_t live_bytes = 0;

    for (uint32_t i = first; i < first + count; i++) {
        const struct candidate *candidate = &d->candidates[i];
        const struct dcp_hash_entry *entry = dcp_hash_table_find(table, candidate->offset_bytes);
        if (entry == NULL || entry->record_bytes != candidate->record_bytes) {
            d->fates[candidate->item] = FATE_FILE;
        } else if (!dcp_hash128_equal(entry->hash, d->reuse->hashes[candidate->item])) {
            d->fates[candidate->item] = FATE_CHANGED;
        } else {
            live_bytes += candidate->record_bytes;
        }
    }
    return live_bytes;
}

/* Keeps the DCP_MOST_LINKS with the most live bytes; of equal ones those that came first. */
static void
keep_worthiest(struct decision *d, const struct worthy *worthy)
{
    struct worthy *least = &d->worthies[0];

    if (d->worthies_count < DCP_MOST_LINKS) {
        d->worthies[d->worthies_count++] = *worthy;
        return;
    }
    for (uint32_t i = 1; i < d->worthies_count; i++) {
        least = d->worthies[i].live_bytes <= least->live_bytes ? &d->worthies[i] : least;
    }
    if (least->live_bytes >= worthy->live_bytes) {
        give_up(d, worthy->first, worthy->count, FATE_TOO_MANY);
    } else {
        give_up(d, least->first, least->count, FATE_TOO_MANY);
        *least = *worthy;
    }
}

static int
consider_file(struct decision *d, uint32_t first, uint32_t count, struct dcp_error *err)
{
    struct worthy worthy = {.first = first, .count = count};
    struct dcp_hash_table table = {0};
    struct dcp_error local;
    int rc;

    dcp_error_clear(&local);
    rc = dcp_base_file_read(d->request->base, d->candidates[first].file, &worthy.from, &table,
                            &local);
    if (rc == DCP_E_NOMEM) {
        return dcp_error_set(err, rc, 0, NULL, "%s", local.message);
    }
    if (rc != 0) {
        give_up(d, first, count, rc == DCP_E_MISSING ? FATE_HASHES : FATE_FILE);
        return 0;
    }
    worthy.live_bytes = compare_hashes(d, first, count, &table);
    dcp_hash_table_clean_up(&table);
    if (worthy.live_bytes < worthy.from.length_bytes - worthy.live_bytes) {
        give_up(d, first, count, FATE_HALF_DEAD);
    } else {
        keep_worthiest(d, &worthy);
    }
    return 0;
}

static int
consider_files(struct decision *d, struct dcp_error *err)
{
    int rc = 0;

    for (uint32_t first = 0, end; first < d->candidates_count && rc == 0; first = end) {
        end = first + 1;
        while (end < d->candidates_count && d->candidates[end].file == d->candidates[first].file) {
            end++;
        }
        rc = check_cancel(d, err);
        if (rc == 0) {
            rc = consider_file(d, first, end - first, err);
        }
    }
    return rc;
}

static void
link_files(struct decision *d)
{
    struct dcp_reuse *reuse = d->reuse;

    for (uint32_t k = 0; k < d->worthies_count; k++) {
        const struct worthy *worthy = &d->worthies[k];
        struct dcp_link *link = &reuse->links[reuse->links_count];
        int rc;

        link->from = worthy->from;
        link->n = d->request->first_link_n + reuse->links_count;
        rc = dcp_link_make(&d->request->target, d->request->base, link);
        if (rc != 0) {
            d->link_errno = d->link_errno == 0 ? -rc : d->link_errno;
            give_up(d, worthy->first, worthy->count, FATE_LINK);
            continue;
        }
        reuse->links_count++;
        for (uint32_t i = worthy->first; i < worthy->first + worthy->count; i++) {
            uint32_t item = d->candidates[i].item;
            if (d->fates[item] == FATE_SAME) {
                dcp_keep_set(reuse->reused, item);
                reuse->items++;
                reuse->bytes += d->candidates[i].record_bytes;
            }
        }
    }
}

/* ---- the report ---- */

static void
explain_link(const struct decision *d, char *ret_text, size_t size)
{
    bool hard = d->request->target.mode == DCP_LINK_HARD;

    if (d->link_errno == EXDEV) {
        snprintf(ret_text, size, "the base is on another file system");
    } else if (d->link_errno == EOPNOTSUPP && !hard) {
        snprintf(ret_text, size,
                 "the file system has no reflinks; incremental_links=\"hard\" makes hard links");
    } else {
        snprintf(ret_text, size, "%s a file of the base failed: %s",
                 hard ? "linking" : "reflinking", strerror(d->link_errno));
    }
}

static void
explain(const struct decision *d)
{
    static const char *const texts[FATES] = {
        [FATE_UNSEEN] = "this rank can not open the base's directory",
        [FATE_FILE] = "a data file of the base is missing, damaged or of another save",
        [FATE_HASHES] = "the base was saved without content hashes",
        [FATE_HALF_DEAD] = "less than half of a file of the base is still in use",
        [FATE_TOO_MANY] = "what is unchanged lies in too many files of the base",
        [FATE_FORM] = "the base has not the same names, element types, sizes and sharding",
    };
    uint64_t lost_bytes[FATES] = {0};
    enum fate worst = FATE_LINK;

    for (uint32_t i = 0; i < d->request->plan->items_count; i++) {
        if (is_kept(d, i)) {
            lost_bytes[d->fates[i]] +=
                dcp_item_weight_bytes(d->request->plan, &d->request->plan->items[i]);
        }
    }
    for (enum fate fate = FATE_LINK; fate < FATES; fate++) {
        worst = lost_bytes[fate] > lost_bytes[worst] ? fate : worst;
    }
    if (lost_bytes[worst] == 0) {
        return;
    }
    if (worst == FATE_LINK) {
        explain_link(d, d->reuse->reason, sizeof d->reuse->reason);
    } else {
        snprintf(d->reuse->reason, sizeof d->reuse->reason, "%s", texts[worst]);
    }
}

int
dcp_reuse_decide(const struct dcp_reuse_request *request, struct dcp_reuse *reuse,
                 struct dcp_error *err)
{
    struct decision d = {.request = request, .reuse = reuse};
    int rc;

    reuse->reused = dcp_calloc(dcp_keep_bytes(request->plan->items_count), 1);
    rc = reuse->reused == NULL
             ? dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a plan's bitmap")
             : 0;
    if (rc == 0) {
        rc = find_candidates(&d, err);
    }
    /* Without anything to compare them with the writer makes the hashes, in passing. */
    if (rc == 0 && d.candidates_count > 0) {
        rc = hash_items(&d, err);
        rc = rc == 0 ? consider_files(&d, err) : rc;
    }
    if (rc == 0) {
        link_files(&d);
        explain(&d);
    }
    dcp_free(d.candidates);
    dcp_free(d.fates);
    return rc;
}

void
dcp_reuse_clean_up(struct dcp_reuse *reuse)
{
    dcp_free(reuse->reused);
    dcp_free(reuse->hashes);
    *reuse = (struct dcp_reuse){0};
}
