/*
 * test_verify_world.c: the check in a world that does not hold still: failing calls, no memory,
 * cancelled, replaced by newer saves.
 */
#include "ctest.h"

#include <errno.h>
#include <stdatomic.h>

#include "incremental_world.h"
#include "verify_subject.h"

/* ---- a world that fails ---- */

static void
no_failing_call_makes_a_damaged_checkpoint_pass(void)
{
    static const enum io_call reading[] = {IO_OPEN_DIR, IO_OPEN_AT, IO_PREAD, IO_FSTAT, IO_LIST};
    struct subject s;
    struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL};
    struct dcp_verify_result result;
    struct dcp_error err;
    make(&s, &small);
    for (size_t kind = 0; kind < sizeof reading / sizeof reading[0]; kind++) {
        uint64_t nth = 0, calls;
        do {
            struct io_memory_faults *faults = io_memory_faults(s.disk.fs);
            uint64_t before = io_memory_calls_of(s.disk.fs, reading[kind]);
            faults->fail_call = reading[kind];
            faults->fail_nth = ++nth;
            faults->fail_errno = EIO;
            int rc = run(s.disk.fs, DIR, &verify, &result, &err);
            calls = io_memory_calls_of(s.disk.fs, reading[kind]) - before;
            bool hit = faults->fail_nth == 0;
            faults->fail_nth = 0;
            if (rc == 0) {
                CHECK_EQ(result.problems_found > 0, hit);
                CHECK(!hit || result.problems[0].sys_errno == EIO);
                dcp_verify_result_clean_up(&result);
            } else {
                CHECK(hit && err.code == DCP_E_IO && err.sys_errno == EIO);
            }
            if (!hit) {
                break;
            }
        } while (nth <= calls);
        CHECK(nth > 1);
    }
    clean_up(&s);
}

static void
calls_that_only_help_may_fail(void)
{
    static const enum io_call helping[] = {IO_CLOSE, IO_DIO_ALIGN, IO_CACHED, IO_SET_DIRECT};
    struct subject s;
    struct world_options options = {.seed = 1, .thread_count = 1, .large_bytes = 9u << 20};
    make(&s, &options);
    for (size_t kind = 0; kind < sizeof helping / sizeof helping[0]; kind++) {
        struct io_memory_faults *faults = io_memory_faults(s.disk.fs);
        faults->fail_call = helping[kind];
        faults->fail_nth = 1;
        faults->fail_errno = EIO;
        faults->fail_after_effect = helping[kind] == IO_CLOSE;
        CHECK_EQ(problems(s.disk.fs, DIR, DCP_VERIFY_FULL, NULL), 0);
        CHECK_EQ(faults->fail_nth, 0);
    }
    clean_up(&s);
}

static void
an_unreadable_place_spoils_its_records_only(void)
{
    struct subject s;
    struct world_options options = {
        .seed = 1, .thread_count = 1, .large_bytes = 30u << 20, .tensors = 4};
    uint64_t spared = 0;
    make(&s, &options);
    for (uint64_t nth = 4; nth < 8; nth++) {
        struct io_memory_faults *faults = io_memory_faults(s.disk.fs);
        struct dcp_verify_problem first = {0};
        faults->fail_call = IO_PREAD;
        faults->fail_nth = nth;
        faults->fail_errno = EIO;
        uint64_t found = problems(s.disk.fs, DIR, DCP_VERIFY_FULL, &first);
        CHECK(found >= 1 && found <= s.world.layout.records_count);
        spared += s.world.layout.records_count - found;
        CHECK(first.code == DCP_E_IO && strstr(first.what, "Input/output error") != NULL);
        faults->fail_nth = 0;
    }
    CHECK(spared > 0);
    clean_up(&s);
}

static void
running_out_of_memory_is_an_error_and_leaks_nothing(void)
{
    struct subject s;
    struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL};
    make(&s, &small);
    disk_damage(&s.disk, &s.world, 0, s.world.layout.records[0].offset_bytes + 70, 1, UINT64_MAX);
    uint64_t failures = 0;
    for (uint64_t nth = 1;; nth++) {
        struct dcp_verify_result result;
        struct dcp_error err;
        dcp_engine_trim();
        dcp_alloc_fail_after(nth);
        int rc = run(s.disk.fs, DIR, &verify, &result, &err);
        dcp_alloc_fail_after(0);
        if (rc == 0) {
            CHECK_EQ(result.problems_found, 1);
            dcp_verify_result_clean_up(&result);
            break;
        }
        CHECK_EQ(rc, DCP_E_NOMEM);
        failures++;
    }
    CHECK(failures > 10);
    clean_up(&s);
}

/* ---- hooks ---- */

static atomic_int cancel;
static _Atomic uint64_t calls_left;
static void (*when_due)(struct io_memory *fs);
static struct io_memory *hooked_fs;

static void
count_down(struct io_memory_process *process, enum io_call call, const char *name)
{
    (void)process;
    if (when_due == NULL || (strstr(name, ".distcp") == NULL && call != IO_PREAD)) {
        return;
    }
    if (calls_left > 0 && --calls_left == 0) {
        when_due(hooked_fs);
    }
}

static void
set_cancel(struct io_memory *fs)
{
    (void)fs;
    cancel = 1;
}

static void
a_cancelled_check_ends_soon(void)
{
    struct subject s;
    struct world_options options = {.seed = 1, .thread_count = 1, .large_bytes = 60u << 20};
    struct dcp_verify_options verify = {
        .level = DCP_VERIFY_FULL, .cancel = &cancel, .direct = DCP_DIRECT_ON};
    make(&s, &options);
    struct io_memory_process *process = io_memory_process(s.disk.fs, 0);
    process->before = count_down;
    when_due = set_cancel;
    for (uint64_t at = 0; at < 6; at++) {
        struct dcp_verify_result result;
        struct dcp_error err;
        cancel = at == 0;
        calls_left = at;
        CHECK_EQ(run(s.disk.fs, DIR, &verify, &result, &err), DCP_E_CANCELLED);
    }
    process->before = NULL;
    when_due = NULL;
    clean_up(&s);
}

/* ---- replaced ---- */

static const struct tensors versions[2] = {
    {.count = 3, .lengths = {1000, 300000, 20}, .file_per_item = true},
    {.count = 3, .lengths = {1000, 300000, 20}, .versions = {1, 1, 1}, .file_per_item = true},
};

static void
save_again(struct io_memory *fs)
{
    struct saving saving = {.dir = DIR};
    struct dcp_save_info info;
    when_due = NULL;
    tensors_save(NULL, fs, &versions[1], &saving, &info);
}

static void
remove_all(struct io_memory *fs)
{
    when_due = NULL;
    tensors_remove(fs, DIR);
}

/* Checks a checkpoint, during which `act` happens before system call number `at`. */
static void
check_while(void (*act)(struct io_memory *fs), uint64_t at, struct dcp_verify_result *ret_result)
{
    struct io_memory *fs = io_memory_new(at);
    struct saving saving = {.dir = DIR};
    struct dcp_save_info info;
    struct dcp_verify_options verify = {.level = DCP_VERIFY_FULL};
    struct dcp_error err = {0};
    tensors_save(NULL, fs, &versions[0], &saving, &info);
    io_memory_process(fs, 0)->before = count_down;
    hooked_fs = fs;
    when_due = act;
    calls_left = at;
    const struct dcp_io *io = &io_memory_process(fs, 0)->io;
    CHECK_OK(dcp_verify_run(io, DIR, &verify, ret_result, &err), &err);
    io_memory_process(fs, 0)->before = NULL;
    when_due = NULL;
    io_memory_free(fs);
    dcp_engine_trim();
}

static void
a_checkpoint_that_is_replaced_meanwhile_is_checked_anew(void)
{
    uint32_t replaced = 0;
    for (uint64_t at = 1; at < 30; at++) {
        struct dcp_verify_result result;
        check_while(save_again, at, &result);
        CHECK_EQ(result.problems_found, 0);
        CHECK(result.replaced_count <= 1);
        replaced += result.replaced_count;
        dcp_verify_result_clean_up(&result);
    }
    CHECK(replaced > 0);
}

static void
a_checkpoint_that_is_deleted_meanwhile_is_not_whole(void)
{
    for (uint64_t at = 1; at < 8; at += 2) {
        struct dcp_verify_result result;
        check_while(remove_all, at, &result);
        CHECK_EQ(result.problems_found, 1);
        CHECK(result.problems_count == 1 && result.problems[0].code == DCP_E_NOENT &&
              strcmp(result.problems[0].file, ".metadata") == 0);
        dcp_verify_result_clean_up(&result);
    }
}

CTEST_MAIN(RUN(no_failing_call_makes_a_damaged_checkpoint_pass); RUN(calls_that_only_help_may_fail);
           RUN(an_unreadable_place_spoils_its_records_only);
           RUN(running_out_of_memory_is_an_error_and_leaks_nothing);
           RUN(a_cancelled_check_ends_soon);
           RUN(a_checkpoint_that_is_replaced_meanwhile_is_checked_anew);
           RUN(a_checkpoint_that_is_deleted_meanwhile_is_not_whole);)
