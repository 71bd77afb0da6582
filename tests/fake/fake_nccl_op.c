/*
 * fake_nccl_op.c: the operations of the fake NCCL as transfers between pairs of ranks.
 *
 * Every rank sends what another needs straight to it, itself included, and reduces what it got in
 * the order of the ranks: n * n copies, the same result everywhere, and nothing to choose.
 */
#include "fake_nccl.h"

#include <stdlib.h>
#include <string.h>

uint64_t
fake_type_bytes(int type)
{
    static const uint8_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return type >= 0 && type < (int)sizeof bytes ? bytes[type] : 0;
}

/* ---- reductions: sum, prod, max, min, avg of whole numbers and of float and double ---- */

#define REDUCE(name, ctype)                                                                        \
    static void reduce_##name(void *into, const void *from, uint64_t count, int op)                \
    {                                                                                              \
        ctype *a = into;                                                                           \
        const ctype *b = from;                                                                     \
        for (uint64_t i = 0; i < count; i++) {                                                     \
            switch (op) {                                                                          \
            case 1:                                                                                \
                a[i] = (ctype)(a[i] * b[i]);                                                       \
                break;                                                                             \
            case 2:                                                                                \
                a[i] = a[i] > b[i] ? a[i] : b[i];                                                  \
                break;                                                                             \
            case 3:                                                                                \
                a[i] = a[i] < b[i] ? a[i] : b[i];                                                  \
                break;                                                                             \
            default:                                                                               \
                a[i] = (ctype)(a[i] + b[i]);                                                       \
            }                                                                                      \
        }                                                                                          \
    }                                                                                              \
    static void divide_##name(void *into, uint64_t count, int by)                                  \
    {                                                                                              \
        ctype *a = into;                                                                           \
        for (uint64_t i = 0; i < count; i++) {                                                     \
            a[i] = (ctype)(a[i] / (ctype)by);                                                      \
        }                                                                                          \
    }

REDUCE(i8, int8_t)
REDUCE(u8, uint8_t)
REDUCE(i32, int32_t)
REDUCE(u32, uint32_t)
REDUCE(i64, int64_t)
REDUCE(u64, uint64_t)
REDUCE(f32, float)
REDUCE(f64, double)

static const struct {
    void (*reduce)(void *into, const void *from, uint64_t count, int op);
    void (*divide)(void *into, uint64_t count, int by);
} reductions[] = {
    {reduce_i8, divide_i8},
    {reduce_u8, divide_u8},
    {reduce_i32, divide_i32},
    {reduce_u32, divide_u32},
    {reduce_i64, divide_i64},
    {reduce_u64, divide_u64},
    {NULL, NULL},
    {reduce_f32, divide_f32},
    {reduce_f64, divide_f64},
};

/* `parts` has one image per rank. */
static int
reduce_parts(const struct fake_comm *comm, const struct fake_op *op, const uint8_t *parts)
{
    uint64_t bytes = op->count * fake_type_bytes(op->type);
    if (op->type >= (int)(sizeof reductions / sizeof reductions[0]) ||
        reductions[op->type].reduce == NULL || op->reduction > 4) {
        fake_note("no reduction %d of type %d here", op->reduction, op->type);
        return FAKE_INVALID_USAGE;
    }
    memcpy(op->recv, parts, bytes);
    for (int r = 1; r < comm->count; r++) {
        reductions[op->type].reduce(op->recv, parts + (uint64_t)r * bytes, op->count,
                                    op->reduction);
    }
    if (op->reduction == 4) {
        reductions[op->type].divide(op->recv, op->count, comm->count);
    }
    return 0;
}

/* ---- who sends what to whom ---- */

static bool
is_reduction(enum fake_kind kind)
{
    return kind == FAKE_ALL_REDUCE || kind == FAKE_REDUCE || kind == FAKE_REDUCE_SCATTER;
}

struct list {
    struct fake_transfer *items;
    size_t count;
};

static void
add(struct list *list, const struct fake_op *op, int peer, bool sends, const uint8_t *data)
{
    uint32_t root = op->kind == FAKE_P2P ? 0 : (uint32_t)op->root;
    list->items[list->count++] = (struct fake_transfer){
        .peer = peer,
        .sends = sends,
        .kind = op->kind,
        .what = (uint32_t)op->type | (uint32_t)op->reduction << 8 | root << 16,
        .data = (uint8_t *)data,
        .bytes = op->count * fake_type_bytes(op->type),
    };
}

/* `parts` is where the images of all ranks come to be reduced. */
static void
add_op(struct list *list, const struct fake_comm *comm, const struct fake_op *op, uint8_t *parts)
{
    uint64_t bytes = op->count * fake_type_bytes(op->type);
    bool is_root = comm->rank == op->root;
    if (op->kind == FAKE_P2P) {
        add(list, op, op->root, op->is_send, op->is_send ? op->send : op->recv);
        return;
    }
    for (int r = 0; r < comm->count; r++) {
        uint64_t at = (uint64_t)r * bytes;
        switch (op->kind) {
        case FAKE_REDUCE:
        case FAKE_GATHER:
            if (r == op->root) {
                add(list, op, r, true, op->send);
            }
            if (is_root) {
                add(list, op, r, false, (op->kind == FAKE_REDUCE ? parts : op->recv) + at);
            }
            break;
        case FAKE_BROADCAST:
        case FAKE_SCATTER:
            if (is_root) {
                add(list, op, r, true, op->send + (op->kind == FAKE_SCATTER ? at : 0));
            }
            if (r == op->root) {
                add(list, op, r, false, op->recv);
            }
            break;
        default: {
            bool cut = op->kind == FAKE_REDUCE_SCATTER || op->kind == FAKE_ALL_TO_ALL;
            add(list, op, r, true, op->send + (cut ? at : 0));
            add(list, op, r, false, (is_reduction(op->kind) ? parts : op->recv) + at);
        }
        }
    }
}

int
fake_run_ops(struct fake_comm *comm, const struct fake_op *ops, size_t count)
{
    struct list list = {calloc(count * 2 * (size_t)comm->count, sizeof *list.items), 0};
    uint8_t **parts = calloc(count, sizeof *parts);
    int rc = list.items == NULL || parts == NULL ? FAKE_SYSTEM : 0;
    for (size_t i = 0; rc == 0 && i < count; i++) {
        uint64_t bytes = ops[i].count * fake_type_bytes(ops[i].type);
        if (is_reduction(ops[i].kind)) {
            parts[i] = malloc((size_t)comm->count * bytes + 1);
            rc = parts[i] == NULL ? FAKE_SYSTEM : 0;
        }
        if (rc == 0) {
            add_op(&list, comm, &ops[i], parts[i]);
        }
    }
    if (rc == 0) {
        rc = fake_run_transfers(comm, list.items, list.count);
    }
    for (size_t i = 0; i < count && parts != NULL; i++) {
        bool receives = ops[i].kind != FAKE_REDUCE || comm->rank == ops[i].root;
        if (rc == 0 && parts[i] != NULL && receives) {
            rc = reduce_parts(comm, &ops[i], parts[i]);
        }
        free(parts[i]);
    }
    free(parts);
    free(list.items);
    if (rc != 0) {
        atomic_store(&comm->async_error, rc);
    }
    return rc;
}
