/*
 * test_writer_mappings.c: a writer process keeps an arena mapped until its next save, one that was
 * mapped ahead until its first, and never more than a trainer has.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ctest.h"
#include "writer_mappings.h"
#include "writer_world.h"

enum { PAGE = 4096, LEN = 64 * PAGE };

static atomic_int no_cancel;

static int
make_arena(uint8_t fill)
{
    int fd = memfd_create("arena", MFD_CLOEXEC);
    uint8_t page[PAGE];

    memset(page, fill, sizeof page);
    for (int i = 0; i < LEN / PAGE; i++) {
        CHECK_EQ(write(fd, page, sizeof page), (ssize_t)sizeof page);
    }
    return fd;
}

/* Where it is kept; -1: nowhere. */
static int
place_of(const struct dcp_writer_mappings *mappings, int fd)
{
    for (int i = 0; i < DCP_MAX_ARENAS; i++) {
        if (dcp_process_is_mapped(&mappings->kept[i].memory, fd)) {
            return i;
        }
    }
    return -1;
}

static void
each_arena_is_mapped_once(void)
{
    struct dcp_writer_mappings mappings = {0};
    const uint8_t *first, *second, *again;
    int one = make_arena(1), other = make_arena(2);

    CHECK_EQ(dcp_mappings_use(&mappings, one, LEN, &first), 0);
    CHECK_EQ(dcp_mappings_use(&mappings, other, LEN, &second), 0);
    CHECK(first[0] == 1 && first[LEN - 1] == 1 && second[0] == 2);
    CHECK_EQ(dcp_mappings_use(&mappings, one, LEN / 2, &again), 0);
    CHECK(again == first);
    CHECK_EQ(ftruncate(one, 2 * LEN), 0);
    CHECK_EQ(dcp_mappings_use(&mappings, one, 2 * LEN, &again), 0);
    CHECK(again[0] == 1 && again[2 * LEN - 1] == 0);
    CHECK_EQ(dcp_mappings_use(&mappings, one, 3 * LEN, &again), -EINVAL);
    CHECK(place_of(&mappings, one) >= 0 && place_of(&mappings, other) >= 0);
    dcp_mappings_clean_up(&mappings);
    CHECK(place_of(&mappings, one) == -1 && place_of(&mappings, other) == -1);
    close(one);
    close(other);
}

static void
the_one_that_rested_longest_makes_room(void)
{
    struct dcp_writer_mappings mappings = {0};
    const uint8_t *bytes;
    int fds[DCP_MAX_ARENAS + 1];

    for (int i = 0; i <= DCP_MAX_ARENAS; i++) {
        fds[i] = make_arena((uint8_t)i);
    }
    for (int i = 0; i < DCP_MAX_ARENAS; i++) {
        CHECK_EQ(dcp_mappings_use(&mappings, fds[i], LEN, &bytes), 0);
    }
    CHECK_EQ(dcp_mappings_use(&mappings, fds[0], LEN, &bytes), 0);
    CHECK_EQ(dcp_mappings_use(&mappings, fds[DCP_MAX_ARENAS], LEN, &bytes), 0);
    CHECK_EQ(bytes[0], DCP_MAX_ARENAS);
    for (int i = 0; i <= DCP_MAX_ARENAS; i++) {
        CHECK((place_of(&mappings, fds[i]) == -1) == (i == 1));
        close(fds[i]);
    }
    dcp_mappings_clean_up(&mappings);
}

static uint32_t
resident_pages(const struct dcp_writer_mapping *mapping)
{
    unsigned char resident[LEN / PAGE];
    uint32_t count = 0;

    CHECK_EQ(mincore(mapping->memory.bytes, LEN, resident), 0);
    for (int i = 0; i < LEN / PAGE; i++) {
        count += resident[i] & 1;
    }
    return count;
}

static void
one_that_was_prepared_is_kept_for_its_first_use(void)
{
    struct dcp_writer_mappings mappings = {0};
    const uint8_t *bytes;
    int ahead = make_arena(1), used = make_arena(2);

    CHECK_EQ(dcp_mappings_prepare(&mappings, ahead, LEN, &no_cancel), 0);
    CHECK_EQ(resident_pages(&mappings.kept[place_of(&mappings, ahead)]), LEN / PAGE);
    CHECK_EQ(dcp_mappings_use(&mappings, used, LEN, &bytes), 0);
    dcp_mappings_expire(&mappings, DCP_WRITER_KEEP_NS);
    CHECK(place_of(&mappings, ahead) >= 0 && place_of(&mappings, used) >= 0);
    dcp_mappings_expire(&mappings, DCP_WRITER_KEEP_PREPARED_NS);
    CHECK(place_of(&mappings, ahead) >= 0 && place_of(&mappings, used) == -1);
    CHECK_EQ(dcp_mappings_use(&mappings, ahead, LEN, &bytes), 0);
    CHECK_EQ(bytes[LEN - 1], 1);
    dcp_mappings_expire(&mappings, DCP_WRITER_KEEP_NS + 1);
    CHECK_EQ(place_of(&mappings, ahead), -1);
    CHECK_EQ(dcp_mappings_prepare(&mappings, ahead, LEN, &no_cancel), 0);
    dcp_mappings_expire(&mappings, DCP_WRITER_KEEP_PREPARED_NS + 1);
    CHECK_EQ(place_of(&mappings, ahead), -1);
    close(ahead);
    close(used);
}

static void
what_is_no_arena_is_refused(void)
{
    struct dcp_writer_mappings mappings = {0};
    const uint8_t *bytes;
    int fd = make_arena(1);

    CHECK_EQ(dcp_mappings_prepare(&mappings, fd, LEN + 1, &no_cancel), -EINVAL);
    CHECK_EQ(dcp_mappings_use(&mappings, fd, 0, &bytes), -EINVAL);
    CHECK_EQ(dcp_mappings_use(&mappings, -1, LEN, &bytes), -EBADF);
    CHECK_EQ(place_of(&mappings, fd), -1);
    close(fd);
}

/* ---- in the process ---- */

static const struct world_options one_large = {
    .seed = 7, .tensors = 1, .thread_count = 1, .large_bytes = 6000000};

/* Bytes of shared memory that a process has in its page tables. */
static uint64_t
mapped_bytes(int64_t pid)
{
    char text[8192], path[64];
    unsigned long long kib = 0;

    snprintf(path, sizeof path, "/proc/%lld/status", (long long)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t len = fd >= 0 ? read(fd, text, sizeof text - 1) : 0;
    text[len > 0 ? len : 0] = '\0';
    const char *at = strstr(text, "RssShmem:");
    CHECK(at != NULL && sscanf(at, "RssShmem: %llu", &kib) == 1);
    close(fd);
    return kib << 10;
}

static void
what_was_prepared_is_mapped_before_the_first_write(void)
{
    struct dcp_writer_process *process = writer_start();
    int64_t pid = dcp_writer_process_pid(process);
    struct dcp_engine_options engine = {0};
    struct writer_world w, other;
    struct dcp_error err = {0};

    writer_world_make(&w, &one_large, NULL);
    writer_world_make(&other, &one_large, NULL);
    CHECK_OK(dcp_writer_process_prepare(process, &w.arena, NULL, &err), &err);
    CHECK_EQ(mapped_bytes(pid), 0); /* nothing was touched */
    w.arena.touched_bytes = w.image.bytes;
    other.arena.touched_bytes = other.image.bytes;
    CHECK_OK(dcp_writer_process_prepare(process, &w.arena, NULL, &err), &err);
    CHECK_OK(dcp_writer_process_prepare(process, &other.arena, NULL, &err), &err);
    CHECK(mapped_bytes(pid) >= w.image.bytes + other.image.bytes);
    CHECK_EQ(writer_descriptors(pid), 4);
    CHECK(dcp_writer_process_usable(process));
    CHECK(writer_writes(process, &w, &engine));
    CHECK(writer_writes(process, &other, &engine));
    writer_world_clean_up(&other);
    writer_world_clean_up(&w);
    dcp_writer_process_stop(process);
}

static void
a_preparation_that_fails_is_told(void)
{
    struct dcp_writer_process *process = writer_start();
    struct writer_world w;
    struct dcp_error err = {0};
    atomic_int cancel = 1;

    writer_world_make(&w, &one_large, NULL);
    w.arena.touched_bytes = w.arena.bytes + 1;
    CHECK_EQ(dcp_writer_process_prepare(process, &w.arena, NULL, &err), DCP_E_INVALID);
    dcp_error_clear(&err);
    w.arena.touched_bytes = w.image.bytes;
    CHECK_EQ(dcp_writer_process_prepare(process, &w.arena, &cancel, &err), DCP_E_CANCELLED);
    CHECK(dcp_writer_process_usable(process));
    dcp_error_clear(&err);
    CHECK_EQ(ftruncate(w.arena.fd, 4096), 0);
    CHECK_EQ(dcp_writer_process_prepare(process, &w.arena, NULL, &err), DCP_E_IO);
    CHECK(dcp_writer_process_usable(process));
    CHECK_EQ(kill((pid_t)dcp_writer_process_pid(process), SIGKILL), 0);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_writer_process_prepare(process, &w.arena, NULL, &err), DCP_E_IO);
    CHECK(strstr(err.message, "signal 9") != NULL);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_writer_process_prepare(process, &w.arena, NULL, &err), DCP_E_INVALID);
    writer_world_clean_up(&w);
    dcp_writer_process_stop(process);
}

CTEST_MAIN(RUN(each_arena_is_mapped_once); RUN(the_one_that_rested_longest_makes_room);
           RUN(one_that_was_prepared_is_kept_for_its_first_use); RUN(what_is_no_arena_is_refused);
           RUN(what_was_prepared_is_mapped_before_the_first_write);
           RUN(a_preparation_that_fails_is_told);)
