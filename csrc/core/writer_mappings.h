/*
 * writer_mappings.h: private to csrc/writer: the arenas that a writer process keeps mapped.
 */
#ifndef WRITER_MAPPINGS_H
#define WRITER_MAPPINGS_H

#include "dcp_limits.h"
#include "process_posix.h"

/* Zero-initialised is none.  A trainer has no more arenas than that. */
struct dcp_writer_mappings {
    struct dcp_writer_mapping {
        struct dcp_process_memory memory;
        uint64_t turn; /* of its last use; 0: of none */
        bool prepared; /* mapped ahead, and not used yet */
    } kept[DCP_MAX_ARENAS];
    uint64_t turns;
};

/* The first `len` bytes of an arena; the mapping is kept. */
int dcp_mappings_use(struct dcp_writer_mappings *mappings, int fd, uint64_t len,
                     const uint8_t **ret_bytes) DCP_MUST_CHECK;
/* Maps them for a later use, which then faults nowhere. */
int dcp_mappings_prepare(struct dcp_writer_mappings *mappings, int fd, uint64_t len,
                         const atomic_int *cancel) DCP_MUST_CHECK;
/* Lets go what has served no save for too long. */
void dcp_mappings_expire(struct dcp_writer_mappings *mappings, uint64_t idle_ns);
void dcp_mappings_clean_up(struct dcp_writer_mappings *mappings);

#endif
