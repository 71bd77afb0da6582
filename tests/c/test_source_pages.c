/*
 * test_source_pages.c: pages of a mapped file come when they are needed, go when they were saved,
 * and a file that does not have them any more is an error instead of a signal.
 */
#include "ctest.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "source_pages.h"

enum { FILE_BYTES = 3 << 20, RAW_MADV_POPULATE_READ = 22 };

struct mapped {
    int fd;
    uint8_t *bytes;
    struct dcp_engine_options options;
};

static uint8_t
byte_at(uint64_t i)
{
    return (uint8_t)(i * 2654435761u >> 11);
}

static void
map_file(struct mapped *m)
{
    char path[256];
    const char *base = getenv("TMPDIR");
    snprintf(path, sizeof path, "%s/dcp_pages_XXXXXX", base != NULL ? base : "/tmp");
    m->fd = mkstemp(path);
    CHECK(m->fd >= 0);
    unlink(path);
    uint8_t *bytes = malloc(FILE_BYTES);
    for (uint64_t i = 0; i < FILE_BYTES; i++) {
        bytes[i] = byte_at(i);
    }
    CHECK_EQ(pwrite(m->fd, bytes, FILE_BYTES, 0), FILE_BYTES);
    free(bytes);
    m->bytes = mmap(NULL, FILE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE, m->fd, 0);
    CHECK(m->bytes != MAP_FAILED);
    m->options =
        (struct dcp_engine_options){.mapped_from = m->bytes, .mapped_to = m->bytes + FILE_BYTES};
}

static void
unmap_file(struct mapped *m)
{
    munmap(m->bytes, FILE_BYTES);
    close(m->fd);
}

/* Pages of the range that this process has. */
static uint64_t
resident(const uint8_t *from, uint64_t pages)
{
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), count = 0;
    for (uint64_t i = 0; i < pages; i++) {
        uint64_t entry = 0;
        CHECK_EQ(pread(fd, &entry, sizeof entry, (off_t)(((uintptr_t)from / page + i) * 8)), 8);
        count += entry >> 63;
    }
    close(fd);
    return count;
}

static void
pages_come_when_they_are_needed_and_go_when_they_are_done(void)
{
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    static const uint64_t ranges[][2] = {{0, FILE_BYTES},     {5, 1},    {4095, 2}, {100, 1 << 20},
                                         {FILE_BYTES - 3, 3}, {77777, 0}};
    for (size_t r = 0; r < sizeof ranges / sizeof ranges[0]; r++) {
        struct dcp_error err = {0};
        struct mapped m;
        map_file(&m);
        uint64_t from = ranges[r][0], len = ranges[r][1], wrong = 0;
        CHECK(source_is_mapped(&m.options, m.bytes + from, len));
        CHECK_OK(source_pages_need(&m.options, m.bytes + from, len, &err), &err);
        uint64_t first = from / page, pages = (from + len + page - 1) / page - first;
        CHECK_EQ(resident(m.bytes + first * page, pages), pages);
        for (uint64_t i = from; i < from + len; i++) {
            wrong += m.bytes[i] != byte_at(i);
        }
        CHECK_EQ(wrong, 0);
        source_pages_done(m.bytes + from, len);
        /* All but the last, which has more. */
        uint64_t gone = (from + len) / page - first;
        CHECK_EQ(resident(m.bytes + first * page, gone), 0);
        for (uint64_t i = 0; i < FILE_BYTES; i++) {
            wrong += m.bytes[i] != byte_at(i);
        }
        CHECK_EQ(wrong, 0);
        unmap_file(&m);
    }
}

/* It belongs to what is saved next, too. */
static void
a_page_that_is_done_in_part_stays(void)
{
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    struct mapped m;
    map_file(&m);
    m.bytes[3 * page + 10] = (uint8_t)(byte_at(3 * page + 10) + 1); /* a copy of its own */
    source_pages_done(m.bytes + 50, 3 * page);
    CHECK_EQ(m.bytes[3 * page + 10], (uint8_t)(byte_at(3 * page + 10) + 1));
    unmap_file(&m);
}

static void
memory_outside_of_the_file_is_nobodys_page(void)
{
    struct mapped m;
    map_file(&m);
    CHECK(!source_is_mapped(&m.options, m.bytes - 1, 2));
    CHECK(!source_is_mapped(&m.options, m.bytes + FILE_BYTES, 0));
    CHECK(!source_is_mapped(&m.options, m.bytes + FILE_BYTES - 1, 2));
    CHECK(!source_is_mapped(&m.options, m.bytes, UINT64_MAX));
    CHECK(source_is_mapped(&m.options, m.bytes + FILE_BYTES - 1, 1));
    unmap_file(&m);
}

static void
a_file_that_was_cut_short_is_an_error(void)
{
    struct dcp_error err = {0};
    struct mapped m;
    map_file(&m);
    bool can_ask = madvise(m.bytes, 1, RAW_MADV_POPULATE_READ) == 0;
    CHECK_EQ(ftruncate(m.fd, 1 << 20), 0);
    CHECK_OK(source_pages_need(&m.options, m.bytes, 1 << 20, &err), &err);
    if (can_ask) { /* older kernels give no answer */
        CHECK_EQ(source_pages_need(&m.options, m.bytes + (1 << 20), 1, &err), DCP_E_IO);
        CHECK(err.sys_errno == EIO && strstr(err.message, "cut short") != NULL);
        dcp_error_clear(&err);
        CHECK_EQ(source_pages_need(&m.options, m.bytes + 9, FILE_BYTES - 9, &err), DCP_E_IO);
    }
    unmap_file(&m);
}

CTEST_MAIN(RUN(pages_come_when_they_are_needed_and_go_when_they_are_done);
           RUN(a_page_that_is_done_in_part_stays); RUN(memory_outside_of_the_file_is_nobodys_page);
           RUN(a_file_that_was_cut_short_is_an_error);)
