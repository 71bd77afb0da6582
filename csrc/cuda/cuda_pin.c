/*
 * cuda_pin.c: pins memory of the host for all devices.
 *
 * It is pinned in pieces that end at multiples of CUDA_PIN_BYTES: the driver keeps its lock while
 * it pins one, and the trainer's launches wait for it.  Where pieces end can be told from an
 * address alone, which is how copies know where to stop.  So memory that has grown keeps all its
 * pieces but the last, which ended where the memory did.
 *
 * A piece that somebody else had pinned stays theirs: it is not unpinned here.
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
    uint64_t bytes;
    uint64_t pieces; /* that are pinned: of a pin that is in the list, all */
    bool ours[];     /* which of them */
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

/* Unpins all but the first `keep` of the pieces that are pinned. */
static void
unpin_from(struct pin *pin, const struct cuda_stay *stay, uint64_t keep)
{
    uint64_t at = 0;

    for (uint64_t i = 0; i < pin->pieces; i++) {
        if (i >= keep && pin->ours[i] && stay->runtime->cudaHostUnregister(pin->memory + at) != 0) {
            (void)stay->runtime->cudaGetLastError();
        }
        at += piece_bytes(pin, at);
    }
    pin->pieces = dcp_min_u64(pin->pieces, keep);
}

/* Pins the pieces that are not; on failure unpins all. */
static int
pin_rest(struct pin *pin, const struct cuda_stay *stay, struct dcp_error *err)
{
    char what[96];

    for (uint64_t i = 0, at = 0; at < pin->bytes; i++) {
        uint64_t n = piece_bytes(pin, at);
        if (i >= pin->pieces) {
            cuda_status status =
                stay->runtime->cudaHostRegister(pin->memory + at, n, DCP_CUDA_HOST_PORTABLE);
            if (status == DCP_CUDA_ERROR_HOST_MEMORY_REGISTERED) {
                (void)stay->runtime->cudaGetLastError();
            } else if (status != 0) {
                (void)snprintf(what, sizeof what,
                               "pin %" PRIu64 " bytes of the host's memory (see ulimit -l)",
                               pin->bytes);
                unpin_from(pin, stay, 0);
                return cuda_check(stay, status, what, err);
            }
            pin->ours[i] = status == 0;
            pin->pieces = i + 1;
        }
        at += n;
    }
    return 0;
}

/* Out of the list; NULL when it is none. */
static struct pin *
take_out(const void *memory)
{
    struct pin *pin = NULL;

    (void)pthread_mutex_lock(&pins_mutex);
    for (struct pin **at = &pins; *at != NULL; at = &(*at)->next) {
        if ((*at)->memory == memory) {
            pin = *at;
            *at = pin->next;
            break;
        }
    }
    (void)pthread_mutex_unlock(&pins_mutex);
    return pin;
}

static void
put_in(struct pin *pin)
{
    (void)pthread_mutex_lock(&pins_mutex);
    pin->next = pins;
    pins = pin;
    (void)pthread_mutex_unlock(&pins_mutex);
}

/* Makes room for the pieces of `bytes`, and unpins the last one there is if it ends in between.
 * `old` is NULL or taken; on failure it is as it was. */
static int
grow(struct pin *old, const struct cuda_stay *stay, void *memory, uint64_t bytes,
     struct pin **ret_pin, struct dcp_error *err)
{
    uint64_t first = (uintptr_t)memory / CUDA_PIN_BYTES;
    uint64_t pieces = ((uintptr_t)memory + bytes - 1) / CUDA_PIN_BYTES - first + 1;
    struct pin *pin = dcp_realloc(old, sizeof *pin + (size_t)pieces * sizeof pin->ours[0]);

    if (pin == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "out of memory for a list of pinned memory");
    }
    if (old == NULL) {
        *pin = (struct pin){.memory = memory};
    } else if (((uintptr_t)memory + pin->bytes) % CUDA_PIN_BYTES != 0) {
        unpin_from(pin, stay, pin->pieces - 1);
    }
    pin->bytes = bytes;
    *ret_pin = pin;
    return 0;
}

int
cuda_pin(void *ctx, void *memory, uint64_t bytes, struct dcp_error *err)
{
    const struct cuda_table *table = ctx;
    struct cuda_stay stay;
    struct pin *pin = take_out(memory);
    int rc;

    if (bytes == 0 || (pin != NULL && bytes <= pin->bytes)) {
        if (pin != NULL) {
            put_in(pin);
        }
        return 0;
    }
    rc = cuda_enter(table->device.index, &stay, err);
    if (rc != 0) {
        if (pin != NULL) {
            put_in(pin); /* what is pinned stays so, until it is unpinned */
        }
        return rc;
    }
    rc = grow(pin, &stay, memory, bytes, &pin, err);
    if (rc == 0) {
        rc = pin_rest(pin, &stay, err);
    } else if (pin != NULL) {
        unpin_from(pin, &stay, 0);
    }
    cuda_leave(&stay);
    if (rc != 0) {
        dcp_free(pin);
        return rc;
    }
    put_in(pin);
    return 0;
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
        unpin_from(pin, &stay, 0);
        cuda_leave(&stay);
    }
    dcp_free(pin);
}
