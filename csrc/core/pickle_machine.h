/*
 * pickle_machine.h: the inlined parts that both halves of the pickle machine use.
 *
 * pickle_vm.c has the loop, scalars, the memo and globals; pickle_build.c tuples, lists, dicts and
 * objects.  Threads: a machine belongs to one thread.
 */
#ifndef DCP_PICKLE_MACHINE_H
#define DCP_PICKLE_MACHINE_H

#include "pickle_op.h"
#include "pickle_vm.h"

/* Cells of a list or dict: the first segment, then the last one; while there is none, the memo. */
enum {
    DCP_SEQUENCE_FIRST = 0,
    DCP_SEQUENCE_LAST = 1,
    DCP_SEQUENCE_MEMO = 1, /* 0: not memoised, number + 1, or DCP_SHARED */
    DCP_SEQUENCE_CELLS = 2,
};

#define DCP_SHARED UINT64_MAX

int dcp_pm_underflow(struct dcp_pickle_vm *vm);

static inline int
dcp_pm_push(struct dcp_pickle_vm *vm, dcp_pvalue v)
{
    if (vm->stack.len == vm->stack.cap) {
        int rc = dcp_pickle_grow(vm, &vm->stack, vm->stack.len + 1);
        if (rc != 0) {
            return rc;
        }
    }
    vm->stack.data[vm->stack.len++] = v;
    return 0;
}

/* The height that nothing may be popped below. */
static inline size_t
dcp_pm_fence(const struct dcp_pickle_vm *vm)
{
    return vm->marks_count == 0 ? 0 : vm->marks[vm->marks_count - 1];
}

static inline bool
dcp_pm_lacks(const struct dcp_pickle_vm *vm, size_t values)
{
    return vm->stack.len - dcp_pm_fence(vm) < values;
}

static inline dcp_pvalue
dcp_pm_top(const struct dcp_pickle_vm *vm, size_t depth)
{
    return vm->stack.data[vm->stack.len - 1 - depth];
}

static inline int
dcp_pm_take_cells(struct dcp_pickle_vm *vm, size_t count, uint64_t *ret_cell)
{
    if (vm->cells.cap - vm->cells.len < count) {
        int rc = dcp_pickle_grow(vm, &vm->cells, vm->cells.len + count);
        if (rc != 0) {
            return rc;
        }
    }
    *ret_cell = vm->cells.len;
    vm->cells.len += count;
    return 0;
}

static inline int
dcp_pm_pop_mark(struct dcp_pickle_vm *vm, size_t *ret_base)
{
    if (vm->marks_count == 0) {
        return dcp_pickle_corrupt(vm, "an opcode finds no MARK");
    }
    *ret_base = vm->marks[--vm->marks_count];
    return 0;
}

/* Whether these opcodes come next. */
static inline bool
dcp_pm_follows(const struct dcp_pickle_vm *vm, const void *ops, size_t count)
{
    return vm->len - vm->pos >= count && memcmp(vm->data + vm->pos, ops, count) == 0;
}

/* ---- pickle_build.c: one function per opcode (or family) ---- */

int dcp_op_pop(struct dcp_pickle_vm *vm);
int dcp_op_tuple(struct dcp_pickle_vm *vm);
/* TUPLE1 to TUPLE3. */
int dcp_op_tuple_of(struct dcp_pickle_vm *vm, size_t count);
/* EMPTY_LIST and EMPTY_DICT. */
int dcp_op_sequence(struct dcp_pickle_vm *vm, enum dcp_ptag tag);
int dcp_op_append(struct dcp_pickle_vm *vm);
int dcp_op_appends(struct dcp_pickle_vm *vm);
int dcp_op_setitem(struct dcp_pickle_vm *vm);
int dcp_op_setitems(struct dcp_pickle_vm *vm);
int dcp_op_build(struct dcp_pickle_vm *vm);
int dcp_op_newobj(struct dcp_pickle_vm *vm);
int dcp_op_newobj_ex(struct dcp_pickle_vm *vm);
/* FROZENSET: what lies above the mark becomes one foreign value. */
int dcp_op_frozenset(struct dcp_pickle_vm *vm);
int dcp_op_reduce(struct dcp_pickle_vm *vm);
int dcp_op_persistent(struct dcp_pickle_vm *vm);

#endif
