/*
 * pickle_vm.c: the pickle machine: one opcode after the other over a stack of values.
 *
 * This half holds the loop, scalars, the memo and globals; pickle_build.c puts values together and
 * explains how they lie in memory.
 *
 * The checks: opcodes against the end of the input, pops against the last mark, numbers of the
 * memo against the input's length (a pickler numbers densely), marks against DCP_MAX_DEPTH.
 *
 * Threads: a machine belongs to one thread.
 */
#include "pickle_vm.h"

#include "pickle_machine.h"

enum {
    MIN_PROTOCOL = 2,
    MAX_PROTOCOL = 5,
};

#define INT60_MAX ((INT64_C(1) << 59) - 1)

/* Opcodes of Python's list that no file of torch uses. */
static const char other_ops[] = "2FILSTUVdgilopP\x82\x83\x84\x97\x98";

/* ---- input ---- */

int
dcp_pm_underflow(struct dcp_pickle_vm *vm)
{
    return dcp_pickle_corrupt(vm, "an opcode finds too few values on the stack");
}

/* The next `width` bytes as a little-endian number. */
static inline int
take_number(struct dcp_pickle_vm *vm, unsigned width, uint64_t *ret)
{
    if (vm->len - vm->pos < width) {
        return dcp_pickle_corrupt(vm, "the file ends inside an opcode");
    }
    uint64_t v = 0;
    for (unsigned i = 0; i < width; i++) {
        v |= (uint64_t)vm->data[vm->pos + i] << (8 * i);
    }
    vm->pos += width;
    *ret = v;
    return 0;
}

static inline int
skip_bytes(struct dcp_pickle_vm *vm, uint64_t count)
{
    if (count > vm->len - vm->pos) {
        return dcp_pickle_corrupt(vm, "a text is longer than the rest of the file");
    }
    vm->pos += (size_t)count;
    return 0;
}

/* ---- frame and scalars ---- */

static int
op_proto(struct dcp_pickle_vm *vm)
{
    uint64_t version = 0;
    int rc = take_number(vm, 1, &version);
    if (rc == 0 && (version < MIN_PROTOCOL || version > MAX_PROTOCOL)) {
        rc = dcp_pickle_unsupported(vm, "a pickle protocol other than 2 to 5");
    }
    return rc;
}

static int
op_frame(struct dcp_pickle_vm *vm)
{
    uint64_t bytes = 0;
    int rc = take_number(vm, 8, &bytes);
    if (rc == 0 && bytes > vm->len - vm->pos) {
        rc = dcp_pickle_corrupt(vm, "a frame is longer than the rest of the file");
    }
    return rc;
}

static inline int
op_text(struct dcp_pickle_vm *vm, unsigned width, enum dcp_ptag tag)
{
    uint64_t len = 0;
    int rc = take_number(vm, width, &len);
    if (rc == 0) {
        rc = skip_bytes(vm, len);
    }
    return rc != 0 ? rc : dcp_pm_push(vm, dcp_p_make(tag, vm->op_pos));
}

static int
op_float(struct dcp_pickle_vm *vm)
{
    int rc = skip_bytes(vm, sizeof(double));
    return rc != 0 ? rc : dcp_pm_push(vm, dcp_p_make(DCP_P_OPAQUE, vm->op_pos));
}

static inline int
push_int(struct dcp_pickle_vm *vm, int64_t v)
{
    return dcp_pm_push(vm, dcp_p_make(DCP_P_INT, (uint64_t)v));
}

static inline int
op_uint(struct dcp_pickle_vm *vm, unsigned width)
{
    uint64_t v = 0;
    int rc = take_number(vm, width, &v);
    return rc != 0 ? rc : push_int(vm, width == 4 ? (int32_t)(uint32_t)v : (int64_t)v);
}

static int
op_long(struct dcp_pickle_vm *vm, unsigned width_bytes)
{
    uint64_t width = 0;
    int rc = take_number(vm, width_bytes, &width);
    if (rc != 0) {
        return rc;
    }
    if (width == 0) {
        return push_int(vm, 0);
    }
    if (width > 8) {
        rc = skip_bytes(vm, width);
        return rc != 0 ? rc : dcp_pm_push(vm, dcp_p_make(DCP_P_OPAQUE, vm->op_pos));
    }
    uint64_t bits = 0;
    rc = take_number(vm, (unsigned)width, &bits);
    if (rc != 0) {
        return rc;
    }
    unsigned unused = 64 - 8 * (unsigned)width;
    int64_t v = (int64_t)(bits << unused) >> unused;
    if (v > INT60_MAX || v < -INT60_MAX) {
        return dcp_pm_push(vm, dcp_p_make(DCP_P_OPAQUE, vm->op_pos));
    }
    return push_int(vm, v);
}

/* ---- memo ---- */

/* Makes the memo long enough for a number that does not follow the last one. */
static int __attribute__((noinline))
stretch_memo(struct dcp_pickle_vm *vm, uint64_t number)
{
    struct dcp_parray *memo = &vm->memo;
    if (number > vm->len) {
        return dcp_pickle_corrupt(vm, "a memo number beyond the length of the file");
    }
    if (number >= memo->cap) {
        int rc = dcp_pickle_grow(vm, memo, (size_t)number + 1);
        if (rc != 0) {
            return rc;
        }
    }
    memset(memo->data + memo->len, 0, ((size_t)number + 1 - memo->len) * sizeof *memo->data);
    memo->len = (size_t)number + 1;
    return 0;
}

static inline int
memo_put(struct dcp_pickle_vm *vm, uint64_t number)
{
    if (dcp_pm_lacks(vm, 1)) {
        return dcp_pm_underflow(vm);
    }
    struct dcp_parray *memo = &vm->memo;
    if (number == memo->len && number < memo->cap) {
        memo->data[memo->len++] = DCP_P_UNSET;
    } else if (number >= memo->len) {
        int rc = stretch_memo(vm, number);
        if (rc != 0) {
            return rc;
        }
    }
    vm->memo_count += memo->data[number] == DCP_P_UNSET;
    dcp_pvalue v = dcp_pm_top(vm, 0);
    memo->data[number] = v;
    if (dcp_p_tag(v) == DCP_P_DICT) {
        uint64_t *head = vm->cells.data + dcp_p_payload(v);
        if (head[DCP_SEQUENCE_FIRST] == 0) {
            head[DCP_SEQUENCE_MEMO] = head[DCP_SEQUENCE_MEMO] == 0 ? number + 1 : DCP_SHARED;
        }
    }
    return 0;
}

static int
op_put(struct dcp_pickle_vm *vm, unsigned width)
{
    uint64_t number = 0;
    int rc = take_number(vm, width, &number);
    return rc != 0 ? rc : memo_put(vm, number);
}

static inline int
op_get(struct dcp_pickle_vm *vm, unsigned width)
{
    uint64_t number = 0;
    int rc = take_number(vm, width, &number);
    if (rc != 0) {
        return rc;
    }
    dcp_pvalue v = number < vm->memo.len ? vm->memo.data[number] : DCP_P_UNSET;
    if (v == DCP_P_UNSET) {
        return dcp_pickle_corrupt(vm, "a memo number that was never given");
    }
    if (dcp_p_tag(v) == DCP_P_RETIRED) {
        return dcp_pickle_unsupported(vm, "an object's attributes are used a second time");
    }
    if (dcp_p_tag(v) == DCP_P_DICT) {
        uint64_t *head = vm->cells.data + dcp_p_payload(v);
        if (head[DCP_SEQUENCE_FIRST] == 0) {
            head[DCP_SEQUENCE_MEMO] = DCP_SHARED;
        }
    }
    return dcp_pm_push(vm, v);
}

static int
op_mark(struct dcp_pickle_vm *vm)
{
    if (vm->marks_count == DCP_MAX_DEPTH) {
        return dcp_pickle_unsupported(vm, "values nested too deeply");
    }
    vm->marks[vm->marks_count++] = vm->stack.len;
    return 0;
}

static int
op_pop_mark(struct dcp_pickle_vm *vm)
{
    size_t base = 0;
    int rc = dcp_pm_pop_mark(vm, &base);
    if (rc == 0) {
        vm->stack.len = base;
    }
    return rc;
}

/* ---- runs of opcodes ---- */

/* What torch's own pickler writes for each object and each torch.Size.  Running these opcodes in a
 * row, each by its own function, saves the loop's branch on five of six. */
static const uint8_t object_run[] = {DCP_OP_NEWOBJ, DCP_OP_MEMOIZE, DCP_OP_EMPTY_DICT,
                                     DCP_OP_MEMOIZE, DCP_OP_MARK};
static const uint8_t size_run[] = {DCP_OP_MEMOIZE, DCP_OP_TUPLE1, DCP_OP_MEMOIZE, DCP_OP_REDUCE,
                                   DCP_OP_MEMOIZE};

static inline int
op_empty_tuple(struct dcp_pickle_vm *vm)
{
    int rc = dcp_pm_push(vm, dcp_p_make(DCP_P_TUPLE, 0));
    if (rc != 0 || !dcp_pm_follows(vm, object_run, sizeof object_run)) {
        return rc;
    }
    vm->pos += sizeof object_run;
    rc = dcp_op_newobj(vm);
    if (rc == 0) {
        rc = memo_put(vm, vm->memo_count);
    }
    if (rc == 0) {
        rc = dcp_op_sequence(vm, DCP_P_DICT);
    }
    if (rc == 0) {
        rc = memo_put(vm, vm->memo_count);
    }
    return rc != 0 ? rc : op_mark(vm);
}

static inline int
op_tuple_of(struct dcp_pickle_vm *vm, size_t count)
{
    int rc = dcp_op_tuple_of(vm, count);
    if (rc != 0 || !dcp_pm_follows(vm, size_run, sizeof size_run)) {
        return rc;
    }
    vm->pos += sizeof size_run;
    rc = memo_put(vm, vm->memo_count);
    if (rc == 0) {
        rc = dcp_op_tuple_of(vm, 1);
    }
    if (rc == 0) {
        rc = memo_put(vm, vm->memo_count);
    }
    if (rc == 0) {
        rc = dcp_op_reduce(vm);
    }
    return rc != 0 ? rc : memo_put(vm, vm->memo_count);
}

/* ---- globals ---- */

static int
take_line(struct dcp_pickle_vm *vm, struct dcp_span *ret)
{
    const uint8_t *start = vm->data + vm->pos;
    const uint8_t *end = memchr(start, '\n', vm->len - vm->pos);
    if (end == NULL) {
        return dcp_pickle_corrupt(vm, "the file ends inside the name of a global");
    }
    *ret = (struct dcp_span){start, (size_t)(end - start)};
    vm->pos += ret->len + 1;
    return 0;
}

static int
op_global(struct dcp_pickle_vm *vm)
{
    struct dcp_span module, name;
    dcp_pvalue found = DCP_P_UNSET;
    int rc = take_line(vm, &module);
    if (rc == 0) {
        rc = take_line(vm, &name);
    }
    if (rc == 0) {
        rc = vm->dialect->find_global(vm, module, name, &found);
    }
    return rc != 0 ? rc : dcp_pm_push(vm, found);
}

static int
op_stack_global(struct dcp_pickle_vm *vm)
{
    if (dcp_pm_lacks(vm, 2)) {
        return dcp_pm_underflow(vm);
    }
    if (dcp_p_tag(dcp_pm_top(vm, 0)) != DCP_P_TEXT || dcp_p_tag(dcp_pm_top(vm, 1)) != DCP_P_TEXT) {
        return dcp_pickle_corrupt(vm, "a global whose name is no text");
    }
    dcp_pvalue found = DCP_P_UNSET;
    struct dcp_span module = dcp_p_text(vm, dcp_pm_top(vm, 1));
    struct dcp_span name = dcp_p_text(vm, dcp_pm_top(vm, 0));
    int rc = vm->dialect->find_global(vm, module, name, &found);
    if (rc == 0) {
        vm->stack.len--;
        vm->stack.data[vm->stack.len - 1] = found;
    }
    return rc;
}

/* ---- the loop ---- */

static int
op_stop(struct dcp_pickle_vm *vm)
{
    vm->done = true;
    return dcp_pm_lacks(vm, 1) ? dcp_pm_underflow(vm) : 0;
}

static int
op_other(struct dcp_pickle_vm *vm, uint8_t op)
{
    if (op != 0 && memchr(other_ops, op, sizeof other_ops - 1) != NULL) {
        return dcp_pickle_unsupported(vm, "an opcode that torch's files do not use");
    }
    return dcp_pickle_corrupt(vm, "a byte that is no opcode");
}

/* clang-format off */
static inline int
run_op(struct dcp_pickle_vm *vm, uint8_t op)
{
    switch (op) {
    case DCP_OP_BINGET:           return op_get(vm, 1);
    case DCP_OP_MEMOIZE:          return memo_put(vm, vm->memo_count);
    case DCP_OP_BININT1:          return op_uint(vm, 1);
    case DCP_OP_LONG_BINGET:      return op_get(vm, 4);
    case DCP_OP_BININT2:          return op_uint(vm, 2);
    case DCP_OP_BININT:           return op_uint(vm, 4);
    case DCP_OP_MARK:             return op_mark(vm);
    case DCP_OP_EMPTY_TUPLE:      return op_empty_tuple(vm);
    case DCP_OP_NEWOBJ:           return dcp_op_newobj(vm);
    case DCP_OP_EMPTY_DICT:       return dcp_op_sequence(vm, DCP_P_DICT);
    case DCP_OP_SETITEMS:         return dcp_op_setitems(vm);
    case DCP_OP_TUPLE1:           return op_tuple_of(vm, 1);
    case DCP_OP_TUPLE2:           return op_tuple_of(vm, 2);
    case DCP_OP_TUPLE3:           return op_tuple_of(vm, 3);
    case DCP_OP_REDUCE:           return dcp_op_reduce(vm);
    case DCP_OP_SHORT_BINUNICODE: return op_text(vm, 1, DCP_P_TEXT);
    case DCP_OP_BINUNICODE:       return op_text(vm, 4, DCP_P_TEXT);
    case DCP_OP_BINUNICODE8:      return op_text(vm, 8, DCP_P_TEXT);
    case DCP_OP_SHORT_BINBYTES:   return op_text(vm, 1, DCP_P_OPAQUE);
    case DCP_OP_BINBYTES:         return op_text(vm, 4, DCP_P_OPAQUE);
    case DCP_OP_BINPUT:           return op_put(vm, 1);
    case DCP_OP_LONG_BINPUT:      return op_put(vm, 4);
    case DCP_OP_NONE:             return dcp_pm_push(vm, dcp_p_make(DCP_P_NONE, 0));
    case DCP_OP_NEWTRUE:          return dcp_pm_push(vm, dcp_p_make(DCP_P_BOOL, 1));
    case DCP_OP_NEWFALSE:         return dcp_pm_push(vm, dcp_p_make(DCP_P_BOOL, 0));
    case DCP_OP_LONG1:            return op_long(vm, 1);
    case DCP_OP_LONG4:            return op_long(vm, 4);
    case DCP_OP_BINBYTES8:        return op_text(vm, 8, DCP_P_OPAQUE);
    case DCP_OP_BYTEARRAY8:       return op_text(vm, 8, DCP_P_OPAQUE);
    case DCP_OP_EMPTY_SET:        return dcp_pm_push(vm, dcp_p_make(DCP_P_FOREIGN, 0));
    case DCP_OP_ADDITEMS:         return dcp_op_appends(vm);
    case DCP_OP_FROZENSET:        return dcp_op_frozenset(vm);
    case DCP_OP_NEWOBJ_EX:        return dcp_op_newobj_ex(vm);
    case DCP_OP_POP_MARK:         return op_pop_mark(vm);
    case DCP_OP_BINFLOAT:         return op_float(vm);
    case DCP_OP_EMPTY_LIST:       return dcp_op_sequence(vm, DCP_P_LIST);
    case DCP_OP_TUPLE:            return dcp_op_tuple(vm);
    case DCP_OP_APPEND:           return dcp_op_append(vm);
    case DCP_OP_APPENDS:          return dcp_op_appends(vm);
    case DCP_OP_SETITEM:          return dcp_op_setitem(vm);
    case DCP_OP_BUILD:            return dcp_op_build(vm);
    case DCP_OP_STACK_GLOBAL:     return op_stack_global(vm);
    case DCP_OP_GLOBAL:           return op_global(vm);
    case DCP_OP_BINPERSID:        return dcp_op_persistent(vm);
    case DCP_OP_POP:              return dcp_op_pop(vm);
    case DCP_OP_PROTO:            return op_proto(vm);
    case DCP_OP_FRAME:            return op_frame(vm);
    case DCP_OP_STOP:             return op_stop(vm);
    default:                      return op_other(vm, op);
    }
}
/* clang-format on */

void
dcp_pickle_vm_init(struct dcp_pickle_vm *vm, const uint8_t *data, size_t len,
                   const struct dcp_pdialect *dialect, void *ctx, uint64_t *scratch,
                   size_t scratch_count, struct dcp_error *err)
{
    DCP_ASSERT(dialect->classes_count <= DCP_P_MAX_CLASSES);
    *vm = (struct dcp_pickle_vm){
        .data = data, .len = len, .dialect = dialect, .ctx = ctx, .err = err};
    if (scratch != NULL) {
        vm->stack = (struct dcp_parray){.data = scratch, .cap = scratch_count};
        vm->memo = (struct dcp_parray){.data = scratch + scratch_count, .cap = scratch_count};
        vm->cells = (struct dcp_parray){.data = scratch + 2 * scratch_count, .cap = scratch_count};
    }
}

int
dcp_pickle_vm_run(struct dcp_pickle_vm *vm, dcp_pvalue *ret_value)
{
    if (vm->len < 2 || vm->data[0] != DCP_OP_PROTO) {
        return dcp_pickle_corrupt(vm, "this is no pickle of protocol 2 or later");
    }
    uint64_t cell_0;
    int rc = dcp_pickle_reserve(vm);
    if (rc == 0) {
        rc = dcp_pm_take_cells(vm, 1, &cell_0);
    }
    if (rc != 0) {
        return rc;
    }
    vm->cells.data[0] = DCP_P_ALL_UINTS | DCP_P_ALL_INTS_OR_TEXTS | DCP_P_ALL_TEXTS;
    while (!vm->done) {
        vm->op_pos = vm->pos;
        if (vm->pos == vm->len) {
            return dcp_pickle_corrupt(vm, "the file ends before STOP");
        }
        rc = run_op(vm, vm->data[vm->pos++]);
        if (rc != 0) {
            return rc;
        }
    }
    *ret_value = dcp_pm_top(vm, 0);
    return 0;
}

void
dcp_pickle_vm_finish(struct dcp_pickle_vm *vm)
{
    dcp_parray_clean_up(&vm->stack);
    dcp_parray_clean_up(&vm->memo);
}

void
dcp_pickle_vm_clean_up(struct dcp_pickle_vm *vm)
{
    if (vm == NULL) {
        return;
    }
    dcp_pickle_vm_finish(vm);
    dcp_parray_clean_up(&vm->cells);
}
