/*
 * shm_faults.c: the table of shm_faults.h.
 */
#include "shm_faults.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* True: the call fails. */
static bool
strikes(struct shm_faults *faults, bool can_fail)
{
    if (!can_fail && faults->fault != SHM_CANCELS && faults->fault != SHM_KILLS) {
        return false;
    }
    uint32_t call = atomic_fetch_add(&faults->calls, 1) + 1;
    if (faults->nth == 0 || call < faults->nth) {
        return false;
    }
    atomic_store(&faults->hit, true);
    if (faults->fault == SHM_CANCELS) {
        atomic_store(faults->cancel, 1);
    } else if (faults->fault == SHM_KILLS) {
        kill(getpid(), SIGKILL);
    }
    return faults->fault == SHM_FAILS && call == faults->nth;
}

static const struct dcp_shm *
inner(void)
{
    return dcp_shm_posix();
}

static int
faulty_host(void *ctx, struct dcp_shm_host *ret)
{
    return strikes(ctx, true) ? -ENOSPC : inner()->host(NULL, ret);
}

static int
faulty_create(void *ctx, const char *name)
{
    return strikes(ctx, true) ? -ENOSPC : inner()->create(NULL, name);
}

static int
faulty_open(void *ctx, const char *name)
{
    return strikes(ctx, true) ? -ENOSPC : inner()->open(NULL, name);
}

static int
faulty_resize(void *ctx, int fd, uint64_t len)
{
    return strikes(ctx, true) ? -ENOSPC : inner()->resize(NULL, fd, len);
}

static int
faulty_allocate(void *ctx, int fd, uint64_t offset, uint64_t len)
{
    struct shm_faults *faults = ctx;
    bool fails = strikes(ctx, true) || (faults->fault == SHM_FULL && atomic_load(&faults->hit));
    return fails ? -ENOSPC : inner()->allocate(NULL, fd, offset, len);
}

static int
faulty_map(void *ctx, int fd, uint64_t len, void **ret_memory)
{
    return strikes(ctx, true) ? -ENOSPC : inner()->map(NULL, fd, len, ret_memory);
}

static void
faulty_unmap(void *ctx, void *memory, uint64_t len)
{
    (void)strikes(ctx, false);
    inner()->unmap(NULL, memory, len);
}

static void
faulty_close(void *ctx, int fd)
{
    (void)strikes(ctx, false);
    inner()->close(NULL, fd);
}

static int
faulty_unlink(void *ctx, const char *name)
{
    (void)strikes(ctx, false);
    return inner()->unlink(NULL, name);
}

static int
faulty_list(void *ctx, dcp_list_fn fn, void *fn_ctx)
{
    return strikes(ctx, true) ? -ENOSPC : inner()->list(NULL, fn, fn_ctx);
}

static bool
faulty_alive(void *ctx, int64_t pid)
{
    struct shm_faults *faults = ctx;
    (void)strikes(ctx, false);
    return !(faults->fault == SHM_SEES_DEATH && atomic_load(&faults->hit)) &&
           inner()->alive(NULL, pid);
}

static void
faulty_wait(void *ctx, const void *word, uint32_t seen, uint64_t timeout_ns)
{
    (void)strikes(ctx, false);
    inner()->wait(NULL, word, seen, timeout_ns);
}

static void
faulty_wake(void *ctx, const void *word)
{
    (void)strikes(ctx, false);
    inner()->wake(NULL, word);
}

void
shm_faults_init(struct shm_faults *faults, enum shm_fault fault, uint32_t nth)
{
    memset(faults, 0, sizeof *faults);
    faults->fault = fault;
    faults->nth = nth;
    faults->shm = (struct dcp_shm){.ctx = faults,
                                   .host = faulty_host,
                                   .create = faulty_create,
                                   .open = faulty_open,
                                   .resize = faulty_resize,
                                   .allocate = faulty_allocate,
                                   .map = faulty_map,
                                   .unmap = faulty_unmap,
                                   .close = faulty_close,
                                   .unlink = faulty_unlink,
                                   .list = faulty_list,
                                   .alive = faulty_alive,
                                   .wait = faulty_wait,
                                   .wake = faulty_wake};
}

struct counting {
    int64_t pid;
    uint32_t count;
};

/* dcp_native-<load id>-<host id>-<process id>-<rank> */
static int
count_name(void *ctx, const char *name)
{
    struct counting *counting = ctx;
    const char *pid = strlen(name) > 11 + 66 ? name + 11 + 66 : "";
    counting->count +=
        strncmp(name, "dcp_native-", 11) == 0 && strtoll(pid, NULL, 10) == counting->pid;
    return 0;
}

uint32_t
shm_names_of(int64_t pid)
{
    struct counting counting = {pid, 0};
    int rc = dcp_shm_posix()->list(NULL, count_name, &counting);
    return rc == 0 ? counting.count : UINT32_MAX;
}
