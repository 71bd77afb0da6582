/*
 * plan_scaling.c: what the coordinator pays per item, step by step, as ranks and tensors grow.
 *
 *     make build/bench/plan_scaling
 *     build/bench/plan_scaling [--json] [ranks] [items per rank] [fsdp | ddp | hsdp]
 *
 * Synthetic plans of an FSDP job: most tensors sharded along dim 0 over all ranks (fsdp), or over
 * the 8 ranks of a node and replicated over nodes (hsdp), or replicated (ddp); besides one
 * replicated tensor in 16 and one object in 64.  Every plan goes through the codec, without its
 * names as most do in a gather, so the steps see memory as it is after one; what it costs with
 * names is told besides.  Prints nanoseconds per item; the sum of the coordinator's steps must stay
 * below 1000.  With --json, one line per shape, nanoseconds by step.  Checks the counts that it
 * prints and exits 1 when one is wrong.
 */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "dcp_metadata.h"
#include "dcp_plan.h"
#include "name_table.h"

enum shape { FSDP, DDP, HSDP };

enum { NODE_RANKS = 8, REPLICATED_EVERY = 16, OBJECT_EVERY = 64 };

static bool as_json;

static void
die(const struct dcp_error *err)
{
    fprintf(stderr, "plan_scaling: %s\n", err->message);
    exit(1);
}

static void
must(int rc, const struct dcp_error *err)
{
    if (rc != 0) {
        die(err);
    }
}

static uint64_t
now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void
put(const char *step, uint64_t ns, uint64_t items)
{
    if (as_json) {
        printf(", \"%s\": %" PRIu64, step, ns);
    } else {
        printf("  %-24s %9.3f ms %8.1f ns/item\n", step, (double)ns / 1e6,
               (double)ns / (double)items);
    }
}

static void
report(const char *step, uint64_t since_ns, uint64_t items)
{
    put(step, now_ns() - since_ns, items);
}

__attribute__((format(printf, 1, 2))) static void
say(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    if (!as_json) {
        vprintf(format, args);
    }
    va_end(args);
}

static void
make_item(struct dcp_plan *plan, enum shape shape, uint32_t ranks, uint32_t i,
          struct dcp_error *err)
{
    static const char *const parts[] = {"attention.wq.weight", "attention.wk.weight",
                                        "attention.wv.weight", "feed_forward.w1.weight"};
    char fqn[96];
    struct dcp_buf path = {0};
    struct dcp_item item = {.dtype = DCP_DTYPE_FLOAT32, .ndim = 2};
    int len = snprintf(fqn, sizeof fqn, "model.layers.%u.%s", i / 4, parts[i % 4]);
    dcp_path_put_str(&path, "model", 5);
    dcp_path_put_str(&path, fqn + 6, (size_t)len - 6);
    must(dcp_plan_add_name(plan, fqn, (size_t)len, path.data, path.len, 2, &item.name, err), err);
    dcp_buf_clean_up(&path);
    uint64_t rows = 64 + i % 5 * 16;
    uint32_t parts_count = shape == FSDP ? ranks : NODE_RANKS;
    uint64_t size[] = {rows * parts_count, 1024}, offsets[] = {0, 0};
    uint64_t sizes[] = {size[0], 1024};
    if (i % OBJECT_EVERY == 7) {
        item = (struct dcp_item){.name = item.name, .kind = DCP_ITEM_BYTES, .slot_bytes = 800};
    } else if (i % REPLICATED_EVERY == 3 || shape == DDP) {
        item.kind = DCP_ITEM_TENSOR;
        size[0] = sizes[0] = rows;
    } else {
        item.kind = DCP_ITEM_SHARD;
        offsets[0] = rows * (plan->rank % parts_count);
        sizes[0] = rows;
    }
    must(dcp_plan_add_item(plan, &item, size, offsets, sizes, err), err);
}

/* Sums over all plans. */
struct codec_costs {
    uint64_t build_ns, hash_ns, names_hash_ns;
    uint64_t encode_ns, decode_ns, image_bytes;                   /* without names */
    uint64_t named_encode_ns, named_decode_ns, named_image_bytes; /* with them */
};

static void
must_be_equal(const struct dcp_plan *a, const struct dcp_plan *b)
{
    struct dcp_hash128 x = dcp_plan_fingerprint(a, 0), y = dcp_plan_fingerprint(b, 0);
    if (x.lo != y.lo || x.hi != y.hi) {
        fprintf(stderr, "plan_scaling: a plan changed on its way\n");
        exit(1);
    }
}

static void
pass_named(const struct dcp_plan *plan, struct dcp_buf *image, struct codec_costs *costs)
{
    struct dcp_plan back;
    struct dcp_error err = {0};
    uint64_t t0 = now_ns();
    dcp_buf_clear(image);
    must(dcp_plan_encode(plan, image, &err), &err);
    uint64_t t1 = now_ns();
    must(dcp_plan_decode(image->data, image->len, &back, &err), &err);
    uint64_t t2 = now_ns();
    costs->named_encode_ns += t1 - t0;
    costs->named_decode_ns += t2 - t1;
    costs->named_image_bytes += image->len;
    must_be_equal(plan, &back);
    dcp_plan_clean_up(&back);
}

/* As in a gather; the first plan is the coordinator's, whose names are the ones that it knows. */
static void
pass_nameless(const struct dcp_plan *plan, struct dcp_name_tables *tables, struct dcp_buf *image,
              struct dcp_plan *ret_back, struct codec_costs *costs)
{
    struct dcp_error err = {0};
    uint64_t t0 = now_ns();
    struct dcp_hash128 names_hash = dcp_plan_names_hash(plan);
    uint64_t t1 = now_ns();
    (void)dcp_plan_fingerprint_named(plan, &names_hash, 0);
    uint64_t t2 = now_ns();
    dcp_buf_clear(image);
    must(dcp_plan_encode_nameless(plan, &names_hash, image, &err), &err);
    uint64_t t3 = now_ns();
    if (plan->rank == 0) {
        must(dcp_name_tables_add_copy(tables, plan, &names_hash, &err), &err);
    }
    must(dcp_plan_decode_shared(image->data, image->len, tables, ret_back, &err), &err);
    uint64_t t4 = now_ns();
    costs->names_hash_ns += t1 - t0;
    costs->hash_ns += t2 - t0;
    costs->encode_ns += t3 - t2;
    costs->decode_ns += t4 - t3;
    costs->image_bytes += image->len;
    must_be_equal(plan, ret_back);
}

/* Makes one plan at a time and sends it through the codec, as a gather would. */
static struct dcp_plan *
make_plans(enum shape shape, uint32_t ranks, uint32_t items)
{
    struct dcp_error err = {0};
    struct dcp_plan *plans = calloc(ranks, sizeof *plans);
    struct codec_costs costs = {0};
    struct dcp_name_tables tables = {0};
    struct dcp_buf image = {0};
    for (uint32_t p = 0; p < ranks; p++) {
        struct dcp_plan plan = {
            .rank = p, .thread_count = 1, .single_file_per_rank = true, .has_paths = true};
        uint64_t since = now_ns();
        for (uint32_t i = 0; i < items; i++) {
            make_item(&plan, shape, ranks, i, &err);
        }
        costs.build_ns += now_ns() - since;
        pass_named(&plan, &image, &costs);
        pass_nameless(&plan, &tables, &image, &plans[p], &costs);
        dcp_plan_clean_up(&plan);
    }
    dcp_buf_clean_up(&image);
    dcp_name_tables_clean_up(&tables);
    double n = (double)ranks * items;
    say("  each rank, ns/item: build %.1f, fingerprint %.1f (names %.1f), encode %.1f; image "
        "%.1f B/item\n",
        (double)costs.build_ns / n, (double)costs.hash_ns / n, (double)costs.names_hash_ns / n,
        (double)costs.encode_ns / n, (double)costs.image_bytes / n);
    put("decode", costs.decode_ns, (uint64_t)ranks * items);
    say("  (with names: encode %.1f, decode %.1f ns/item; image %.1f B/item)\n",
        (double)costs.named_encode_ns / n, (double)costs.named_decode_ns / n,
        (double)costs.named_image_bytes / n);
    return plans;
}

static void
time_layouts(const struct dcp_global_plan *global, uint64_t items)
{
    struct dcp_error err = {0};
    uint64_t since = now_ns();
    for (uint32_t p = 0; p < global->plans_count; p++) {
        struct dcp_layout layout;
        must(dcp_layout_build(&global->plans[p], global->keep.bits[p], &layout, &err), &err);
        dcp_layout_clean_up(&layout);
    }
    report("layouts alone", since, items);
}

static void
check_counts(const struct dcp_global_plan *global, enum shape shape, uint32_t ranks, uint32_t items)
{
    uint64_t want = 0;
    for (uint32_t i = 0; i < items; i++) {
        bool replicated = i % OBJECT_EVERY == 7 || i % REPLICATED_EVERY == 3 || shape == DDP;
        uint32_t parts = shape == FSDP || ranks < NODE_RANKS ? ranks : NODE_RANKS;
        want += replicated ? 1 : parts;
    }
    if (global->entries_count != items || global->chunks_count != want ||
        global->keep.dropped_items != (uint64_t)ranks * items - want) {
        fprintf(stderr, "plan_scaling: %" PRIu64 " entries, %" PRIu64 " chunks; wrong\n",
                global->entries_count, global->chunks_count);
        exit(1);
    }
}

static void
run(const char *name, enum shape shape, uint32_t ranks, uint32_t items)
{
    struct dcp_error err = {0};
    uint64_t total = (uint64_t)ranks * items;
    say("%s, %u ranks x %u items\n", name, ranks, items);
    if (as_json) {
        printf("{\"shape\": \"%s\", \"ranks\": %u, \"items\": %u", name, ranks, items);
    }
    struct dcp_plan *plans = make_plans(shape, ranks, items);

    uint64_t since = now_ns();
    struct dcp_name_ids names;
    must(dcp_name_ids_build(plans, ranks, &names, &err), &err);
    report("names alone", since, total);
    struct dcp_keep keep;
    since = now_ns();
    must(dcp_plan_dedup_named(plans, ranks, &names, false, DCP_SPLIT_AUTO, &keep, &err), &err);
    report("dedup alone", since, total);
    dcp_keep_clean_up(&keep);
    dcp_name_ids_clean_up(&names);

    struct dcp_global_plan global;
    since = now_ns();
    must(dcp_global_plan_build(plans, ranks, false, &global, &err), &err);
    uint64_t steps_ns = now_ns() - since;
    report("global plan", since, total);
    check_counts(&global, shape, ranks, items);
    since = now_ns();
    must(dcp_global_plan_validate(&global, &err), &err);
    report("validation alone", since, total);
    time_layouts(&global, total);

    struct dcp_storage_meta meta = {.version = "1.0.0"};
    struct dcp_save_id save_id = {.bytes = {1}};
    struct dcp_buf image = {0};
    since = now_ns();
    must(dcp_metadata_write(&global, &meta, &save_id, 0, NULL, &image, &err), &err);
    steps_ns += now_ns() - since;
    report("metadata", since, total);
    put("global plan + metadata", steps_ns, total);
    if (as_json) {
        puts("}");
    }
    dcp_buf_clean_up(&image);
    dcp_global_plan_clean_up(&global);
    for (uint32_t p = 0; p < ranks; p++) {
        dcp_plan_clean_up(&plans[p]);
    }
    free(plans);
}

int
main(int argc, char **argv)
{
    static const char *const names[] = {"fsdp", "ddp", "hsdp"};
    as_json = argc > 1 && strcmp(argv[1], "--json") == 0;
    argc -= as_json;
    argv += as_json;
    long ranks = argc > 1 ? strtol(argv[1], NULL, 10) : 64;
    long items = argc > 2 ? strtol(argv[2], NULL, 10) : 256;
    if (ranks < 1 || ranks > DCP_MAX_RANKS || items < 1 || items > 1000000) {
        fprintf(stderr,
                "usage: plan_scaling [--json] [ranks] [items per rank] [fsdp | ddp | hsdp]\n");
        return 2;
    }
    for (int s = FSDP; s <= HSDP; s++) {
        if (argc <= 3 || strcmp(argv[3], names[s]) == 0) {
            run(names[s], (enum shape)s, (uint32_t)ranks, (uint32_t)items);
        }
    }
    return 0;
}
