/*
 * test_comm.c: collectives give the right bytes on every rank, and a group that lost a rank fails
 * everywhere in time.
 */
#include "dcp_comm.h"

#include <time.h>

#include "ctest.h"
#include "dcp_limits.h"
#include "sim_ranks.h"

enum { MAX_RANKS = 64, TIMEOUT_MS = 20000 };

/* What a rank's byte `i` of message `round` is: differs by rank, position and round. */
static uint8_t
pattern(uint32_t rank, size_t i, uint32_t round)
{
    return (uint8_t)(rank * 131 + i * 7 + (i >> 8) * 13 + round * 29 + 5);
}

static void
fill(uint8_t *dst, uint32_t rank, size_t bytes, uint32_t round)
{
    for (size_t i = 0; i < bytes; i++) {
        dst[i] = pattern(rank, i, round);
    }
}

static bool
holds(const uint8_t *src, uint32_t rank, size_t bytes, uint32_t round)
{
    for (size_t i = 0; i < bytes; i++) {
        if (src[i] != pattern(rank, i, round)) {
            return false;
        }
    }
    return true;
}

static double
now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- fixed sizes ---- */

struct fixed_case {
    size_t bytes;
    uint32_t root;
    int wrong[MAX_RANKS]; /* steps that gave wrong bytes or an error */
};

static void
run_fixed(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    (void)sim;
    struct fixed_case *c = arg;
    struct dcp_error err = {0};
    size_t bytes = c->bytes;
    int wrong = 0;
    uint8_t *mine = malloc(bytes + 1);
    uint8_t *all = malloc(bytes * comm->size + 1);

    int64_t lanes[3] = {comm->rank, -(int64_t)comm->rank,
                        comm->rank == c->root ? INT64_MIN : INT64_MAX};
    wrong += comm->all_reduce_min(comm->ctx, lanes, 3, &err) != 0;
    wrong += lanes[0] != 0 || lanes[1] != -(int64_t)(comm->size - 1) || lanes[2] != INT64_MIN;

    fill(mine, comm->rank, bytes, 1);
    memset(all, 0, bytes * comm->size + 1);
    bool is_root = comm->rank == c->root;
    wrong += comm->gather(comm->ctx, c->root, mine, is_root ? all : NULL, bytes, &err) != 0;
    for (uint32_t r = 0; is_root && r < comm->size; r++) {
        wrong += !holds(all + r * bytes, r, bytes, 1);
    }

    fill(mine, comm->rank, bytes, 2);
    memset(all, 0, bytes * comm->size + 1);
    wrong += comm->all_gather(comm->ctx, mine, all, bytes, &err) != 0;
    for (uint32_t r = 0; r < comm->size; r++) {
        wrong += !holds(all + r * bytes, r, bytes, 2);
    }

    for (uint32_t r = 0; r < comm->size; r++) {
        fill(all + r * bytes, r, bytes, 3);
    }
    memset(mine, 0, bytes + 1);
    wrong += comm->scatter(comm->ctx, c->root, is_root ? all : NULL, mine, bytes, &err) != 0;
    wrong += !holds(mine, comm->rank, bytes, 3);

    memset(mine, 0, bytes + 1);
    if (is_root) {
        fill(mine, 200, bytes, 4);
    }
    wrong += comm->broadcast(comm->ctx, c->root, mine, bytes, &err) != 0;
    wrong += !holds(mine, 200, bytes, 4);

    c->wrong[comm->rank] = wrong;
    free(mine);
    free(all);
}

static void
every_collective_of_the_simulated_group_moves_the_right_bytes(void)
{
    static const uint32_t sizes[] = {1, 2, 3, 7, 64};
    static const size_t lengths[] = {0, 1, 8, 1000};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        for (size_t l = 0; l < sizeof lengths / sizeof lengths[0]; l++) {
            struct fixed_case c = {.bytes = lengths[l], .root = sizes[s] / 2};
            sim_ranks_run(sizes[s], TIMEOUT_MS, run_fixed, &c);
            for (uint32_t r = 0; r < sizes[s]; r++) {
                CHECK_EQ(c.wrong[r], 0);
            }
        }
    }
}

static void
the_local_table_is_a_group_of_one(void)
{
    struct dcp_comm comm;
    dcp_comm_local(&comm);
    CHECK_EQ(comm.rank, 0);
    CHECK_EQ(comm.size, 1);
    struct fixed_case c = {.bytes = 1000};
    run_fixed(&comm, NULL, &c);
    CHECK_EQ(c.wrong[0], 0);
    struct dcp_error err = {0};
    CHECK_EQ(comm.broadcast(comm.ctx, 1, NULL, 0, &err), DCP_E_INVALID);
    comm.destroy(comm.ctx);
}

/* ---- variable sizes ---- */

struct bytes_case {
    size_t unit; /* rank r sends r * unit bytes, the last rank none */
    uint32_t root;
    int wrong[MAX_RANKS];
};

static size_t
length_of(const struct bytes_case *c, uint32_t rank, uint32_t size)
{
    return rank + 1 == size ? 0 : rank * c->unit;
}

static int
gather_and_check(const struct dcp_comm *comm, const struct bytes_case *c, struct dcp_error *err)
{
    size_t len = length_of(c, comm->rank, comm->size);
    uint8_t *mine = malloc(len + 1);
    fill(mine, comm->rank, len, 1);
    uint8_t *block = NULL;
    struct dcp_span *spans = NULL;
    int wrong = dcp_comm_gather_bytes(comm, c->root, mine, len, &block, &spans, err) != 0;
    free(mine);
    if (comm->rank != c->root) {
        return wrong + (block != NULL) + (spans != NULL);
    }
    for (uint32_t r = 0; r < comm->size; r++) {
        wrong += spans[r].len != length_of(c, r, comm->size);
        wrong += !holds(spans[r].data, r, spans[r].len, 1);
    }
    dcp_free(block);
    dcp_free(spans);
    return wrong;
}

static int
scatter_and_check(const struct dcp_comm *comm, const struct bytes_case *c, struct dcp_error *err)
{
    struct dcp_span *spans = calloc(comm->size, sizeof *spans);
    for (uint32_t r = 0; r < comm->size; r++) {
        size_t len = length_of(c, r, comm->size);
        uint8_t *bytes = malloc(len + 1);
        fill(bytes, r, len, 2);
        spans[r] = (struct dcp_span){bytes, len};
    }
    struct dcp_buf buf = {0};
    dcp_buf_put(&buf, "head", 4);
    bool is_root = comm->rank == c->root;
    int wrong = dcp_comm_scatter_bytes(comm, c->root, is_root ? spans : NULL, &buf, err) != 0;
    size_t len = length_of(c, comm->rank, comm->size);
    wrong += buf.len != 4 + len;
    wrong += buf.len != 4 + len || memcmp(buf.data, "head", 4) != 0 ||
             !holds(buf.data + 4, comm->rank, len, 2);
    dcp_buf_clean_up(&buf);
    for (uint32_t r = 0; r < comm->size; r++) {
        free((void *)spans[r].data);
    }
    free(spans);
    return wrong;
}

static int
broadcast_and_check(const struct dcp_comm *comm, const struct bytes_case *c, size_t len,
                    struct dcp_error *err)
{
    struct dcp_buf buf = {0};
    bool is_root = comm->rank == c->root;
    size_t head = is_root ? 0 : 3;
    if (is_root && len != 0) {
        fill(dcp_buf_extend(&buf, len), 77, len, 3);
    }
    dcp_buf_put(&buf, "abc", head);
    int wrong = dcp_comm_broadcast_bytes(comm, c->root, &buf, err) != 0;
    wrong += buf.len != head + len || !holds(buf.data + head, 77, len, 3);
    dcp_buf_clean_up(&buf);
    return wrong;
}

static void
run_bytes(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    (void)sim;
    struct bytes_case *c = arg;
    struct dcp_error err = {0};
    int wrong = gather_and_check(comm, c, &err);
    wrong += scatter_and_check(comm, c, &err);
    wrong += broadcast_and_check(comm, c, 5 * c->unit + 1, &err);
    wrong += broadcast_and_check(comm, c, 0, &err);
    c->wrong[comm->rank] = wrong + (err.code != 0);
}

static void
messages_of_any_length_arrive_whole(void)
{
    static const uint32_t sizes[] = {1, 2, 5, 64};
    static const size_t units[] = {0, 1, 9, 777};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        for (size_t u = 0; u < sizeof units / sizeof units[0]; u++) {
            struct bytes_case c = {.unit = units[u], .root = sizes[s] - 1};
            sim_ranks_run(sizes[s], TIMEOUT_MS, run_bytes, &c);
            for (uint32_t r = 0; r < sizes[s]; r++) {
                CHECK_EQ(c.wrong[r], 0);
            }
        }
    }
}

/* 64 MiB of one round over 4 ranks are 16 MiB a piece: the longest message needs three. */
static void
messages_longer_than_a_piece_arrive_whole(void)
{
    struct bytes_case c = {.unit = (17 << 20) + 3, .root = 0};
    sim_ranks_run(4, TIMEOUT_MS, run_bytes, &c);
    for (uint32_t r = 0; r < 4; r++) {
        CHECK_EQ(c.wrong[r], 0);
    }
}

struct limit_case {
    uint32_t guilty;
    bool local_failure; /* else a message over the limit */
    int rc[MAX_RANKS];
};

static void
run_limit(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    (void)sim;
    struct limit_case *c = arg;
    struct dcp_error err = {0};
    struct dcp_buf buf = {0};
    if (c->local_failure) {
        buf.failed = comm->rank == c->guilty;
        c->rc[comm->rank] = dcp_comm_broadcast_bytes(comm, 0, &buf, &err);
    } else {
        /* Never read: the lengths are refused first. */
        uint64_t len = comm->rank == c->guilty ? DCP_MAX_METADATA_BYTES + 1 : 1;
        uint8_t *block = NULL;
        struct dcp_span *spans = NULL;
        c->rc[comm->rank] =
            dcp_comm_gather_bytes(comm, 0, (const uint8_t *)"x", len, &block, &spans, &err);
    }
    dcp_buf_clean_up(&buf);
}

static void
a_message_over_the_limit_is_refused_on_every_rank(void)
{
    for (uint32_t guilty = 0; guilty < 4; guilty++) {
        struct limit_case c = {.guilty = guilty};
        sim_ranks_run(4, TIMEOUT_MS, run_limit, &c);
        for (uint32_t r = 0; r < 4; r++) {
            CHECK_EQ(c.rc[r], DCP_E_LIMIT);
        }
    }
}

static void
a_rank_that_cannot_take_part_stops_every_rank_at_once(void)
{
    for (uint32_t guilty = 0; guilty < 4; guilty++) {
        struct limit_case c = {.guilty = guilty, .local_failure = true};
        sim_ranks_run(4, TIMEOUT_MS, run_limit, &c);
        for (uint32_t r = 0; r < 4; r++) {
            CHECK_EQ(c.rc[r], r == guilty ? DCP_E_NOMEM : DCP_E_PEER);
        }
    }
}

static void
no_memory_anywhere_fails_without_a_leak(void)
{
    for (uint64_t n = 1; n < 12; n++) {
        struct dcp_comm comm;
        dcp_comm_local(&comm);
        struct dcp_error err = {0};
        dcp_alloc_fail_after(n);
        uint8_t *block = NULL;
        struct dcp_span *spans = NULL;
        uint8_t byte = 1;
        int rc = dcp_comm_gather_bytes(&comm, 0, &byte, 1, &block, &spans, &err);
        struct dcp_buf buf = {0};
        struct dcp_span span = {&byte, 1};
        struct dcp_error scatter_err = {0};
        int scatter_rc = dcp_comm_scatter_bytes(&comm, 0, &span, &buf, &scatter_err);
        dcp_alloc_fail_after(0);
        CHECK(rc == (n <= 4 ? DCP_E_NOMEM : 0));
        CHECK(scatter_rc == (n <= 7 ? DCP_E_NOMEM : 0));
        dcp_free(block);
        dcp_free(spans);
        dcp_buf_clean_up(&buf);
    }
}

/* ---- a group that lost a rank ---- */

struct kill_case {
    uint32_t victim;
    int step; /* calls that go well before */
    int rc[MAX_RANKS], again[MAX_RANKS], before[MAX_RANKS];
};

static void
run_kill(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct kill_case *c = arg;
    struct dcp_error err = {0};
    int64_t lane = 1;
    for (int i = 0; i < c->step; i++) {
        c->before[comm->rank] |= comm->all_reduce_min(comm->ctx, &lane, 1, &err);
    }
    if (comm->rank == c->victim) {
        dcp_comm_sim_kill(sim, comm->rank);
    }
    c->rc[comm->rank] = comm->all_reduce_min(comm->ctx, &lane, 1, &err);
    struct dcp_error second = {0};
    uint8_t byte = 0;
    c->again[comm->rank] = comm->broadcast(comm->ctx, 0, &byte, 1, &second);
}

static void
a_killed_rank_fails_every_call_from_then_on(void)
{
    double start = now_seconds();
    for (uint32_t size = 2; size <= 64; size *= 2) {
        struct kill_case c = {.victim = size / 3, .step = 5};
        sim_ranks_run(size, TIMEOUT_MS, run_kill, &c);
        for (uint32_t r = 0; r < size; r++) {
            CHECK_EQ(c.before[r], 0);
            CHECK_EQ(c.rc[r], DCP_E_COMM);
            CHECK_EQ(c.again[r], DCP_E_COMM);
        }
    }
    CHECK(now_seconds() - start < TIMEOUT_MS / 1000.0);
}

static void
run_absent(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    (void)sim;
    struct kill_case *c = arg;
    struct dcp_error err = {0};
    int64_t lane = 1;
    if (comm->rank != c->victim) {
        c->rc[comm->rank] = comm->all_reduce_min(comm->ctx, &lane, 1, &err);
    }
}

static void
a_rank_that_never_comes_ends_every_wait_at_the_deadline(void)
{
    struct kill_case c = {.victim = 2};
    double start = now_seconds();
    sim_ranks_run(4, 100, run_absent, &c);
    double took = now_seconds() - start;
    CHECK(took >= 0.1 && took < 10);
    int timeouts = 0;
    for (uint32_t r = 0; r < 4; r++) {
        if (r != c.victim) {
            timeouts += c.rc[r] == DCP_E_TIMEOUT;
            CHECK(c.rc[r] == DCP_E_TIMEOUT || c.rc[r] == DCP_E_COMM);
        }
    }
    CHECK(timeouts >= 1);
}

static void
run_different(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    (void)sim;
    struct kill_case *c = arg;
    struct dcp_error err = {0};
    uint8_t bytes[8 * 8] = {0};
    if (comm->rank == c->victim && c->step == 0) {
        c->rc[comm->rank] = comm->broadcast(comm->ctx, 0, bytes, 8, &err);
    } else {
        size_t n = comm->rank == c->victim && c->step == 1 ? 7 : 8;
        uint32_t root = comm->rank == c->victim && c->step == 2 ? 1 : 0;
        c->rc[comm->rank] = comm->gather(comm->ctx, root, bytes, bytes, n, &err);
    }
}

static void
ranks_that_differ_in_call_size_or_root_all_fail(void)
{
    for (int step = 0; step < 3; step++) {
        struct kill_case c = {.victim = 3, .step = step};
        sim_ranks_run(5, TIMEOUT_MS, run_different, &c);
        for (uint32_t r = 0; r < 5; r++) {
            CHECK_EQ(c.rc[r], DCP_E_COMM);
        }
    }
}

/* ---- failure exchange ---- */

struct failure_case {
    uint32_t every; /* ranks that are a multiple of it failed */
    int wrong[MAX_RANKS];
};

static size_t
failure_length(uint32_t rank)
{
    return rank == 0 ? DCP_MAX_FAILURE_BYTES : rank * 3;
}

static int
check_failure(const struct dcp_failure *f)
{
    if (f->rank % 2 == 0) {
        return f->kind != DCP_FAILURE_PYTHON || f->len != failure_length(f->rank) ||
               !holds(f->bytes, f->rank, f->len, 9);
    }
    const struct dcp_error *error = (const struct dcp_error *)(const void *)f->bytes;
    return f->kind != DCP_FAILURE_CORE || f->len != sizeof *error || error->code != DCP_E_IO ||
           error->sys_errno != (int32_t)f->rank || strcmp(error->message, "disk gone") != 0;
}

static void
run_failures(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    (void)sim;
    struct failure_case *c = arg;
    struct dcp_error error = {0};
    struct dcp_failure mine = {.rank = comm->rank};
    uint8_t *bytes = malloc(DCP_MAX_FAILURE_BYTES);
    if (comm->rank % 2 == 0) {
        mine.kind = DCP_FAILURE_PYTHON;
        mine.len = failure_length(comm->rank);
        fill(bytes, comm->rank, mine.len, 9);
        mine.bytes = bytes;
    } else {
        (void)dcp_error_set(&error, DCP_E_IO, (int)comm->rank, NULL, "disk gone");
        mine.kind = DCP_FAILURE_CORE;
        mine.len = sizeof error;
        mine.bytes = (uint8_t *)&error;
    }
    bool failed = c->every != 0 && comm->rank % c->every == 0;
    struct dcp_failure_list list = {0};
    struct dcp_error err = {0};
    int wrong = dcp_failure_exchange(comm, failed ? &mine : NULL, &list, &err) != 0;
    uint32_t expected = c->every == 0 ? 0 : (comm->size + c->every - 1) / c->every;
    wrong += list.count != expected;
    for (size_t i = 0; i < list.count; i++) {
        wrong += list.items[i].rank != i * c->every;
        wrong += check_failure(&list.items[i]);
    }
    dcp_failure_list_clean_up(&list);
    dcp_failure_list_clean_up(&list);
    free(bytes);
    c->wrong[comm->rank] = wrong;
}

static void
every_rank_learns_every_failure_in_rank_order(void)
{
    static const uint32_t sizes[] = {1, 2, 16, 64};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        for (uint32_t every = 0; every <= 5; every++) {
            struct failure_case c = {.every = every};
            sim_ranks_run(sizes[s], TIMEOUT_MS, run_failures, &c);
            for (uint32_t r = 0; r < sizes[s]; r++) {
                CHECK_EQ(c.wrong[r], 0);
            }
        }
    }
}

CTEST_MAIN(RUN(every_collective_of_the_simulated_group_moves_the_right_bytes);
           RUN(the_local_table_is_a_group_of_one); RUN(messages_of_any_length_arrive_whole);
           RUN(messages_longer_than_a_piece_arrive_whole);
           RUN(a_message_over_the_limit_is_refused_on_every_rank);
           RUN(a_rank_that_cannot_take_part_stops_every_rank_at_once);
           RUN(no_memory_anywhere_fails_without_a_leak);
           RUN(a_killed_rank_fails_every_call_from_then_on);
           RUN(a_rank_that_never_comes_ends_every_wait_at_the_deadline);
           RUN(ranks_that_differ_in_call_size_or_root_all_fail);
           RUN(every_rank_learns_every_failure_in_rank_order);)
