/*
 * sim_ranks.c: runs one function on every rank of a simulated group, a thread each.
 */
#include "sim_ranks.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

struct rank_thread {
    pthread_t thread;
    struct dcp_comm_sim *sim;
    struct dcp_comm comm;
    sim_rank_fn fn;
    void *arg;
};

static void
give_up(const char *what)
{
    fprintf(stderr, "sim_ranks_run: %s failed\n", what);
    exit(2);
}

static void *
run_rank(void *arg)
{
    struct rank_thread *self = arg;
    self->fn(&self->comm, self->sim, self->arg);
    self->comm.destroy(self->comm.ctx);
    return NULL;
}

void
sim_ranks_run(uint32_t size, uint32_t timeout_ms, sim_rank_fn fn, void *arg)
{
    struct dcp_comm_sim *sim = NULL;
    struct dcp_error err = {0};
    struct rank_thread *threads = calloc(size, sizeof *threads);
    pthread_attr_t attr;
    if (threads == NULL || pthread_attr_init(&attr) != 0) {
        give_up("memory");
    }
    if (pthread_attr_setstacksize(&attr, 512 << 10) != 0) {
        give_up("stack size");
    }
    if (dcp_comm_sim_new(size, timeout_ms, &sim, &err) != 0) {
        give_up(err.message);
    }
    for (uint32_t i = 0; i < size; i++) {
        threads[i] = (struct rank_thread){.sim = sim, .fn = fn, .arg = arg};
        dcp_comm_sim_rank(sim, i, &threads[i].comm);
        if (pthread_create(&threads[i].thread, &attr, run_rank, &threads[i]) != 0) {
            give_up("a thread");
        }
    }
    for (uint32_t i = 0; i < size; i++) {
        pthread_join(threads[i].thread, NULL);
    }
    pthread_attr_destroy(&attr);
    dcp_comm_sim_destroy(sim);
    free(threads);
}
