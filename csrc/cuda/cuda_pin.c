/*
 * cuda_pin.c: pins memory of the host for all devices.
 *
 * It is pinned in pieces that end at multiples of CUDA_PIN_BYTES: the driver keeps its lock while
 * it pins one, and the trainer's launches wait for it.  Where pieces end can be told from an
 * address alone, which is how copies know where to stop.
 *
 * A piece that somebody else had pinned stays theirs: it is not unpinned here.  The same memory may
 * be pinned more than once, and is unpinned when it was as often.
 *
 * Threads: any number; a mutex guards the list, and is not held while memory is pinned.  Pinning
 * and unpinning the same memory at the same time is the caller's mistake.
 */
#include "cuda_device.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>

#include "dcp_alloc.h"

struct pin {
    struct pin *next;
    uint8_t *memory;
    uint64_t bytes, times;
    uint64_t pieces;
    bool ours[]; /* which of the pieces */
};

static struct pin *pins;
static pthread_mutex_t pins_mutex = PTHREAD_MUTEX_INITIALIZER;

/* Bytes of the piece that starts `at` bytes into the memory. */
static uint64_t
piece_bytes(const struct pin *pin, uint64_t at)
{
    uint64_t left = CUDA_PIN_BYTES - (uintptr_t)(pin->memory + at) % CUDA_PIN_BYTES;
    return dcp_min_u64(left, pin->bytes - at);
}

/* Unpins the first `pieces`. */
static void
unpin_pieces(const struct pin *pin, const struct cuda_stay *stay, uint64_t pieces)
{
    uint64_t at = 0;

    for (uint64_t i = 0; i < pieces; i++) {
        if (pin->ours[i] && stay->runtime->cudaHostUnregister(pin->memory + at) != 0) {
            (void)stay->runtime->cudaGetLastError();
        }
        at += piece_bytes(pin, at);
    }
}

static int
pin_pieces(struct pin *pin, const struct cuda_stay *stay, struct dcp_error *err)
{
    char what[96];
    uint64_t at = 0;

    for (uint64_t i = 0; i < pin->pieces; i++) {
        uint64_t n = piece_bytes(pin, at);
        cuda_status status =
            stay->runtime->cudaHostRegister(pin->memory + at, n, DCP_CUDA_HOST_PORTABLE);
        if (status == DCP_CUDA_ERROR_HOST_MEMORY_REGISTERED) {
            (void)stay->runtime->cudaGetLastError();
        } else if (status != 0) {
            (void)snprintf(what, sizeof what,
                           "pin %" PRIu64 " bytes of the host's memory (see ulimit -l)",
                           pin->bytes);
            unpin_pieces(pin, stay, i);
            return cuda_check(stay, status, what, err);
        }
        pin->ours[i] = status == 0;
        at += n;
    }
    return 0;
}

static struct pin *
find_locked(const void *memory)
{
    struct pin *pin = pins;
    while (pin != NULL && pin->memory != memory) {
        pin = pin->next;
    }
    return pin;
}

/* Whether it was pinned before, which counts once more. */
static bool
pin_again(const void *memory, uint64_t bytes)
{
    (void)pthread_mutex_lock(&pins_mutex);
    struct pin *pin = find_locked(memory);
    bool again = pin != NULL && pin->bytes == bytes;
    if (again) {
        pin->times++;
    }
    (void)pthread_mutex_unlock(&pins_mutex);
    return again;
}

int
cuda_pin(void *ctx, void *memory, uint64_t bytes, struct dcp_error *err)
{
    const struct cuda_table *table = ctx;
    struct cuda_stay stay;
    int rc;

    if (bytes == 0 || pin_again(memory, bytes)) {
        return 0;
    }
    uint64_t first = (uintptr_t)memory / CUDA_PIN_BYTES;
    uint64_t pieces = ((uintptr_t)memory + bytes - 1) / CUDA_PIN_BYTES - first + 1;
    struct pin *pin = dcp_calloc(1, sizeof *pin + (size_t)pieces * sizeof pin->ours[0]);
    if (pin == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "out of memory for a list of pinned memory");
    }
    pin->memory = memory;
    pin->bytes = bytes;
    pin->times = 1;
    pin->pieces = pieces;
    rc = cuda_enter(table->device.index, &stay, err);
    if (rc == 0) {
        rc = pin_pieces(pin, &stay, err);
        cuda_leave(&stay);
    }
    if (rc != 0) {
        dcp_free(pin);
        return rc;
    }
    (void)pthread_mutex_lock(&pins_mutex);
    pin->next = pins;
    pins = pin;
    (void)pthread_mutex_unlock(&pins_mutex);
    return 0;
}

/* The pin that was undone for the last time, out of the list; NULL when it was none. */
static struct pin *
take_out(const void *memory)
{
    (void)pthread_mutex_lock(&pins_mutex);
    struct pin *pin = find_locked(memory);
    if (pin != NULL && --pin->times > 0) {
        pin = NULL;
    }
    for (struct pin **at = &pins; pin != NULL && *at != NULL; at = &(*at)->next) {
        if (*at == pin) {
            *at = pin->next;
            break;
        }
    }
    (void)pthread_mutex_unlock(&pins_mutex);
    return pin;
}

void
cuda_unpin(void *ctx, void *memory)
{
    const struct cuda_table *table = ctx;
    struct pin *pin = take_out(memory);
    struct cuda_stay stay;

    if (pin == NULL) {
        return;
    }
    if (cuda_enter(table->device.index, &stay, NULL) == 0) {
        unpin_pieces(pin, &stay, pin->pieces);
        cuda_leave(&stay);
    }
    dcp_free(pin);
}
