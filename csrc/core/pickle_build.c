/*
 * pickle_build.c: the opcodes of the pickle machine that put values together.
 *
 * Built for `.metadata`, whose bulk is small objects: NEWOBJ, an empty dict, two to four items,
 * SETITEMS, BUILD.  When SETITEMS finds a fresh dict above an object and BUILD behind it, the items
 * go straight into the object's cells; the dict, which nothing can reach any more, is used again
 * for the next object.  Its memo number is retired: a pickle that fetches it all the same is
 * refused.  Attributes are found by the position of their memoised name, without comparing text.
 * torch.Size's argument, a tuple in a tuple, is one tag more and no memory.
 *
 * Everything lives in one array of cells: tuples as [count << 3 | flags][values], lists and dicts
 * as [first segment][last segment, or the memo while it is empty], segments as
 * [next][count][values], objects as their attributes.  Cell 0 is the empty tuple, so 0 can mean
 * "none" for all the others.  Cells are named by number, as the array moves when it grows.
 *
 * Threads: a machine belongs to one thread.
 */
#include "pickle_machine.h"

enum { SEGMENT_HEAD = 2 };

/* ---- containers ---- */

int
dcp_op_pop(struct dcp_pickle_vm *vm)
{
    if (vm->marks_count != 0 && vm->stack.len == dcp_pm_fence(vm)) {
        vm->marks_count--; /* as Python does */
        return 0;
    }
    if (dcp_pm_lacks(vm, 1)) {
        return dcp_pm_underflow(vm);
    }
    vm->stack.len--;
    return 0;
}

/* Replaces the values from `base` on by a tuple of them. */
static inline int
make_tuple(struct dcp_pickle_vm *vm, size_t base)
{
    size_t count = vm->stack.len - base;
    uint64_t cell = 0;
    if (count != 0) {
        int rc = dcp_pm_take_cells(vm, count + 1, &cell);
        if (rc != 0) {
            return rc;
        }
        uint64_t flags = DCP_P_ALL_UINTS | DCP_P_ALL_INTS_OR_TEXTS | DCP_P_ALL_TEXTS;
        for (size_t i = 0; i < count; i++) {
            dcp_pvalue v = vm->stack.data[base + i];
            vm->cells.data[cell + 1 + i] = v;
            if (dcp_p_tag(v) == DCP_P_INT) {
                flags &= dcp_p_int(v) < 0 ? DCP_P_ALL_INTS_OR_TEXTS
                                          : DCP_P_ALL_INTS_OR_TEXTS | DCP_P_ALL_UINTS;
            } else {
                flags &= dcp_p_tag(v) == DCP_P_TEXT ? DCP_P_ALL_INTS_OR_TEXTS | DCP_P_ALL_TEXTS : 0;
            }
        }
        vm->cells.data[cell] = (uint64_t)count << 3 | flags;
    }
    vm->stack.len = base;
    return dcp_pm_push(vm, dcp_p_make(DCP_P_TUPLE, cell));
}

int
dcp_op_tuple(struct dcp_pickle_vm *vm)
{
    size_t base = 0;
    int rc = dcp_pm_pop_mark(vm, &base);
    return rc != 0 ? rc : make_tuple(vm, base);
}

int
dcp_op_tuple_of(struct dcp_pickle_vm *vm, size_t count)
{
    if (dcp_pm_lacks(vm, count)) {
        return dcp_pm_underflow(vm);
    }
    if (count == 1 && dcp_p_tag(dcp_pm_top(vm, 0)) == DCP_P_TUPLE) {
        vm->stack.data[vm->stack.len - 1] =
            dcp_p_make(DCP_P_TUPLE1, dcp_p_payload(dcp_pm_top(vm, 0)));
        return 0;
    }
    return make_tuple(vm, vm->stack.len - count);
}

int
dcp_op_sequence(struct dcp_pickle_vm *vm, enum dcp_ptag tag)
{
    uint64_t cell = vm->free_dict;
    if (tag == DCP_P_DICT && cell != 0) {
        vm->free_dict = vm->cells.data[cell];
    } else {
        int rc = dcp_pm_take_cells(vm, DCP_SEQUENCE_CELLS, &cell);
        if (rc != 0) {
            return rc;
        }
    }
    memset(vm->cells.data + cell, 0, DCP_SEQUENCE_CELLS * sizeof *vm->cells.data);
    return dcp_pm_push(vm, dcp_p_make(tag, cell));
}

/* Moves the values from `base` on into a list or dict. */
static int
append(struct dcp_pickle_vm *vm, dcp_pvalue sequence, size_t base)
{
    size_t count = vm->stack.len - base;
    if (count == 0) {
        return 0;
    }
    uint64_t segment = 0;
    int rc = dcp_pm_take_cells(vm, SEGMENT_HEAD + count, &segment);
    if (rc != 0) {
        return rc;
    }
    uint64_t *cells = vm->cells.data;
    cells[segment] = 0;
    cells[segment + 1] = count;
    memcpy(cells + segment + SEGMENT_HEAD, vm->stack.data + base, count * sizeof *cells);
    uint64_t *head = cells + dcp_p_payload(sequence);
    if (head[DCP_SEQUENCE_FIRST] == 0) {
        head[DCP_SEQUENCE_FIRST] = segment;
    } else {
        cells[head[DCP_SEQUENCE_LAST]] = segment;
    }
    head[DCP_SEQUENCE_LAST] = segment;
    vm->stack.len = base;
    return 0;
}

/* Appends what lies above the list at base - 1. */
static int
append_items(struct dcp_pickle_vm *vm, size_t base)
{
    if (base <= dcp_pm_fence(vm)) {
        return dcp_pm_underflow(vm);
    }
    dcp_pvalue list = vm->stack.data[base - 1];
    if (dcp_p_tag(list) == DCP_P_FOREIGN) {
        vm->stack.len = base;
        return 0;
    }
    if (dcp_p_tag(list) != DCP_P_LIST) {
        return dcp_pickle_corrupt(vm, "items are appended to what is no list");
    }
    return append(vm, list, base);
}

int
dcp_op_append(struct dcp_pickle_vm *vm)
{
    return dcp_pm_lacks(vm, 2) ? dcp_pm_underflow(vm) : append_items(vm, vm->stack.len - 1);
}

int
dcp_op_appends(struct dcp_pickle_vm *vm)
{
    size_t base = 0;
    int rc = dcp_pm_pop_mark(vm, &base);
    return rc != 0 ? rc : append_items(vm, base);
}

int
dcp_op_frozenset(struct dcp_pickle_vm *vm)
{
    size_t base = 0;
    int rc = dcp_pm_pop_mark(vm, &base);
    if (rc != 0) {
        return rc;
    }
    vm->stack.len = base;
    return dcp_pm_push(vm, dcp_p_make(DCP_P_FOREIGN, 0));
}

/* ---- objects ---- */

/* What an attribute is to an object. */
enum { FIELD_SET = 0, FIELD_STRANGE = 1 /* the object is not what the dialect knows */ };

/* The first time that a text stands for an attribute of this class. */
static int __attribute__((noinline))
set_new_field(struct dcp_pickle_vm *vm, dcp_pvalue object, dcp_pvalue key, dcp_pvalue value)
{
    uint32_t class_id = dcp_p_class(object);
    const struct dcp_pclass *class = &vm->dialect->classes[class_id];
    if (dcp_p_tag(key) != DCP_P_TEXT) {
        return dcp_pickle_corrupt(vm, "an attribute's name is no text");
    }
    for (uint32_t i = 0; i < class->fields_count; i++) {
        if (dcp_p_text_is(vm, key, class->fields[i])) {
            vm->keys_seen[class_id][i] = key;
            vm->cells.data[dcp_p_arg(object) + i] = value;
            return FIELD_SET;
        }
    }
    (void)dcp_pickle_foreign(vm, "an attribute that is not torch's own", dcp_p_text(vm, key));
    return class->is_open ? FIELD_SET : FIELD_STRANGE;
}

/* FIELD_SET, FIELD_STRANGE or a negative code. */
static inline int
set_field(struct dcp_pickle_vm *vm, dcp_pvalue object, dcp_pvalue key, dcp_pvalue value)
{
    uint32_t class_id = dcp_p_class(object);
    uint32_t count = vm->dialect->classes[class_id].fields_count;
    const dcp_pvalue *seen = vm->keys_seen[class_id];
    for (uint32_t i = 0; i < count; i++) {
        if (seen[i] == key) {
            vm->cells.data[dcp_p_arg(object) + i] = value;
            return FIELD_SET;
        }
    }
    return set_new_field(vm, object, key, value);
}

static inline bool
has_fields(const struct dcp_pickle_vm *vm, dcp_pvalue v)
{
    return dcp_p_tag(v) == DCP_P_OBJECT && vm->dialect->classes[dcp_p_class(v)].fields != NULL;
}

/* Nobody but the stack and one memo number knows this dict, and it is empty. */
static inline bool
is_fresh_dict(const struct dcp_pickle_vm *vm, dcp_pvalue dict)
{
    const uint64_t *head = vm->cells.data + dcp_p_payload(dict);
    return head[DCP_SEQUENCE_FIRST] == 0 && head[DCP_SEQUENCE_MEMO] != DCP_SHARED;
}

static inline void
retire_dict(struct dcp_pickle_vm *vm, dcp_pvalue dict)
{
    uint64_t *head = vm->cells.data + dcp_p_payload(dict);
    uint64_t number = head[DCP_SEQUENCE_MEMO];
    if (number != 0 && vm->memo.data[number - 1] == dict) {
        vm->memo.data[number - 1] = dcp_p_make(DCP_P_RETIRED, 0);
    }
    head[0] = vm->free_dict;
    vm->free_dict = dcp_p_payload(dict);
}

/* Puts keys and values from `base` on into the dict below them, or into the object below that. */
static inline int
set_items(struct dcp_pickle_vm *vm, size_t base)
{
    size_t floor = dcp_pm_fence(vm);
    if (base <= floor) {
        return dcp_pm_underflow(vm);
    }
    dcp_pvalue dict = vm->stack.data[base - 1];
    if (dcp_p_tag(dict) == DCP_P_FOREIGN) {
        vm->stack.len = base;
        return 0;
    }
    if (dcp_p_tag(dict) != DCP_P_DICT || ((vm->stack.len - base) & 1) != 0) {
        return dcp_pickle_corrupt(vm, "keys and values are put into what is no dict");
    }
    bool is_state = vm->pos < vm->len && vm->data[vm->pos] == DCP_OP_BUILD && base >= floor + 2 &&
                    has_fields(vm, vm->stack.data[base - 2]) && is_fresh_dict(vm, dict);
    if (!is_state) {
        return append(vm, dict, base);
    }
    dcp_pvalue object = vm->stack.data[base - 2];
    bool is_strange = false;
    for (size_t i = base; i < vm->stack.len; i += 2) {
        int rc = set_field(vm, object, vm->stack.data[i], vm->stack.data[i + 1]);
        if (rc < 0) {
            return rc;
        }
        is_strange = is_strange || rc == FIELD_STRANGE;
    }
    if (is_strange) {
        dcp_pickle_poison(vm, object);
    }
    retire_dict(vm, dict);
    vm->pos++;
    vm->stack.len = base - 1;
    return 0;
}

int
dcp_op_setitem(struct dcp_pickle_vm *vm)
{
    return dcp_pm_lacks(vm, 3) ? dcp_pm_underflow(vm) : set_items(vm, vm->stack.len - 2);
}

int
dcp_op_setitems(struct dcp_pickle_vm *vm)
{
    size_t base = 0;
    int rc = dcp_pm_pop_mark(vm, &base);
    return rc != 0 ? rc : set_items(vm, base);
}

/* Attributes from a dict that is more than one object's, or was filled in several steps. */
static int
set_fields(struct dcp_pickle_vm *vm, dcp_pvalue object, dcp_pvalue dict)
{
    struct dcp_p_iter it = dcp_p_iter_of(vm, dict);
    bool is_strange = false;
    dcp_pvalue key;
    while ((key = dcp_p_next(vm, &it)) != DCP_P_UNSET) {
        int rc = set_field(vm, object, key, dcp_p_next(vm, &it));
        if (rc < 0) {
            return rc;
        }
        is_strange = is_strange || rc == FIELD_STRANGE;
    }
    if (is_strange) {
        dcp_pickle_poison(vm, object);
    }
    return 0;
}

int
dcp_op_build(struct dcp_pickle_vm *vm)
{
    if (dcp_pm_lacks(vm, 2)) {
        return dcp_pm_underflow(vm);
    }
    dcp_pvalue state = dcp_pm_top(vm, 0);
    dcp_pvalue object = dcp_pm_top(vm, 1);
    vm->stack.len--;
    if (dcp_p_tag(object) == DCP_P_FOREIGN) {
        return 0;
    }
    if (has_fields(vm, object) && dcp_p_tag(state) == DCP_P_DICT) {
        return set_fields(vm, object, state);
    }
    if (vm->dialect->build == NULL || dcp_p_tag(object) != DCP_P_OBJECT) {
        return dcp_pickle_unsupported(vm, "a state for what has none");
    }
    return vm->dialect->build(vm, object, state);
}

/* Replaces the class and `args_count` values above it by what only Python could make of them. */
static int
make_foreign_object(struct dcp_pickle_vm *vm, size_t args_count)
{
    dcp_pvalue class = dcp_pm_top(vm, args_count);
    if (dcp_p_tag(class) == DCP_P_GLOBAL) {
        const char *name = vm->dialect->classes[dcp_p_class(class)].name;
        class = dcp_pickle_foreign(vm, "an object made in a way that torch does not use",
                                   (struct dcp_span){(const uint8_t *)name, strlen(name)});
    } else if (dcp_p_tag(class) != DCP_P_FOREIGN) {
        return dcp_pickle_corrupt(vm, "an object of what is no class");
    }
    vm->stack.len -= args_count;
    vm->stack.data[vm->stack.len - 1] = class;
    return 0;
}

int
dcp_op_newobj(struct dcp_pickle_vm *vm)
{
    if (dcp_pm_lacks(vm, 2)) {
        return dcp_pm_underflow(vm);
    }
    dcp_pvalue class = dcp_pm_top(vm, 1);
    if (dcp_p_tag(class) != DCP_P_GLOBAL || !vm->dialect->classes[dcp_p_class(class)].is_object ||
        dcp_pm_top(vm, 0) != dcp_p_make(DCP_P_TUPLE, 0)) {
        return make_foreign_object(vm, 1);
    }
    uint32_t count = vm->dialect->classes[dcp_p_class(class)].fields_count;
    uint64_t cell = 0;
    int rc = dcp_pm_take_cells(vm, count, &cell);
    if (rc != 0) {
        return rc;
    }
    for (uint32_t i = 0; i < count; i++) {
        vm->cells.data[cell + i] = DCP_P_UNSET;
    }
    vm->stack.len--;
    vm->stack.data[vm->stack.len - 1] = dcp_p_make_class(DCP_P_OBJECT, dcp_p_class(class), cell);
    return 0;
}

int
dcp_op_newobj_ex(struct dcp_pickle_vm *vm)
{
    return dcp_pm_lacks(vm, 3) ? dcp_pm_underflow(vm) : make_foreign_object(vm, 2);
}

int
dcp_op_reduce(struct dcp_pickle_vm *vm)
{
    if (dcp_pm_lacks(vm, 2)) {
        return dcp_pm_underflow(vm);
    }
    dcp_pvalue args = dcp_pm_top(vm, 0);
    dcp_pvalue callable = dcp_pm_top(vm, 1);
    dcp_pvalue result = callable;
    int rc = 0;
    if (dcp_p_tag(callable) == DCP_P_GLOBAL && dcp_p_is_tuple(args)) {
        rc = vm->dialect->reduce(vm, callable, args, &result);
    } else if (dcp_p_tag(callable) != DCP_P_FOREIGN) {
        rc = dcp_pickle_corrupt(vm, "a call of what cannot be called");
    }
    if (rc == 0) {
        vm->stack.len--;
        vm->stack.data[vm->stack.len - 1] = result;
    }
    return rc;
}

int
dcp_op_persistent(struct dcp_pickle_vm *vm)
{
    if (dcp_pm_lacks(vm, 1)) {
        return dcp_pm_underflow(vm);
    }
    if (vm->dialect->persistent == NULL) {
        return dcp_pickle_unsupported(vm, "a persistent id");
    }
    return vm->dialect->persistent(vm, dcp_pm_top(vm, 0), &vm->stack.data[vm->stack.len - 1]);
}
