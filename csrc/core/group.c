/*
 * group.c: the state that saves and loads of one process group share.
 *
 * The installed plan lives here and nowhere else: it is valid for this very group object, so a
 * restarted rank or a new group always plans again.  Only a save whose install vote succeeded
 * replaces it.
 */
#include "group.h"

#include <string.h>
#include <time.h>

#include "dcp_trace.h"

uint64_t
dcp_now_ns(void)
{
    struct timespec now;

    if (clock_gettime(CLOCK_MONOTONIC, &now) != 0) {
        return 0;
    }
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int
dcp_installed_plan_new(struct dcp_installed_plan **ret_plan, struct dcp_error *err)
{
    struct dcp_installed_plan *plan = dcp_calloc(1, sizeof *plan);

    if (plan == NULL || pthread_mutex_init(&plan->lock, NULL) != 0) {
        dcp_free(plan);
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a plan");
    }
    atomic_init(&plan->refs, 1);
    *ret_plan = plan;
    return 0;
}

struct dcp_installed_plan *
dcp_installed_plan_acquire(struct dcp_installed_plan *plan)
{
    atomic_fetch_add(&plan->refs, 1);
    return plan;
}

void
dcp_installed_plan_release(struct dcp_installed_plan *plan)
{
    if (plan == NULL || atomic_fetch_sub(&plan->refs, 1) != 1) {
        return;
    }
    dcp_free(plan->keep);
    dcp_own_cuts_clean_up(&plan->cuts);
    dcp_layout_clean_up(&plan->layout);
    dcp_global_plan_clean_up(&plan->global);
    for (uint32_t i = 0; plan->plans != NULL && i < plan->plans_count; i++) {
        dcp_plan_clean_up(&plan->plans[i]);
    }
    dcp_free(plan->plans);
    dcp_last_crcs_clean_up(&plan->last);
    dcp_free(plan->sees_claim);
    pthread_mutex_destroy(&plan->lock);
    dcp_free(plan);
}

int
dcp_group_check(const struct dcp_group *group, struct dcp_error *err)
{
    if (group->poisoned) {
        return dcp_error_set(
            err, DCP_E_COMM, 0, NULL,
            "this process group was left in the middle of a collective (an interrupt or an earlier "
            "failure); it can no longer be used for checkpoints: make a new group or restart");
    }
    return 0;
}

int
dcp_group_give_up(struct dcp_group *group, int rc, struct dcp_error *err)
{
    group->poisoned = true;
    if (rc == DCP_E_PEER) {
        rc = DCP_E_COMM;
        err->code = rc;
    }
    return rc;
}

struct dcp_failure
dcp_failure_from_error(const struct dcp_error *err, uint32_t rank)
{
    return (struct dcp_failure){
        .rank = rank,
        .kind = DCP_FAILURE_CORE,
        .bytes = (uint8_t *)err,
        .len = sizeof *err,
    };
}

int
dcp_group_settle_failures(struct dcp_group *group, const struct dcp_save_id *id,
                          const struct dcp_failure *mine, struct dcp_failure_list *ret_list,
                          struct dcp_error *err)
{
    uint64_t traced = dcp_trace_begin();
    bool all_ok = false;
    int rc = dcp_group_check(group, err);

    if (rc == 0) {
        rc = dcp_status_run(&group->comm, id, mine == NULL, &all_ok, err);
    }
    dcp_trace_end(traced, "agree", "status", 0);
    if (rc == 0 && all_ok) {
        return 0;
    }
    if (rc == 0) {
        rc = dcp_failure_exchange(&group->comm, mine, ret_list, err);
    }
    if (rc != 0) {
        return dcp_group_give_up(group, rc, err);
    }
    return dcp_error_set(err, DCP_E_PEER, 0, NULL, "%zu rank(s) failed", ret_list->count);
}

int
dcp_group_new(struct dcp_comm *comm, uint32_t coordinator, struct dcp_group **ret_group,
              struct dcp_error *err)
{
    struct dcp_group *group;

    if (coordinator >= comm->size) {
        return dcp_error_set(err, DCP_E_INVALID, 0, NULL,
                             "coordinator_rank %u is not a rank of this group of %u", coordinator,
                             comm->size);
    }
    group = dcp_calloc(1, sizeof *group);
    if (group == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a group's state");
    }
    group->comm = dcp_comm_count(&group->counted, comm);
    group->coordinator = coordinator;
    memset(comm, 0, sizeof *comm);
    *ret_group = group;
    return 0;
}

int
dcp_group_share(const struct dcp_group *group, uint32_t coordinator, struct dcp_group **ret_group,
                struct dcp_error *err)
{
    struct dcp_comm comm = group->counted.inner;

    if (comm.acquire == NULL) {
        return dcp_error_set(err, DCP_E_UNSUPPORTED, 0, NULL,
                             "collectives over %s can not be shared by groups", comm.kind);
    }
    int rc = dcp_group_new(&comm, coordinator, ret_group, err);

    if (rc == 0) {
        group->counted.inner.acquire(group->counted.inner.ctx);
    }
    return rc;
}

int32_t
dcp_group_device(const struct dcp_group *group)
{
    return group->counted.inner.follow == NULL ? -1 : group->counted.inner.device_index;
}

void
dcp_group_follow(struct dcp_group *group, void *stream)
{
    if (group->counted.inner.follow != NULL) {
        group->counted.inner.follow(group->counted.inner.ctx, stream);
    }
}

void
dcp_group_destroy(struct dcp_group *group)
{
    if (group == NULL) {
        return;
    }
    dcp_installed_plan_release(group->installed);
    dcp_peers_clean_up(&group->peers);
    if (group->comm.destroy != NULL) {
        group->comm.destroy(group->comm.ctx);
    }
    dcp_free(group);
}

const struct dcp_comm *
dcp_group_comm(const struct dcp_group *group)
{
    return &group->comm;
}

struct dcp_comm_stats
dcp_group_comm_stats(const struct dcp_group *group)
{
    return group->counted.stats;
}

uint32_t
dcp_group_coordinator(const struct dcp_group *group)
{
    return group->coordinator;
}

int
dcp_group_meet(struct dcp_group *group, const struct dcp_shm *shm, struct dcp_error *err)
{
    int rc = group->met ? 0 : dcp_group_check(group, err);

    if (rc == 0 && !group->met) {
        rc = dcp_peers_exchange(&group->comm, shm, &group->peers, err);
        if (rc != 0) {
            return dcp_group_give_up(group, rc, err);
        }
        group->met = true;
    }
    return rc;
}

const struct dcp_peers *
dcp_group_peers(const struct dcp_group *group)
{
    return group->met ? &group->peers : NULL;
}

uint32_t
dcp_group_host_ranks(const struct dcp_group *group)
{
    const struct dcp_peers *peers = &group->peers;
    static const uint8_t unknown[sizeof peers->hosts[0].id];
    uint32_t ranks = 0;

    if (!group->met || memcmp(peers->hosts[peers->rank].id, unknown, sizeof unknown) == 0) {
        return 0;
    }
    for (uint32_t i = 0; i < peers->count; i++) {
        ranks += memcmp(peers->hosts[i].id, peers->hosts[peers->rank].id, sizeof unknown) == 0;
    }
    return ranks;
}

void
dcp_group_forget_plan(struct dcp_group *group)
{
    dcp_installed_plan_release(group->installed);
    group->installed = NULL;
}

void
dcp_group_poison(struct dcp_group *group)
{
    group->poisoned = true;
}
