/*
 * save_gather.c: every rank's plan to the coordinator, names only where they are news (design
 * section 3, SLOW).
 *
 * Names are two thirds of a plan, mostly the same on all ranks and mostly the same as last time.
 * The vote has told every rank the hash of the coordinator's names and which plan the coordinator
 * has installed, so a rank knows, without a word more, that the coordinator has its names:
 *   - they are the coordinator's own, or
 *   - they are those of the plan that this rank and the coordinator both have installed.
 * Then the rank sends their hash in place of them; else it sends them.  The coordinator looks a
 * hash up among tables whose content it hashed itself (name_table.h) and refuses one it does not
 * find: whatever a rank believes, it cannot end up with another rank's names.
 *
 * All messages are padded to the longest on their way (comm_bytes.c), so the coordinator leaves its
 * own names out too and takes them from its memory.
 *
 * Threads: dcp_transfer.h.
 */
#include "save.h"

#include "name_table.h"

static bool
coordinator_has_names(const struct dcp_save *save)
{
    const struct dcp_installed_plan *installed = save->group->installed;
    if (dcp_hash128_equal(save->names_hash, save->coordinator_names_hash)) {
        return true;
    }
    return installed != NULL && save->coordinator_held_plan != 0 &&
           installed->plan_id.lo == save->coordinator_held_plan &&
           dcp_hash128_equal(save->names_hash, installed->names_hash);
}

/* The plan, then whether this rank sees the coordinator's claim. */
static int
encode(const struct dcp_save *save, struct dcp_buf *message, struct dcp_error *err)
{
    int rc = coordinator_has_names(save)
                 ? dcp_plan_encode_nameless(&save->plan, &save->names_hash, message, err)
                 : dcp_plan_encode(&save->plan, message, err);
    if (rc != 0) {
        return rc;
    }
    dcp_buf_put_u8(message, dcp_save_sees_claim(save) ? 1 : 0);
    return dcp_buf_check(message, err);
}

/* What ranks may leave out: the coordinator's own names and those of the installed plans. */
static int
collect_tables(const struct dcp_save *save, struct dcp_name_tables *tables, struct dcp_error *err)
{
    const struct dcp_installed_plan *installed = save->group->installed;
    const struct dcp_name_table *before = NULL;
    int rc = 0;
    for (uint32_t i = 0; rc == 0 && installed != NULL && i < installed->plans_count; i++) {
        struct dcp_name_table *table = installed->plans[i].table;
        if (table != before) {
            rc = dcp_name_tables_add(tables, table, err);
            before = table;
        }
    }
    return rc != 0 ? rc : dcp_name_tables_add_copy(tables, &save->plan, &save->names_hash, err);
}

static int
decode_all(const struct dcp_span *messages, uint32_t size, struct dcp_name_tables *tables,
           struct dcp_installed_plan *next, struct dcp_error *err)
{
    next->plans = dcp_calloc(size, sizeof *next->plans);
    next->sees_claim = dcp_calloc(size, sizeof *next->sees_claim);
    if (next->plans == NULL || next->sees_claim == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for the plans of %u ranks",
                             size);
    }
    next->plans_count = size;
    for (uint32_t i = 0; i < size; i++) {
        if (messages[i].len == 0) {
            return dcp_error_set(err, DCP_E_PEER, 0, NULL, "rank %u sent no plan", i);
        }
        size_t plan_len = messages[i].len - 1;
        next->sees_claim[i] = messages[i].data[plan_len] != 0;
        int rc = dcp_plan_decode_shared(messages[i].data, plan_len, tables, &next->plans[i], err);
        if (rc != 0) {
            return rc;
        }
        if (next->plans[i].rank != i) {
            return dcp_error_set(err, DCP_E_INTERNAL, 0, NULL, "rank %u sent the plan of rank %u",
                                 i, next->plans[i].rank);
        }
    }
    return 0;
}

/* Coordinator: tables first, then every message. */
static int
take_messages(const struct dcp_save *save, const struct dcp_span *messages,
              struct dcp_installed_plan *next, struct dcp_error *err)
{
    struct dcp_name_tables tables = {0};
    int rc = collect_tables(save, &tables, err);
    if (rc == 0) {
        rc = decode_all(messages, save->group->comm.size, &tables, next, err);
    }
    dcp_name_tables_clean_up(&tables);
    return rc;
}

int
dcp_save_gather_plans(struct dcp_save *save, struct dcp_installed_plan *next,
                      struct dcp_span **ret_spans, struct dcp_error *local, int *ret_local_rc,
                      struct dcp_error *err)
{
    struct dcp_group *group = save->group;
    struct dcp_buf message = {0};
    uint8_t *block = NULL;

    next->names_hash = save->names_hash;
    int local_rc = encode(save, &message, local);
    int rc = dcp_comm_gather_bytes(&group->comm, group->coordinator, message.data,
                                   local_rc == 0 ? message.len : 0, &block, ret_spans, err);
    if (rc != 0) {
        rc = dcp_group_give_up(group, rc, err);
    } else if (local_rc == 0 && group->comm.rank == group->coordinator) {
        local_rc = take_messages(save, *ret_spans, next, local);
    }
    *ret_local_rc = local_rc;
    dcp_buf_clean_up(&message);
    dcp_free(block);
    return rc;
}
