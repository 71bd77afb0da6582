/*
 * writer_world.c: worlds in shared arenas, and writer processes, for tests.
 */
#include "writer_world.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static void
need(bool good, const char *what)
{
    if (!good) {
        fprintf(stderr, "writer_world: %s: %s\n", what, strerror(errno));
        exit(1);
    }
}

void
writer_world_make(struct writer_world *w, const struct world_options *options, const char *parent)
{
    const struct dcp_io *io = dcp_io_posix();
    struct dcp_engine_options engine = {0};
    struct dcp_error err = {0};

    memset(w, 0, sizeof *w);
    snprintf(w->dir, sizeof w->dir, "%s/dcp-writer-XXXXXX", parent != NULL ? parent : "/tmp");
    need(mkdtemp(w->dir) != NULL, "mkdtemp");
    w->dirfd = io->open_dir(io->ctx, w->dir);
    need(w->dirfd >= 0, "open_dir");
    world_make(&w->world, options);
    need(dcp_image_place(&w->world.layout, w->world.plan.rank, w->world.n0, &w->image, &err) == 0,
         "dcp_image_place");
    w->arena = (struct dcp_arena){.bytes = w->image.bytes + 4096,
                                  .fd = memfd_create("arena", MFD_CLOEXEC),
                                  .kind = DCP_ARENA_SHARED,
                                  .pid = getpid()};
    need(w->arena.fd >= 0 && ftruncate(w->arena.fd, (off_t)w->arena.bytes) == 0, "memfd");
    w->arena.memory =
        mmap(NULL, w->arena.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, w->arena.fd, 0);
    need(w->arena.memory != MAP_FAILED, "mmap");
    need(dcp_image_fill(&w->image, w->arena.memory, &w->world.plan, &w->world.layout,
                        w->world.sources, &w->world.save_id, w->world.n0, &engine, NULL, &err) == 0,
         "dcp_image_fill");
}

void
writer_world_clean_up(struct writer_world *w)
{
    const struct dcp_io *io = dcp_io_posix();

    munmap(w->arena.memory, w->arena.bytes);
    io->close(io->ctx, w->arena.fd);
    io->close(io->ctx, w->dirfd);
    need(rmdir(w->dir) == 0, "rmdir");
    dcp_image_clean_up(&w->image);
    world_clean_up(&w->world);
}

const char *
writer_executable(void)
{
    static char path[PATH_MAX];
    ssize_t len = readlink("/proc/self/exe", path, sizeof path - 1);

    need(len > 0, "readlink");
    path[len] = '\0';
    char *name = strrchr(path, '/') + 1;
    snprintf(name, (size_t)(path + sizeof path - name), "dcp_writer");
    return path;
}

struct dcp_writer_process *
writer_start(void)
{
    struct dcp_writer_process *process = NULL;
    struct dcp_error err = {0};

    if (dcp_writer_process_start(writer_executable(), &process, &err) != 0) {
        fprintf(stderr, "writer_world: %s\n", err.message);
        exit(1);
    }
    return process;
}

int
writer_write(struct dcp_writer_process *process, const struct writer_world *w,
             const struct dcp_engine_options *options, struct dcp_write_stats *ret_stats,
             struct dcp_error *err)
{
    return dcp_writer_process_write(process, w->dirfd, w->dir, &w->world.save_id, &w->image,
                                    &w->arena, options, ret_stats, err);
}

bool
writer_writes(struct dcp_writer_process *process, const struct writer_world *w,
              const struct dcp_engine_options *options)
{
    struct dcp_error err = {0};

    if (writer_write(process, w, options, NULL, &err) != 0) {
        printf("writing by the process: %s\n", err.message);
        return false;
    }
    return world_check_files(dcp_io_posix(), w->dirfd, &w->world);
}

uint32_t
writer_world_sweep(const struct writer_world *w)
{
    const struct dcp_io *io = dcp_io_posix();
    uint32_t count = 0;

    for (uint32_t i = 0; i < w->world.layout.files_count; i++) {
        char name[64];
        world_file_name(&w->world, i, name, sizeof name);
        count += io->unlink_at(io->ctx, w->dirfd, name) == 0;
    }
    return count;
}

uint32_t
writer_descriptors(int64_t pid)
{
    char path[64];
    uint32_t count = 0;

    snprintf(path, sizeof path, "/proc/%lld/fd", (long long)pid);
    DIR *dir = opendir(path);
    need(dir != NULL, path);
    for (const struct dirent *entry = readdir(dir); entry != NULL; entry = readdir(dir)) {
        count += entry->d_name[0] != '.';
    }
    closedir(dir);
    return count - (pid == (int64_t)getpid()); /* the walk's own */
}

bool
writer_await(int64_t pid, int *ret_status)
{
    for (int ms = 0; ms < 60000; ms++) {
        pid_t rc = waitpid((pid_t)pid, ret_status, WNOHANG);
        if (rc == (pid_t)pid) {
            return true;
        }
        dcp_io_posix()->sleep_ns(NULL, 1000000);
    }
    return false;
}
