/*
 * commit_actors.c: what the actors of the commit model do: save, give up, publish late, settle,
 * sweep, read, delete.
 */
#include "commit_world.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>

/* Restarts of a reader, each of which needs another commit. */
enum { READER_TRIES = 8 };

static void
say(struct commit_world *world, char letter, enum dcp_outcome outcome)
{
    if (!world->abandoned) {
        world->saves[(unsigned)letter].said[explore_actor()] = outcome;
        world->checked_version = 0;
    }
}

/* What an actor goes on with from here is in the claim alone: how it came by it does not matter. */
static void
forget_all_but(struct commit_world *world, const struct dcp_claim *claim, unsigned phase)
{
    struct io_memory_process *process = world->processes[explore_actor()];

    process->history = (claim->n0 * 4 + (uint64_t)claim->outcome) * 16 + phase * 2 + claim->durable;
}

unsigned
commit_write_files(const struct commit_world *world, const struct dcp_claim *claim, char letter)
{
    const struct dcp_io *io = claim->io;
    char name[64];

    for (unsigned k = 0; k < world->files; k++) {
        struct dcp_save_id id = commit_id_of(letter);
        int fd;
        dcp_data_file_name(name, sizeof name, 0, claim->n0 + k);
        fd = io->open_at(io->ctx, claim->dirfd, name, O_WRONLY | O_CREAT | O_EXCL, 0666);
        if (fd < 0) {
            return k;
        }
        (void)io->pwrite(io->ctx, fd, &id, sizeof id, 0);
        (void)io->fdatasync(io->ctx, fd);
        (void)io->close(io->ctx, fd);
    }
    (void)io->fsync(io->ctx, claim->dirfd);
    return world->files;
}

static void
discard(struct dcp_claim *claim, unsigned files)
{
    char names[COMMIT_FILES_MOST][64];
    const char *list[COMMIT_FILES_MOST];

    for (unsigned k = 0; k < files; k++) {
        dcp_data_file_name(names[k], sizeof names[k], 0, claim->n0 + k);
        list[k] = names[k];
    }
    dcp_claim_discard(claim, list, files);
}

/* Publishes what is written, settles what is open, sweeps or discards: the end of every save. */
void
commit_conclude(struct commit_world *world, struct dcp_claim *claim, char letter, unsigned made,
                bool publish)
{
    enum dcp_outcome outcome = DCP_OUTCOME_UNKNOWN;
    uint8_t image[COMMIT_IMAGE_BYTES];
    struct dcp_error err;
    uint64_t swept;

    dcp_error_clear(&err);
    if (publish && made == world->files) {
        size_t len = fake_metadata(image, &claim->save_id, claim->n0, world->files);
        int rc = dcp_claim_publish(claim, image, len, &outcome, &err);
        if ((rc == 0) != (outcome == DCP_OUTCOME_COMMITTED) && !world->abandoned) {
            commit_world_broke(world, "publish contradicts itself", letter);
        }
    }
    for (int i = 0; i < 3 && outcome == DCP_OUTCOME_UNKNOWN; i++) {
        dcp_error_clear(&err);
        outcome = dcp_claim_settle(claim, &err);
    }
    say(world, letter, outcome);
    forget_all_but(world, claim, 2 + made);
    if (outcome == DCP_OUTCOME_COMMITTED) {
        dcp_error_clear(&err);
        (void)!dcp_claim_sweep(claim, &swept, &err);
    } else if (outcome != DCP_OUTCOME_UNKNOWN) {
        discard(claim, made);
    }
}

static void
act_saver(struct commit_world *world, unsigned actor, int32_t rank, bool publish)
{
    char letter = (char)('A' + actor);
    struct dcp_save_id id = commit_id_of(letter);
    struct dcp_claim claim;
    struct dcp_error err;

    dcp_error_clear(&err);
    if (dcp_claim_take(&world->processes[actor]->io, world->dirfds[actor], COMMIT_DIR, rank, &id,
                       "a test", true, &claim, &err) != 0) {
        if (err.code != DCP_E_REMOVED && err.code != DCP_E_SUPERSEDED && world->lost == 0) {
            commit_world_broke(world, err.message, letter);
        }
        return;
    }
    forget_all_but(world, &claim, 1);
    commit_conclude(world, &claim, letter, commit_write_files(world, &claim, letter), publish);
}

/* A claim made earlier, by a process that is still there. */
static struct dcp_claim
old_claim(struct commit_world *world, unsigned actor, char letter, uint64_t n0)
{
    struct dcp_claim claim = {.io = &world->processes[actor]->io,
                              .dirfd = world->dirfds[actor],
                              .dir_path = COMMIT_DIR,
                              .rank = -1,
                              .n0 = n0,
                              .save_id = commit_id_of(letter),
                              .sync = true};

    dcp_claim_name_put(claim.name, -1, n0, &claim.save_id);
    dcp_metadata_name(claim.target, -1);
    return claim;
}

uint64_t
commit_late_n0(const struct commit_world *world)
{
    return 2 * (uint64_t)world->files;
}

static void
act_sweeper(struct commit_world *world, unsigned actor)
{
    struct dcp_claim claim = old_claim(world, actor, COMMIT_OLD, world->files);
    struct dcp_error err;
    uint64_t swept;

    claim.outcome = DCP_OUTCOME_COMMITTED;
    claim.durable = true;
    dcp_error_clear(&err);
    (void)!dcp_claim_sweep(&claim, &swept, &err);
}

static void
act_late_settler(struct commit_world *world, unsigned actor)
{
    struct dcp_claim claim = old_claim(world, actor, COMMIT_LATE, commit_late_n0(world));
    struct dcp_error err;

    dcp_error_clear(&err);
    say(world, COMMIT_LATE, dcp_claim_settle(&claim, &err));
}

/* True when a file of the image is not there. */
static bool
read_files(struct commit_world *world, unsigned actor, const struct dcp_buf *image)
{
    const struct dcp_io *io = &world->processes[actor]->io;
    struct dcp_buf data = {0};
    const char *name;
    size_t at = 20;
    bool missing = false;

    while (!missing && (name = fake_next(image->data, image->len, &at)) != NULL) {
        struct dcp_error err;
        dcp_error_clear(&err);
        dcp_buf_clear(&data);
        missing = dcp_io_read_file(io, world->dirfds[actor], name, 64, &data, &err) != 0;
        if (!missing && (data.len != 16 || memcmp(data.data, image->data + 4, 16) != 0)) {
            /* A header of another save is as good as no file; while nobody deletes it never
             * happens: numbers are not used again. */
            missing = true;
            if (!world->client_began) {
                commit_world_broke(world, "a reader met foreign bytes", (char)image->data[4]);
            }
        }
    }
    dcp_buf_clean_up(&data);
    return missing;
}

static void
act_reader(struct commit_world *world, unsigned actor)
{
    const struct dcp_io *io = &world->processes[actor]->io;
    struct dcp_buf image = {0};
    char before = 0;

    for (int i = 0; i < READER_TRIES; i++) {
        struct dcp_error err;
        dcp_error_clear(&err);
        dcp_buf_clear(&image);
        if (dcp_io_read_file(io, world->dirfds[actor], ".metadata", 256, &image, &err) != 0) {
            if (!world->client_began) {
                commit_world_broke(world, "a reader found no checkpoint", before);
            }
            break;
        }
        if (before == (char)image.data[4]) {
            if (!world->client_began) {
                commit_world_broke(world, "a reader misses a file of the checkpoint", before);
            }
            break;
        }
        before = (char)image.data[4];
        if (!read_files(world, actor, &image)) {
            break;
        }
    }
    dcp_buf_clean_up(&image);
}

static int
note_for_client(void *ctx, const char *name)
{
    dcp_buf_put(ctx, name, strlen(name) + 1);
    return 0;
}

/* False when it can not be listed. */
static bool
empty_directory(struct commit_world *world, unsigned actor)
{
    const struct dcp_io *io = &world->processes[actor]->io;
    struct dcp_buf names = {0};
    bool listed = io->list(io->ctx, world->dirfds[actor], note_for_client, &names) == 0;

    if (listed) {
        world->client_began = !world->abandoned;
        for (size_t at = 0; at < names.len; at += strlen((char *)names.data + at) + 1) {
            (void)io->unlink_at(io->ctx, world->dirfds[actor], (char *)names.data + at);
        }
    }
    dcp_buf_clean_up(&names);
    return listed;
}

static void
act_client(struct commit_world *world, unsigned actor)
{
    if (empty_directory(world, actor)) {
        (void)io_memory_rmdir(world->processes[actor], COMMIT_DIR);
    }
}

/* Empties the directory and, unless the sweeper (actor 0) has begun by then, saves to it: numbers
 * begin again below the sweeper's.  Were the directory emptied and saved to between the sweeper's
 * last look and its unlink, the new file would go: names are all that unlink knows (sweep.c). */
static void
act_restarter(struct commit_world *world, unsigned actor)
{
    (void)empty_directory(world, actor);
    if (world->processes[0]->history != 0) {
        return;
    }
    world->client_began = false;
    world->current[0] = 0;
    world->starts_anew = true;
    memset(world->saves, 0, sizeof world->saves);
    act_saver(world, actor, -1, true);
}

void
commit_world_act(void *ctx, unsigned actor)
{
    struct commit_world *world = ctx;
    struct dcp_claim claim;

    switch (world->roles[actor]) {
    case COMMITTER:
    case QUITTER:
        act_saver(world, actor, -1, world->roles[actor] == COMMITTER);
        break;
    case RANK_COMMITTER:
        act_saver(world, actor, 0, true);
        break;
    case LATE_PUBLISHER:
        claim = old_claim(world, actor, COMMIT_LATE, commit_late_n0(world));
        commit_conclude(world, &claim, COMMIT_LATE, world->files, true);
        break;
    case LATE_SETTLER:
        act_late_settler(world, actor);
        break;
    case SWEEPER:
        act_sweeper(world, actor);
        break;
    case READER:
        act_reader(world, actor);
        break;
    case CLIENT:
        act_client(world, actor);
        break;
    case RESTARTER:
        act_restarter(world, actor);
        break;
    }
}
