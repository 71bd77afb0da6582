/*
 * test_name_table.c: plans that are sent without names, or with names that others sent too, come
 * back as they were; and no message gets names that are not its own.
 */
#include "name_table.h"

#include "ctest.h"
#include "dcp_metadata.h"
#include "plan_maker.h"

enum { RANKS = 7 };

static bool
same_plan(const struct dcp_plan *a, const struct dcp_plan *b)
{
    struct dcp_hash128 x = dcp_plan_fingerprint(a, 0), y = dcp_plan_fingerprint(b, 0);
    return x.lo == y.lo && x.hi == y.hi && a->dims_count == b->dims_count &&
           a->names_count == b->names_count && a->items_count == b->items_count;
}

static void
encode(const struct dcp_plan *plan, bool nameless, struct dcp_buf *image)
{
    struct dcp_hash128 hash = dcp_plan_names_hash(plan);
    struct dcp_error err = {0};
    dcp_buf_clear(image);
    if (nameless) {
        CHECK_OK(dcp_plan_encode_nameless(plan, &hash, image, &err), &err);
    } else {
        CHECK_OK(dcp_plan_encode(plan, image, &err), &err);
    }
}

static void
know_names_of(struct dcp_name_tables *tables, const struct dcp_plan *plan)
{
    struct dcp_hash128 hash = dcp_plan_names_hash(plan);
    struct dcp_error err = {0};
    CHECK_OK(dcp_name_tables_add_copy(tables, plan, &hash, &err), &err);
}

/* Decodes a copy of exactly `len` bytes, so that the sanitizer sees a read behind it; nothing of it
 * stays in `tables`. */
static int
decode_copy(const uint8_t *data, size_t len, const struct dcp_plan *known_names_of,
            struct dcp_plan *ret_plan)
{
    struct dcp_name_tables tables = {0};
    struct dcp_error err = {0};
    uint8_t *copy = malloc(len == 0 ? 1 : len);
    memcpy(copy, data, len);
    if (known_names_of != NULL) {
        know_names_of(&tables, known_names_of);
    }
    int rc = dcp_plan_decode_shared(copy, len, &tables, ret_plan, &err);
    CHECK(rc == err.code);
    dcp_name_tables_clean_up(&tables);
    free(copy);
    return rc;
}

static void
copy_names(const struct dcp_plan *from, uint32_t count, bool with_paths, struct dcp_plan *to)
{
    struct dcp_error err = {0};
    for (uint32_t i = 0; i < count; i++) {
        const struct dcp_name *name = &from->names[i];
        uint32_t index;
        CHECK_OK(dcp_plan_add_name(to, name->fqn, name->fqn_len, with_paths ? name->path : NULL,
                                   with_paths ? name->path_len : 0,
                                   with_paths ? name->path_parts : 0, &index, &err),
                 &err);
    }
}

static void
copy_items(const struct dcp_plan *from, struct dcp_plan *to)
{
    struct dcp_error err = {0};
    for (uint32_t i = 0; i < from->items_count; i++) {
        const struct dcp_item *item = &from->items[i];
        if (item->name < to->names_count) {
            CHECK_OK(dcp_plan_add_item(to, item, dcp_item_global_size(from, item),
                                       dcp_item_offsets(from, item), dcp_item_sizes(from, item),
                                       &err),
                     &err);
        }
    }
}

/* Ranks as a job may have them: the same names, fewer, none, no paths, other ones. */
static void
make_plans(struct maker_rng *rng, struct dcp_plan plans[RANKS])
{
    maker_random_plan(rng, &plans[0], 0, (uint32_t)maker_below(rng, 40));
    for (uint32_t r = 1; r < RANKS; r++) {
        uint64_t variant = maker_below(rng, 6);
        if (variant == 0) {
            maker_random_plan(rng, &plans[r], r, (uint32_t)maker_below(rng, 40));
            continue;
        }
        uint32_t count = plans[0].names_count;
        count = variant == 1 ? (uint32_t)maker_below(rng, count + 1) : variant == 2 ? 0 : count;
        plans[r] = (struct dcp_plan){.rank = r, .thread_count = 1, .has_paths = r % 2 != 0};
        copy_names(&plans[0], count, variant != 3, &plans[r]);
        copy_items(&plans[0], &plans[r]);
    }
}

static void
plans_with_shared_names_come_back_equal(void)
{
    struct dcp_buf images[RANKS] = {{0}};
    for (uint64_t seed = 0; seed < 300; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plans[RANKS], back[RANKS] = {{0}};
        struct dcp_name_tables tables = {0};
        struct dcp_error err = {0};
        make_plans(&rng, plans);
        know_names_of(&tables, &plans[0]);
        for (uint32_t r = 0; r < RANKS; r++) {
            struct dcp_hash128 hash = dcp_plan_names_hash(&plans[r]);
            bool known = dcp_name_tables_by_hash(&tables, &hash) != NULL;
            encode(&plans[r], known && maker_below(&rng, 4) != 0, &images[r]);
            CHECK_OK(dcp_plan_decode_shared(images[r].data, images[r].len, &tables, &back[r], &err),
                     &err);
            CHECK(same_plan(&plans[r], &back[r]));
        }
        /* One table per content, and plans outlive the set of tables. */
        dcp_name_tables_clean_up(&tables);
        for (uint32_t r = 0; r < RANKS; r++) {
            for (uint32_t q = 0; q < r; q++) {
                struct dcp_hash128 a = dcp_plan_names_hash(&back[r]);
                struct dcp_hash128 b = dcp_plan_names_hash(&back[q]);
                CHECK_EQ(back[r].table == back[q].table, a.lo == b.lo && a.hi == b.hi);
            }
            CHECK(same_plan(&plans[r], &back[r]));
        }
        maker_clean_up_plans(plans, RANKS);
        maker_clean_up_plans(back, RANKS);
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        dcp_buf_clean_up(&images[r]);
    }
}

/* Every part of a name counts, and where one ends and the next begins. */
static void
any_difference_of_names_gives_another_hash(void)
{
    static const struct {
        const char *fqns[3];
        const char *path; /* of the last; NULL: none */
    } cases[] = {
        {{"a", "b"}, NULL}, {{"b", "a"}, NULL},   {{"ab"}, NULL},       {{"a"}, NULL},
        {{"a", ""}, NULL},  {{"", "a"}, NULL},    {{""}, NULL},         {{NULL}, NULL},
        {{"a", "b"}, ""},   {{"a", "b"}, "s\1b"}, {{"a", "b"}, "s\1c"}, {{"a", "b", "c"}, NULL},
        {{"abs\1b"}, NULL},
    };
    enum { CASES = sizeof cases / sizeof *cases };
    struct dcp_hash128 hashes[CASES];
    for (size_t c = 0; c < CASES; c++) {
        struct dcp_plan plan = {0};
        struct dcp_error err = {0};
        for (size_t i = 0; i < 3 && cases[c].fqns[i] != NULL; i++) {
            bool last = i == 2 || cases[c].fqns[i + 1] == NULL;
            const char *path = last ? cases[c].path : NULL;
            size_t len = path == NULL ? 0 : strlen(path);
            uint32_t name;
            CHECK_OK(dcp_plan_add_name(&plan, cases[c].fqns[i], strlen(cases[c].fqns[i]),
                                       (const uint8_t *)path, len, len != 0, &name, &err),
                     &err);
        }
        hashes[c] = dcp_plan_names_hash(&plan);
        for (size_t d = 0; d < c; d++) {
            CHECK(hashes[c].lo != hashes[d].lo && hashes[c].hi != hashes[d].hi);
        }
        dcp_plan_clean_up(&plan);
    }
}

/* Items, rank and options have no part in it. */
static void
plans_with_equal_names_have_one_hash(void)
{
    struct maker_rng rng = {5};
    struct dcp_plan plan, other = {.rank = 9, .has_paths = true};
    maker_random_plan(&rng, &plan, 3, 20);
    copy_names(&plan, plan.names_count, true, &other);
    struct dcp_hash128 a = dcp_plan_names_hash(&plan), b = dcp_plan_names_hash(&other);
    CHECK(a.lo == b.lo && a.hi == b.hi);
    dcp_plan_clean_up(&plan);
    dcp_plan_clean_up(&other);
}

static void
names_that_nobody_sent_are_refused(void)
{
    struct maker_rng rng = {1};
    struct dcp_plan plan, other, back = {0};
    struct dcp_error err = {0};
    struct dcp_buf image = {0};
    maker_random_plan(&rng, &plan, 5, 20);
    maker_random_plan(&rng, &other, 6, 20);
    encode(&plan, true, &image);
    CHECK_EQ(decode_copy(image.data, image.len, NULL, &back), DCP_E_MISSING);
    CHECK_EQ(decode_copy(image.data, image.len, &other, &back), DCP_E_MISSING);
    CHECK_EQ(dcp_plan_decode(image.data, image.len, &back, &err), DCP_E_CORRUPT);
    CHECK_EQ(decode_copy(image.data, image.len, &plan, &back), 0);
    dcp_plan_clean_up(&back);
    dcp_plan_clean_up(&plan);
    dcp_plan_clean_up(&other);
    dcp_buf_clean_up(&image);
}

static void
every_truncation_of_a_nameless_image_is_refused(void)
{
    struct dcp_buf image = {0};
    for (uint64_t seed = 0; seed < 4; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plan, back;
        maker_random_plan(&rng, &plan, 5, 30);
        encode(&plan, true, &image);
        for (size_t len = 0; len < image.len; len++) {
            CHECK_EQ(decode_copy(image.data, len, &plan, &back), DCP_E_CORRUPT);
        }
        dcp_buf_put_u8(&image, 0);
        CHECK_EQ(decode_copy(image.data, image.len, &plan, &back), DCP_E_CORRUPT);
        dcp_plan_clean_up(&plan);
    }
    dcp_buf_clean_up(&image);
}

/* What decodes has the names that its hash stands for, or that came with it, and is sound. */
static void
mutations_never_give_a_plan_other_names_than_it_says(void)
{
    struct dcp_buf image = {0}, again = {0};
    uint32_t accepted = 0, refused = 0;
    for (uint64_t seed = 0; seed < 40; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plan;
        maker_random_plan(&rng, &plan, 5, 12);
        struct dcp_hash128 hash = dcp_plan_names_hash(&plan);
        bool nameless = seed % 2 == 0;
        encode(&plan, nameless, &image);
        for (uint32_t round = 0; round < 400; round++) {
            uint8_t *copy = malloc(image.len);
            memcpy(copy, image.data, image.len);
            uint64_t limit = maker_below(&rng, 2) != 0 ? image.len : 38; /* the head, or anywhere */
            for (uint64_t n = 1 + maker_below(&rng, 3); n > 0; n--) {
                uint8_t *at = &copy[maker_below(&rng, limit)];
                uint8_t bit = (uint8_t)(1u << maker_below(&rng, 8));
                *at = (uint8_t)(maker_below(&rng, 2) != 0 ? maker_next(&rng) : *at ^ bit);
            }
            struct dcp_plan back = {0}, twice = {0};
            if (decode_copy(copy, image.len, &plan, &back) == 0) {
                struct dcp_hash128 names = dcp_plan_names_hash(&back);
                accepted++;
                CHECK(!nameless || (names.lo == hash.lo && names.hi == hash.hi));
                encode(&back, false, &again);
                CHECK_EQ(decode_copy(again.data, again.len, NULL, &twice), 0);
                CHECK(same_plan(&back, &twice));
            } else {
                refused++;
            }
            dcp_plan_clean_up(&back);
            dcp_plan_clean_up(&twice);
            free(copy);
        }
        dcp_plan_clean_up(&plan);
    }
    CHECK(accepted > 500 && refused > 500);
    dcp_buf_clean_up(&image);
    dcp_buf_clean_up(&again);
}

/* A table is found by the bytes it came from, so those must be its own to the last one. */
static void
names_that_differ_in_one_byte_are_decoded_anew(void)
{
    struct dcp_plan plans[2], back[2] = {{0}};
    struct dcp_buf images[2] = {{0}};
    struct dcp_name_tables tables = {0};
    struct dcp_error err = {0};
    maker_start_plans(plans, 2);
    maker_object(&plans[0], "state.0", 80);
    maker_object(&plans[1], "state.1", 80);
    for (uint32_t r = 0; r < 2; r++) {
        encode(&plans[r], false, &images[r]);
        CHECK_OK(dcp_plan_decode_shared(images[r].data, images[r].len, &tables, &back[r], &err),
                 &err);
        CHECK(same_plan(&plans[r], &back[r]));
        dcp_buf_clean_up(&images[r]);
    }
    CHECK(back[0].table != back[1].table);
    dcp_name_tables_clean_up(&tables);
    maker_clean_up_plans(plans, 2);
    maker_clean_up_plans(back, 2);
}

/* Each rank has a name of its own: in the place of the coordinator's, besides it, or not at all. */
static void
a_name_of_its_own_costs_a_rank_no_copy_of_the_others(void)
{
    enum { NAMES = 12, OWN = 5, KINDS = 3 };
    struct dcp_plan coordinator = {0}, plans[KINDS] = {{0}}, back[KINDS] = {{0}};
    struct dcp_name_tables tables = {0};
    struct dcp_buf images[KINDS] = {{0}};
    struct dcp_error err = {0};
    char fqn[32];
    for (uint32_t i = 0; i < NAMES; i++) {
        snprintf(fqn, sizeof fqn, "layers.%u.weight", i);
        (void)maker_name(&coordinator, fqn);
        for (uint32_t kind = 0; kind < KINDS; kind++) {
            if (i == OWN && kind != 2) {
                (void)maker_name(&plans[kind], "rng.7");
            }
            if (i != OWN || kind == 1) {
                (void)maker_name(&plans[kind], fqn);
            }
        }
    }
    know_names_of(&tables, &coordinator);
    for (uint32_t kind = 0; kind < KINDS; kind++) {
        encode(&plans[kind], false, &images[kind]);
        CHECK_OK(
            dcp_plan_decode_shared(images[kind].data, images[kind].len, &tables, &back[kind], &err),
            &err);
        uint32_t borrowed = 0;
        for (uint32_t i = 0; i < back[kind].names_count; i++) {
            for (uint32_t k = 0; k < NAMES; k++) {
                borrowed += back[kind].names[i].fqn == tables.lender->names[k].fqn;
            }
        }
        CHECK_EQ(borrowed, kind == 1 ? NAMES : NAMES - 1);
        dcp_buf_clean_up(&images[kind]);
    }
    dcp_name_tables_clean_up(&tables); /* the tables keep what they borrow */
    for (uint32_t kind = 0; kind < KINDS; kind++) {
        CHECK(same_plan(&plans[kind], &back[kind]));
    }
    maker_clean_up_plans(plans, KINDS);
    maker_clean_up_plans(back, KINDS);
    dcp_plan_clean_up(&coordinator);
}

static void
numbers_of_names_do_not_depend_on_sharing(void)
{
    for (uint64_t seed = 0; seed < 60; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plans[RANKS], back[RANKS] = {{0}};
        struct dcp_name_tables tables = {0};
        struct dcp_name_ids direct, shared;
        struct dcp_error err = {0};
        struct dcp_buf image = {0};
        make_plans(&rng, plans);
        for (uint32_t r = 0; r < RANKS; r++) {
            know_names_of(&tables, &plans[r]);
            encode(&plans[r], true, &image);
            CHECK_OK(dcp_plan_decode_shared(image.data, image.len, &tables, &back[r], &err), &err);
        }
        CHECK_OK(dcp_name_ids_build(plans, RANKS, &direct, &err), &err);
        CHECK_OK(dcp_name_ids_build(back, RANKS, &shared, &err), &err);
        CHECK_EQ(direct.distinct_count, shared.distinct_count);
        for (uint32_t r = 0; r < RANKS; r++) {
            CHECK(memcmp(direct.ids + direct.first[r], shared.ids + shared.first[r],
                         plans[r].names_count * sizeof *direct.ids) == 0);
        }
        dcp_name_ids_clean_up(&direct);
        dcp_name_ids_clean_up(&shared);
        dcp_name_tables_clean_up(&tables);
        dcp_buf_clean_up(&image);
        maker_clean_up_plans(plans, RANKS);
        maker_clean_up_plans(back, RANKS);
    }
}

/* The same five names: in order, reversed, by other paths, without the last two. */
static void
make_variant(struct dcp_plan *plan, uint32_t rank, uint64_t variant)
{
    const uint64_t sizes[] = {2, 3};
    struct dcp_error err = {0};
    *plan = (struct dcp_plan){
        .rank = rank, .thread_count = 1, .single_file_per_rank = true, .has_paths = true};
    for (uint32_t i = 0; i < (variant == 3 ? 3 : 5); i++) {
        uint32_t k = variant == 1 ? 4 - i : i;
        struct dcp_buf path = {0};
        char fqn[16];
        uint32_t name;
        snprintf(fqn, sizeof fqn, "model.%u", k);
        dcp_path_put_str(&path, "model", 5);
        if (variant == 2) {
            dcp_path_put_str(&path, fqn + 6, 1);
        } else {
            dcp_path_put_int(&path, k);
        }
        CHECK_OK(dcp_plan_add_name(plan, fqn, 7, path.data, path.len, 2, &name, &err), &err);
        CHECK_EQ(name, i);
        dcp_buf_clean_up(&path);
        CHECK_OK(dcp_plan_add_item(plan,
                                   &(struct dcp_item){.name = name,
                                                      .kind = DCP_ITEM_TENSOR,
                                                      .dtype = DCP_DTYPE_FLOAT32,
                                                      .ndim = 2},
                                   sizes, (uint64_t[]){0, 0}, sizes, &err),
                 &err);
    }
}

static void
write_metadata(const struct dcp_plan *plans, struct dcp_buf *ret_image)
{
    struct dcp_storage_meta meta = {.checkpoint_id = "/ckpt", .version = "1.0.0"};
    struct dcp_save_id id = {{1}};
    struct dcp_global_plan global;
    struct dcp_error err = {0};
    CHECK_OK(dcp_global_plan_build(plans, RANKS, false, &global, &err), &err);
    CHECK_OK(dcp_metadata_write(&global, &meta, &id, 0, ret_image, &err), &err);
    dcp_global_plan_clean_up(&global);
}

/* Which plan's paths and whose order win is torch's affair (metadata_paths.c). */
static void
metadata_does_not_depend_on_sharing(void)
{
    for (uint64_t seed = 0; seed < 200; seed++) {
        struct maker_rng rng = {seed};
        struct dcp_plan plans[RANKS], back[RANKS] = {{0}};
        struct dcp_name_tables tables = {0};
        struct dcp_error err = {0};
        struct dcp_buf image = {0}, direct = {0}, shared = {0};
        uint64_t variant = 0;
        for (uint32_t r = 0; r < RANKS; r++) {
            variant = maker_below(&rng, 2) != 0 ? maker_below(&rng, 4) : variant;
            make_variant(&plans[r], r, variant);
            know_names_of(&tables, &plans[r]);
            encode(&plans[r], true, &image);
            CHECK_OK(dcp_plan_decode_shared(image.data, image.len, &tables, &back[r], &err), &err);
        }
        write_metadata(plans, &direct);
        write_metadata(back, &shared);
        CHECK_EQ(direct.len, shared.len);
        CHECK(direct.len == shared.len && memcmp(direct.data, shared.data, direct.len) == 0);
        dcp_buf_clean_up(&direct);
        dcp_buf_clean_up(&shared);
        dcp_buf_clean_up(&image);
        dcp_name_tables_clean_up(&tables);
        maker_clean_up_plans(plans, RANKS);
        maker_clean_up_plans(back, RANKS);
    }
}

static void
running_out_of_memory_is_reported_and_leaks_nothing(void)
{
    struct maker_rng rng = {11};
    struct dcp_plan plan;
    struct dcp_buf images[2] = {{0}};
    maker_random_plan(&rng, &plan, 0, 200);
    encode(&plan, false, &images[0]);
    encode(&plan, true, &images[1]);
    bool succeeded = false;
    for (uint64_t n = 1; !succeeded && n < 300; n++) {
        struct dcp_plan back[3] = {{0}};
        struct dcp_name_tables tables = {0};
        struct dcp_error err = {0};
        int rc = 0;
        dcp_alloc_fail_after(n);
        for (size_t i = 0; rc == 0 && i < 3; i++) {
            rc = dcp_plan_decode_shared(images[i / 2].data, images[i / 2].len, &tables, &back[i],
                                        &err);
        }
        dcp_alloc_fail_after(0);
        CHECK(rc == 0 || rc == DCP_E_NOMEM);
        succeeded = rc == 0;
        dcp_name_tables_clean_up(&tables);
        maker_clean_up_plans(back, 3);
    }
    CHECK(succeeded);
    dcp_buf_clean_up(&images[0]);
    dcp_buf_clean_up(&images[1]);
    dcp_plan_clean_up(&plan);
}

CTEST_MAIN(RUN(plans_with_shared_names_come_back_equal);
           RUN(any_difference_of_names_gives_another_hash);
           RUN(plans_with_equal_names_have_one_hash); RUN(names_that_nobody_sent_are_refused);
           RUN(every_truncation_of_a_nameless_image_is_refused);
           RUN(mutations_never_give_a_plan_other_names_than_it_says);
           RUN(names_that_differ_in_one_byte_are_decoded_anew);
           RUN(a_name_of_its_own_costs_a_rank_no_copy_of_the_others);
           RUN(numbers_of_names_do_not_depend_on_sharing); RUN(metadata_does_not_depend_on_sharing);
           RUN(running_out_of_memory_is_reported_and_leaks_nothing);)
