/*
 * writer_world.h: a world whose image lies in a shared arena, a real directory, and a writer
 * process for tests.  Failures to set it up end the test program.
 */
#ifndef WRITER_WORLD_H
#define WRITER_WORLD_H

#include "dcp_writer_process.h"
#include "engine_world.h"

struct writer_world {
    char dir[64];
    int dirfd;
    struct world world;
    struct dcp_image image;
    struct dcp_arena arena;
};

/* `parent`: where the directory is made; NULL is /tmp. */
void writer_world_make(struct writer_world *w, const struct world_options *options,
                       const char *parent);
void writer_world_clean_up(struct writer_world *w);

/* Where the Makefile has built the executable. */
const char *writer_executable(void);
struct dcp_writer_process *writer_start(void);
int writer_write(struct dcp_writer_process *process, const struct writer_world *w,
                 const struct dcp_engine_options *options, struct dcp_write_stats *ret_stats,
                 struct dcp_error *err);
/* Writes, compares the files with what they must hold and removes them; says what is wrong. */
bool writer_writes(struct dcp_writer_process *process, const struct writer_world *w,
                   const struct dcp_engine_options *options);
/* Removes what a failed save left; how many files there were. */
uint32_t writer_world_sweep(const struct writer_world *w);
/* Descriptors that a process has open. */
uint32_t writer_descriptors(int64_t pid);
/* Waits for a child, or a process that became one (PR_SET_CHILD_SUBREAPER); false when it did not
 * end in a minute. */
bool writer_await(int64_t pid, int *ret_status);

#endif
