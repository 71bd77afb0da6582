/*
 * metadata_maker.c: global plans and `.metadata` images for tests.
 */
#include "metadata_maker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "metadata_private.h"
#include "plan_maker.h"

/* Longer than one byte of length can say. */
static const char long_name[] =
    "abcdefghijklmnopqrstuvwxyz abcdefghijklmnopqrstuvwxyz abcdefghijklmnopqrstuvwxyz "
    "abcdefghijklmnopqrstuvwxyz abcdefghijklmnopqrstuvwxyz abcdefghijklmnopqrstuvwxyz "
    "abcdefghijklmnopqrstuvwxyz abcdefghijklmnopqrstuvwxyz abcdefghijklmnopqrstuvwxyz "
    "abcdefghijklmnopqrstuvwxyz abcdefghijklmnopqrstuvwxyz";
static const char id_text[] = "/tmp/check/point";

static void
must(int rc, const struct dcp_error *err)
{
    if (rc != 0) {
        fprintf(stderr, "metadata_maker: %d: %s\n", rc, err->message);
        exit(1);
    }
}

/* Rows of a tensor over all ranks, the last ones with fewer or none. */
static void
add_sharded(struct metadata_sample *sample, const char *fqn, int dtype, uint32_t ndim,
            const uint64_t *size)
{
    uint64_t rows = (size[0] + SAMPLE_RANKS - 1) / SAMPLE_RANKS;
    for (uint64_t r = 0; r < SAMPLE_RANKS; r++) {
        uint64_t offsets[3] = {dcp_min_u64(r * rows, size[0]), 0, 0};
        uint64_t sizes[3] = {0, ndim > 1 ? size[1] : 0, ndim > 2 ? size[2] : 0};
        sizes[0] = dcp_min_u64(rows, size[0] - offsets[0]);
        maker_shard(&sample->plans[r], fqn, dtype, ndim, size, offsets, sizes);
    }
}

static void
add_name_with_path(struct dcp_plan *plan, const char *fqn)
{
    struct dcp_buf path = {0};
    struct dcp_error err = {0};
    uint32_t name;
    dcp_path_put_str(&path, "optimizer", 9);
    dcp_path_put_int(&path, 3);
    dcp_path_put_str(&path, "state", 5);
    dcp_path_put_int(&path, 70000);
    dcp_path_put_str(&path, "\xC3\xA9t\xC3\xA9", 5);
    must(dcp_plan_add_name(plan, fqn, strlen(fqn), path.data, path.len, 5, &name, &err), &err);
    dcp_buf_clean_up(&path);
}

void
metadata_sample_make(struct metadata_sample *sample, uint64_t seed)
{
    static const int dtypes[] = {DCP_DTYPE_FLOAT32, DCP_DTYPE_BFLOAT16, DCP_DTYPE_UINT8,
                                 DCP_DTYPE_FLOAT8_E4M3FN, DCP_DTYPE_COMPLEX128};
    *sample = (struct metadata_sample){.save_id = {.bytes = {1, 2, 3, 4, 5, 6, 7, 8}}};
    struct maker_rng rng = {seed};
    maker_start_plans(sample->plans, SAMPLE_RANKS);
    for (uint32_t r = 0; r < SAMPLE_RANKS; r++) {
        struct dcp_plan *plan = &sample->plans[r];
        plan->has_paths = true;
        plan->thread_count = 1 + (uint32_t)maker_below(&rng, 2);
        maker_object(plan, "step", 512);
        if (r != 1) {
            add_name_with_path(plan, "optimizer.3.state.70000.\xC3\xA9t\xC3\xA9");
        }
    }
    for (uint64_t i = 0; i < 6; i++) {
        char fqn[400];
        snprintf(fqn, sizeof fqn, "model.layers.%d.%s", (int)i, i == 2 ? long_name : "weight");
        uint64_t size[3] = {1 + maker_below(&rng, 8), 1 + maker_below(&rng, 400),
                            1 + maker_below(&rng, 70000)};
        int dtype = dtypes[maker_below(&rng, sizeof dtypes / sizeof dtypes[0])];
        add_sharded(sample, fqn, dtype, 1 + (uint32_t)(i % 3), size);
    }
    for (uint32_t r = 0; r < SAMPLE_RANKS; r++) {
        uint64_t huge[1] = {(3ull << 30) + maker_below(&rng, 1000)};
        uint64_t five[5] = {2, 1, 3, 1, 2};
        maker_tensor(&sample->plans[r], "replicated", DCP_DTYPE_FLOAT16, 5, five);
        maker_tensor(&sample->plans[r], r == 2 ? "huge" : "scalar",
                     r == 2 ? DCP_DTYPE_INT8 : DCP_DTYPE_FLOAT64, r == 2 ? 1 : 0, huge);
    }
    for (uint32_t i = 0; i < sample->plans[0].items_count; i++) {
        struct dcp_item *item = &sample->plans[0].items[i];
        if (item->kind == DCP_ITEM_SHARD) {
            item->props = (uint8_t)maker_below(&rng, 8);
        }
    }
    struct dcp_error err = {0};
    must(dcp_global_plan_build(sample->plans, SAMPLE_RANKS, false, &sample->global, &err), &err);
}

/* Links the items of plan `p` that are not in `written`, into files behind those of `layout`. */
static void
link_plan(struct metadata_sample *sample, struct maker_rng *rng, uint32_t p, const uint8_t *written,
          const struct dcp_layout *layout)
{
    struct dcp_links *links = &sample->links;
    uint32_t first_file = links->files_count;
    uint32_t files_count = 1 + (uint32_t)maker_below(rng, 3);
    for (uint32_t f = 0; f < files_count; f++) {
        struct dcp_linked_file file = {.plan = p, .n = layout->files_count + 2 * f};
        file.save_id.bytes[maker_below(rng, 2)] = (uint8_t)(100 + maker_below(rng, 4));
        links->files[links->files_count++] = file;
    }
    for (uint32_t i = 0; i < sample->plans[p].items_count; i++) {
        if (!dcp_keep_test(sample->global.keep.bits[p], i) || dcp_keep_test(written, i)) {
            continue;
        }
        links->records[links->records_count++] = (struct dcp_linked_record){
            .plan = p,
            .item = i,
            .file = first_file + (uint32_t)maker_below(rng, files_count),
            .offset_bytes = 64 + maker_next(rng) % (1ull << 40),
            .length_bytes = 600 + maker_next(rng) % (1ull << 33),
        };
    }
}

void
metadata_sample_link(struct metadata_sample *sample, uint64_t seed)
{
    struct maker_rng rng = {seed};
    struct dcp_error err = {0};
    size_t items_count = 0;
    for (uint32_t p = 0; p < SAMPLE_RANKS; p++) {
        items_count += sample->plans[p].items_count;
    }
    sample->links.files = dcp_malloc_array(3 * SAMPLE_RANKS, sizeof *sample->links.files);
    sample->links.records = dcp_malloc_array(items_count, sizeof *sample->links.records);
    for (uint32_t p = 0; p < SAMPLE_RANKS; p++) {
        struct dcp_layout *layout = &sample->global.layouts[p];
        uint8_t written[64] = {0};
        if (sample->plans[p].items_count > 8 * sizeof written) {
            exit(1);
        }
        for (uint32_t i = 0; i < sample->plans[p].items_count; i++) {
            bool keep = dcp_keep_test(sample->global.keep.bits[p], i);
            written[i / 8] |= (uint8_t)((keep && maker_below(&rng, 2) == 0) << i % 8);
        }
        dcp_layout_clean_up(layout);
        must(dcp_layout_build(&sample->plans[p], written, layout, &err), &err);
        link_plan(sample, &rng, p, written, layout);
    }
}

void
metadata_sample_clean_up(struct metadata_sample *sample)
{
    dcp_links_clean_up(&sample->links);
    dcp_global_plan_clean_up(&sample->global);
    maker_clean_up_plans(sample->plans, SAMPLE_RANKS);
}

void
metadata_sample_image(const struct metadata_sample *sample, struct dcp_buf *image)
{
    struct dcp_storage_meta meta = {
        .checkpoint_id = id_text,
        .checkpoint_id_is_path = true,
        .storage_save_id = "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        .version = "1.0.0",
    };
    struct dcp_error err = {0};
    const struct dcp_links *links = sample->links.files_count > 0 ? &sample->links : NULL;
    must(
        dcp_metadata_write(&sample->global, &meta, &sample->save_id, SAMPLE_N0, links, image, &err),
        &err);
}

static bool
is_same_bytes(const void *a, const void *b, uint64_t len)
{
    return len == 0 || memcmp(a, b, (size_t)len) == 0;
}

bool
metadata_is_same(const struct dcp_metadata *a, const struct dcp_metadata *b)
{
    return a->entries_count == b->entries_count && a->chunks_count == b->chunks_count &&
           a->dims_count == b->dims_count && a->files_count == b->files_count &&
           a->strings_len == b->strings_len &&
           is_same_bytes(a->strings, b->strings, a->strings_len) &&
           is_same_bytes(a->entries, b->entries, a->entries_count * sizeof *a->entries) &&
           is_same_bytes(a->chunks, b->chunks, a->chunks_count * sizeof *a->chunks) &&
           is_same_bytes(a->dims, b->dims, a->dims_count * sizeof *a->dims) &&
           is_same_bytes(a->files, b->files, a->files_count * sizeof *a->files);
}

int
metadata_read_copy(const uint8_t *image, size_t len, bool pickle_only,
                   const struct dcp_metadata *same_as, bool *ret_same, struct dcp_error *err)
{
    uint8_t *copy = malloc(len == 0 ? 1 : len);
    if (copy == NULL) {
        exit(1);
    }
    memcpy(copy, image, len);
    /* An empty image is the end of a block, where every access is one too many. */
    const uint8_t *data = len == 0 ? copy + 1 : copy;
    struct dcp_metadata md;
    dcp_error_clear(err);
    int rc = pickle_only ? dcp_metadata_read_pickle(data, len, &md, err)
                         : dcp_metadata_read(data, len, &md, err);
    free(copy);
    if (rc != err->code || (rc != 0 && err->message[0] == 0)) {
        fprintf(stderr, "metadata_maker: returned %d, recorded %d '%s'\n", rc, err->code,
                err->message);
        exit(1);
    }
    if (rc != 0) {
        return rc;
    }
    struct dcp_error why = {0};
    must(dcp_metadata_validate(&md, &why), &why);
    if (same_as != NULL) {
        *ret_same = metadata_is_same(&md, same_as);
    }
    dcp_metadata_clean_up(&md);
    return 0;
}
