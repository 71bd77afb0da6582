/*
 * test_key_tree.c: the tree of keys has every key where its dots say, merges what is alike and
 * nothing else, and leaves nothing behind when memory runs out.
 *
 * What is merged in any tree of keys is compared with a definition of its own in Python
 * (tests/py/test_cli_tree.py).
 */
#include "dcp_key_tree.h"

#include "ctest.h"

enum { LAYERS = 300 };

static struct dcp_tree_key
key_of(const char *text, uint32_t look, uint64_t bytes)
{
    return (struct dcp_tree_key){{(const uint8_t *)text, strlen(text)}, look, bytes};
}

static struct dcp_key_tree
build(const struct dcp_tree_key *keys, uint32_t count, bool merge)
{
    struct dcp_key_tree tree = {0};
    struct dcp_error err = {0};

    CHECK_OK(dcp_key_tree_build(keys, count, merge, &tree, &err), &err);
    return tree;
}

/* The child of that name, shown or not, or DCP_TREE_NONE. */
static uint32_t
child_named(const struct dcp_key_tree *tree, uint32_t parent, const char *name)
{
    for (uint32_t i = 1; i < tree->nodes_count; i++) {
        const struct dcp_tree_node *node = &tree->nodes[i];
        if (node->parent == parent && node->name.len == strlen(name) &&
            memcmp(node->name.data, name, node->name.len) == 0) {
            return i;
        }
    }
    return DCP_TREE_NONE;
}

static void
case_no_keys_are_a_root_alone(void)
{
    struct dcp_key_tree tree = build(NULL, 0, true);

    CHECK_EQ(tree.nodes_count, 1);
    CHECK_EQ(tree.nodes[0].rows_below, 0);
    dcp_key_tree_clean_up(&tree);
}

static void
case_a_key_may_be_what_others_begin_with(void)
{
    const struct dcp_tree_key keys[] = {key_of("a.b", 0, 1), key_of("a", 1, 2), key_of("a.", 0, 4),
                                        key_of("", 0, 8), key_of(".", 0, 16)};
    struct dcp_key_tree tree = build(keys, 5, true);
    uint32_t a = child_named(&tree, 0, "a"), empty = child_named(&tree, 0, "");

    CHECK_EQ(tree.nodes[a].key, 1);
    CHECK_EQ(tree.nodes[a].bytes, 7);
    CHECK_EQ(tree.nodes[child_named(&tree, a, "b")].key, 0);
    CHECK_EQ(tree.nodes[child_named(&tree, a, "")].key, 2);
    CHECK_EQ(tree.nodes[empty].key, 3);
    CHECK_EQ(tree.nodes[empty].bytes, 24);
    CHECK_EQ(tree.nodes[child_named(&tree, empty, "")].key, 4);
    CHECK_EQ(tree.nodes[0].rows_below, 5);
    dcp_key_tree_clean_up(&tree);
}

static void
case_layers_that_are_alike_are_one_row(void)
{
    static char texts[2 * LAYERS][32];
    static struct dcp_tree_key keys[2 * LAYERS];

    for (uint32_t i = 0; i < LAYERS; i++) {
        snprintf(texts[2 * i], sizeof texts[0], "m.layers.%u.w", i);
        snprintf(texts[2 * i + 1], sizeof texts[0], "m.layers.%u.b", i);
        keys[2 * i] = key_of(texts[2 * i], 0, 10);
        keys[2 * i + 1] = key_of(texts[2 * i + 1], 1, 1);
    }
    keys[2 * 7].look = 2; /* layer 7 is another */
    struct dcp_key_tree tree = build(keys, 2 * LAYERS, true), whole;
    uint32_t layers = child_named(&tree, child_named(&tree, 0, "m"), "layers");
    uint32_t first = child_named(&tree, layers, "0"), count = 0;

    CHECK_EQ(tree.nodes[layers].children_count, 2);
    CHECK_EQ(tree.nodes[first].bytes, 11 * (LAYERS - 1));
    CHECK_EQ(tree.nodes[layers].bytes, 11 * LAYERS);
    for (uint32_t n = first; n != DCP_TREE_NONE; n = tree.nodes[n].next_alike) {
        CHECK(n == first || tree.nodes[n].hidden);
        count++;
    }
    CHECK_EQ(count, LAYERS - 1);
    CHECK_EQ(tree.nodes[first].next, child_named(&tree, layers, "7"));
    CHECK_EQ(tree.nodes[0].rows_below, 1 + 2 * 3); /* m.layers; both with w and b */
    whole = build(keys, 2 * LAYERS, false);
    CHECK_EQ(whole.nodes[0].rows_below, 1 + 3 * LAYERS);
    dcp_key_tree_clean_up(&whole);
    dcp_key_tree_clean_up(&tree);
}

static void
case_only_numbers_are_merged(void)
{
    const struct dcp_tree_key keys[] = {key_of("q", 0, 1), key_of("k", 0, 1),  key_of("1", 0, 1),
                                        key_of("", 0, 1),  key_of("2", 0, 1),  key_of("-3", 0, 1),
                                        key_of("4", 1, 1), key_of("5.6", 0, 1)};
    struct dcp_key_tree tree = build(keys, 8, true);

    CHECK_EQ(tree.nodes[0].children_count, 7);
    CHECK_EQ(tree.nodes[child_named(&tree, 0, "1")].next_alike, child_named(&tree, 0, "2"));
    CHECK_EQ(tree.nodes[0].rows_below, 7);
    dcp_key_tree_clean_up(&tree);
}

static void
case_paths_of_any_depth_are_rows(void)
{
    static char deep[2][20001];
    struct dcp_tree_key keys[2];

    memset(deep, '.', sizeof deep);
    deep[0][20000] = deep[1][20000] = '\0';
    deep[1][19999] = 'x';
    keys[0] = key_of(deep[0], 0, 1);
    keys[1] = key_of(deep[1], 0, 1);
    struct dcp_key_tree tree = build(keys, 2, true);
    CHECK_EQ(tree.nodes_count, 1 + 20001 + 1);
    CHECK_EQ(tree.nodes[0].bytes, 2);
    dcp_key_tree_clean_up(&tree);
}

static void
case_bytes_that_can_not_be_counted_are_the_most(void)
{
    const struct dcp_tree_key keys[] = {key_of("a.b", 0, UINT64_MAX), key_of("a.c", 0, 5)};
    struct dcp_key_tree tree = build(keys, 2, true);

    CHECK(tree.nodes[0].bytes == UINT64_MAX);
    dcp_key_tree_clean_up(&tree);
}

static void
case_every_failed_allocation_is_an_error_and_leaks_nothing(void)
{
    static char texts[LAYERS][32];
    static struct dcp_tree_key keys[LAYERS];
    uint64_t failures = 0;

    for (uint32_t i = 0; i < LAYERS; i++) {
        snprintf(texts[i], sizeof texts[0], "layers.%u.w%u", i, i % 3);
        keys[i] = key_of(texts[i], i % 2, i);
    }
    for (uint64_t n = 1;; n++) {
        struct dcp_key_tree tree = {0};
        struct dcp_error err = {0};

        dcp_alloc_fail_after(n);
        int rc = dcp_key_tree_build(keys, LAYERS, true, &tree, &err);
        dcp_alloc_fail_after(0);
        dcp_key_tree_clean_up(&tree);
        if (rc == 0) {
            break;
        }
        CHECK_EQ(rc, DCP_E_NOMEM);
        CHECK(err.message[0] != '\0');
        failures++;
    }
    CHECK(failures > 5);
}

CTEST_MAIN(RUN(case_no_keys_are_a_root_alone); RUN(case_a_key_may_be_what_others_begin_with);
           RUN(case_layers_that_are_alike_are_one_row); RUN(case_only_numbers_are_merged);
           RUN(case_paths_of_any_depth_are_rows);
           RUN(case_bytes_that_can_not_be_counted_are_the_most);
           RUN(case_every_failed_allocation_is_an_error_and_leaks_nothing);)
