/*
 * commit_world.c: makes the world of the commit model, checks it after every step, and lets the
 * next save be the judge of what is left.
 */
#include "commit_world.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* Runs the save after all others. */
enum { NEXT_PROCESS = 6 };

/* The global checkpoint, and rank 0's own. */
static const char *const targets[] = {".metadata", "__0.metadata"};

static const char *const role_names[] = {"committer",    "quitter",   "late publisher",
                                         "late settler", "sweeper",   "reader",
                                         "client",       "restarter", "rank committer"};

/* ---- the toy format ---- */

size_t
fake_metadata(uint8_t *ret, const struct dcp_save_id *id, uint64_t n0, unsigned files)
{
    size_t len = 20;

    memcpy(ret, "FAKE", 4);
    memcpy(ret + 4, id, sizeof *id);
    for (unsigned k = 0; k < files; k++) {
        dcp_data_file_name((char *)ret + len, 40, 0, n0 + k);
        len += strlen((char *)ret + len) + 1;
    }
    return len;
}

const char *
fake_next(const uint8_t *image, size_t len, size_t *at)
{
    const char *name = (const char *)image + *at;

    if (*at >= len) {
        return NULL;
    }
    *at += strlen(name) + 1;
    return name;
}

bool
fake_save_id(const uint8_t *image, size_t len, struct dcp_save_id *ret_id)
{
    if (len < 20 || memcmp(image, "FAKE", 4) != 0) {
        return false;
    }
    memcpy(ret_id, image + 4, sizeof *ret_id);
    return true;
}

struct dcp_save_id
commit_id_of(char letter)
{
    struct dcp_save_id id;

    memset(&id, letter, sizeof id);
    return id;
}

void
commit_world_broke(struct commit_world *world, const char *what, char letter)
{
    if (!world->abandoned) {
        fprintf(stderr, "actor %u (%s): %s, save %c\n", explore_actor(),
                role_names[world->roles[explore_actor()]], what, letter == 0 ? '-' : letter);
        world->broken = true;
    }
}

/* True for the name of a claim that the running actor makes itself. */
static bool
is_own_claim(const char *name)
{
    struct dcp_save_id id = commit_id_of((char)('A' + explore_actor()));
    struct dcp_claim_name parsed;
    char own[DCP_CLAIM_NAME_BYTES];

    if (!dcp_claim_name_parse(name, &parsed)) {
        return false;
    }
    dcp_claim_name_put(own, parsed.rank, parsed.n0, &id);
    return strcmp(own, name) == 0;
}

/* Others notice changes of names and looks at them; bytes go to files that nobody else can see yet.
 * All that a claimant has learnt before it opens its claim is the number, and which try this is. */
static void
before_call(struct io_memory_process *process, enum io_call call, const char *name)
{
    struct commit_world *world = process->hook_ctx;

    if (call == IO_OPEN_AT && is_own_claim(name)) {
        process->history = ++world->claims_opened[explore_actor()];
        for (const char *p = name; *p != '\0'; p++) {
            process->history = process->history * 31 + (unsigned char)*p;
        }
    }
    if (call == IO_LIST || call == IO_RENAME_AT || call == IO_UNLINK_AT || call == IO_LINK_AT ||
        (call == IO_OPEN_AT && strcmp(name, "..") != 0) || call == IO_TRUNCATE ||
        (call == IO_FSTAT && world->client_began)) {
        explore_yield();
    }
}

static int
choose_result(struct io_memory_process *process, int count)
{
    (void)process;
    return explore_choose(count);
}

/* ---- what explore.c calls ---- */

static void
put_save(struct commit_world *world, char letter, uint64_t n0, const char *metadata_name)
{
    struct dcp_save_id id = commit_id_of(letter);
    uint8_t image[COMMIT_IMAGE_BYTES];
    char name[64];

    for (unsigned k = 0; k < world->files; k++) {
        dcp_data_file_name(name, sizeof name, 0, n0 + k);
        io_memory_put_file(world->fs, COMMIT_DIR, name, &id, sizeof id);
    }
    if (metadata_name != NULL) {
        io_memory_put_file(world->fs, COMMIT_DIR, metadata_name, image,
                           fake_metadata(image, &id, n0, world->files));
    }
}

static bool
has_role(const struct commit_world *world, enum role role)
{
    for (unsigned i = 0; i < world->actors_count; i++) {
        if (world->roles[i] == role) {
            return true;
        }
    }
    return false;
}

/* Orphans of a crash, the checkpoint `o` above them, and perhaps the late save `l`. */
static void
world_start(void *ctx)
{
    struct commit_world *world = ctx;
    struct io_memory_process *first;

    world->fs = io_memory_new(1);
    memset(world->saves, 0, sizeof world->saves);
    memset(world->claims_opened, 0, sizeof world->claims_opened);
    world->current[0] = COMMIT_OLD;
    world->current[1] = 0;
    world->checked_version = 0;
    world->client_began = world->starts_anew = world->abandoned = world->broken = false;
    io_memory_faults(world->fs)->stale_lists = world->stale;
    io_memory_faults(world->fs)->torn_lists = world->torn;
    first = io_memory_process(world->fs, 0);
    (void)first->io.mkdirs(first->io.ctx, COMMIT_DIR);
    put_save(world, 'x', 0, NULL);
    put_save(world, COMMIT_OLD, world->files, ".metadata");
    world->saves[COMMIT_OLD].committed = true;
    world->saves[COMMIT_OLD].n0 = world->files;
    if (has_role(world, LATE_PUBLISHER) || has_role(world, LATE_SETTLER)) {
        struct dcp_save_id id = commit_id_of(COMMIT_LATE);
        char name[DCP_CLAIM_NAME_BYTES];
        dcp_claim_name_put(name, -1, commit_late_n0(world), &id);
        io_memory_put_file(world->fs, COMMIT_DIR, name, "claim", 5);
        put_save(world, COMMIT_LATE, commit_late_n0(world), NULL);
    }
    for (unsigned i = 0; i < world->actors_count; i++) {
        struct io_memory_process *process = io_memory_process(world->fs, i);
        world->processes[i] = process;
        world->dirfds[i] = process->io.open_dir(process->io.ctx, COMMIT_DIR);
        process->listed_version[0] =
            io_memory_process(world->fs, IO_MEMORY_PROCESSES - 1)->listed_version[0];
        process->history = 0;
        process->hook_ctx = world;
        process->before = before_call;
        process->choose = choose_result;
    }
    io_memory_faults(world->fs)->lost_replies = world->lost;
}

static uint64_t
world_state(void *ctx)
{
    struct commit_world *world = ctx;
    uint64_t hash = io_memory_state_hash(world->fs);
    uint64_t facts = (uint64_t)world->client_began << 1 | world->starts_anew;

    for (int letter = 'A'; letter < 128; letter++) {
        facts = facts * 3 + world->saves[letter].committed;
    }
    hash = hash * 0x9E3779B97F4A7C15u ^ facts;
    for (unsigned i = 0; i < world->actors_count; i++) {
        hash = hash * 0x9E3779B97F4A7C15u ^ world->processes[i]->history;
        hash ^= hash >> 31;
    }
    return hash;
}

/* The present checkpoint is whole; after the client began, at least not mixed. */
static void
check_loadable(struct commit_world *world, const uint8_t *image, size_t len)
{
    const char *name;
    size_t at = 20;

    while ((name = fake_next(image, len, &at)) != NULL) {
        size_t data_len = 0;
        const uint8_t *data;
        data = io_memory_file(world->fs, COMMIT_DIR, name, &data_len);
        if (data == NULL && !world->client_began) {
            commit_world_broke(world, "the present checkpoint lost a file", (char)image[4]);
        } else if (data != NULL && (data_len != 16 || memcmp(data, image + 4, 16) != 0)) {
            commit_world_broke(world, "the present checkpoint is mixed or cut", (char)image[4]);
        }
    }
}

static void
check_commit(struct commit_world *world, char letter, uint64_t n0)
{
    struct save_fact *save = &world->saves[(unsigned)letter];

    if (save->committed) {
        commit_world_broke(world, "a replaced save came back", letter);
    }
    for (int other = 'A'; other < 128; other++) {
        if (!world->client_began && world->saves[other].committed && world->saves[other].n0 == n0) {
            commit_world_broke(world, "two saves of one number were committed", letter);
        }
    }
    save->committed = true;
    save->n0 = n0;
}

/* What was said of a save, against what is. */
static void
check_said(struct commit_world *world, char letter)
{
    const struct save_fact *save = &world->saves[(unsigned)letter];

    for (unsigned k = 0; k < world->actors_count; k++) {
        if (save->said[k] == DCP_OUTCOME_ABORTED && save->committed && !world->client_began) {
            commit_world_broke(world, "a save that was called aborted is committed", letter);
        }
        if (save->said[k] == DCP_OUTCOME_SUPERSEDED &&
            (world->current[0] == letter || world->current[1] == letter)) {
            commit_world_broke(world, "a save called superseded is the checkpoint", letter);
        }
        if (save->said[k] == DCP_OUTCOME_COMMITTED && !save->committed) {
            commit_world_broke(world, "a save that was called committed is not", letter);
        }
    }
}

static void
check_target(struct commit_world *world, int target)
{
    size_t len = 0;
    const uint8_t *image = io_memory_file(world->fs, COMMIT_DIR, targets[target], &len);
    char before = world->current[target], letter = 0;
    bool may_be_absent = world->client_began || (before == 0 && (world->starts_anew || target > 0));

    if (image == NULL) {
        if (!may_be_absent) {
            commit_world_broke(world, "there is no checkpoint any more", before);
        }
    } else if (len < 21 || memcmp(image, "FAKE", 4) != 0) {
        commit_world_broke(world, "the target is not metadata", before);
    } else {
        letter = (char)image[4];
        check_loadable(world, image, len);
    }
    if (letter != 0 && letter != before) {
        uint32_t rank;
        uint64_t n0 = 0;
        (void)dcp_data_file_parse((const char *)image + 20, &rank, &n0);
        check_commit(world, letter, n0);
    }
    world->current[target] = letter;
}

static bool
world_check(void *ctx)
{
    struct commit_world *world = ctx;

    if (world->checked_version == io_memory_version(world->fs)) {
        return !world->broken;
    }
    world->checked_version = io_memory_version(world->fs);
    check_target(world, 0);
    check_target(world, 1);
    for (unsigned i = 0; i < world->actors_count; i++) {
        check_said(world, (char)('A' + i));
    }
    check_said(world, COMMIT_LATE);
    return !world->broken;
}

static void
world_abandon(void *ctx)
{
    struct commit_world *world = ctx;

    world->abandoned = true;
    io_memory_faults(world->fs)->crash_at = 0;
}

/* The next save, alone: it must commit, and then be alone. */
static void
check_next_save(struct commit_world *world)
{
    struct io_memory_process *process = io_memory_process(world->fs, NEXT_PROCESS);
    struct dcp_save_id id = commit_id_of(COMMIT_NEXT);
    int dirfd = process->io.open_dir(process->io.ctx, COMMIT_DIR);
    struct dcp_claim claim;
    struct dcp_error err;

    dcp_error_clear(&err);
    io_memory_faults(world->fs)->lost_replies = 0;
    io_memory_faults(world->fs)->stale_lists = false;
    if (dcp_claim_take(&process->io, dirfd, COMMIT_DIR, -1, &id, NULL, true, &claim, &err) != 0) {
        commit_world_broke(world, err.message, COMMIT_NEXT);
        return;
    }
    commit_conclude(world, &claim, COMMIT_NEXT, commit_write_files(world, &claim, COMMIT_NEXT),
                    true);
    if (!world_check(world) || world->current[0] != COMMIT_NEXT) {
        commit_world_broke(world, "the next save did not commit", COMMIT_NEXT);
    }
    if (io_memory_names_count(world->fs, COMMIT_DIR) !=
        (world->current[1] == 0 ? 1 : 2) * (1 + world->files)) {
        for (size_t i = 0; i < io_memory_names_count(world->fs, COMMIT_DIR); i++) {
            fprintf(stderr, "  %s\n", io_memory_name(world->fs, COMMIT_DIR, i));
        }
        commit_world_broke(world, "the next save left more than itself", COMMIT_NEXT);
    }
    process->io.close(process->io.ctx, dirfd);
}

static bool
world_finish(void *ctx, bool complete)
{
    struct commit_world *world = ctx;

    if (complete && io_memory_open_files(world->fs) != world->actors_count) {
        commit_world_broke(world, "descriptors were left open", 0);
    }
    if (complete && !io_memory_dir_removed(world->fs, COMMIT_DIR)) {
        check_next_save(world);
    }
    io_memory_free(world->fs);
    world->fs = NULL;
    return !world->broken;
}

bool
commit_world_explore(struct commit_world *world, int preemptions)
{
    struct explore explore = {
        .ctx = world,
        .actors_count = world->actors_count,
        .preemptions = preemptions,
        .start = world_start,
        .act = commit_world_act,
        .state = world_state,
        .check = world_check,
        .abandon = world_abandon,
        .finish = world_finish,
    };
    struct timespec from, to;

    clock_gettime(CLOCK_MONOTONIC, &from);
    explore_run(&explore);
    clock_gettime(CLOCK_MONOTONIC, &to);
    printf("   ");
    for (unsigned i = 0; i < world->actors_count; i++) {
        printf(" %s%s", role_names[world->roles[i]], i + 1 < world->actors_count ? "," : "");
    }
    printf(": files %u%s%s%s: %" PRIu64 " states, %" PRIu64 " runs, %u steps, %.2f s\n",
           world->files, world->stale ? ", stale" : "",
           world->torn == 0   ? ""
           : world->torn == 1 ? ", torn"
                              : ", torn back",
           world->lost ? ", lost replies" : "", explore.states, explore.runs, explore.longest,
           (double)(to.tv_sec - from.tv_sec) + 1e-9 * (double)(to.tv_nsec - from.tv_nsec));
    fflush(stdout);
    return !explore.failed && explore.complete_runs > 0;
}
