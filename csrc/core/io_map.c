/*
 * io_map.c: bytes of the page cache lent to their reader, by mappings that no file can turn into a
 * crash.
 *
 * The kernel copies from the page cache at half the speed of a copy with streaming stores: its
 * stores first read what they overwrite.  Only a mapping lets our own copy do it.  The price of
 * mappings is SIGBUS where a page cannot be had: the file was cut short under the reader, or the
 * device failed on a page that had been dropped.  So pages are brought in first, with an answer
 * (MADV_POPULATE_READ, Linux 5.14), and for the rest a handler is there as long as anything is
 * lent: a fault in lent memory puts zero pages in its place, the reader goes on, and giving the
 * memory back says that it cannot be trusted.  Every other SIGBUS goes to whoever handled it
 * before.
 *
 * Process-wide state: the handler of SIGBUS while memory is lent, put back behind the last; the
 * table of what is lent.  Fork: mappings are not inherited, and a child begins with an empty table.
 * A handler that others put over ours may call it: ours is not put over theirs in turn, and files
 * are read, not mapped, as long as it stays.
 * Threads: any; memory is given back by the thread that borrowed it, whose mask of signals lets
 * SIGBUS through meanwhile (a blocked fault would kill).
 */
#include "io_map.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    MOST_LENT = 64, /* at once in one process; more get -EBUSY and read as usual */
    RAW_MADV_POPULATE_READ = 22,
};

/* `from` is 0 while free, 1 while taken but not filled. */
struct lent {
    _Atomic uintptr_t from, to; /* whole pages */
    atomic_int lost;
    bool was_blocked; /* SIGBUS, in the borrowing thread */
};

static struct lent table[MOST_LENT];

static pthread_mutex_t handler_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned handler_users; /* guarded by handler_lock, and so is the change of `before` */
static struct sigaction before;
static bool covered; /* somebody's handler lies over ours and may call it; guarded likewise */

static uintptr_t
page_bytes(void)
{
    return (uintptr_t)sysconf(_SC_PAGESIZE);
}

/* ---- the handler: async-signal-safe calls only ---- */

/* Zero pages from the faulting one to the end of what was lent. */
static bool
replace_lost(uintptr_t at)
{
    for (int i = 0; i < MOST_LENT; i++) {
        uintptr_t from = atomic_load(&table[i].from), to = atomic_load(&table[i].to);
        /* The entry may have been given to another mapping between the two loads. */
        if (from > 1 && at >= from && at < to && atomic_load(&table[i].from) == from) {
            uintptr_t page = at & ~(page_bytes() - 1);
            void *zeros = mmap((void *)page, to - page, PROT_READ,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            atomic_store(&table[i].lost, 1);
            return zeros != MAP_FAILED;
        }
    }
    return false;
}

static void
on_bus_error(int number, siginfo_t *info, void *context)
{
    int kept_errno = errno;

    /* Above 0: from the kernel, about an address. */
    if (info->si_code > 0 && replace_lost((uintptr_t)info->si_addr)) {
        errno = kept_errno;
        return;
    }
    if ((before.sa_flags & SA_SIGINFO) != 0) {
        before.sa_sigaction(number, info, context);
    } else if (before.sa_handler == SIG_DFL ||
               (before.sa_handler == SIG_IGN && info->si_code > 0)) {
        /* The fault happens again, without us. */
        struct sigaction plain = {.sa_handler = SIG_DFL};
        (void)sigaction(SIGBUS, &plain, NULL);
        if (info->si_code <= 0) {
            (void)raise(SIGBUS);
        }
    } else if (before.sa_handler != SIG_IGN) {
        before.sa_handler(number);
    }
    errno = kept_errno;
}

static bool
is_ours(const struct sigaction *action)
{
    return (action->sa_flags & SA_SIGINFO) != 0 && action->sa_sigaction == on_bus_error;
}

/* A child has none of the memory, nor the threads that borrowed it. */
static void
forget_in_child(void)
{
    struct sigaction now;

    (void)pthread_mutex_init(&handler_lock, NULL);
    handler_users = 0;
    for (int i = 0; i < MOST_LENT; i++) {
        atomic_store(&table[i].from, 0);
    }
    if (sigaction(SIGBUS, NULL, &now) == 0 && is_ours(&now)) {
        (void)sigaction(SIGBUS, &before, NULL);
    }
}

static void
watch_forks(void)
{
    (void)pthread_atfork(NULL, NULL, forget_in_child);
}

static int
handler_take(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct sigaction now,
        ours = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
    int rc = 0;

    (void)pthread_once(&once, watch_forks);
    pthread_mutex_lock(&handler_lock);
    if (sigaction(SIGBUS, NULL, &now) != 0) {
        rc = -errno;
    } else if (is_ours(&now)) {
        covered = false;
    } else if (covered || handler_users > 0) {
        covered = true;
        rc = -EBUSY;
    } else {
        before = now;
        rc = sigaction(SIGBUS, &ours, NULL) != 0 ? -errno : 0;
    }
    handler_users += rc == 0;
    pthread_mutex_unlock(&handler_lock);
    return rc;
}

static void
handler_drop(void)
{
    struct sigaction now;

    pthread_mutex_lock(&handler_lock);
    if (--handler_users == 0 && sigaction(SIGBUS, NULL, &now) == 0) {
        covered = !is_ours(&now);
        if (!covered) {
            (void)sigaction(SIGBUS, &before, NULL);
        }
    }
    pthread_mutex_unlock(&handler_lock);
}

/* ---- lending ---- */

static struct lent *
lent_take(void)
{
    for (int i = 0; i < MOST_LENT; i++) {
        uintptr_t none = 0;
        if (atomic_compare_exchange_strong(&table[i].from, &none, 1)) {
            atomic_store(&table[i].lost, 0);
            return &table[i];
        }
    }
    return NULL;
}

static struct lent *
lent_find(uintptr_t from)
{
    for (int i = 0; i < MOST_LENT; i++) {
        if (atomic_load(&table[i].from) == from) {
            return &table[i];
        }
    }
    return NULL;
}

static int
map_pages(int fd, uint64_t offset, size_t len, void **ret)
{
    void *pages = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, (off_t)offset);
    int rc = 0;

    if (pages == MAP_FAILED) {
        return -errno;
    }
    (void)madvise(pages, len, MADV_DONTFORK);
    while (madvise(pages, len, RAW_MADV_POPULATE_READ) != 0) {
        if (errno == EINVAL) {
            break; /* an older kernel: pages come as they are touched */
        }
        if (errno != EINTR && errno != EAGAIN) {
            rc = errno == EFAULT ? -EIO : -errno;
            (void)munmap(pages, len);
            return rc;
        }
    }
    *ret = pages;
    return 0;
}

static void
let_bus_errors_through(struct lent *lent)
{
    sigset_t bus, old;

    sigemptyset(&bus);
    sigaddset(&bus, SIGBUS);
    lent->was_blocked =
        pthread_sigmask(SIG_UNBLOCK, &bus, &old) == 0 && sigismember(&old, SIGBUS) == 1;
}

int
dcp_map_lend(void *ctx, int fd, uint64_t offset, size_t len, const uint8_t **ret)
{
    size_t lead = (size_t)(offset & (page_bytes() - 1));
    struct lent *lent;
    void *pages = NULL;
    int rc;
    (void)ctx;

    if (len == 0 || offset > INT64_MAX || len > (uint64_t)INT64_MAX - offset) {
        return -EINVAL;
    }
    lent = lent_take();
    if (lent == NULL) {
        return -EBUSY;
    }
    rc = handler_take();
    if (rc == 0) {
        rc = map_pages(fd, offset - lead, len + lead, &pages);
        if (rc != 0) {
            handler_drop();
        }
    }
    if (rc != 0) {
        atomic_store(&lent->from, 0);
        return rc;
    }
    let_bus_errors_through(lent);
    atomic_store(&lent->to, (uintptr_t)pages + dcp_align_up(len + lead, page_bytes()));
    atomic_store(&lent->from, (uintptr_t)pages);
    *ret = (const uint8_t *)pages + lead;
    return 0;
}

int
dcp_map_return(void *ctx, const uint8_t *bytes, size_t len)
{
    uintptr_t from = (uintptr_t)bytes & ~(page_bytes() - 1);
    struct lent *lent = lent_find(from);
    bool lost;
    (void)ctx;

    if (lent == NULL) {
        return -EINVAL;
    }
    lost = atomic_load(&lent->lost) != 0;
    if (lent->was_blocked) {
        sigset_t bus;
        sigemptyset(&bus);
        sigaddset(&bus, SIGBUS);
        (void)pthread_sigmask(SIG_BLOCK, &bus, NULL);
    }
    /* Out of the table first: another thread may be given the same addresses at once. */
    uintptr_t to = (uintptr_t)bytes + len;
    atomic_store(&lent->from, 0);
    (void)munmap((void *)from, to - from);
    handler_drop();
    return lost ? -EIO : 0;
}
