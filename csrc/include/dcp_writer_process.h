/*
 * dcp_writer_process.h: a process beside the trainer that writes images out of shared arenas.
 *
 * The executable is ours (csrc/writer), core only: it starts in milliseconds, inherits one socket
 * and nothing else, gets per save one message with the descriptors of the arena and the directory,
 * and ends when the socket does.
 *
 * Thread rule: one save at a time per process; the handle is used by one thread at a time, except
 * dcp_writer_process_pid.
 */
#ifndef DCP_WRITER_PROCESS_H
#define DCP_WRITER_PROCESS_H

#include "dcp_arena.h"
#include "dcp_image.h"

#ifdef __cplusplus
extern "C" {
#endif

struct dcp_writer_process;

/* Starts it; returns when it answered. */
int dcp_writer_process_start(const char *executable, struct dcp_writer_process **ret_process,
                             struct dcp_error *err) DCP_MUST_CHECK;
/* Ends it (closes the socket, waits, kills at last) and frees the handle.  In a forked child only
 * frees. */
void dcp_writer_process_stop(struct dcp_writer_process *process);
/* False once it has died or does not speak our protocol: stop it and start another. */
bool dcp_writer_process_usable(struct dcp_writer_process *process);
int64_t dcp_writer_process_pid(const struct dcp_writer_process *process);

/* Has the process map what was touched of an arena (SHARED), so that its first write costs what
 * later ones do.  Kept until a write has used it, 10 minutes at most.  DCP_E_IO: the process is
 * lost, or had no room; DCP_E_CANCELLED. */
int dcp_writer_process_prepare(struct dcp_writer_process *process, const struct dcp_arena *arena,
                               atomic_int *cancel, struct dcp_error *err) DCP_MUST_CHECK;

/* As dcp_image_write, by the process.  `arena` is SHARED and holds the image from its beginning.
 * Its death is DCP_E_IO with a text that says so; options->created_files then counts all files of
 * the image, for it cannot tell. */
int dcp_writer_process_write(struct dcp_writer_process *process, int dirfd, const char *dir_path,
                             const struct dcp_save_id *save_id, const struct dcp_image *image,
                             const struct dcp_arena *arena,
                             const struct dcp_engine_options *options,
                             struct dcp_write_stats *ret_stats,
                             struct dcp_error *err) DCP_MUST_CHECK;

/* ---- saves that outlive their trainer (docs/architecture.md, "A save without its trainer") ----
 */

struct dcp_writer_survival {
    int32_t claim_rank;       /* of the save's claim: -1 for the global one */
    uint64_t n0;              /* of the save's claim */
    struct dcp_span metadata; /* of who commits: the image to publish; empty on other ranks */
};

/* As dcp_writer_process_write (which `survival` NULL is), but every file's header comes last, when
 * the rest is durable; and if this trainer ends before dcp_writer_process_settled, the process
 * finishes the write and, where it has the metadata, commits the save once all files that the
 * metadata names are there. */
int dcp_writer_process_write_surviving(struct dcp_writer_process *process, int dirfd,
                                       const char *dir_path, const struct dcp_save_id *save_id,
                                       const struct dcp_image *image, const struct dcp_arena *arena,
                                       const struct dcp_engine_options *options,
                                       const struct dcp_writer_survival *survival,
                                       struct dcp_write_stats *ret_stats,
                                       struct dcp_error *err) DCP_MUST_CHECK;
/* The save is committed or given up: nothing of it is left to do.  Stopping the process says so
 * too. */
void dcp_writer_process_settled(struct dcp_writer_process *process);

/* Waits while a process without a trainer still works on a save of this directory: 0 when none does
 * (any more).  DCP_E_TIMEOUT: one still does; a claim fences it.  DCP_E_CANCELLED. */
int dcp_writer_orphan_wait(int dirfd, const char *dir_path, uint64_t timeout_ns, atomic_int *cancel,
                           struct dcp_error *err) DCP_MUST_CHECK;

#ifdef __cplusplus
}
#endif
#endif
