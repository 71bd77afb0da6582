/*
 * nccl_api.c: fills the table of NCCL's functions from the library in the process.
 *
 * RTLD_NOLOAD finds a library only if something else has loaded it; a preloaded stand-in with the
 * same soname is found as well, and a torch that has NCCL inside gives its own.  The handle is kept
 * for good.  As in cuda_api.c a table that could not be filled is tried again when somebody asks
 * next.
 *
 * Threads: a mutex guards the filling; the filled table is read without it.
 */
#include "nccl_api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

struct symbol {
    const char *name;
    size_t offset; /* of its pointer in the table */
    bool must_be_there;
};

#define SYMBOL(result, name, parameters) {#name, offsetof(struct nccl_api, name), true},
#define NEWER_SYMBOL(result, name, parameters) {#name, offsetof(struct nccl_api, name), false},

static const struct symbol symbols[] = {NCCL_FUNCTIONS(SYMBOL) NCCL_NEWER_FUNCTIONS(NEWER_SYMBOL)};

static const char *const library_names[] = {"libnccl.so.2", "libtorch_cuda.so"};

static struct nccl_api table;
static _Atomic(const struct nccl_api *) found; /* NULL until the table is complete */
static pthread_mutex_t fill_mutex = PTHREAD_MUTEX_INITIALIZER;

static bool
fill_from(void *handle)
{
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *address = dlsym(handle, symbols[i].name);
        if (address == NULL && symbols[i].must_be_there) {
            return false;
        }
        /* POSIX wants dlsym's result to be usable as a function; ISO C has no cast for it. */
        memcpy((char *)&table + symbols[i].offset, &address, sizeof address);
    }
    return true;
}

static void
fill_locked(void)
{
    for (size_t i = 0; i < sizeof library_names / sizeof library_names[0]; i++) {
        void *handle = dlopen(library_names[i], RTLD_NOW | RTLD_NOLOAD);
        if (handle != NULL && fill_from(handle)) {
            atomic_store_explicit(&found, &table, memory_order_release);
            return;
        }
        if (handle != NULL) {
            (void)dlclose(handle);
        }
    }
}

const struct nccl_api *
nccl_api(void)
{
    const struct nccl_api *api = atomic_load_explicit(&found, memory_order_acquire);
    if (api == NULL) {
        (void)pthread_mutex_lock(&fill_mutex);
        if (atomic_load_explicit(&found, memory_order_relaxed) == NULL) {
            fill_locked();
        }
        (void)pthread_mutex_unlock(&fill_mutex);
        api = atomic_load_explicit(&found, memory_order_acquire);
    }
    return api;
}

void
nccl_api_replace(const struct nccl_api *api)
{
    atomic_store_explicit(&found, api, memory_order_release);
}
