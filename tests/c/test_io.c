/*
 * test_io.c: the real table on a real directory, and the whole-buffer helpers under faults.
 */
#include "ctest.h"
#include "io_memory.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PATH_BYTES = 400, PAGE = 4096, MIB = 1 << 20 };

/* ---- a directory of its own for each case ---- */

struct place {
    const struct dcp_io *io;
    char path[PATH_BYTES];
    int dirfd;
};

static int
unlink_name(void *ctx, const char *name)
{
    const struct place *place = ctx;
    return place->io->unlink_at(NULL, place->dirfd, name);
}

static void
place_make(struct place *place)
{
    const char *tmp = getenv("TMPDIR");

    place->io = dcp_io_posix();
    snprintf(place->path, sizeof place->path, "%s/dcp_test_io.XXXXXX",
             tmp == NULL ? P_tmpdir : tmp);
    if (mkdtemp(place->path) == NULL) {
        perror(place->path);
        exit(1);
    }
    place->dirfd = place->io->open_dir(NULL, place->path);
    CHECK(place->dirfd >= 0);
}

static void
place_remove(struct place *place)
{
    CHECK_EQ(place->io->list(NULL, place->dirfd, unlink_name, place), 0);
    CHECK_EQ(rmdir(place->path), 0);
    CHECK_EQ(place->io->close(NULL, place->dirfd), 0);
}

static int
make_file(const struct place *place, const char *name, size_t len)
{
    int fd = place->io->open_at(NULL, place->dirfd, name, O_RDWR | O_CREAT | O_EXCL, 0600);
    uint8_t *block = aligned_alloc(PAGE, len == 0 ? PAGE : (len + PAGE - 1) / PAGE * PAGE);

    CHECK(fd >= 0 && block != NULL);
    memset(block, 0x5A, len);
    CHECK_EQ(place->io->pwrite(NULL, fd, block, len, 0), (ssize_t)len);
    free(block);
    return fd;
}

static int
count_name(void *ctx, const char *name)
{
    (void)name;
    return ++*(int *)ctx == 3 ? 7 : 0;
}

static int
count_all(void *ctx, const char *name)
{
    CHECK(strcmp(name, ".") != 0 && strcmp(name, "..") != 0);
    ++*(int *)ctx;
    return 0;
}

/* ---- the real table ---- */

static void
mkdirs_makes_every_part_and_is_content_with_what_is_there(void)
{
    static const char *const tails[] = {"/a/b/c", "/a/b", "/a"};
    struct place place;
    char deep[2 * PATH_BYTES], part[2 * PATH_BYTES];
    struct stat st;
    int fd;

    place_make(&place);
    snprintf(deep, sizeof deep, "%s/a//b/c/", place.path);
    CHECK_EQ(place.io->mkdirs(NULL, deep), 0);
    CHECK_EQ(place.io->mkdirs(NULL, deep), 0);
    CHECK(stat(deep, &st) == 0 && S_ISDIR(st.st_mode));
    fd = make_file(&place, "file", 0);
    snprintf(part, sizeof part, "%s/file", place.path);
    CHECK_EQ(place.io->mkdirs(NULL, part), -ENOTDIR);
    snprintf(part, sizeof part, "%s/file/below", place.path);
    CHECK_EQ(place.io->mkdirs(NULL, part), -ENOTDIR);
    CHECK_EQ(place.io->mkdirs(NULL, ""), -ENOENT);
    CHECK_EQ(place.io->close(NULL, fd), 0);
    for (size_t i = 0; i < sizeof tails / sizeof tails[0]; i++) {
        snprintf(part, sizeof part, "%s%s", place.path, tails[i]);
        CHECK_EQ(rmdir(part), 0);
    }
    place_remove(&place);
}

static void
failures_are_negated_errno(void)
{
    struct place place;
    struct dcp_stat st;
    char byte = 0;
    int fd, read_only;

    place_make(&place);
    CHECK_EQ(place.io->open_dir(NULL, "/nonexistent/directory"), -ENOENT);
    CHECK_EQ(place.io->open_at(NULL, place.dirfd, "absent", O_RDONLY, 0), -ENOENT);
    fd = make_file(&place, "file", 10);
    CHECK_EQ(place.io->open_at(NULL, place.dirfd, "file", O_WRONLY | O_CREAT | O_EXCL, 0600),
             -EEXIST);
    read_only = place.io->open_at(NULL, place.dirfd, "file", O_RDONLY, 0);
    CHECK_EQ(place.io->pwrite(NULL, read_only, &byte, 1, 0), -EBADF);
    CHECK_EQ(place.io->truncate(NULL, read_only, 0), -EINVAL);
    CHECK_EQ(place.io->pread(NULL, fd, &byte, 1, UINT64_MAX), -EINVAL);
    CHECK_EQ(place.io->pwrite(NULL, fd, &byte, 1, (uint64_t)INT64_MAX), -EFBIG);
    CHECK_EQ(place.io->truncate(NULL, fd, UINT64_MAX), -EFBIG);
    CHECK_EQ(place.io->fallocate(NULL, fd, UINT64_MAX, 2), -EFBIG);
    CHECK_EQ(place.io->unlink_at(NULL, place.dirfd, "absent"), -ENOENT);
    CHECK_EQ(place.io->rename_at(NULL, place.dirfd, "absent", "file"), -ENOENT);
    CHECK_EQ(place.io->link_at(NULL, place.dirfd, "file", place.dirfd, "file"), -EEXIST);
    CHECK_EQ(place.io->close(NULL, read_only), 0);
    CHECK_EQ(place.io->close(NULL, fd), 0);
    CHECK_EQ(place.io->close(NULL, fd), -EBADF);
    CHECK_EQ(place.io->fstat(NULL, fd, &st), -EBADF);
    place_remove(&place);
}

static void
every_descriptor_is_closed_by_exec(void)
{
    struct place place;
    int fds[3];

    place_make(&place);
    fds[0] = place.io->open_dir(NULL, place.path);
    fds[1] = place.io->dup_dir(NULL, place.dirfd);
    fds[2] = make_file(&place, "file", 1);
    for (int i = 0; i < 3; i++) {
        CHECK((fcntl(fds[i], F_GETFD) & FD_CLOEXEC) != 0);
        CHECK_EQ(place.io->close(NULL, fds[i]), 0);
    }
    place_remove(&place);
}

static void
bytes_come_back_and_sizes_are_told(void)
{
    struct place place;
    struct dcp_stat st;
    char bytes[8] = "";
    int fd;

    place_make(&place);
    fd = make_file(&place, "file", 100);
    CHECK_EQ(place.io->pwrite(NULL, fd, "abc", 3, 98), 3);
    CHECK_EQ(place.io->pread(NULL, fd, bytes, sizeof bytes, 97), 4);
    CHECK_EQ(memcmp(bytes, "Zabc", 4), 0);
    CHECK_EQ(place.io->pread(NULL, fd, bytes, sizeof bytes, 101), 0);
    CHECK_EQ(place.io->fallocate(NULL, fd, 0, MIB), 0);
    CHECK_EQ(place.io->fstat(NULL, fd, &st), 0);
    CHECK_EQ(st.size_bytes, 101);
    CHECK(!st.is_dir && st.links == 1 && st.mtime_ns > 0);
    CHECK_EQ(place.io->truncate(NULL, fd, 5), 0);
    CHECK_EQ(place.io->fdatasync(NULL, fd), 0);
    CHECK_EQ(place.io->fsync(NULL, fd), 0);
    CHECK_EQ(place.io->fsync(NULL, place.dirfd), 0);
    CHECK_EQ(place.io->unlink_at(NULL, place.dirfd, "file"), 0);
    CHECK_EQ(place.io->fstat(NULL, fd, &st), 0);
    CHECK_EQ(st.size_bytes, 5);
    CHECK_EQ(st.links, 0);
    CHECK_EQ(place.io->close(NULL, fd), 0);
    place_remove(&place);
}

static void
names_are_listed_from_the_start_every_time(void)
{
    struct place place;
    char name[16];
    int dup, count = 0;

    place_make(&place);
    for (int i = 0; i < 40; i++) {
        snprintf(name, sizeof name, "f%d", i);
        CHECK_EQ(place.io->close(NULL, make_file(&place, name, 0)), 0);
    }
    dup = place.io->dup_dir(NULL, place.dirfd);
    CHECK_EQ(place.io->list(NULL, place.dirfd, count_all, &count), 0);
    CHECK_EQ(count, 40);
    CHECK_EQ(place.io->list(NULL, dup, count_all, &count), 0);
    CHECK_EQ(count, 80);
    count = 0;
    CHECK_EQ(place.io->list(NULL, dup, count_name, &count), 7);
    CHECK_EQ(count, 3);
    CHECK_EQ(place.io->close(NULL, dup), 0);
    place_remove(&place);
}

static void
a_removed_directory_is_recognised_by_its_descriptor(void)
{
    struct place place;
    struct dcp_stat st;
    int count = 0;

    place_make(&place);
    CHECK_EQ(rmdir(place.path), 0);
    CHECK_EQ(place.io->fstat(NULL, place.dirfd, &st), 0);
    CHECK(st.is_dir && st.links == 0);
    CHECK_EQ(place.io->open_at(NULL, place.dirfd, "new", O_WRONLY | O_CREAT | O_EXCL, 0600),
             -ENOENT);
    CHECK_EQ(place.io->unlink_at(NULL, place.dirfd, "new"), -ENOENT);
    CHECK(place.io->list(NULL, place.dirfd, count_all, &count) <= 0);
    CHECK_EQ(count, 0);
    CHECK_EQ(place.io->close(NULL, place.dirfd), 0);
}

static void
a_rename_replaces_and_a_link_does_not(void)
{
    struct place place;
    struct dcp_stat st;
    int a, b;

    place_make(&place);
    a = make_file(&place, "a", 1);
    b = make_file(&place, "b", 2);
    CHECK_EQ(place.io->rename_at(NULL, place.dirfd, "a", "b"), 0);
    CHECK_EQ(place.io->fstat(NULL, b, &st), 0);
    CHECK_EQ(st.links, 0);
    CHECK_EQ(place.io->link_at(NULL, place.dirfd, "b", place.dirfd, "c"), 0);
    CHECK_EQ(place.io->fstat(NULL, a, &st), 0);
    CHECK_EQ(st.links, 2);
    CHECK_EQ(place.io->close(NULL, a), 0);
    CHECK_EQ(place.io->close(NULL, b), 0);
    place_remove(&place);
}

/* Where the file system has no reflinks (TMPDIR says which one is tried), nothing is left behind. */
static void
a_clone_has_the_bytes_and_is_a_file_of_its_own(void)
{
    uint8_t was, is, other = 0xAB;
    struct place place;
    struct dcp_stat st;
    int a, c, rc;

    place_make(&place);
    a = make_file(&place, "a", 3 * PAGE + 7);
    CHECK_EQ(place.io->clone_at(NULL, place.dirfd, "absent", place.dirfd, "c"), -ENOENT);
    CHECK_EQ(place.io->open_at(NULL, place.dirfd, "c", O_RDONLY, 0), -ENOENT);
    CHECK_EQ(place.io->clone_at(NULL, place.dirfd, "a", place.dirfd, "a"), -EEXIST);
    rc = place.io->clone_at(NULL, place.dirfd, "a", place.dirfd, "c");
    CHECK(rc == 0 || rc == -EOPNOTSUPP);
    c = place.io->open_at(NULL, place.dirfd, "c", O_RDWR, 0);
    CHECK_EQ(c >= 0, rc == 0);
    if (rc == 0) {
        CHECK_EQ(place.io->fstat(NULL, c, &st), 0);
        CHECK(st.size_bytes == 3 * PAGE + 7 && st.links == 1);
        CHECK_EQ(place.io->pread(NULL, a, &was, 1, PAGE), 1);
        CHECK_EQ(place.io->pread(NULL, c, &is, 1, PAGE), 1);
        CHECK_EQ(is, was);
        CHECK_EQ(place.io->pwrite(NULL, c, &other, 1, PAGE), 1);
        CHECK_EQ(place.io->pread(NULL, a, &is, 1, PAGE), 1);
        CHECK_EQ(is, was);
        CHECK_EQ(place.io->close(NULL, c), 0);
    } else {
        printf("     (no reflinks in %s)\n", place.path);
    }
    CHECK_EQ(place.io->close(NULL, a), 0);
    place_remove(&place);
}

static void
a_mode_is_that_of_the_file_and_not_of_the_name(void)
{
    struct place place;
    struct stat st;
    int a;

    place_make(&place);
    a = make_file(&place, "a", 1);
    CHECK_EQ(place.io->link_at(NULL, place.dirfd, "a", place.dirfd, "b"), 0);
    CHECK_EQ(place.io->chmod(NULL, a, 0444), 0);
    CHECK_EQ(fstatat(place.dirfd, "b", &st, 0), 0);
    CHECK_EQ(st.st_mode & 07777, 0444);
    CHECK_EQ(place.io->close(NULL, a), 0);
    place_remove(&place);
}

static bool
is_power_of_two(uint32_t n)
{
    return n != 0 && (n & (n - 1)) == 0;
}

/* Whatever alignment is told must work; asking must leave the file as it was. */
static void
direct_writes_work_at_the_alignment_that_is_told(void)
{
    struct place place;
    struct dcp_dio_align align;
    uint8_t *block = aligned_alloc(PAGE, 4 * PAGE);
    int fd, flags;

    place_make(&place);
    fd = make_file(&place, "file", 100);
    flags = fcntl(fd, F_GETFL);
    CHECK_EQ(place.io->dio_align(NULL, fd, &align), 0);
    CHECK_EQ(fcntl(fd, F_GETFL), flags);
    if (align.mem_bytes == 0) {
        CHECK_EQ(align.offset_bytes, 0);
        printf("    no direct I/O here\n");
    } else {
        CHECK(is_power_of_two(align.mem_bytes) && is_power_of_two(align.offset_bytes));
        CHECK(align.mem_bytes <= PAGE && align.offset_bytes <= PAGE);
        memset(block, 1, 4 * PAGE);
        CHECK_EQ(place.io->set_direct(NULL, fd, true), 0);
        CHECK((fcntl(fd, F_GETFL) & O_DIRECT) != 0);
        CHECK_EQ(place.io->pwrite(NULL, fd, block + align.mem_bytes, align.offset_bytes,
                                  align.offset_bytes),
                 (ssize_t)align.offset_bytes);
        CHECK_EQ(place.io->dio_align(NULL, fd, &align), 0);
        CHECK((fcntl(fd, F_GETFL) & O_DIRECT) != 0);
        CHECK_EQ(place.io->set_direct(NULL, fd, false), 0);
        CHECK_EQ(fcntl(fd, F_GETFL), flags);
        CHECK_EQ(place.io->pwrite(NULL, fd, block, 1, 1), 1);
    }
    CHECK_EQ(place.io->close(NULL, fd), 0);
    free(block);
    place_remove(&place);
}

static void
files_in_memory_are_told_from_files_on_disk(void)
{
    const struct dcp_io *io = dcp_io_posix();
    struct dcp_dio_align align = {0};
    int fd = memfd_create("test_io", MFD_CLOEXEC);

    CHECK(fd >= 0);
    CHECK_EQ(io->dio_align(NULL, fd, &align), 0);
    CHECK(align.in_memory);
    CHECK_EQ(io->close(NULL, fd), 0);
    CHECK_EQ(io->dio_align(NULL, fd, &align), -EBADF);
}

static void
cached_counts_pages_that_are_resident(void)
{
    const struct dcp_io *io = dcp_io_posix();
    int fd = memfd_create("test_io", MFD_CLOEXEC), percent;
    uint8_t page[PAGE] = {1};

    CHECK_EQ(io->truncate(NULL, fd, 100 * PAGE), 0);
    for (uint64_t i = 0; i < 25; i++) {
        CHECK_EQ(io->pwrite(NULL, fd, page, sizeof page, i * PAGE), PAGE);
    }
    percent = io->cached(NULL, fd, 0, 100 * PAGE);
    if (percent == -ENOSYS) {
        printf("    this kernel does not tell\n");
    } else {
        CHECK_EQ(percent, 25);
        CHECK_EQ(io->cached(NULL, fd, 0, 25 * PAGE), 100);
        CHECK_EQ(io->cached(NULL, fd, 1, 2), 100);
        CHECK_EQ(io->cached(NULL, fd, 50 * PAGE, UINT32_MAX), 0);
        CHECK_EQ(io->cached(NULL, fd, 200 * PAGE, PAGE), 0);
    }
    CHECK_EQ(io->cached(NULL, fd, UINT64_MAX, 1), -EINVAL);
    CHECK_EQ(io->close(NULL, fd), 0);
}

static void
flushed_ranges_leave_the_page_cache_and_keep_their_bytes(void)
{
    struct place place;
    struct dcp_space space = {0};
    uint8_t byte = 0;
    int fd;

    place_make(&place);
    fd = make_file(&place, "file", 2 * MIB);
    CHECK_EQ(place.io->flush_range(NULL, fd, 0, MIB, false), 0);
    CHECK_EQ(place.io->flush_range(NULL, fd, 0, 2 * MIB, true), 0);
    CHECK_EQ(place.io->flush_range(NULL, fd, UINT64_MAX, 1, true), -EINVAL);
    CHECK_EQ(place.io->pread(NULL, fd, &byte, 1, MIB), 1);
    CHECK_EQ(byte, 0x5A);
    CHECK_EQ(place.io->space(NULL, place.dirfd, &space), 0);
    CHECK(space.free_bytes > 0);
    CHECK_EQ(place.io->close(NULL, fd), 0);
    place_remove(&place);
}

/* ---- whole buffers, under faults ---- */

struct bench {
    struct io_memory *fs;
    const struct dcp_io *io;
    int dirfd, fd;
};

static void
bench_make(struct bench *bench, uint64_t seed)
{
    bench->fs = io_memory_new(seed);
    bench->io = &io_memory_process(bench->fs, 0)->io;
    CHECK_EQ(bench->io->mkdirs(bench->io->ctx, "d"), 0);
    bench->dirfd = bench->io->open_dir(bench->io->ctx, "d");
    bench->fd = bench->io->open_at(bench->io->ctx, bench->dirfd, "f", O_RDWR | O_CREAT, 0600);
    CHECK(bench->fd >= 0);
}

static void
fill(uint8_t *data, size_t len, uint64_t seed)
{
    for (size_t i = 0; i < len; i++) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        data[i] = (uint8_t)(seed >> 56);
    }
}

static void
whole_buffers_get_through_interruptions_and_short_calls(void)
{
    enum { LEN = 5000 };
    uint8_t *out = malloc(LEN), *in = malloc(LEN);
    struct dcp_error err;

    for (uint64_t seed = 1; seed <= 50; seed++) {
        struct bench bench;
        struct dcp_buf buf = {0};
        dcp_error_clear(&err);
        bench_make(&bench, seed);
        io_memory_faults(bench.fs)->short_percent = 80;
        io_memory_faults(bench.fs)->eintr_percent = 40;
        fill(out, LEN, seed);
        memset(in, 0, LEN);
        CHECK_OK(dcp_io_write_all(bench.io, bench.fd, out, LEN, 77, "f", &err), &err);
        CHECK_OK(dcp_io_read_all(bench.io, bench.fd, in, LEN, 77, "f", &err), &err);
        CHECK_EQ(memcmp(in, out, LEN), 0);
        dcp_buf_put(&buf, "kept", 4);
        CHECK_OK(dcp_io_read_file(bench.io, bench.dirfd, "f", LEN + 77, &buf, &err), &err);
        CHECK_EQ(buf.len, 4 + 77 + LEN);
        CHECK_EQ(memcmp(buf.data, "kept", 4), 0);
        CHECK_EQ(memcmp(buf.data + 4 + 77, out, LEN), 0);
        CHECK_EQ(io_memory_open_files(bench.fs), 2);
        dcp_buf_clean_up(&buf);
        io_memory_free(bench.fs);
    }
    free(out);
    free(in);
}

static void
a_full_disk_is_told_with_file_and_place(void)
{
    uint8_t data[3000] = {0};
    struct bench bench;
    struct dcp_error err;

    dcp_error_clear(&err);
    bench_make(&bench, 1);
    io_memory_faults(bench.fs)->space_bytes = 1234;
    CHECK_EQ(dcp_io_write_all(bench.io, bench.fd, data, sizeof data, 0, "f", &err), DCP_E_IO);
    CHECK_EQ(err.sys_errno, ENOSPC);
    CHECK_EQ(err.offset_bytes, 1234);
    CHECK_EQ(strcmp(err.path, "f"), 0);
    CHECK(strstr(err.message, "free some space") != NULL);
    io_memory_free(bench.fs);
}

static void
a_file_that_ends_early_is_damage_not_success(void)
{
    uint8_t data[100] = {0};
    struct bench bench;
    struct dcp_error err;

    dcp_error_clear(&err);
    bench_make(&bench, 1);
    CHECK_OK(dcp_io_write_all(bench.io, bench.fd, data, 60, 0, "f", &err), &err);
    CHECK_OK(dcp_io_read_all(bench.io, bench.fd, data, 0, 1000, "f", &err), &err);
    CHECK_EQ(dcp_io_read_all(bench.io, bench.fd, data, 100, 0, "f", &err), DCP_E_CORRUPT);
    CHECK(strstr(err.message, "ends at byte 60") != NULL);
    io_memory_free(bench.fs);
}

/* A table whose pwrite does nothing and says so, whose files are stale for a while. */
static unsigned stale_left;

static ssize_t
write_nothing(void *ctx, int fd, const void *buf, size_t len, uint64_t offset)
{
    (void)ctx;
    (void)fd;
    (void)buf;
    (void)len;
    (void)offset;
    return 0;
}

static const struct dcp_io *stale_inner;

static ssize_t
read_stale(void *ctx, int fd, void *buf, size_t len, uint64_t offset)
{
    if (stale_left > 0) {
        stale_left--;
        return -ESTALE;
    }
    return stale_inner->pread(ctx, fd, buf, len, offset);
}

static void
a_write_of_nothing_is_an_error_not_a_loop(void)
{
    uint8_t byte = 0;
    struct bench bench;
    struct dcp_io io;
    struct dcp_error err;

    dcp_error_clear(&err);
    bench_make(&bench, 1);
    io = *bench.io;
    io.pwrite = write_nothing;
    CHECK_EQ(dcp_io_write_all(&io, bench.fd, &byte, 1, 0, "f", &err), DCP_E_IO);
    CHECK_EQ(err.sys_errno, EIO);
    io_memory_free(bench.fs);
}

static void
a_file_replaced_while_it_is_read_is_opened_again(void)
{
    struct bench bench;
    struct dcp_io io;
    struct dcp_error err;
    struct dcp_buf buf = {0};

    dcp_error_clear(&err);
    bench_make(&bench, 1);
    CHECK_OK(dcp_io_write_all(bench.io, bench.fd, "data", 4, 0, "f", &err), &err);
    io = *bench.io;
    stale_inner = bench.io;
    io.pread = read_stale;
    stale_left = 2;
    CHECK_OK(dcp_io_read_file(&io, bench.dirfd, "f", 10, &buf, &err), &err);
    CHECK(buf.len == 4 && memcmp(buf.data, "data", 4) == 0);
    stale_left = 1000;
    CHECK_EQ(dcp_io_read_file(&io, bench.dirfd, "f", 10, &buf, &err), DCP_E_IO);
    CHECK_EQ(err.sys_errno, ESTALE);
    CHECK_EQ(buf.len, 4);
    CHECK_EQ(io_memory_open_files(bench.fs), 2);
    dcp_buf_clean_up(&buf);
    io_memory_free(bench.fs);
}

static void
what_read_file_refuses_leaves_the_buffer_as_it_was(void)
{
    struct bench bench;
    struct dcp_error err;
    struct dcp_buf buf = {0};

    bench_make(&bench, 1);
    dcp_buf_put(&buf, "kept", 4);
    dcp_error_clear(&err);
    CHECK_OK(dcp_io_write_all(bench.io, bench.fd, "0123456789", 10, 0, "f", &err), &err);
    CHECK_EQ(dcp_io_read_file(bench.io, bench.dirfd, "absent", 10, &buf, &err), DCP_E_NOENT);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_io_read_file(bench.io, bench.dirfd, "f", 9, &buf, &err), DCP_E_LIMIT);
    dcp_error_clear(&err);
    CHECK_EQ(dcp_io_read_file(bench.io, bench.dirfd, "..", 9, &buf, &err), DCP_E_IO);
    CHECK_EQ(err.sys_errno, EISDIR);
    for (int call = 0; call < IO_CALLS; call++) {
        if (call == IO_OPEN_AT || call == IO_FSTAT || call == IO_PREAD) {
            struct io_memory_faults *faults = io_memory_faults(bench.fs);
            dcp_error_clear(&err);
            faults->fail_call = call;
            faults->fail_nth = 1;
            faults->fail_errno = EIO;
            CHECK_EQ(dcp_io_read_file(bench.io, bench.dirfd, "f", 10, &buf, &err), DCP_E_IO);
            CHECK_EQ(err.sys_errno, EIO);
        }
    }
    CHECK(buf.len == 4 && memcmp(buf.data, "kept", 4) == 0);
    CHECK_EQ(io_memory_open_files(bench.fs), 2);
    dcp_buf_clean_up(&buf);
    io_memory_free(bench.fs);
}

CTEST_MAIN(RUN(mkdirs_makes_every_part_and_is_content_with_what_is_there);
           RUN(failures_are_negated_errno); RUN(every_descriptor_is_closed_by_exec);
           RUN(bytes_come_back_and_sizes_are_told); RUN(names_are_listed_from_the_start_every_time);
           RUN(a_removed_directory_is_recognised_by_its_descriptor);
           RUN(a_rename_replaces_and_a_link_does_not);
           RUN(a_clone_has_the_bytes_and_is_a_file_of_its_own);
           RUN(a_mode_is_that_of_the_file_and_not_of_the_name);
           RUN(direct_writes_work_at_the_alignment_that_is_told);
           RUN(files_in_memory_are_told_from_files_on_disk);
           RUN(cached_counts_pages_that_are_resident);
           RUN(flushed_ranges_leave_the_page_cache_and_keep_their_bytes);
           RUN(whole_buffers_get_through_interruptions_and_short_calls);
           RUN(a_full_disk_is_told_with_file_and_place);
           RUN(a_file_that_ends_early_is_damage_not_success);
           RUN(a_write_of_nothing_is_an_error_not_a_loop);
           RUN(a_file_replaced_while_it_is_read_is_opened_again);
           RUN(what_read_file_refuses_leaves_the_buffer_as_it_was);)
