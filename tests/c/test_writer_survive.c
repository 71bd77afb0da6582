/*
 * test_writer_survive.c: a save that may lose its trainers becomes the checkpoint without them, or
 * none at all; a file's header says that the file is whole.
 */
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "claim_scan.h"
#include "ctest.h"
#include "writer_outlive.h"
#include "writer_world.h"

enum { RANKS = 2 };

/* A save of two files, each written by a process of its own, as if by two ranks. */
struct save {
    struct writer_world w;
    struct dcp_buf metadata;
    struct dcp_claim claim;
    struct dcp_image parts[RANKS]; /* borrow from w.image */
    pid_t trainers[RANKS];
    int64_t writers[RANKS];
    bool slow;
};

static void
save_make(struct save *save)
{
    const struct world_options options = {
        .seed = 3, .tensors = 6, .objects = 2, .thread_count = RANKS, .large_bytes = 200000};
    struct dcp_storage_meta meta = {.checkpoint_id = "x"};
    struct dcp_global_plan global;
    struct dcp_error err = {0};

    memset(save, 0, sizeof *save);
    writer_world_make(&save->w, &options, NULL);
    const struct world *world = &save->w.world;
    CHECK_EQ(save->w.image.files_count, RANKS);
    CHECK_OK(dcp_global_plan_build(&world->plan, 1, false, &global, &err), &err);
    CHECK_OK(
        dcp_metadata_write(&global, &meta, &world->save_id, world->n0, NULL, &save->metadata, &err),
        &err);
    dcp_global_plan_clean_up(&global);
    CHECK_OK(dcp_claim_take(dcp_io_posix(), save->w.dirfd, save->w.dir, -1, &world->save_id, NULL,
                            true, &save->claim, &err),
             &err);
    for (uint32_t r = 0; r < RANKS; r++) {
        save->parts[r] = save->w.image;
        save->parts[r].files = &save->w.image.files[r];
        save->parts[r].files_count = 1;
        save->parts[r].total_bytes = save->w.image.files[r].length_bytes;
        save->parts[r].payload_bytes = 1;
    }
    CHECK_EQ(prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), 0);
}

static void
save_clean_up(struct save *save)
{
    const struct dcp_io *io = dcp_io_posix();

    writer_world_sweep(&save->w);
    io->unlink_at(io->ctx, save->w.dirfd, ".metadata");
    io->unlink_at(io->ctx, save->w.dirfd, save->claim.name);
    dcp_buf_clean_up(&save->metadata);
    writer_world_clean_up(&save->w);
}

static int
write_part(struct save *save, struct dcp_writer_process *process, uint32_t rank)
{
    struct dcp_engine_options engine = {.sync = true};
    struct dcp_writer_survival survival = {.claim_rank = -1, .n0 = save->claim.n0};
    struct dcp_error err = {0};

    if (rank == 0) {
        survival.metadata = (struct dcp_span){save->metadata.data, save->metadata.len};
    }
    if (save->slow) {
        engine.tuning.limit_bytes_s = 40000;
        engine.ring_buffer_bytes = 16u << 10;
    }
    return dcp_writer_process_write_surviving(process, save->w.dirfd, save->w.dir,
                                              &save->w.world.save_id, &save->parts[rank],
                                              &save->w.arena, &engine, &survival, NULL, &err);
}

/* Starts a trainer that writes its part, says so, and waits to be killed. */
static void
start_trainer(struct save *save, uint32_t rank, bool settles)
{
    int ends[2];
    char done;

    CHECK_EQ(pipe(ends), 0);
    save->trainers[rank] = fork();
    if (save->trainers[rank] == 0) {
        struct dcp_writer_process *process = writer_start();
        int64_t pid = dcp_writer_process_pid(process);
        (void)!write(ends[1], &pid, sizeof pid);
        int rc = write_part(save, process, rank);
        if (settles) {
            dcp_writer_process_settled(process);
        }
        (void)!write(ends[1], rc == 0 ? "y" : "n", 1);
        pause();
        _exit(0);
    }
    CHECK_EQ(read(ends[0], &save->writers[rank], sizeof save->writers[rank]), sizeof(int64_t));
    if (!save->slow) {
        CHECK_EQ(read(ends[0], &done, 1), 1);
    }
    close(ends[0]);
    close(ends[1]);
}

static bool
has_header(const struct save *save, uint32_t index, bool *ret_there)
{
    const struct dcp_io *io = dcp_io_posix();
    uint8_t bytes[DCP_FILE_HEADER_BYTES] = {0};
    struct dcp_file_header header;
    char name[64];

    world_file_name(&save->w.world, index, name, sizeof name);
    int fd = io->open_at(io->ctx, save->w.dirfd, name, O_RDONLY, 0);
    *ret_there = fd >= 0;
    bool has = fd >= 0 && io->pread(io->ctx, fd, bytes, sizeof bytes, 0) == sizeof bytes &&
               dcp_file_parse_header(bytes, &header, NULL) == 0;
    if (fd >= 0) {
        io->close(io->ctx, fd);
    }
    return has;
}

static void
await_file(const struct save *save, uint32_t index)
{
    for (bool there = false; !there;) {
        (void)has_header(save, index, &there);
        dcp_io_posix()->sleep_ns(NULL, 1000000);
    }
}

static void
kill_trainer(struct save *save, uint32_t rank)
{
    int status = 0;

    kill(save->trainers[rank], SIGKILL);
    CHECK(writer_await(save->trainers[rank], &status));
}

static void
await_writer(struct save *save, uint32_t rank)
{
    int status = -1;

    CHECK(writer_await(save->writers[rank], &status));
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static bool
is_committed(const struct save *save)
{
    struct dcp_save_id id = {0};
    bool present = false;

    return dcp_claim_read_save_id(&save->claim, ".metadata", &present, &id, NULL) == 0 && present &&
           memcmp(&id, &save->w.world.save_id, sizeof id) == 0;
}

static bool
claim_stands(const struct save *save)
{
    return dcp_io_exists(dcp_io_posix(), save->w.dirfd, save->claim.name);
}

/* ---- ---- */

static void
all_trainers_may_die_while_their_files_are_written(void)
{
    struct save save;
    bool there;

    save_make(&save);
    save.slow = true;
    for (uint32_t r = 0; r < RANKS; r++) {
        start_trainer(&save, r, false);
        await_file(&save, r);
        CHECK(!has_header(&save, r, &there)); /* the last to come */
        kill_trainer(&save, r);
    }
    await_writer(&save, 1);
    await_writer(&save, 0);
    CHECK(is_committed(&save) && !claim_stands(&save));
    CHECK(world_check_files(dcp_io_posix(), save.w.dirfd, &save.w.world));
    save_clean_up(&save);
}

static void
a_trainer_may_die_between_its_files_and_its_commit(void)
{
    struct save save;

    save_make(&save);
    start_trainer(&save, 0, false);
    start_trainer(&save, 1, false);
    kill_trainer(&save, 0);
    await_writer(&save, 0);
    CHECK(is_committed(&save));
    kill_trainer(&save, 1);
    await_writer(&save, 1);
    CHECK(world_check_files(dcp_io_posix(), save.w.dirfd, &save.w.world));
    save_clean_up(&save);
}

static void
a_settled_save_is_left_alone(void)
{
    struct save save;

    save_make(&save);
    start_trainer(&save, 1, true);
    start_trainer(&save, 0, true);
    for (uint32_t r = 0; r < RANKS; r++) {
        kill_trainer(&save, r);
        await_writer(&save, r);
    }
    CHECK(!is_committed(&save) && claim_stands(&save));
    save_clean_up(&save);
}

static void
stopping_the_process_settles(void)
{
    struct save save;

    save_make(&save);
    struct dcp_writer_process *process = writer_start();
    CHECK_EQ(write_part(&save, process, 1), 0);
    dcp_writer_process_settled(process);
    dcp_writer_process_settled(process);
    CHECK(dcp_writer_process_usable(process));
    CHECK_EQ(write_part(&save, process, 0), 0);
    CHECK(!is_committed(&save) && claim_stands(&save));
    dcp_writer_process_stop(process);
    CHECK(!is_committed(&save) && claim_stands(&save));
    CHECK(world_check_files(dcp_io_posix(), save.w.dirfd, &save.w.world));
    save_clean_up(&save);
}

/* The other rank's process is lost as well: nobody can commit. */
static void
an_orphan_is_found_and_a_newer_save_ends_it(void)
{
    const struct dcp_save_id newer_id = {{9, 9}};
    struct dcp_claim newer;
    struct dcp_error err = {0};
    struct save save;

    save_make(&save);
    CHECK_OK(dcp_writer_orphan_wait(save.w.dirfd, save.w.dir, 0, NULL, &err), &err);
    start_trainer(&save, 0, false);
    CHECK_OK(dcp_writer_orphan_wait(save.w.dirfd, save.w.dir, 0, NULL, &err), &err);
    kill_trainer(&save, 0);
    for (int rc = 0; rc == 0;) { /* until it has noticed */
        rc = dcp_writer_orphan_wait(save.w.dirfd, save.w.dir, 0, NULL, &err);
        CHECK(rc == 0 || rc == DCP_E_TIMEOUT);
    }
    atomic_int cancel = 1;
    dcp_error_clear(&err);
    CHECK_EQ(dcp_writer_orphan_wait(save.w.dirfd, save.w.dir, UINT64_MAX, &cancel, &err),
             DCP_E_CANCELLED);
    dcp_error_clear(&err);
    CHECK_OK(dcp_claim_take(dcp_io_posix(), save.w.dirfd, save.w.dir, -1, &newer_id, NULL, true,
                            &newer, &err),
             &err);
    await_writer(&save, 0);
    CHECK(!is_committed(&save) && !claim_stands(&save));
    CHECK_EQ(dcp_claim_settle(&newer, &err), DCP_OUTCOME_ABORTED); /* it stood */
    save_clean_up(&save);
}

static void
who_waits_for_an_orphan_sees_its_commit(void)
{
    struct dcp_error err = {0};
    struct save save;

    save_make(&save);
    start_trainer(&save, 0, false);
    kill_trainer(&save, 0);
    for (int rc = 0; rc == 0;) {
        rc = dcp_writer_orphan_wait(save.w.dirfd, save.w.dir, 0, NULL, &err);
    }
    start_trainer(&save, 1, false);
    dcp_error_clear(&err);
    CHECK_OK(dcp_writer_orphan_wait(save.w.dirfd, save.w.dir, UINT64_MAX, NULL, &err), &err);
    CHECK(is_committed(&save));
    await_writer(&save, 0);
    kill_trainer(&save, 1);
    await_writer(&save, 1);
    CHECK(world_check_files(dcp_io_posix(), save.w.dirfd, &save.w.world));
    save_clean_up(&save);
}

static void
an_orphan_whose_write_failed_gives_the_save_up(void)
{
    const struct dcp_io *io = dcp_io_posix();
    char name[64];
    struct save save;

    save_make(&save);
    world_file_name(&save.w.world, 0, name, sizeof name);
    int fd = io->open_at(io->ctx, save.w.dirfd, name, O_CREAT | O_WRONLY, 0600);
    start_trainer(&save, 0, false);
    kill_trainer(&save, 0);
    await_writer(&save, 0);
    CHECK(!is_committed(&save) && !claim_stands(&save));
    CHECK(dcp_io_exists(io, save.w.dirfd, name)); /* it was not ours */
    io->close(io->ctx, fd);
    save_clean_up(&save);
}

/* In this process, with a short wait: files that never come, or come damaged. */
static void
files_that_do_not_come_end_the_save_at_its_deadline(void)
{
    const struct dcp_io *io = dcp_io_posix();

    for (int damaged = 0; damaged < 2; damaged++) {
        struct dcp_orphan orphan;
        struct save save;
        bool there;

        save_make(&save);
        struct dcp_writer_process *process = writer_start();
        CHECK_EQ(write_part(&save, process, 0), 0);
        if (damaged) {
            char name[64];
            CHECK_EQ(write_part(&save, process, 1), 0);
            world_file_name(&save.w.world, 1, name, sizeof name);
            int fd = io->open_at(io->ctx, save.w.dirfd, name, O_WRONLY, 0);
            CHECK_EQ(io->truncate(io->ctx, fd, save.parts[1].total_bytes - 1), 0);
            io->close(io->ctx, fd);
        }
        dcp_writer_process_stop(process);
        struct dcp_writer_request request = {
            .save_id = save.w.world.save_id,
            .image = save.parts[0],
            .options = {.sync = true},
            .dir_path = save.w.dir,
            .survives = true,
            .survival = {-1, save.claim.n0, {save.metadata.data, save.metadata.len}},
        };
        dcp_orphan_begin(&orphan, io, save.w.dirfd, &request);
        CHECK(dcp_orphan_stands(&orphan));
        CHECK_EQ(dcp_orphan_finish(&orphan, 0, 1, 300000000), DCP_OUTCOME_ABORTED);
        CHECK(!dcp_orphan_stands(&orphan));
        dcp_orphan_end(&orphan);
        CHECK(!is_committed(&save) && !claim_stands(&save));
        (void)has_header(&save, 0, &there);
        CHECK(!there); /* its own were removed */
        save_clean_up(&save);
    }
}

CTEST_MAIN(RUN(all_trainers_may_die_while_their_files_are_written);
           RUN(a_trainer_may_die_between_its_files_and_its_commit);
           RUN(a_settled_save_is_left_alone); RUN(stopping_the_process_settles);
           RUN(an_orphan_is_found_and_a_newer_save_ends_it);
           RUN(who_waits_for_an_orphan_sees_its_commit);
           RUN(an_orphan_whose_write_failed_gives_the_save_up);
           RUN(files_that_do_not_come_end_the_save_at_its_deadline);)
