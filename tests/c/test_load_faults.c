/*
 * test_load_faults.c: one thing goes wrong in one call of one rank while a checkpoint of several
 * blocks is loaded into scattered memory; then the same ranks load it again.
 *
 * Whatever failed: all ranks are told the same, nothing stays open, no byte beside a target
 * changes, and the second load gets everything.
 */
#include <errno.h>

#include "ctest.h"
#include "plan_maker.h"
#include "save_faults.h"
#include "save_world.h"
#include "sim_ranks.h"

enum {
    RANKS = 3,
    COORDINATOR = 1,
    TIMEOUT_MS = 20000,
    MOST_CALLS = 500,
    MOST_FAILURES = 20,
    ROWS = 320, /* of a kilobyte of float32 each: rank 0 saves more than one block */
    COLUMNS = 1024,
    REPLICA_ROWS = 40,
    REPLICA_COLUMNS = 30,
    BOXES = 4,
    PAD = 3,           /* elements behind every row of a target */
    GUARD_BYTES = 512, /* before and behind it */
    GUARD = 0xA5,
};

static const uint64_t row_starts[RANKS + 1] = {0, 290, 291, ROWS};

/* ---- what is saved ---- */

/* Element i of a tensor, as float32 or the low half of a float64: never GUARD repeated. */
static uint32_t
element(uint32_t tensor, uint64_t i)
{
    return (uint32_t)(i * 2654435761u + tensor * 97u) & 0x7F7F7F7Fu;
}

static void *
some_memory(size_t bytes)
{
    void *memory = malloc(bytes);

    if (memory == NULL) {
        fprintf(stderr, "test_load_faults: no memory\n");
        exit(1);
    }
    return memory;
}

static void
must_ok(int rc, const struct dcp_error *err)
{
    if (rc != 0) {
        fprintf(stderr, "test_load_faults: %s\n", err->message);
        exit(1);
    }
}

static void
save_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    const struct dcp_save_params params = {.io = arg,
                                           .dir_path = SAVE_DIR,
                                           .meta = {.checkpoint_id = SAVE_DIR, .version = "1.0.0"},
                                           .identity = "a test",
                                           .direct = DCP_DIRECT_OFF};
    const uint64_t first = row_starts[comm->rank], height = row_starts[comm->rank + 1] - first;
    const uint64_t replica[] = {REPLICA_ROWS, REPLICA_COLUMNS};
    struct dcp_group *group = save_world_group(comm, COORDINATOR);
    struct dcp_plan plan = {
        .rank = comm->rank, .thread_count = 2, .single_file_per_rank = true, .has_paths = true};
    struct dcp_source sources[2] = {{0}};
    struct dcp_failure_list failures = {0};
    struct dcp_save *save = NULL;
    struct dcp_error err = {0};
    bool exists;
    (void)sim;

    uint32_t *rows = some_memory(height * COLUMNS * 4);
    uint32_t *whole = some_memory(REPLICA_ROWS * REPLICA_COLUMNS * 4);
    for (uint64_t i = 0; i < height * COLUMNS; i++) {
        rows[i] = element(0, first * COLUMNS + i);
    }
    for (uint64_t i = 0; i < REPLICA_ROWS * REPLICA_COLUMNS; i++) {
        whole[i] = element(1, i);
    }
    maker_shard2(&plan, "weight", ROWS, COLUMNS, first, 0, height, COLUMNS);
    maker_tensor(&plan, "replica", DCP_DTYPE_FLOAT32, 2, replica);
    sources[0].data = (uint8_t *)rows;
    sources[1].data = (uint8_t *)whole;
    must_ok(dcp_save_new(group, &params, &save, &err), &err);
    must_ok(dcp_save_open(save, &exists, &err), &err);
    must_ok(dcp_save_claim(save, &err), &err);
    dcp_save_set_plan(save, &plan);
    must_ok(dcp_save_agree(save, NULL, &failures, &err), &err);
    dcp_save_fit_sources(save, sources);
    must_ok(dcp_save_compare(save, NULL, sources, NULL, &failures, &err), &err);
    must_ok(dcp_save_write(save, sources, NULL, NULL, &err), &err);
    must_ok(dcp_save_finish(save, NULL, &failures, &err), &err);
    dcp_save_destroy(save);
    dcp_plan_clean_up(&plan);
    dcp_group_destroy(group);
    free(rows);
    free(whole);
}

static struct io_memory *
saved(void)
{
    struct io_memory *fs = io_memory_new(5);

    io_memory_set_dio(fs, (struct dcp_dio_align){512, 512, false});
    sim_ranks_run(RANKS, TIMEOUT_MS, save_rank, &io_memory_process(fs, 1)->io);
    return fs;
}

/* ---- targets between guards ---- */

struct box {
    const char *fqn;
    uint32_t tensor;
    uint64_t columns_of_tensor;
    uint64_t at[2], sizes[2];
    bool row_major;
    int64_t strides_bytes[2];
    size_t bytes;
    uint8_t *memory; /* owned: guard, elements with pads, guard */
};

static uint8_t *
box_data(const struct box *box)
{
    return box->memory + GUARD_BYTES;
}

static void
box_make(struct box *box, const char *fqn, uint64_t columns_of_tensor, uint64_t row,
         uint64_t column, uint64_t height, uint64_t width, bool row_major)
{
    uint64_t row_bytes = 4 * (width + (row_major ? 0 : PAD));

    *box = (struct box){.fqn = fqn,
                        .tensor = strcmp(fqn, "weight") != 0,
                        .columns_of_tensor = columns_of_tensor,
                        .at = {row, column},
                        .sizes = {height, width},
                        .row_major = row_major,
                        .strides_bytes = {(int64_t)row_bytes, 4},
                        .bytes = 2 * GUARD_BYTES + height * row_bytes};
    box->memory = some_memory(box->bytes);
    memset(box->memory, GUARD, box->bytes);
}

/* Rows across all chunks, columns out of them, a rank's own part and a replica. */
static void
boxes_make(struct box *boxes, uint32_t rank)
{
    box_make(&boxes[0], "weight", COLUMNS, 280 + rank, 0, 20, COLUMNS, true);
    box_make(&boxes[1], "weight", COLUMNS, 3, 100 * rank + 1, ROWS - 5, 77, false);
    box_make(&boxes[2], "weight", COLUMNS, 0, 0, 283 + rank, COLUMNS, rank != 1);
    box_make(&boxes[3], "replica", REPLICA_COLUMNS, 0, 0, REPLICA_ROWS, REPLICA_COLUMNS, true);
}

/* Nothing beside the elements changed; with `loaded`, and these are what was saved. */
static bool
box_holds(const struct box *box, bool loaded)
{
    size_t at = 0;

    for (uint64_t r = 0; r < box->sizes[0]; r++) {
        size_t start = GUARD_BYTES + r * (uint64_t)box->strides_bytes[0];
        for (; at < start; at++) {
            if (box->memory[at] != GUARD) {
                return false;
            }
        }
        for (uint64_t c = 0; loaded && c < box->sizes[1]; c++) {
            uint32_t got, want = element(box->tensor, (box->at[0] + r) * box->columns_of_tensor +
                                                          box->at[1] + c);
            memcpy(&got, box->memory + start + 4 * c, 4);
            if (got != want) {
                return false;
            }
        }
        at = start + 4 * box->sizes[1];
    }
    for (; at < box->bytes; at++) {
        if (box->memory[at] != GUARD) {
            return false;
        }
    }
    return true;
}

/* ---- loads ---- */

struct fault_case {
    struct {
        enum fault_mode mode;
        uint32_t nth;
        int sys_errno;
    } io;
    uint32_t victim;
    uint64_t fail_allocation; /* of all ranks, from its number on; 0: none */
    bool allocation_of_read;  /* counted from before reading, else from before opening */
    enum dcp_direct direct;
    enum dcp_read_once read_once;
    bool verify_all;
    /* filled by the run */
    struct dcp_io *table;
    bool hit;
    struct {
        int rc, read_code;
        struct dcp_error err;
        struct dcp_failure_list failures;
        bool is_there, guards_hold, is_loaded;
    } first[RANKS], second[RANKS];
};

/* All ranks run out of memory from here on: they share a heap. */
static void
run_out_of_memory(const struct dcp_comm *comm, uint64_t nth)
{
    struct dcp_error err = {0};
    int64_t lane = 0;

    must_ok(comm->all_reduce_min(comm->ctx, &lane, 1, &err), &err);
    if (comm->rank == 0) {
        dcp_alloc_fail_after(nth);
    }
    must_ok(comm->all_reduce_min(comm->ctx, &lane, 1, &err), &err);
}

static int
plan_boxes(const struct dcp_metadata *md, const struct box *boxes, struct dcp_read_plan *plan,
           struct dcp_error *err)
{
    uint64_t target;
    int rc = 0;

    plan->md = md;
    for (size_t i = 0; rc == 0 && i < BOXES; i++) {
        const struct box *box = &boxes[i];
        const struct dcp_md_entry *entry = dcp_metadata_find(md, box->fqn, strlen(box->fqn));
        if (entry == NULL) {
            return dcp_error_set(err, DCP_E_MISSING, 0, NULL, "%s is absent", box->fqn);
        }
        rc = dcp_read_plan_add(plan, (uint64_t)(entry - md->entries), box_data(box),
                               box->row_major ? NULL : box->strides_bytes, box->at, box->sizes,
                               &target, err);
    }
    return rc != 0 ? rc : dcp_read_plan_build(plan, true, NULL, err);
}

static int
no_records(void *ctx, const struct dcp_read_plan *plan, const struct dcp_read_item *item,
           const uint8_t *bytes, size_t len, struct dcp_error *err)
{
    (void)ctx, (void)plan, (void)item, (void)bytes, (void)len;
    return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL, "a plain tensor was handed to Python");
}

static const struct dcp_failure *
as_failure(struct dcp_failure *record, int code, const struct dcp_error *err, uint32_t rank)
{
    *record = (struct dcp_failure){.rank = rank,
                                   .kind = DCP_FAILURE_CORE,
                                   .bytes = (uint8_t *)(uintptr_t)err,
                                   .len = sizeof *err};
    return code != 0 ? record : NULL;
}

/* The order of calls of dcp_native/_load.py.  *ret_read_code: of dcp_load_read. */
static int
load_steps(struct dcp_load *load, const struct dcp_comm *comm, const struct fault_case *fault,
           bool is_first, const struct box *boxes, struct dcp_read_plan *plan, int *ret_read_code,
           struct dcp_failure_list *failures, struct dcp_error *err)
{
    struct dcp_error local_err = {0};
    struct dcp_failure record;
    struct dcp_read_stats stats;
    int local = 0, rc = dcp_load_open(load, NULL, &local, failures, err);

    if (rc != 0) {
        return rc;
    }
    local_err = *err;
    dcp_error_clear(err);
    if (local == 0) {
        dcp_error_clear(&local_err);
        local = plan_boxes(dcp_load_metadata(load), boxes, plan, &local_err);
    }
    rc = dcp_load_status(load, as_failure(&record, local, &local_err, comm->rank), failures, err);
    if (rc != 0) {
        return rc;
    }
    if (is_first && fault->allocation_of_read) {
        run_out_of_memory(comm, fault->fail_allocation);
    }
    dcp_error_clear(&local_err);
    local = dcp_load_read(load, plan, NULL, NULL, no_records, NULL, &stats, &local_err);
    *ret_read_code = local;
    return dcp_load_status(load, as_failure(&record, local, &local_err, comm->rank), failures, err);
}

static void
load_once_into_boxes(struct dcp_group *group, const struct dcp_io *io, struct fault_case *fault,
                     bool is_first)
{
    const struct dcp_comm *comm = dcp_group_comm(group);
    const struct dcp_load_params params = {.io = io,
                                           .dir_path = SAVE_DIR,
                                           .call_hash = 5,
                                           .rank = comm->rank,
                                           .verify = true,
                                           .verify_all = fault->verify_all,
                                           .direct = fault->direct,
                                           .read_once = fault->read_once};
    __typeof__(&fault->first[0]) ret =
        is_first ? &fault->first[comm->rank] : (void *)&fault->second[comm->rank];
    struct dcp_read_plan plan = {0};
    struct dcp_load *load = NULL;
    struct box boxes[BOXES];

    boxes_make(boxes, comm->rank);
    ret->read_code = 1; /* not reached */
    must_ok(dcp_load_new(group, &params, &load, &ret->err), &ret->err);
    if (is_first && fault->fail_allocation != 0 && !fault->allocation_of_read) {
        run_out_of_memory(comm, fault->fail_allocation);
    }
    ret->rc = load_steps(load, comm, fault, is_first, boxes, &plan, &ret->read_code, &ret->failures,
                         &ret->err);
    dcp_load_destroy(load);
    dcp_read_plan_clean_up(&plan);
    ret->guards_hold = ret->is_loaded = true;
    for (size_t i = 0; i < BOXES; i++) {
        ret->guards_hold = ret->guards_hold && box_holds(&boxes[i], false);
        ret->is_loaded = ret->is_loaded && box_holds(&boxes[i], true);
        free(boxes[i].memory);
    }
}

static void
load_rank(const struct dcp_comm *comm, struct dcp_comm_sim *sim, void *arg)
{
    struct fault_case *fault = arg;
    struct dcp_group *group = save_world_group(comm, COORDINATOR);
    struct io_faults faults;
    (void)sim;

    io_faults_init(&faults, fault->table);
    if (comm->rank == fault->victim) {
        io_faults_arm(&faults, fault->io.mode, fault->io.nth, fault->io.sys_errno);
    }
    load_once_into_boxes(group, &faults.io, fault, true);
    if (comm->rank == fault->victim) {
        fault->hit = atomic_load(&faults.hit);
    }
    if (fault->first[comm->rank].rc == DCP_E_PEER && fault->fail_allocation == 0) {
        load_once_into_boxes(group, fault->table, fault, false); /* the same group goes on */
        fault->second[comm->rank].is_there = true;
    }
    dcp_group_destroy(group);
}

static void
describe(const struct fault_case *fault)
{
    fprintf(stderr,
            "failed: victim %u, mode %d, call %u, errno %d; allocation %llu of %s; direct %d, "
            "read_once %d\n",
            fault->victim, fault->io.mode, fault->io.nth, fault->io.sys_errno,
            (unsigned long long)fault->fail_allocation,
            fault->allocation_of_read ? "reading" : "opening", fault->direct, fault->read_once);
    for (uint32_t r = 0; r < RANKS; r++) {
        fprintf(stderr, "  rank %u: %s, read %d: %s; guards %d, loaded %d; then %s: %s\n", r,
                dcp_code_name(fault->first[r].rc), fault->first[r].read_code,
                fault->first[r].err.message, fault->first[r].guards_hold, fault->first[r].is_loaded,
                dcp_code_name(fault->second[r].rc), fault->second[r].err.message);
        for (size_t i = 0; i < fault->first[r].failures.count; i++) {
            fprintf(stderr, "    rank %u failed: %s\n", fault->first[r].failures.items[i].rank,
                    ((struct dcp_error *)fault->first[r].failures.items[i].bytes)->message);
        }
    }
}

static void
judge(const struct fault_case *fault)
{
    bool no_memory = fault->fail_allocation != 0;

    for (uint32_t r = 0; r < RANKS; r++) {
        int rc = fault->first[r].rc;
        CHECK(rc != DCP_E_TIMEOUT);
        CHECK(strstr(fault->first[r].err.message, "where rank") == NULL); /* in other calls */
        CHECK((rc == 0) == (fault->first[0].rc == 0));
        CHECK(rc == 0 || rc == DCP_E_PEER || no_memory);
        CHECK(rc != DCP_E_PEER || fault->first[r].failures.count > 0 || no_memory);
        CHECK(no_memory ||
              failure_lists_equal(&fault->first[0].failures, &fault->first[r].failures));
        CHECK(fault->first[r].guards_hold);
        CHECK(fault->first[r].is_loaded || fault->first[r].read_code != 0);
        CHECK(fault->second[r].is_there == (rc == DCP_E_PEER && !no_memory));
        if (fault->second[r].is_there) {
            CHECK_EQ(fault->second[r].rc, 0);
            CHECK(fault->second[r].guards_hold && fault->second[r].is_loaded);
        }
    }
    CHECK(fault->hit || no_memory || fault->first[0].rc == 0);
}

static void
run_case(struct io_memory *fs, struct fault_case *fault)
{
    int before = ctest_failures;

    fault->table = &io_memory_process(fs, 0)->io;
    sim_ranks_run(RANKS, TIMEOUT_MS, load_rank, fault);
    dcp_alloc_fail_after(0);
    judge(fault);
    CHECK_EQ(io_memory_open_files(fs), 0);
    if (ctest_failures != before) {
        describe(fault);
    }
    for (uint32_t r = 0; r < RANKS; r++) {
        dcp_failure_list_clean_up(&fault->first[r].failures);
        dcp_failure_list_clean_up(&fault->second[r].failures);
    }
}

/* Every call of the ranks from `first` to `last` in turn, until a load is over before the fault
 * comes.  Returns how many cases there were, *ret_failed of how many the load failed. */
static unsigned
fail_each_call(const struct fault_case *like, uint32_t first, uint32_t last, unsigned *ret_failed)
{
    struct io_memory *fs = saved();
    unsigned cases = 0, failed = 0;

    for (uint32_t victim = first; victim <= last; victim++) {
        bool hit = true;
        for (uint32_t nth = 1; hit && nth < MOST_CALLS && ctest_failures < MOST_FAILURES; nth++) {
            struct fault_case fault = *like;
            fault.victim = victim;
            fault.io.nth = nth;
            run_case(fs, &fault);
            hit = fault.hit;
            cases += hit;
            failed += hit && fault.first[0].rc != 0;
        }
    }
    io_memory_free(fs);
    dcp_engine_trim();
    *ret_failed = failed;
    return cases;
}

/* ---- cases ---- */

static void
a_failing_call_of_any_rank_fails_the_load_everywhere_or_nowhere(void)
{
    for (int i = 0; i < 2; i++) {
        struct fault_case like = {.io = {.mode = FAULT_BEFORE, .sys_errno = EIO},
                                  .direct = i == 0 ? DCP_DIRECT_OFF : DCP_DIRECT_AUTO,
                                  .read_once = i == 0 ? DCP_READ_ONCE_OFF : DCP_READ_ONCE_HOST,
                                  .verify_all = i == 0};
        unsigned failed;
        CHECK(fail_each_call(&like, 0, RANKS - 1, &failed) > 3 * RANKS);
        CHECK(failed > 2 * RANKS);
    }
}

static void
a_lost_reply_and_a_disk_that_stays_broken_fail_the_load_everywhere(void)
{
    for (uint32_t victim = 0; victim < RANKS; victim++) {
        struct fault_case like = {
            .io = {.mode = victim == 1 ? FAULT_AFTER : FAULT_FOR_EVER, .sys_errno = EIO},
            .direct = victim == 0 ? DCP_DIRECT_AUTO : DCP_DIRECT_OFF};
        unsigned failed;
        CHECK(fail_each_call(&like, victim, victim, &failed) > 3);
        CHECK(failed > 2);
    }
}

/* What they may mean: gone, replaced, too many files, no right, no memory in the kernel. */
static void
any_errno_of_any_call_is_told_to_all(void)
{
    static const int errnos[] = {ENOENT, ESTALE, EMFILE, EACCES, ENOMEM, EINVAL};
    for (uint32_t e = 0; e < sizeof errnos / sizeof errnos[0]; e++) {
        struct fault_case like = {.io = {.mode = FAULT_BEFORE, .sys_errno = errnos[e]},
                                  .direct = e % 2 == 0 ? DCP_DIRECT_OFF : DCP_DIRECT_AUTO,
                                  .read_once = e % 2 == 0 ? DCP_READ_ONCE_HOST : DCP_READ_ONCE_OFF};
        unsigned failed;
        CHECK(fail_each_call(&like, e % RANKS, e % RANKS, &failed) > 3);
        CHECK(failed > 1);
    }
}

static void
interrupted_calls_and_short_reads_are_continued(void)
{
    for (int i = 0; i < 8; i++) {
        struct io_memory *fs = saved();
        struct fault_case fault = {.victim = UINT32_MAX,
                                   .direct = i % 2 == 0 ? DCP_DIRECT_OFF : DCP_DIRECT_AUTO,
                                   .read_once = i % 4 < 2 ? DCP_READ_ONCE_HOST : DCP_READ_ONCE_OFF};
        io_memory_faults(fs)->short_percent = i < 4 ? 60 : 0;
        io_memory_faults(fs)->eintr_percent = i < 4 ? 0 : 40;
        run_case(fs, &fault);
        for (uint32_t r = 0; r < RANKS; r++) {
            CHECK_EQ(fault.first[r].rc, 0);
        }
        io_memory_free(fs);
    }
    dcp_engine_trim();
}

/* The first allocation fails and all after it, then the second, until the load gets through. */
static void
running_out_of_memory_anywhere_fails_the_load_everywhere(void)
{
    for (int of_read = 0; of_read < 2; of_read++) {
        struct io_memory *fs = saved();
        unsigned failed = 0;
        bool all_ok = false;
        for (uint64_t nth = 1; !all_ok && ctest_failures < MOST_FAILURES; nth++) {
            struct fault_case fault = {.victim = UINT32_MAX,
                                       .fail_allocation = nth,
                                       .allocation_of_read = of_read != 0,
                                       .direct = DCP_DIRECT_OFF};
            dcp_engine_trim(); /* the buffers that a process keeps are allocated, too */
            run_case(fs, &fault);
            all_ok = fault.first[0].rc == 0;
            failed += !all_ok;
        }
        CHECK(failed > 3);
        struct fault_case healthy = {.victim = UINT32_MAX, .direct = DCP_DIRECT_OFF};
        run_case(fs, &healthy);
        CHECK_EQ(healthy.first[0].rc, 0);
        io_memory_free(fs);
        dcp_engine_trim();
    }
}

CTEST_MAIN(RUN(a_failing_call_of_any_rank_fails_the_load_everywhere_or_nowhere);
           RUN(a_lost_reply_and_a_disk_that_stays_broken_fail_the_load_everywhere);
           RUN(any_errno_of_any_call_is_told_to_all);
           RUN(interrupted_calls_and_short_reads_are_continued);
           RUN(running_out_of_memory_anywhere_fails_the_load_everywhere);)
