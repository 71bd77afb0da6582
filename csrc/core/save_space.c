/*
 * save_space.c: whether a save fits where it goes, found out before its first byte.
 *
 * The old checkpoint stays until the new one is complete, so both must fit side by side.  A rank
 * knows its own bytes only, and ranks that each fit may not fit together; the coordinator knows
 * everybody's.  But the sum means something only for ranks that write to the same file system, and
 * a path is no proof of that: with a disk per node all use the same path.  The claim is one: its
 * name holds 64 random bits of this save, so a rank that sees it is in the coordinator's directory.
 * Each rank looks for it when plans are gathered and tells what it saw.
 *   - Gathering: the coordinator refuses a sum, over the ranks that see its claim, that is more
 * than is free.  Nobody has written anything then.
 *   - An installed plan: before it votes, the coordinator compares the sum of that plan with what
 * is free now; where that does not fit it asks for a new round, in which the case above decides.
 *   - A rank that does not see the claim (a disk of its own, or a newer save took the directory
 * over) compares its own bytes only, when it begins to write; so does everybody who saves alone.
 *   - An incremental save may write a small part of its plan: its ranks compare what they are about
 * to write.
 * Where the file system does not tell (quotas never do), the writes will.
 *
 * Threads: dcp_transfer.h.
 */
#include "save.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>

#include "claim_scan.h"

static uint64_t
free_bytes(struct dcp_save *save)
{
    struct dcp_space space;

    if (!save->asked_space) {
        save->asked_space = true;
        save->free_bytes = save->io->space(save->io->ctx, save->dirfd, &space) == 0
                               ? space.free_bytes
                               : UINT64_MAX;
    }
    return save->free_bytes;
}

static int
refuse(const struct dcp_save *save, uint64_t need_bytes, uint32_t ranks, struct dcp_error *err)
{
    char who[64] = "this rank";

    if (ranks > 1) {
        snprintf(who, sizeof who, "this save (%" PRIu32 " ranks)", ranks);
    }
    return dcp_error_set(err, DCP_E_IO, ENOSPC, save->dir_path,
                         "not enough space in %s: %s writes %" PRIu64 " bytes, %" PRIu64
                         " are free; %sfree some space there or save elsewhere",
                         save->dir_path, who, need_bytes, save->free_bytes,
                         save->exists ? "the previous checkpoint is kept until the new one is "
                                        "complete, both must fit: "
                                      : "");
}

bool
dcp_save_sees_claim(const struct dcp_save *save)
{
    char name[DCP_CLAIM_NAME_BYTES];

    if (save->info.is_coordinator) {
        return true;
    }
    if (save->dirfd < 0) {
        return false;
    }
    dcp_claim_name_put(name, -1, save->info.n0, &save->info.save_id);
    return dcp_io_exists(save->io, save->dirfd, name);
}

bool
dcp_save_fits_again(struct dcp_save *save)
{
    return save->base_path != NULL || save->group->installed->shared_bytes <= free_bytes(save);
}

int
dcp_save_check_sum(struct dcp_save *save, struct dcp_installed_plan *next, struct dcp_error *err)
{
    uint32_t ranks = 0;

    next->shared_bytes = 0;
    for (uint32_t i = 0; i < next->plans_count; i++) {
        if (next->sees_claim[i]) {
            ranks++;
            if (dcp_add_overflows_u64(next->shared_bytes, next->global.layouts[i].total_bytes,
                                      &next->shared_bytes)) {
                return dcp_error_set(err, DCP_E_LIMIT, 0, save->dir_path,
                                     "the save has over 2^64 bytes");
            }
        }
    }
    return save->info.incremental || next->shared_bytes <= free_bytes(save)
               ? 0
               : refuse(save, next->shared_bytes, ranks, err);
}

int
dcp_save_check_own(struct dcp_save *save, struct dcp_error *err)
{
    uint64_t need_bytes = dcp_save_layout(save)->total_bytes;

    return need_bytes <= free_bytes(save) ? 0 : refuse(save, need_bytes, 1, err);
}
