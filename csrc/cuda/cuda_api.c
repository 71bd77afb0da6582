/*
 * cuda_api.c: fills the tables of functions from the libraries in the process.
 *
 * RTLD_NOLOAD finds a library only if something else has loaded it; a preloaded stand-in with the
 * same soname is found as well.  A handle is kept for good, so that the library cannot be unloaded
 * under its table.
 *
 * A table that was filled is published by its state alone and never changes again.  One that could
 * not be filled is tried again when somebody asks next: torch may load CUDA after us.
 *
 * Threads: a mutex guards the filling; filled tables are read without it.
 */
#include "cuda_api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#include "dcp_cuda.h"

struct symbol {
    const char *name;
    size_t offset; /* of its pointer in the table */
};

#define SYMBOL_OF_CUDART(result, name, parameters) {#name, offsetof(struct cudart_api, name)},
#define SYMBOL_OF_DRIVER(result, name, parameters) {#name, offsetof(struct cuda_driver_api, name)},
#define SYMBOL_OF_CUFILE(result, name, parameters) {#name, offsetof(struct cufile_api, name)},

static const struct symbol cudart_symbols[] = {CUDART_FUNCTIONS(SYMBOL_OF_CUDART){NULL, 0}};
static const struct symbol driver_symbols[] = {CUDA_DRIVER_FUNCTIONS(SYMBOL_OF_DRIVER){NULL, 0}};
static const struct symbol cufile_symbols[] = {CUFILE_FUNCTIONS(SYMBOL_OF_CUFILE){NULL, 0}};

/* Newest first: a process has one of them. */
static const char *const cudart_names[] = {"libcudart.so.13", "libcudart.so.12",
                                           "libcudart.so.11.0", NULL};
static const char *const driver_names[] = {"libcuda.so.1", NULL};
static const char *const cufile_names[] = {"libcufile.so.0", NULL};

static struct cudart_api cudart_table;
static struct cuda_driver_api driver_table;
static struct cufile_api cufile_table;

struct library {
    const char *const *names;
    const struct symbol *symbols;
    void *table;
    bool may_load;
    _Atomic(const void *) found; /* the table to use; NULL until it is complete */
};

static struct library cudart_library = {
    .names = cudart_names, .symbols = cudart_symbols, .table = &cudart_table};
static struct library driver_library = {
    .names = driver_names, .symbols = driver_symbols, .table = &driver_table};
static struct library cufile_library = {
    .names = cufile_names, .symbols = cufile_symbols, .table = &cufile_table, .may_load = true};

static pthread_mutex_t fill_mutex = PTHREAD_MUTEX_INITIALIZER;

static bool
fill_from(struct library *library, void *handle)
{
    for (const struct symbol *symbol = library->symbols; symbol->name != NULL; symbol++) {
        void *address = dlsym(handle, symbol->name);
        if (address == NULL) {
            return false;
        }
        /* POSIX wants dlsym's result to be usable as a function; ISO C has no cast for it. */
        memcpy((char *)library->table + symbol->offset, &address, sizeof address);
    }
    return true;
}

static void
fill_locked(struct library *library)
{
    for (const char *const *name = library->names; *name != NULL; name++) {
        void *handle = dlopen(*name, RTLD_NOW | RTLD_NOLOAD);
        if (handle == NULL && library->may_load) {
            handle = dlopen(*name, RTLD_NOW | RTLD_LOCAL);
        }
        if (handle == NULL) {
            continue;
        }
        if (fill_from(library, handle)) {
            atomic_store_explicit(&library->found, library->table, memory_order_release);
            return;
        }
        (void)dlclose(handle);
    }
}

static const void *
table_of(struct library *library)
{
    const void *found = atomic_load_explicit(&library->found, memory_order_acquire);
    if (found == NULL) {
        (void)pthread_mutex_lock(&fill_mutex);
        if (atomic_load_explicit(&library->found, memory_order_relaxed) == NULL) {
            fill_locked(library);
        }
        (void)pthread_mutex_unlock(&fill_mutex);
        found = atomic_load_explicit(&library->found, memory_order_acquire);
    }
    return found;
}

const struct cudart_api *
cudart_api(void)
{
    return table_of(&cudart_library);
}

const struct cuda_driver_api *
cuda_driver_api(void)
{
    return table_of(&driver_library);
}

const struct cufile_api *
cufile_api(void)
{
    return table_of(&cufile_library);
}

void
cuda_api_replace(const struct cudart_api *cudart, const struct cuda_driver_api *driver,
                 const struct cufile_api *cufile)
{
    atomic_store_explicit(&cudart_library.found, cudart, memory_order_release);
    atomic_store_explicit(&driver_library.found, driver, memory_order_release);
    atomic_store_explicit(&cufile_library.found, cufile, memory_order_release);
}

bool
dcp_cuda_is_there(void)
{
    return cudart_api() != NULL;
}
