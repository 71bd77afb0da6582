/*
 * load.c: one load: metadata read once and broadcast, planned by every rank for itself, read and
 * verified.
 *
 * No rank decides for itself which checkpoint it sees: the coordinator's image of `.metadata` is
 * everybody's.  Only where that file is absent does a rank look for its own `__{rank}.metadata`, as
 * torch does; a damaged file is an error and never a reason to fall back.
 */
#include "group.h"

#include <errno.h>
#include <string.h>

#include "claim_scan.h"
#include "dcp_trace.h"
#include "group_read.h"
#include "reader.h"
#include "share.h"

/* First byte of the coordinator's message. */
/* How often an absent file is looked for, each time in the directory that the path then names. */
enum { OPEN_TRIES = 3 };

enum image_state {
    IMAGE_ABSENT = 0,
    IMAGE_PRESENT = 1, /* all of `.metadata` follows */
    IMAGE_TAIL = 2,    /* what stands behind its pickle; the coordinator checked the whole */
};

struct dcp_load {
    struct dcp_group *group; /* borrows */
    const struct dcp_io *io;
    char *dir_path; /* owned */
    uint64_t call_hash;
    uint32_t rank;
    bool verify, verify_all;
    enum dcp_direct direct;
    const struct dcp_shm *shm; /* NULL: this rank shares nothing */
    struct dcp_share share;
    int64_t *lanes;      /* owned; NULL: this rank does not ask the group to read together */
    bool by_group;       /* every rank asks for it, and has one image of the metadata */
    bool group_entered;  /* the agreement on what the group reads together */
    atomic_bool reading; /* in dcp_load_read, maybe on a thread that was left there */
    bool elsewhere;      /* of this rank; once opened: of some rank */
    bool planned;        /* the agreement on planning was entered */
    bool echo;           /* reading ended because another rank's did */
    int dirfd;           /* -1 when the directory could not be opened */
    int open_errno;
    bool rank_local;
    struct dcp_buf image;   /* a state byte and what `md` was read from */
    struct dcp_buf message; /* what is sent in its place; empty once sent, or when all is needed */
    bool parsed;            /* `md` is there before the broadcast */
    struct dcp_metadata md;
};

int
dcp_load_new(struct dcp_group *group, const struct dcp_load_params *params,
             struct dcp_load **ret_load, struct dcp_error *err)
{
    struct dcp_load *load = dcp_calloc(1, sizeof *load);
    size_t len = strlen(params->dir_path) + 1;

    if (load != NULL) {
        load->dir_path = dcp_malloc(len);
    }
    if (load == NULL || load->dir_path == NULL) {
        dcp_free(load);
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a load");
    }
    memcpy(load->dir_path, params->dir_path, len);
    load->group = group;
    load->io = params->io;
    load->call_hash = params->call_hash;
    load->rank = params->rank;
    load->verify = params->verify;
    load->verify_all = params->verify_all;
    load->elsewhere = params->elsewhere;
    load->direct = params->direct;
    load->shm = params->read_once == DCP_READ_ONCE_OFF ? NULL : params->shm;
    load->dirfd = load->io->open_dir(load->io->ctx, load->dir_path);
    if (load->dirfd < 0) {
        load->open_errno = -load->dirfd;
        load->dirfd = -1;
    }
    if (params->read_once == DCP_READ_ONCE_GROUP && dcp_group_comm(group)->size > 1) {
        /* Without memory for it nobody reads together. */
        load->lanes = dcp_malloc_array(DCP_GROUP_READ_LANES, sizeof *load->lanes);
    }
    *ret_load = load;
    return 0;
}

void
dcp_load_destroy(struct dcp_load *load)
{
    if (load == NULL) {
        return;
    }
    dcp_share_end(&load->share);
    dcp_free(load->lanes);
    if (load->dirfd >= 0) {
        load->io->close(load->io->ctx, load->dirfd);
    }
    dcp_metadata_clean_up(&load->md);
    dcp_buf_clean_up(&load->image);
    dcp_buf_clean_up(&load->message);
    dcp_free(load->dir_path);
    dcp_free(load);
}

/* What the path leads to now: somebody may have moved a link and be deleting what it named. */
static bool
reopen(struct dcp_load *load)
{
    int fd = load->io->open_dir(load->io->ctx, load->dir_path);

    if (fd < 0) {
        return false;
    }
    load->io->close(load->io->ctx, load->dirfd);
    load->dirfd = fd;
    return true;
}

/* Appends a state byte and the file. Absent (the file or its directory) is not an error. */
static int
read_image(struct dcp_load *load, const char *name, struct dcp_buf *buf, struct dcp_error *err)
{
    int rc;

    dcp_buf_put_u8(buf, IMAGE_PRESENT);
    rc = dcp_buf_check(buf, err);
    if (rc != 0) {
        return rc;
    }
    if (load->dirfd < 0) {
        if (load->open_errno != ENOENT) {
            return dcp_error_set(err, DCP_E_IO, load->open_errno, load->dir_path,
                                 "could not open the checkpoint's directory %s", load->dir_path);
        }
        rc = DCP_E_NOENT;
    } else {
        int tries = 0;
        do {
            dcp_error_clear(err);
            rc = dcp_io_read_file(load->io, load->dirfd, name, DCP_MAX_METADATA_BYTES, buf, err);
        } while (rc == DCP_E_NOENT && ++tries < OPEN_TRIES && reopen(load));
    }
    if (rc == DCP_E_NOENT) {
        dcp_error_clear(err);
        buf->data[0] = IMAGE_ABSENT;
        buf->len = 1;
        rc = 0;
    }
    return rc;
}

static int
absent(const struct dcp_load *load, const char *own_name, struct dcp_error *err)
{
    return dcp_error_set(err, DCP_E_ASSERTION, ENOENT, load->dir_path,
                         "metadata is None; global metadata read failed: [Errno 2] No such file or "
                         "directory: '%s/.metadata'; rank local metadata read failed: [Errno 2] No "
                         "such file or directory: '%s/%s'",
                         load->dir_path, load->dir_path, own_name);
}

/* The reader of an image does not know its file. */
static int
name_damage(const struct dcp_load *load, int rc, struct dcp_error *err)
{
    struct dcp_error what = *err;

    if (rc != 0) {
        dcp_error_clear(err);
        dcp_error_set(err, rc, what.sys_errno, load->dir_path, "%s of %s: %s",
                      load->rank_local ? "the rank's own metadata" : ".metadata", load->dir_path,
                      what.message);
    }
    return rc;
}

/* After the broadcast: everybody has the same state byte and image. */
static int
parse_image(struct dcp_load *load, struct dcp_error *err)
{
    char own_name[DCP_CLAIM_NAME_BYTES];
    int rc;

    if (load->image.len >= 1 && load->image.data[0] == IMAGE_ABSENT) {
        dcp_metadata_name(own_name, (int32_t)load->rank);
        dcp_buf_clear(&load->image);
        rc = read_image(load, own_name, &load->image, err);
        if (rc != 0) {
            return rc;
        }
        if (load->image.data[0] == IMAGE_ABSENT) {
            return absent(load, own_name, err);
        }
        load->rank_local = true;
    }
    if (load->image.len < 1) {
        return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL, "an empty metadata message arrived");
    }
    if (load->parsed) {
        return 0;
    }
    const uint8_t *bytes = load->image.data + 1;
    size_t len = load->image.len - 1;
    rc = load->image.data[0] == IMAGE_TAIL ? dcp_metadata_read_tail(bytes, len, &load->md, err)
                                           : dcp_metadata_read(bytes, len, &load->md, err);
    return name_damage(load, rc, err);
}

/* Coordinator: what the others need of the image.  Our own file is read before it is sent, which
 * takes little and spares them the pickle; any other one is parsed by all ranks at the same time,
 * and so is one that this fails on. */
static int
make_message(struct dcp_load *load, struct dcp_error *err)
{
    struct dcp_save_id id;
    const uint8_t *bytes = load->image.data + 1;
    size_t len = load->image.len - 1;

    if (load->group->comm.size == 1 || load->image.data[0] != IMAGE_PRESENT ||
        !dcp_metadata_peek_save_id(bytes, len, &id)) {
        return 0;
    }
    load->parsed = dcp_metadata_read(bytes, len, &load->md, NULL) == 0;
    if (!load->parsed || load->md.tail_at == 0) {
        return 0;
    }
    dcp_buf_put_u8(&load->message, IMAGE_TAIL);
    dcp_buf_put(&load->message, bytes + load->md.tail_at, len - (size_t)load->md.tail_at);
    return dcp_buf_check(&load->message, err);
}

/* Everybody gets the coordinator's image, or as much of it as says all. */
static int
share_image(struct dcp_load *load, struct dcp_error *err)
{
    struct dcp_group *group = load->group;
    struct dcp_buf *sent = load->message.len > 0 ? &load->message : &load->image;
    int rc = dcp_comm_broadcast_bytes(&group->comm, group->coordinator, sent, err);

    dcp_buf_clean_up(&load->message);
    return rc;
}

/* A load's vote: nothing to reuse, so SLOW means "go on".  What tells a save's id in a save is a
 * random number here, by which the ranks of a host find each other's memory; what says that a rank
 * has a base, that it asks the group to read together, which takes the same call on all. */
static int
vote(struct dcp_load *load, bool ok, enum dcp_verdict *ret_verdict, struct dcp_save_id *ret_load_id,
     struct dcp_error *err)
{
    struct dcp_group *group = load->group;
    struct dcp_vote ballot = {
        .ok = ok,
        .call = load->call_hash ^ (load->verify ? 1 + load->verify_all : 0),
        .is_coordinator = group->comm.rank == group->coordinator,
        .has_base = load->lanes != NULL,
        .elsewhere = load->elsewhere,
    };
    int rc = dcp_group_check(group, err);

    if (rc == 0) {
        if (ballot.is_coordinator &&
            dcp_random_bytes(ballot.save_id.bytes, sizeof ballot.save_id.bytes) != 0) {
            memset(&ballot.save_id, 0, sizeof ballot.save_id);
        }
        uint64_t traced = dcp_trace_begin();
        rc = dcp_vote_run(&group->comm, &ballot, ret_verdict, err);
        dcp_trace_end(traced, "agree", "vote", 0);
        if (rc != 0) {
            group->poisoned = true;
        }
        *ret_load_id = ballot.save_id;
        load->by_group = rc == 0 && ballot.has_base && ballot.call_agrees;
    }
    return rc;
}

/* Before the next agreement, behind which every rank looks for the others of its host. */
static void
begin_sharing(struct dcp_load *load, const struct dcp_save_id *load_id)
{
    static const struct dcp_save_id none;

    if (load->shm == NULL) {
        dcp_share_because(&load->share, "read_once is off");
    } else if (load->group->comm.size < 2) {
        dcp_share_because(&load->share, "there is one rank");
    } else if (load->rank_local || memcmp(load_id, &none, sizeof none) == 0) {
        dcp_share_because(&load->share, "every rank reads metadata of its own");
    } else {
        dcp_share_begin(&load->share, load->shm, load_id, load->group->comm.rank);
    }
}

int
dcp_load_open(struct dcp_load *load, const struct dcp_failure *mine, int *ret_local_code,
              struct dcp_failure_list *ret_failures, struct dcp_error *err)
{
    struct dcp_group *group = load->group;
    enum dcp_verdict verdict = DCP_VERDICT_FAILED;
    struct dcp_save_id load_id = {{0}};
    struct dcp_error local;
    struct dcp_failure reading;
    int rc;

    dcp_error_clear(&local);
    if (group->comm.rank == group->coordinator && mine == NULL && !load->elsewhere &&
        (read_image(load, ".metadata", &load->image, &local) != 0 ||
         make_message(load, &local) != 0)) {
        reading = dcp_failure_from_error(&local, group->comm.rank);
        mine = &reading;
    }
    rc = vote(load, mine == NULL, &verdict, &load_id, err);
    if (rc == 0 && verdict == DCP_VERDICT_FAILED) {
        rc = dcp_failure_exchange(&group->comm, mine, ret_failures, err);
        if (rc == 0) {
            return dcp_error_set(err, DCP_E_PEER, 0, NULL, "%zu rank(s) failed",
                                 ret_failures->count);
        }
    }
    load->elsewhere = rc == 0 && verdict == DCP_VERDICT_ELSEWHERE;
    if (load->elsewhere) {
        *ret_local_code = 0;
        return 0;
    }
    if (rc == 0) {
        rc = share_image(load, err);
    }
    if (rc != 0) {
        return dcp_group_give_up(group, rc, err);
    }
    load->by_group = load->by_group && load->image.len >= 1 && load->image.data[0] != IMAGE_ABSENT;
    *ret_local_code = parse_image(load, err);
    if (*ret_local_code == 0) {
        begin_sharing(load, &load_id);
    }
    return 0;
}

const struct dcp_metadata *
dcp_load_metadata(const struct dcp_load *load)
{
    return &load->md;
}

struct dcp_span
dcp_load_metadata_image(const struct dcp_load *load)
{
    if (load->image.len < 1) {
        return (struct dcp_span){NULL, 0};
    }
    return (struct dcp_span){load->image.data + 1, load->image.len - 1};
}

bool
dcp_load_rank_local(const struct dcp_load *load)
{
    return load->rank_local;
}

bool
dcp_load_is_elsewhere(const struct dcp_load *load)
{
    return load->elsewhere;
}

/* A rank that fails between the agreement on planning and reading: the others read without it, and
 * must not wait for it. */
static int
decline_reading(struct dcp_load *load, struct dcp_error *err)
{
    struct dcp_group_read read = {.comm = &load->group->comm, .lanes = load->lanes};
    int rc = dcp_group_check(load->group, err);

    if (rc == 0 && load->by_group && !load->group_entered) {
        load->group_entered = true;
        rc = dcp_group_read_decline(&read, &load->md, err);
    }
    return rc;
}

int
dcp_load_status(struct dcp_load *load, const struct dcp_failure *mine,
                struct dcp_failure_list *ret_failures, struct dcp_error *err)
{
    struct dcp_save_id any = {{0}};
    struct dcp_failure echo;
    int rc;

    if (atomic_load(&load->reading)) {
        /* Its caller left: the thread ends what it shares.  Of collectives it may be in the middle,
         * so that there is nobody to tell. */
        if (load->by_group) {
            dcp_group_poison(load->group);
        }
    } else if (mine != NULL || load->planned) {
        /* A caller that comes here without having read, or that will not read: the others of its
         * host must not wait for it. */
        dcp_share_end(&load->share);
    }
    if (load->planned) {
        rc = decline_reading(load, err);
        if (rc != 0) {
            return dcp_group_give_up(load->group, rc, err);
        }
    }
    load->planned = true;
    if (mine != NULL && load->echo) {
        echo = *mine;
        echo.kind |= DCP_FAILURE_ECHO;
        mine = &echo;
    }
    rc = dcp_group_settle_failures(load->group, &any, mine, ret_failures, err);
    if (rc != 0 && !atomic_load(&load->reading)) {
        dcp_share_end(&load->share); /* nobody will read; an exception may keep `load` for long */
    }
    return rc;
}

/* First what all ranks of the group want, if they ask for that; then the rest, with those of this
 * host. */
static int
read_together(struct dcp_load *load, const struct dcp_read_plan *plan,
              const struct dcp_engine_options *options, dcp_record_fn on_record,
              void *on_record_ctx, struct dcp_read_stats *ret_stats, struct dcp_error *err)
{
    struct dcp_group_read read = {.comm = &load->group->comm, .lanes = load->lanes};
    struct dcp_read_stats stats = {0};
    struct dcp_read_plan rest = *plan;
    int rc = 0;

    if (load->by_group) {
        load->group_entered = true;
        rc = dcp_group_check(load->group, err);
        if (rc == 0) {
            uint64_t traced = dcp_trace_begin();
            rc = dcp_group_read_run(&read, load->io, load->dirfd, load->dir_path, plan, options,
                                    &stats, err);
            dcp_trace_end(traced, "phase", "read with the group", stats.wanted_bytes);
        }
        if (rc == DCP_E_COMM) {
            rc = dcp_group_give_up(load->group, rc, err);
        }
    }
    if (read.rest != NULL) {
        rest.items = read.rest;
        rest.items_count = read.rest_count;
        rest.wanted_bytes -= dcp_min_u64(rest.wanted_bytes, stats.wanted_bytes);
    }
    if (rc == 0) {
        uint64_t traced = dcp_trace_begin();
        rc = dcp_share_read(&load->share, load->io, load->dirfd, load->dir_path, &rest, options,
                            on_record, on_record_ctx, ret_stats, err);
        dcp_trace_end(traced, "phase", "read", rest.wanted_bytes);
    } else {
        dcp_share_end(&load->share); /* the caller may have left, and nobody else would */
    }
    if (rc == 0) {
        dcp_read_stats_add(ret_stats, &stats);
    }
    dcp_free(read.rest);
    return rc;
}

int
dcp_load_read(struct dcp_load *load, const struct dcp_read_plan *plan, atomic_int *cancel,
              _Atomic uint64_t *progress_bytes, dcp_record_fn on_record, void *on_record_ctx,
              struct dcp_read_stats *ret_stats, struct dcp_error *err)
{
    struct dcp_engine_options options = {
        .direct = load->direct,
        .verify = load->verify,
        .verify_all = load->verify_all,
        .cancel = cancel,
        .progress_bytes = progress_bytes,
    };

    atomic_store(&load->reading, true);
    int rc = read_together(load, plan, &options, on_record, on_record_ctx, ret_stats, err);
    load->echo = rc == DCP_E_PEER;
    atomic_store(&load->reading, false);
    return rc;
}

const char *
dcp_load_share_reason(const struct dcp_load *load)
{
    return load->share.reason;
}
