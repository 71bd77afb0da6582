/*
 * failure.c: what failed on which rank, told to every rank.
 *
 * It runs after a vote or status said that some rank failed, so that each rank can raise what
 * torch's users know: the failures of all ranks, by rank.  A record travels as its kind (one byte)
 * and its bytes; a rank without a failure sends nothing.  Records come from other processes, so
 * kinds and sizes are checked and texts are terminated before anything reads them.
 *
 * Threads: the comm table's rule, one caller at a time.
 */
#include "comm_bytes.h"

#include <string.h>

#include "dcp_limits.h"

enum { KIND_BYTES = 1 };

static int
check_record(uint32_t rank, uint32_t kind, size_t len, struct dcp_error *err)
{
    if (kind != DCP_FAILURE_CORE && kind != DCP_FAILURE_PYTHON) {
        return dcp_error_set(err, DCP_E_COMM, 0, NULL,
                             "rank %u sent a failure of unknown kind %u; install the same "
                             "dcp_native on all ranks",
                             rank, kind);
    }
    if (len > DCP_MAX_FAILURE_BYTES) {
        return dcp_error_set(err, DCP_E_LIMIT, 0, NULL,
                             "rank %u sent a failure of %zu bytes, the limit is %u", rank, len,
                             DCP_MAX_FAILURE_BYTES);
    }
    if (kind == DCP_FAILURE_CORE && len != sizeof(struct dcp_error)) {
        return dcp_error_set(err, DCP_E_COMM, 0, NULL,
                             "rank %u sent an error record of %zu bytes, ours have %zu; install "
                             "the same dcp_native on all ranks",
                             rank, len, sizeof(struct dcp_error));
    }
    return 0;
}

/* Drops those that are only there because another rank failed, unless there are no others. */
static void
drop_echoes(struct dcp_failure_list *list)
{
    size_t causes = 0, kept = 0;

    for (size_t i = 0; i < list->count; i++) {
        causes += (list->items[i].kind & DCP_FAILURE_ECHO) == 0;
    }
    for (size_t i = 0; i < list->count; i++) {
        struct dcp_failure *item = &list->items[i];
        if (causes > 0 && (item->kind & DCP_FAILURE_ECHO) != 0) {
            dcp_free(item->bytes);
            continue;
        }
        item->kind &= ~(uint32_t)DCP_FAILURE_ECHO;
        list->items[kept++] = *item;
    }
    list->count = kept;
}

int
dcp_failure_decode(uint32_t rank, const struct dcp_span *record, struct dcp_failure *ret_failure,
                   struct dcp_error *err)
{
    if (record->len < KIND_BYTES) {
        return dcp_error_set(err, DCP_E_COMM, 0, NULL,
                             "rank %u sent a failure of no bytes; install the same dcp_native on "
                             "all ranks",
                             rank);
    }
    size_t len = record->len - KIND_BYTES;
    uint32_t kind = record->data[0];
    int rc = check_record(rank, kind & ~(uint32_t)DCP_FAILURE_ECHO, len, err);
    if (rc != 0) {
        return rc;
    }
    uint8_t *bytes = dcp_malloc(len);
    if (bytes == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "no memory for %zu bytes of rank %u's failure", len, rank);
    }
    memcpy(bytes, record->data + KIND_BYTES, len);
    if ((kind & ~(uint32_t)DCP_FAILURE_ECHO) == DCP_FAILURE_CORE) {
        bytes[offsetof(struct dcp_error, path) + DCP_ERROR_PATH_BYTES - 1] = 0;
        bytes[offsetof(struct dcp_error, message) + DCP_ERROR_MESSAGE_BYTES - 1] = 0;
    }
    *ret_failure = (struct dcp_failure){.rank = rank, .kind = kind, .bytes = bytes, .len = len};
    return 0;
}

static int
take_records(const struct dcp_span *records, uint32_t records_count,
             struct dcp_failure_list *ret_list, struct dcp_error *err)
{
    size_t count = 0;
    for (uint32_t i = 0; i < records_count; i++) {
        count += records[i].len != 0;
    }
    struct dcp_failure_list list = {0};
    list.items = dcp_malloc_array(count, sizeof *list.items);
    if (list.items == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "no memory for a list of %zu failures",
                             count);
    }
    for (uint32_t i = 0; i < records_count; i++) {
        if (records[i].len == 0) {
            continue;
        }
        int rc = dcp_failure_decode(i, &records[i], &list.items[list.count], err);
        if (rc != 0) {
            dcp_failure_list_clean_up(&list);
            return rc;
        }
        list.count++;
    }
    drop_echoes(&list);
    *ret_list = list;
    return 0;
}

int
dcp_failure_exchange(const struct dcp_comm *comm, const struct dcp_failure *mine,
                     struct dcp_failure_list *ret_list, struct dcp_error *err)
{
    struct dcp_buf record = {0};
    struct dcp_span *records = NULL;
    uint8_t *block = NULL;
    if (mine != NULL && mine->kind != DCP_FAILURE_NONE) {
        DCP_ASSERT(mine->len <= DCP_MAX_FAILURE_BYTES);
        dcp_buf_put_u8(&record, (uint8_t)mine->kind);
        dcp_buf_put(&record, mine->bytes, mine->len);
    }
    /* Without memory for its own record a rank still takes part: the others' failures matter. */
    size_t len = record.failed ? 0 : record.len;
    int rc = dcp_comm_all_gather_bytes(comm, record.data, len, &block, &records, err);
    if (rc == 0) {
        /* What the list says decides whether a load is tried again: a rank without memory for it
         * cannot go on, and its group is given up. */
        rc = take_records(records, comm->size, ret_list, err);
    }
    dcp_free(block);
    dcp_free(records);
    dcp_buf_clean_up(&record);
    return rc;
}

int
dcp_failure_list_copy(const struct dcp_failure_list *list, struct dcp_failure_list *ret_copy)
{
    struct dcp_failure_list copy = {.items = dcp_calloc(list->count, sizeof *copy.items)};

    if (copy.items == NULL) {
        return DCP_E_NOMEM;
    }
    for (size_t i = 0; i < list->count; i++) {
        const struct dcp_failure *from = &list->items[i];
        copy.items[i] = *from;
        copy.items[i].bytes = dcp_malloc(from->len);
        copy.count = i + 1;
        if (copy.items[i].bytes == NULL) {
            dcp_failure_list_clean_up(&copy);
            return DCP_E_NOMEM;
        }
        memcpy(copy.items[i].bytes, from->bytes, from->len);
    }
    *ret_copy = copy;
    return 0;
}

void
dcp_failure_list_clean_up(struct dcp_failure_list *list)
{
    if (list == NULL) {
        return;
    }
    for (size_t i = 0; i < list->count; i++) {
        dcp_free(list->items[i].bytes);
    }
    dcp_free(list->items);
    *list = (struct dcp_failure_list){0};
}
