/*
 * agreement_store.c: the keys of an agreement and the messages in them.
 *
 *     message   version u8, outcome u8, by u32, gone u32, count u32, records
 *     record    rank u32, length u32, then kind u8 and bytes as a failure exchange has them
 *
 * A call that fails is tried once more, for a reply that was lost; adding is not, for it may have
 * counted.  What comes from the store was written by another process: counts and lengths are
 * checked before they are used.
 */
#include "agreement.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "comm_bytes.h"

enum {
    WIRE_VERSION = 1,
    KEY_BYTES = 256,
    TRIES = 2,
    /* A failure of the coordinator's, the one of `f`, a loss, and one to spare. */
    MOST_RECORDS = 4,
    HEADER_BYTES = 14,
    RECORD_HEADER_BYTES = 9,
    WIRE_BYTES = HEADER_BYTES + MOST_RECORDS * (RECORD_HEADER_BYTES + DCP_MAX_FAILURE_BYTES),
};

static const char *const key_names[] = {
    [AGREEMENT_DURABLE] = "n",
    [AGREEMENT_FAILED] = "f",
    [AGREEMENT_VERDICT] = "d",
    [AGREEMENT_LEFT] = "a",
};

static const char *
name_key(const struct agreement *run, enum agreement_key key, char text[KEY_BYTES])
{
    snprintf(text, KEY_BYTES, "%s%s", run->with->prefix, key_names[key]);
    return text;
}

static const char *
name_beat(const struct agreement *run, uint32_t leader, char text[KEY_BYTES])
{
    snprintf(text, KEY_BYTES, "%sh/%" PRIu32, run->with->prefix, leader);
    return text;
}

/* Adding nothing is reading: it can be tried again. */
static int
add_to(struct agreement *run, const char *name, int64_t delta, int64_t *ret_value,
       struct dcp_error *err)
{
    const struct dcp_store *store = run->with->store;
    struct dcp_error first;
    int rc;

    dcp_error_clear(&first);
    run->store_calls++;
    rc = store->add(store->ctx, name, delta, ret_value, delta == 0 ? &first : err);
    if (rc != 0 && delta == 0) {
        run->store_calls++;
        rc = store->add(store->ctx, name, delta, ret_value, err);
    }
    return rc;
}

int
agreement_add(struct agreement *run, enum agreement_key key, int64_t delta, int64_t *ret_value,
              struct dcp_error *err)
{
    char text[KEY_BYTES];
    return add_to(run, name_key(run, key, text), delta, ret_value, err);
}

int
agreement_beat(struct agreement *run, uint32_t leader, int64_t delta, int64_t *ret_value,
               struct dcp_error *err)
{
    char text[KEY_BYTES];
    return add_to(run, name_beat(run, leader, text), delta, ret_value, err);
}

int
agreement_check(struct agreement *run, enum agreement_key key, bool *ret_there,
                struct dcp_error *err)
{
    const struct dcp_store *store = run->with->store;
    char text[KEY_BYTES];
    struct dcp_error last;
    int rc = -1;

    (void)name_key(run, key, text);
    for (int i = 0; rc != 0 && i < TRIES; i++) {
        dcp_error_clear(&last);
        run->store_calls++;
        rc = store->check(store->ctx, text, ret_there, &last);
    }
    if (rc != 0) {
        *err = last;
    }
    return rc;
}

/* What cannot be removed stays: the save has ended. */
static void
remove_name(struct agreement *run, const char *name)
{
    const struct dcp_store *store = run->with->store;
    struct dcp_error ignored;

    for (int i = 0; i < TRIES; i++) {
        dcp_error_clear(&ignored);
        run->store_calls++;
        if (store->remove(store->ctx, name, &ignored) == 0) {
            return;
        }
    }
}

void
agreement_remove(struct agreement *run, enum agreement_key key)
{
    char text[KEY_BYTES];
    remove_name(run, name_key(run, key, text));
}

static void
remove_beat(struct agreement *run, uint32_t leader)
{
    char text[KEY_BYTES];
    remove_name(run, name_beat(run, leader, text));
}

void
agreement_remove_beats(struct agreement *run)
{
    if (run->liveness.beats) {
        remove_beat(run, run->with->rank);
    }
    for (uint32_t i = 0; i < run->liveness.hosts_count; i++) {
        remove_beat(run, run->liveness.hosts[i].leader);
    }
}

void
agreement_remove_all(struct agreement *run)
{
    const struct dcp_peers *peers = run->with->peers;
    uint32_t leaders = 0;

    agreement_remove(run, AGREEMENT_VERDICT);
    agreement_remove(run, AGREEMENT_DURABLE);
    agreement_remove(run, AGREEMENT_FAILED);
    agreement_remove(run, AGREEMENT_LEFT);
    for (uint32_t i = 0; peers != NULL && i < peers->count; i++) {
        leaders += agreement_leader_of(run, i) == i;
    }
    for (uint32_t i = 0; leaders > 1 && i < peers->count; i++) {
        if (agreement_leader_of(run, i) == i) {
            remove_beat(run, i);
        }
    }
}

static void
encode(struct dcp_buf *wire, const struct agreement_notice *notice)
{
    dcp_buf_clear(wire);
    (void)dcp_buf_reserve(wire, HEADER_BYTES);
    dcp_buf_put_u8(wire, WIRE_VERSION);
    dcp_buf_put_u8(wire, (uint8_t)notice->outcome);
    dcp_buf_put_u32(wire, notice->by);
    dcp_buf_put_u32(wire, notice->gone);
    dcp_buf_put_u32(wire, (uint32_t)notice->failures.count);
    for (size_t i = 0; i < notice->failures.count; i++) {
        const struct dcp_failure *failure = &notice->failures.items[i];

        dcp_buf_put_u32(wire, failure->rank);
        dcp_buf_put_u32(wire, (uint32_t)failure->len + 1);
        dcp_buf_put_u8(wire, (uint8_t)(failure->kind & ~(uint32_t)DCP_FAILURE_ECHO));
        dcp_buf_put(wire, failure->bytes, failure->len);
    }
}

int
agreement_tell(struct agreement *run, enum agreement_key key, const struct agreement_notice *notice,
               bool only_first, struct dcp_error *err)
{
    const struct dcp_store *store = run->with->store;
    char text[KEY_BYTES];
    struct dcp_error last;
    int rc;

    encode(&run->wire, notice);
    rc = dcp_buf_check(&run->wire, err);
    if (rc != 0) {
        return rc;
    }
    (void)name_key(run, key, text);
    rc = -1;
    for (int i = 0; rc != 0 && i < TRIES; i++) {
        dcp_error_clear(&last);
        run->store_calls++;
        rc = (only_first ? store->set_once : store->set)(store->ctx, text, run->wire.data,
                                                         run->wire.len, &last);
    }
    if (rc != 0) {
        *err = last;
    }
    return rc;
}

static int
refuse_message(const struct agreement *run, enum agreement_key key, struct dcp_error *err)
{
    char text[KEY_BYTES];
    return dcp_error_set(err, DCP_E_COMM, 0, NULL,
                         "what another rank wrote to \"%s\" in the store cannot be read; install "
                         "the same dcp_native on all ranks",
                         name_key(run, key, text));
}

static int
decode(const struct agreement *run, enum agreement_key key, struct agreement_notice *notice,
       struct dcp_error *err)
{
    struct dcp_cursor c = {.data = run->wire.data, .len = run->wire.len};
    uint8_t version = dcp_cursor_u8(&c);
    uint8_t outcome = dcp_cursor_u8(&c);
    uint32_t count;

    notice->outcome = (enum dcp_outcome)outcome;
    notice->by = dcp_cursor_u32(&c);
    notice->gone = dcp_cursor_u32(&c);
    count = dcp_cursor_u32(&c);
    if (c.failed || version != WIRE_VERSION || outcome > DCP_OUTCOME_SUPERSEDED ||
        notice->by >= run->with->size || count > MOST_RECORDS) {
        return refuse_message(run, key, err);
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t rank = dcp_cursor_u32(&c);
        struct dcp_span record = {.len = dcp_cursor_u32(&c)};
        struct dcp_failure failure;
        int rc;

        record.data = dcp_cursor_bytes(&c, record.len);
        if (c.failed || rank >= run->with->size) {
            return refuse_message(run, key, err);
        }
        rc = dcp_failure_decode(rank, &record, &failure, err);
        if (rc == 0) {
            rc = agreement_add_failure(notice, &failure, err);
            dcp_free(failure.bytes);
        }
        if (rc != 0) {
            return rc;
        }
    }
    return c.pos == c.len ? 0 : refuse_message(run, key, err);
}

int
agreement_hear(struct agreement *run, enum agreement_key key, struct agreement_notice *ret_notice,
               struct dcp_error *err)
{
    const struct dcp_store *store = run->with->store;
    struct agreement_notice notice = {.there = true};
    struct dcp_error last;
    char text[KEY_BYTES];
    bool there = false;
    int rc = agreement_check(run, key, &there, err);

    *ret_notice = (struct agreement_notice){0};
    if (rc != 0 || !there) {
        return rc;
    }
    dcp_buf_clear(&run->wire);
    if (dcp_buf_reserve(&run->wire, WIRE_BYTES) != 0) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for %d bytes of a message",
                             WIRE_BYTES);
    }
    rc = -1;
    for (int i = 0; rc != 0 && i < TRIES; i++) {
        dcp_error_clear(&last);
        run->store_calls++;
        rc = store->get(store->ctx, name_key(run, key, text), run->wire.data, WIRE_BYTES,
                        &run->wire.len, &last);
    }
    if (rc != 0) {
        *err = last;
        return rc;
    }
    rc = decode(run, key, &notice, err);
    if (rc != 0) {
        agreement_notice_clean_up(&notice);
        return rc;
    }
    *ret_notice = notice;
    return 0;
}

int
agreement_add_failure(struct agreement_notice *notice, const struct dcp_failure *failure,
                      struct dcp_error *err)
{
    struct dcp_failure_list *list = &notice->failures;
    struct dcp_failure copy = *failure;
    struct dcp_failure *items;
    size_t at = 0;

    while (at < list->count && list->items[at].rank < failure->rank) {
        at++;
    }
    if (at < list->count && list->items[at].rank == failure->rank) {
        return 0;
    }
    if (list->count == MOST_RECORDS) {
        return 0; /* others are causes enough */
    }
    DCP_ASSERT(failure->len <= DCP_MAX_FAILURE_BYTES);
    copy.bytes = dcp_malloc(failure->len);
    items = dcp_realloc(list->items, (list->count + 1) * sizeof *items);
    if (items != NULL) {
        list->items = items;
    }
    if (copy.bytes == NULL || items == NULL) {
        dcp_free(copy.bytes);
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "no memory for %zu bytes of rank %" PRIu32 "'s failure", failure->len,
                             failure->rank);
    }
    memcpy(copy.bytes, failure->bytes, failure->len);
    memmove(&items[at + 1], &items[at], (list->count - at) * sizeof *items);
    items[at] = copy;
    list->count++;
    return 0;
}

void
agreement_notice_clean_up(struct agreement_notice *notice)
{
    dcp_failure_list_clean_up(&notice->failures);
    *notice = (struct agreement_notice){0};
}
