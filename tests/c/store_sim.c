/*
 * store_sim.c: a store in memory for clients in threads, with a hook in front of every call.
 *
 * It does what a TCPStore does: a counter is made by adding nothing to it, and only a key that is
 * there can be read (there a client would wait for it; here it is an error).
 *
 * Threads: any number of clients, one thread each.  The hook is called without the lock.
 */
#include "store_sim.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct entry {
    char *key;
    uint8_t *value; /* of a counter: an int64_t */
    size_t len;
};

struct client {
    struct store_sim *sim;
    uint32_t number;
};

struct store_sim {
    pthread_mutex_t mutex;
    struct entry *entries; /* guarded by mutex */
    size_t count, cap;
    store_sim_hook hook;
    void *ctx;
    struct client clients[];
};

static void *
must(void *memory)
{
    if (memory == NULL) {
        fprintf(stderr, "store_sim: no memory\n");
        exit(2);
    }
    return memory;
}

struct store_sim *
store_sim_new(uint32_t clients, store_sim_hook hook, void *ctx)
{
    struct store_sim *sim = must(calloc(1, sizeof *sim + clients * sizeof sim->clients[0]));

    sim->hook = hook;
    sim->ctx = ctx;
    for (uint32_t i = 0; i < clients; i++) {
        sim->clients[i] = (struct client){.sim = sim, .number = i};
    }
    pthread_mutex_init(&sim->mutex, NULL);
    return sim;
}

static struct entry *
find_locked(struct store_sim *sim, const char *key)
{
    for (size_t i = 0; i < sim->count; i++) {
        if (strcmp(sim->entries[i].key, key) == 0) {
            return &sim->entries[i];
        }
    }
    return NULL;
}

static void
put_locked(struct store_sim *sim, const char *key, const void *bytes, size_t len)
{
    struct entry *entry = find_locked(sim, key);

    if (entry == NULL) {
        if (sim->count == sim->cap) {
            sim->cap = sim->cap * 2 + 8;
            sim->entries = must(realloc(sim->entries, sim->cap * sizeof *sim->entries));
        }
        entry = &sim->entries[sim->count++];
        *entry = (struct entry){.key = must(strdup(key))};
    }
    free(entry->value);
    entry->value = must(malloc(len + 1));
    memcpy(entry->value, bytes, len);
    entry->len = len;
}

static void
drop_locked(struct store_sim *sim, struct entry *entry)
{
    if (entry != NULL) {
        free(entry->key);
        free(entry->value);
        *entry = sim->entries[--sim->count];
    }
}

/* True: do it.  *ret_fault: what the caller hears. */
static bool
begin(struct client *client, enum store_fault *ret_fault)
{
    *ret_fault = client->sim->hook(client->sim->ctx, client->number, false);
    pthread_mutex_lock(&client->sim->mutex);
    return *ret_fault != STORE_CALL_LOST;
}

static int
end(struct client *client, enum store_fault fault, int rc, const char *key, struct dcp_error *err)
{
    pthread_mutex_unlock(&client->sim->mutex);
    if (client->sim->hook(client->sim->ctx, client->number, true) != STORE_WORKS ||
        fault != STORE_WORKS) {
        return dcp_error_set(err, DCP_E_COMM, 0, NULL, "the store was lost at \"%s\"", key);
    }
    return rc;
}

static int
sim_set(void *ctx, const char *key, const void *bytes, size_t len, struct dcp_error *err)
{
    struct client *client = ctx;
    enum store_fault fault;

    if (begin(client, &fault)) {
        put_locked(client->sim, key, bytes, len);
    }
    return end(client, fault, 0, key, err);
}

static int
sim_set_once(void *ctx, const char *key, const void *bytes, size_t len, struct dcp_error *err)
{
    struct client *client = ctx;
    enum store_fault fault;

    if (begin(client, &fault) && find_locked(client->sim, key) == NULL) {
        put_locked(client->sim, key, bytes, len);
    }
    return end(client, fault, 0, key, err);
}

static int
sim_get(void *ctx, const char *key, void *buf, size_t cap, size_t *ret_len, struct dcp_error *err)
{
    struct client *client = ctx;
    enum store_fault fault;
    int rc = 0;

    if (begin(client, &fault)) {
        struct entry *entry = find_locked(client->sim, key);
        if (entry == NULL) {
            rc = dcp_error_set(err, DCP_E_COMM, 0, NULL, "\"%s\" is not there", key);
        } else if (entry->len > cap) {
            rc = dcp_error_set(err, DCP_E_LIMIT, 0, NULL, "\"%s\" is too long", key);
        } else {
            memcpy(buf, entry->value, entry->len);
            *ret_len = entry->len;
        }
    }
    return end(client, fault, rc, key, err);
}

static int
sim_add(void *ctx, const char *key, int64_t delta, int64_t *ret_value, struct dcp_error *err)
{
    struct client *client = ctx;
    enum store_fault fault;
    int64_t value = 0;

    if (begin(client, &fault)) {
        struct entry *entry = find_locked(client->sim, key);
        if (entry != NULL) {
            memcpy(&value, entry->value, sizeof value);
        }
        value += delta;
        put_locked(client->sim, key, &value, sizeof value);
        *ret_value = value;
    }
    return end(client, fault, 0, key, err);
}

static int
sim_check(void *ctx, const char *key, bool *ret_there, struct dcp_error *err)
{
    struct client *client = ctx;
    enum store_fault fault;

    if (begin(client, &fault)) {
        *ret_there = find_locked(client->sim, key) != NULL;
    }
    return end(client, fault, 0, key, err);
}

static int
sim_remove(void *ctx, const char *key, struct dcp_error *err)
{
    struct client *client = ctx;
    enum store_fault fault;

    if (begin(client, &fault)) {
        drop_locked(client->sim, find_locked(client->sim, key));
    }
    return end(client, fault, 0, key, err);
}

/* The clients live in the store. */
static void
sim_destroy_client(void *ctx)
{
    (void)ctx;
}

void
store_sim_client(struct store_sim *sim, uint32_t client, struct dcp_store *ret_store)
{
    *ret_store = (struct dcp_store){
        .ctx = &sim->clients[client],
        .kind = "simulated",
        .set = sim_set,
        .set_once = sim_set_once,
        .get = sim_get,
        .add = sim_add,
        .check = sim_check,
        .remove = sim_remove,
        .destroy = sim_destroy_client,
    };
}

size_t
store_sim_keys(struct store_sim *sim)
{
    return sim->count;
}

const char *
store_sim_key(struct store_sim *sim, size_t index)
{
    return index < sim->count ? sim->entries[index].key : NULL;
}

void
store_sim_destroy(struct store_sim *sim)
{
    while (sim->count > 0) {
        drop_locked(sim, &sim->entries[0]);
    }
    free(sim->entries);
    pthread_mutex_destroy(&sim->mutex);
    free(sim);
}
