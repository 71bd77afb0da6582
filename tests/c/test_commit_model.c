/*
 * test_commit_model.c: the commit protocol under every interleaving of the calls that others can
 * notice, on the file system in memory.
 *
 * Actors (save ids are single letters): two or more committers, an old writer that publishes late, a
 * process that settles that writer's save, an earlier committer that is still sweeping, a saver that
 * gives up, a reader, and a client that deletes the directory.  After every step:
 *   - until the client deletes, `.metadata` is there and every file it references is whole and its own;
 *   - at no time, not even then, does it reference another save's file;
 *   - no two saves with one number are ever committed, and none twice;
 *   - what publish and settle said stays true: ABORTED was never committed and never is, SUPERSEDED is
 *     not committed from then on, COMMITTED was.
 * When all have ended the next save commits, and leaves nothing but itself.
 *
 * Pairs and triples are explored exhaustively, with listings that are stale or torn and with renames
 * and unlinks whose reply is lost; all actors together with a bound on preemptions.
 *
 * The metadata format is a toy: this file defines the two functions of claim_references.c itself.
 */
#include "claim_scan.h"
#include "ctest.h"
#include "explore.h"
#include "io_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <time.h>

enum {
    FILES_MOST = 2,     /* of one save */
    READER_TRIES = 8,   /* restarts, each of which needs another commit */
    NEXT_PROCESS = 6,   /* runs the save after all others */
};

static const char dir_path[] = "ckpt";

/* ---- the toy format: "FAKE", save id, then names, each with its terminating zero ---- */

static size_t
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

/* The name at *at, which moves to the next; NULL at the end. */
static const char *
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
dcp_claim_image_save_id(const uint8_t *image, size_t len, struct dcp_save_id *ret_id)
{
    if (len < 20 || memcmp(image, "FAKE", 4) != 0) {
        return false;
    }
    memcpy(ret_id, image + 4, sizeof *ret_id);
    return true;
}

int
dcp_claim_references(const uint8_t *image, size_t len, dcp_reference_fn fn, void *fn_ctx,
                     struct dcp_error *err)
{
    struct dcp_save_id id;
    const char *name;
    size_t at = 20;
    int rc = 0;

    if (!dcp_claim_image_save_id(image, len, &id)) {
        return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL, "not a toy");
    }
    while (rc == 0 && (name = fake_next(image, len, &at)) != NULL) {
        rc = fn(fn_ctx, name, strlen(name));
    }
    return rc;
}

/* ---- the world ---- */

/* The global checkpoint, and rank 0's own. */
static const char *const targets[] = {".metadata", "__0.metadata"};

enum role { COMMITTER, QUITTER, LATE_PUBLISHER, LATE_SETTLER, SWEEPER, READER, CLIENT,
            RESTARTER, RANK_COMMITTER };

static const char *const role_names[] = {"committer", "quitter", "late publisher", "late settler",
                                         "sweeper",   "reader",  "client",
                                         "restarter", "rank committer"};

/* What is known of a save, by the letter of its id. */
struct save_fact {
    bool committed, late_said_aborted, ended;
    enum dcp_outcome said[EXPLORE_ACTORS]; /* by actor */
    uint64_t n0;                           /* of the commit */
};

struct world {
    /* the scenario */
    enum role roles[EXPLORE_ACTORS];
    unsigned actors_count, files;
    bool stale;
    int torn;
    unsigned lost;
    /* the run */
    struct io_memory *fs;
    struct io_memory_process *processes[EXPLORE_ACTORS];
    int dirfds[EXPLORE_ACTORS];
    struct save_fact saves[128];
    unsigned claims_opened[EXPLORE_ACTORS];
    uint64_t checked_version; /* of the names, when they were looked at last; 0: look again */
    char current[2]; /* letter of each target; 0: there is none */
    bool client_began; /* to delete: the checkpoint may be incomplete, or gone */
    bool starts_anew;  /* the directory was emptied, and numbers begin again at 0 */
    bool abandoned, broken;
};

static struct dcp_save_id
id_of(char letter)
{
    struct dcp_save_id id;

    memset(&id, letter, sizeof id);
    return id;
}

static void
broke(struct world *world, const char *what, char letter)
{
    if (!world->abandoned) {
        fprintf(stderr, "actor %u (%s): %s, save %c\n", explore_actor(),
                role_names[world->roles[explore_actor()]], what, letter == 0 ? '-' : letter);
        world->broken = true;
    }
}

static void
say(struct world *world, char letter, enum dcp_outcome outcome)
{
    if (!world->abandoned) {
        world->saves[(unsigned)letter].said[explore_actor()] = outcome;
        world->checked_version = 0;
    }
}

/* True for the name of a claim that the running actor makes itself. */
static bool
is_own_claim(const char *name)
{
    struct dcp_save_id id = id_of((char)('A' + explore_actor()));
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
    struct world *world = process->hook_ctx;

    if (call == IO_OPEN_AT && is_own_claim(name)) {
        process->history = ++world->claims_opened[explore_actor()];
        for (const char *p = name; *p != '\0'; p++) {
            process->history = process->history * 31 + (unsigned char)*p;
        }
    }
    if (call == IO_LIST || call == IO_RENAME_AT || call == IO_UNLINK_AT || call == IO_LINK_AT ||
        (call == IO_OPEN_AT && strcmp(name, "..") != 0) ||
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

/* What an actor goes on with from here is in the claim alone: how it came by it does not matter. */
static void
forget_all_but(struct world *world, const struct dcp_claim *claim, unsigned phase)
{
    struct io_memory_process *process = world->processes[explore_actor()];

    process->history = (claim->n0 * 4 + (uint64_t)claim->outcome) * 16 + phase * 2 + claim->durable;
}

/* ---- actors ---- */

static unsigned
write_files(struct world *world, const struct dcp_claim *claim, char letter)
{
    const struct dcp_io *io = claim->io;
    char name[64];

    (void)world;
    for (unsigned k = 0; k < world->files; k++) {
        struct dcp_save_id id = id_of(letter);
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
    char names[FILES_MOST][64];
    const char *list[FILES_MOST];

    for (unsigned k = 0; k < files; k++) {
        dcp_data_file_name(names[k], sizeof names[k], 0, claim->n0 + k);
        list[k] = names[k];
    }
    dcp_claim_discard(claim, list, files);
}

/* Publishes what is written, settles what is open, sweeps or discards: the end of every save. */
static void
conclude(struct world *world, struct dcp_claim *claim, char letter, unsigned made, bool publish)
{
    enum dcp_outcome outcome = DCP_OUTCOME_UNKNOWN;
    uint8_t image[256];
    struct dcp_error err;
    uint64_t swept;

    dcp_error_clear(&err);
    if (publish && made == world->files) {
        size_t len = fake_metadata(image, &claim->save_id, claim->n0, world->files);
        int rc = dcp_claim_publish(claim, image, len, &outcome, &err);
        if ((rc == 0) != (outcome == DCP_OUTCOME_COMMITTED) && !world->abandoned) {
            broke(world, "publish contradicts itself", letter);
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
act_saver(struct world *world, unsigned actor, int32_t rank, bool publish)
{
    char letter = (char)('A' + actor);
    struct dcp_save_id id = id_of(letter);
    struct dcp_claim claim;
    struct dcp_error err;

    dcp_error_clear(&err);
    if (dcp_claim_take(&world->processes[actor]->io, world->dirfds[actor], dir_path, rank, &id,
                       "a test", true, &claim, &err) != 0) {
        if (err.code != DCP_E_REMOVED && err.code != DCP_E_SUPERSEDED && world->lost == 0) {
            broke(world, err.message, letter);
        }
        return;
    }
    forget_all_but(world, &claim, 1);
    conclude(world, &claim, letter, write_files(world, &claim, letter), publish);
}

/* A claim made earlier, by a process that is still there. */
static struct dcp_claim
old_claim(struct world *world, unsigned actor, char letter, uint64_t n0)
{
    struct dcp_claim claim = {.io = &world->processes[actor]->io,
                              .dirfd = world->dirfds[actor],
                              .dir_path = dir_path,
                              .rank = -1,
                              .n0 = n0,
                              .save_id = id_of(letter),
                              .sync = true};

    dcp_claim_name_put(claim.name, -1, n0, &claim.save_id);
    dcp_metadata_name(claim.target, -1);
    return claim;
}

static uint64_t
late_n0(const struct world *world)
{
    return 2 * (uint64_t)world->files;
}

static void
act_sweeper(struct world *world, unsigned actor)
{
    struct dcp_claim claim = old_claim(world, actor, 'o', world->files);
    struct dcp_error err;
    uint64_t swept;

    claim.outcome = DCP_OUTCOME_COMMITTED;
    claim.durable = true;
    dcp_error_clear(&err);
    (void)!dcp_claim_sweep(&claim, &swept, &err);
}

static void
act_late_settler(struct world *world, unsigned actor)
{
    struct dcp_claim claim = old_claim(world, actor, 'l', late_n0(world));
    struct dcp_error err;

    dcp_error_clear(&err);
    say(world, 'l', dcp_claim_settle(&claim, &err));
}

/* True when a file of the image is not there. */
static bool
read_files(struct world *world, unsigned actor, const struct dcp_buf *image)
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
            /* A header of another save is as good as no file; while nobody deletes it never happens:
             * numbers are not used again. */
            missing = true;
            if (!world->client_began) {
                broke(world, "a reader met foreign bytes", (char)image->data[4]);
            }
        }
    }
    dcp_buf_clean_up(&data);
    return missing;
}

static void
act_reader(struct world *world, unsigned actor)
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
                broke(world, "a reader found no checkpoint", before);
            }
            break;
        }
        if (before == (char)image.data[4]) {
            if (!world->client_began) {
                broke(world, "a reader misses a file of the present checkpoint", before);
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

static void
act_client(struct world *world, unsigned actor)
{
    const struct dcp_io *io = &world->processes[actor]->io;
    struct dcp_buf names = {0};

    if (io->list(io->ctx, world->dirfds[actor], note_for_client, &names) == 0) {
        world->client_began = !world->abandoned;
        for (size_t at = 0; at < names.len; at += strlen((char *)names.data + at) + 1) {
            (void)io->unlink_at(io->ctx, world->dirfds[actor], (char *)names.data + at);
        }
        (void)io_memory_rmdir(world->processes[actor], dir_path);
    }
    dcp_buf_clean_up(&names);
}

/* Empties the directory and, unless the sweeper (actor 0) has begun by then, saves to it: numbers begin
 * again below the sweeper's.  Were the directory emptied and saved to between the sweeper's last look
 * and its unlink, the new file would go: names are all that unlink knows (sweep.c). */
static void
act_restarter(struct world *world, unsigned actor)
{
    const struct dcp_io *io = &world->processes[actor]->io;
    struct dcp_buf names = {0};

    if (io->list(io->ctx, world->dirfds[actor], note_for_client, &names) == 0) {
        world->client_began = !world->abandoned;
        for (size_t at = 0; at < names.len; at += strlen((char *)names.data + at) + 1) {
            (void)io->unlink_at(io->ctx, world->dirfds[actor], (char *)names.data + at);
        }
    }
    dcp_buf_clean_up(&names);
    if (world->processes[0]->history != 0) {
        return;
    }
    world->client_began = false;
    world->current[0] = 0;
    world->starts_anew = true;
    memset(world->saves, 0, sizeof world->saves);
    act_saver(world, actor, -1, true);
}

/* ---- what explore.c calls ---- */

static void
put_save(struct world *world, char letter, uint64_t n0, const char *metadata_name)
{
    struct dcp_save_id id = id_of(letter);
    uint8_t image[256];
    char name[64];

    for (unsigned k = 0; k < world->files; k++) {
        dcp_data_file_name(name, sizeof name, 0, n0 + k);
        io_memory_put_file(world->fs, dir_path, name, &id, sizeof id);
    }
    if (metadata_name != NULL) {
        io_memory_put_file(world->fs, dir_path, metadata_name, image,
                           fake_metadata(image, &id, n0, world->files));
    }
}

static bool
has_role(const struct world *world, enum role role)
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
    struct world *world = ctx;
    struct io_memory_process *first;

    world->fs = io_memory_new(1);
    memset(world->saves, 0, sizeof world->saves);
    memset(world->claims_opened, 0, sizeof world->claims_opened);
    world->current[0] = 'o';
    world->current[1] = 0;
    world->checked_version = 0;
    world->client_began = world->starts_anew = world->abandoned = world->broken = false;
    io_memory_faults(world->fs)->stale_lists = world->stale;
    io_memory_faults(world->fs)->torn_lists = world->torn;
    first = io_memory_process(world->fs, 0);
    (void)first->io.mkdirs(first->io.ctx, dir_path);
    put_save(world, 'x', 0, NULL);
    put_save(world, 'o', world->files, ".metadata");
    world->saves['o'].committed = true;
    world->saves['o'].n0 = world->files;
    if (has_role(world, LATE_PUBLISHER) || has_role(world, LATE_SETTLER)) {
        struct dcp_save_id id = id_of('l');
        char name[DCP_CLAIM_NAME_BYTES];
        dcp_claim_name_put(name, -1, late_n0(world), &id);
        io_memory_put_file(world->fs, dir_path, name, "claim", 5);
        put_save(world, 'l', late_n0(world), NULL);
    }
    for (unsigned i = 0; i < world->actors_count; i++) {
        struct io_memory_process *process = io_memory_process(world->fs, i);
        world->processes[i] = process;
        world->dirfds[i] = process->io.open_dir(process->io.ctx, dir_path);
        process->listed_version[0] = io_memory_process(world->fs, IO_MEMORY_PROCESSES - 1)
                                         ->listed_version[0];
        process->history = 0;
        process->hook_ctx = world;
        process->before = before_call;
        process->choose = choose_result;
    }
    io_memory_faults(world->fs)->lost_replies = world->lost;
}

static void
world_act(void *ctx, unsigned actor)
{
    struct world *world = ctx;
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
        claim = old_claim(world, actor, 'l', late_n0(world));
        conclude(world, &claim, 'l', world->files, true);
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

static uint64_t
world_state(void *ctx)
{
    struct world *world = ctx;
    uint64_t hash = io_memory_state_hash(world->fs), facts = (uint64_t)world->client_began << 1 | world->starts_anew;

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
check_loadable(struct world *world, const uint8_t *image, size_t len)
{
    const char *name;
    size_t at = 20;

    while ((name = fake_next(image, len, &at)) != NULL) {
        size_t data_len = 0;
        const uint8_t *data;
        data = io_memory_file(world->fs, dir_path, name, &data_len);
        if (data == NULL && !world->client_began) {
            broke(world, "the present checkpoint lost a file", (char)image[4]);
        } else if (data != NULL && (data_len != 16 || memcmp(data, image + 4, 16) != 0)) {
            broke(world, "the present checkpoint is mixed or not whole", (char)image[4]);
        }
    }
}

static void
check_commit(struct world *world, char letter, uint64_t n0)
{
    struct save_fact *save = &world->saves[(unsigned)letter];

    if (save->committed) {
        broke(world, "a replaced save came back", letter);
    }
    for (int other = 'A'; other < 128; other++) {
        if (!world->client_began && world->saves[other].committed &&
            world->saves[other].n0 == n0) {
            broke(world, "two saves of one number were committed", letter);
        }
    }
    save->committed = true;
    save->n0 = n0;
}

/* What was said of a save, against what is. */
static void
check_said(struct world *world, char letter)
{
    const struct save_fact *save = &world->saves[(unsigned)letter];

    for (unsigned k = 0; k < world->actors_count; k++) {
        if (save->said[k] == DCP_OUTCOME_ABORTED && save->committed && !world->client_began) {
            broke(world, "a save that was called aborted is committed", letter);
        }
        if (save->said[k] == DCP_OUTCOME_SUPERSEDED &&
            (world->current[0] == letter || world->current[1] == letter)) {
            broke(world, "a save that was called superseded is the checkpoint", letter);
        }
        if (save->said[k] == DCP_OUTCOME_COMMITTED && !save->committed) {
            broke(world, "a save that was called committed is not", letter);
        }
    }
}

static void
check_target(struct world *world, int target)
{
    size_t len = 0;
    const uint8_t *image = io_memory_file(world->fs, dir_path, targets[target], &len);
    char before = world->current[target], letter = 0;
    bool may_be_absent = world->client_began || (before == 0 && (world->starts_anew || target > 0));

    if (image == NULL) {
        if (!may_be_absent) {
            broke(world, "there is no checkpoint any more", before);
        }
    } else if (len < 21 || memcmp(image, "FAKE", 4) != 0) {
        broke(world, "the target is not metadata", before);
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
    struct world *world = ctx;

    if (world->checked_version == io_memory_version(world->fs)) {
        return !world->broken;
    }
    world->checked_version = io_memory_version(world->fs);
    check_target(world, 0);
    check_target(world, 1);
    for (unsigned i = 0; i < world->actors_count; i++) {
        check_said(world, (char)('A' + i));
    }
    check_said(world, 'l');
    return !world->broken;
}

static void
world_abandon(void *ctx)
{
    struct world *world = ctx;

    world->abandoned = true;
    io_memory_faults(world->fs)->crash_at = 0;
}

/* The next save, alone: it must commit, and then be alone. */
static void
check_next_save(struct world *world)
{
    struct io_memory_process *process = io_memory_process(world->fs, NEXT_PROCESS);
    struct dcp_save_id id = id_of('z');
    int dirfd = process->io.open_dir(process->io.ctx, dir_path);
    struct dcp_claim claim;
    struct dcp_error err;

    dcp_error_clear(&err);
    io_memory_faults(world->fs)->lost_replies = 0;
    io_memory_faults(world->fs)->stale_lists = false;
    if (dcp_claim_take(&process->io, dirfd, dir_path, -1, &id, NULL, true, &claim, &err) != 0) {
        broke(world, err.message, 'z');
        return;
    }
    conclude(world, &claim, 'z', write_files(world, &claim, 'z'), true);
    if (!world_check(world) || world->current[0] != 'z') {
        broke(world, "the next save did not commit", 'z');
    }
    if (io_memory_names_count(world->fs, dir_path) !=
        (world->current[1] == 0 ? 1 : 2) * (1 + world->files)) {
        for (size_t i = 0; i < io_memory_names_count(world->fs, dir_path); i++) {
            fprintf(stderr, "  %s\n", io_memory_name(world->fs, dir_path, i));
        }
        broke(world, "the next save left more than itself", 'z');
    }
    process->io.close(process->io.ctx, dirfd);
}

static bool
world_finish(void *ctx, bool complete)
{
    struct world *world = ctx;

    if (complete && io_memory_open_files(world->fs) != world->actors_count) {
        broke(world, "descriptors were left open", 0);
    }
    if (complete && !io_memory_dir_removed(world->fs, dir_path)) {
        check_next_save(world);
    }
    io_memory_free(world->fs);
    world->fs = NULL;
    return !world->broken;
}

/* ---- scenarios ---- */

static void
explore_world(struct world *world, int preemptions)
{
    struct explore explore = {
        .ctx = world,
        .actors_count = world->actors_count,
        .preemptions = preemptions,
        .start = world_start,
        .act = world_act,
        .state = world_state,
        .check = world_check,
        .abandon = world_abandon,
        .finish = world_finish,
    };
    struct timespec from, to;

    clock_gettime(CLOCK_MONOTONIC, &from);
    explore_run(&explore);
    clock_gettime(CLOCK_MONOTONIC, &to);
    CHECK(!explore.failed);
    CHECK(explore.complete_runs > 0);
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
}

/* One line of a table: the actors, how they are disturbed, and the bound. */
struct scenario {
    enum role roles[EXPLORE_ACTORS];
    unsigned actors_count, files;
    bool stale;
    int torn;
    unsigned lost;
    int preemptions;
};

#define ACTORS(...) {__VA_ARGS__}, sizeof((enum role[]){__VA_ARGS__}) / sizeof(enum role)

static void
explore_all(const struct scenario *scenarios, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        const struct scenario *scenario = &scenarios[i];
        struct world world = {.actors_count = scenario->actors_count,
                              .files = scenario->files,
                              .stale = scenario->stale,
                              .torn = scenario->torn,
                              .lost = scenario->lost};
        memcpy(world.roles, scenario->roles, sizeof world.roles);
        explore_world(&world, scenario->preemptions);
    }
}

#define EXPLORE_ALL(scenarios) explore_all(scenarios, sizeof(scenarios) / sizeof((scenarios)[0]))

static void
no_pair_breaks_it_in_any_interleaving(void)
{
    const int all = EXPLORE_UNBOUNDED;
    const struct scenario pairs[] = {
        {ACTORS(COMMITTER, COMMITTER), 1, false, 0, 0, all},
        {ACTORS(COMMITTER, COMMITTER), 2, false, 0, 0, 3},
        {ACTORS(COMMITTER, QUITTER), 1, false, 0, 0, all},
        {ACTORS(COMMITTER, LATE_PUBLISHER), 1, false, 0, 0, all},
        {ACTORS(COMMITTER, LATE_PUBLISHER), 2, false, 0, 0, all},
        {ACTORS(COMMITTER, LATE_SETTLER), 2, false, 0, 0, all},
        {ACTORS(COMMITTER, SWEEPER), 2, false, 0, 0, all},
        {ACTORS(COMMITTER, READER), 2, false, 0, 0, all},
        {ACTORS(COMMITTER, CLIENT), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, LATE_SETTLER), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, SWEEPER), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, READER), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, CLIENT), 2, false, 0, 0, all},
        {ACTORS(SWEEPER, READER), 2, false, 0, 0, all},
        {ACTORS(SWEEPER, CLIENT), 2, false, 0, 0, all},
        {ACTORS(SWEEPER, RESTARTER), 2, false, 0, 0, all},
        {ACTORS(RANK_COMMITTER, SWEEPER), 1, false, 0, 0, all},
        {ACTORS(RANK_COMMITTER, COMMITTER), 1, false, 0, 0, 4},
        {ACTORS(RANK_COMMITTER, RANK_COMMITTER), 1, false, 0, 0, 4},
    };
    EXPLORE_ALL(pairs);
}

static void
no_triple_breaks_it(void)
{
    const int all = EXPLORE_UNBOUNDED;
    const struct scenario triples[] = {
        {ACTORS(LATE_PUBLISHER, LATE_SETTLER, LATE_SETTLER), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, LATE_SETTLER, READER), 2, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, SWEEPER, READER), 1, false, 0, 0, all},
        {ACTORS(LATE_PUBLISHER, SWEEPER, CLIENT), 1, false, 0, 0, 4},
        {ACTORS(COMMITTER, LATE_PUBLISHER, LATE_SETTLER), 1, false, 0, 0, 5},
        {ACTORS(COMMITTER, LATE_PUBLISHER, READER), 1, false, 0, 0, 5},
        {ACTORS(COMMITTER, LATE_PUBLISHER, SWEEPER), 1, false, 0, 0, 3},
        {ACTORS(COMMITTER, LATE_PUBLISHER, CLIENT), 1, false, 0, 0, 3},
        {ACTORS(COMMITTER, QUITTER, LATE_PUBLISHER), 1, false, 0, 0, 3},
        {ACTORS(COMMITTER, COMMITTER, LATE_PUBLISHER), 1, false, 0, 0, 2},
        {ACTORS(COMMITTER, COMMITTER, READER), 1, false, 0, 0, 3},
        {ACTORS(COMMITTER, COMMITTER, SWEEPER), 1, false, 0, 0, 2},
        {ACTORS(COMMITTER, COMMITTER, CLIENT), 1, false, 0, 0, 2},
        {ACTORS(RANK_COMMITTER, COMMITTER, COMMITTER), 1, false, 0, 0, 2},
        {ACTORS(RANK_COMMITTER, RANK_COMMITTER, COMMITTER), 1, false, 0, 0, 2},
    };
    EXPLORE_ALL(triples);
}

static void
stale_and_torn_listings_do_not_break_it(void)
{
    const struct scenario scenarios[] = {
        {ACTORS(COMMITTER, COMMITTER), 1, true, 0, 0, 3},
        {ACTORS(COMMITTER, COMMITTER), 1, false, 1, 0, 3},
        {ACTORS(COMMITTER, COMMITTER), 1, false, 2, 0, 3},
        {ACTORS(COMMITTER, COMMITTER), 1, true, 2, 0, 2},
        {ACTORS(COMMITTER, SWEEPER), 1, true, 1, 0, 4},
        {ACTORS(COMMITTER, QUITTER, LATE_PUBLISHER), 1, true, 0, 0, 2},
        {ACTORS(COMMITTER, QUITTER, LATE_PUBLISHER), 1, false, 1, 0, 2},
        {ACTORS(COMMITTER, QUITTER, LATE_PUBLISHER), 1, false, 2, 0, 2},
        {ACTORS(COMMITTER, COMMITTER, LATE_PUBLISHER), 1, true, 0, 0, 2},
        {ACTORS(RANK_COMMITTER, COMMITTER), 1, true, 0, 0, 3},
        {ACTORS(RANK_COMMITTER, COMMITTER), 1, false, 1, 0, 4},
        {ACTORS(RANK_COMMITTER, COMMITTER), 1, false, 2, 0, 4},
        {ACTORS(SWEEPER, RESTARTER), 1, true, 1, 0, EXPLORE_UNBOUNDED},
    };
    EXPLORE_ALL(scenarios);
}

static void
lost_replies_do_not_break_it(void)
{
    const struct scenario scenarios[] = {
        {ACTORS(LATE_PUBLISHER, LATE_SETTLER, LATE_SETTLER), 1, false, 0, 2, EXPLORE_UNBOUNDED},
        {ACTORS(COMMITTER, LATE_PUBLISHER), 1, false, 0, 2, 3},
        {ACTORS(COMMITTER, COMMITTER), 1, false, 0, 1, 3},
        {ACTORS(COMMITTER, QUITTER), 1, false, 0, 2, 2},
        {ACTORS(COMMITTER, SWEEPER), 1, false, 0, 2, 3},
        {ACTORS(COMMITTER, CLIENT), 1, false, 0, 2, 2},
        {ACTORS(COMMITTER, LATE_PUBLISHER, LATE_SETTLER), 1, false, 0, 1, 3},
        {ACTORS(COMMITTER, QUITTER, LATE_PUBLISHER), 1, true, 0, 1, 1},
        {ACTORS(RANK_COMMITTER, COMMITTER), 1, false, 0, 1, 2},
    };
    EXPLORE_ALL(scenarios);
}

static void
all_together_do_not_break_it(void)
{
    const struct scenario scenarios[] = {
        {ACTORS(COMMITTER, COMMITTER, LATE_PUBLISHER, SWEEPER, READER, CLIENT), 1, false, 0, 0, 1},
        {ACTORS(COMMITTER, COMMITTER, LATE_PUBLISHER, SWEEPER, READER), 1, true, 0, 0, 1},
    };
    EXPLORE_ALL(scenarios);
}

CTEST_MAIN(RUN(no_pair_breaks_it_in_any_interleaving); RUN(no_triple_breaks_it);
           RUN(stale_and_torn_listings_do_not_break_it); RUN(lost_replies_do_not_break_it);
           RUN(all_together_do_not_break_it);)
