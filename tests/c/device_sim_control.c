/*
 * device_sim_control.c: what tests ask of a simulated device, and what they make fail.
 */
#include "device_sim_parts.h"

static void
set(struct device_sim *sim, uint64_t *field, uint64_t value)
{
    pthread_mutex_lock(&sim->lock);
    *field = value;
    pthread_mutex_unlock(&sim->lock);
}

void
device_sim_fail_call(struct device_sim *sim, uint64_t number)
{
    set(sim, &sim->fail_call, number);
}

void
device_sim_fail_work(struct device_sim *sim, uint64_t number)
{
    set(sim, &sim->fail_work, number);
}

uint64_t
device_sim_calls(const struct device_sim *sim)
{
    return sim->calls;
}

uint64_t
device_sim_reads(const struct device_sim *sim)
{
    return sim->reads;
}

static void
set_hung(struct device_sim *sim, bool hung, bool for_ever)
{
    pthread_mutex_lock(&sim->lock);
    sim->hung = hung;
    sim->hung_for_ever = for_ever;
    pthread_cond_broadcast(&sim->changed);
    pthread_mutex_unlock(&sim->lock);
}

void
device_sim_hang(struct device_sim *sim, bool for_ever)
{
    set_hung(sim, true, for_ever);
}

void
device_sim_lose(struct device_sim *sim)
{
    pthread_mutex_lock(&sim->lock);
    sim->lost = true;
    pthread_mutex_unlock(&sim->lock);
    set_hung(sim, true, true);
}

static uint64_t
get(struct device_sim *sim, const uint64_t *value)
{
    pthread_mutex_lock(&sim->lock);
    uint64_t got = *value;
    pthread_mutex_unlock(&sim->lock);
    return got;
}

uint64_t
device_sim_held_up(struct device_sim *sim)
{
    return get(sim, &sim->held_up);
}

void
device_sim_go_on(struct device_sim *sim)
{
    set_hung(sim, false, false);
}

uint64_t
device_sim_violations(struct device_sim *sim)
{
    return get(sim, &sim->violations);
}
