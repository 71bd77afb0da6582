/*
 * pickle_values.c: memory, texts and errors of the pickle machine.
 *
 * The machine's arrays are sized from the length of the input before it starts and live on huge
 * pages where they may become large: with 4 KiB pages the first touch of that memory would cost as
 * much as running the whole pickle.  Larger ones are moved by their pages, so growing never holds
 * two.
 *
 * Per byte of input, torch's files need about 1.0 bytes of cells and 0.8 of memo.  Pickles can be
 * made that need forty times that; 8 and 4, and 4 of stack, are where they are refused.
 *
 * Threads: a machine belongs to one thread.
 */
#include "pickle_vm.h"

#include <stdio.h>

enum {
    FIRST_COUNT = 64,
    FIRST_STACK = 4096,
    ROOM_COUNT = 4096, /* values that any pickle may have, however short */
    MAPPED_FROM_BYTES = 1 << 20,
};

/* ---- arrays ---- */

static void
release(struct dcp_parray *array)
{
    switch (array->kind) {
    case DCP_PARRAY_BORROWED:
        break;
    case DCP_PARRAY_BLOCK:
        dcp_free(array->data);
        break;
    case DCP_PARRAY_MAPPED:
        dcp_unmap_huge(array->data, array->cap * sizeof *array->data);
        break;
    }
}

/* Gives an array room for `cap` values; false leaves it as it was. */
static bool
resize(struct dcp_parray *array, size_t cap, struct dcp_error *err)
{
    size_t old_bytes = array->cap * sizeof *array->data;
    size_t bytes = cap * sizeof *array->data;
    uint64_t *data = NULL;
    if (array->kind == DCP_PARRAY_MAPPED) {
        data = dcp_remap_huge(array->data, old_bytes, bytes, err);
    } else if (array->kind == DCP_PARRAY_BLOCK) {
        data = dcp_realloc(array->data, bytes);
    } else {
        /* Once and for all: what may become large is mapped from the start. */
        bool is_mapped = array->limit >= MAPPED_FROM_BYTES / sizeof *data;
        data = is_mapped ? dcp_map_huge(bytes, err) : dcp_malloc(bytes);
        if (data != NULL) {
            if (array->len != 0) {
                memcpy(data, array->data, array->len * sizeof *data);
            }
            release(array);
            array->kind = is_mapped ? DCP_PARRAY_MAPPED : DCP_PARRAY_BLOCK;
        }
    }
    if (data == NULL) {
        return false;
    }
    array->data = data;
    array->cap = cap;
    return true;
}

int
dcp_pickle_grow(struct dcp_pickle_vm *vm, struct dcp_parray *array, size_t count)
{
    if (array->limit != 0 && count > array->limit) {
        return dcp_pickle_unsupported(vm, "far more values than a file of this length has");
    }
    size_t cap = array->cap + array->cap / 4;
    cap = cap < FIRST_COUNT ? FIRST_COUNT : cap;
    cap = cap < count ? count : cap;
    if (array->limit != 0 && cap > array->limit) {
        cap = array->limit;
    }
    if (!resize(array, cap, vm->err)) {
        return dcp_error_set(vm->err, DCP_E_NOMEM, 0, NULL,
                             "reading a pickle: room for %zu values: out of memory", cap);
    }
    return 0;
}

int
dcp_pickle_reserve(struct dcp_pickle_vm *vm)
{
    size_t len = vm->len;
    vm->stack.limit = ROOM_COUNT + len / 2;
    vm->cells.limit = ROOM_COUNT + len;
    vm->memo.limit = ROOM_COUNT + len / 2;
    if (vm->stack.cap != 0) {
        return 0; /* scratch memory, for small pickles */
    }
    int rc = dcp_pickle_grow(vm, &vm->stack, dcp_min_u64(len + 1, FIRST_STACK));
    if (rc == 0) {
        rc = dcp_pickle_grow(vm, &vm->cells, len / 8 + len / 128 + 1);
    }
    return rc != 0 ? rc : dcp_pickle_grow(vm, &vm->memo, len / 10 + 1);
}

void
dcp_parray_clean_up(struct dcp_parray *array)
{
    release(array);
    *array = (struct dcp_parray){0};
}

/* ---- texts ---- */

struct dcp_span
dcp_p_text(const struct dcp_pickle_vm *vm, dcp_pvalue text)
{
    DCP_ASSERT(dcp_p_tag(text) == DCP_P_TEXT);
    size_t at = (size_t)dcp_p_payload(text);
    /* The machine checked that opcode, length and bytes are there. */
    unsigned width = vm->data[at] == 0x8C ? 1 : vm->data[at] == 'X' ? 4 : 8;
    uint64_t len = 0;
    for (unsigned i = 0; i < width; i++) {
        len |= (uint64_t)vm->data[at + 1 + i] << (8 * i);
    }
    DCP_ASSERT(at + 1 + width + len <= vm->len);
    return (struct dcp_span){.data = vm->data + at + 1 + width, .len = (size_t)len};
}

bool
dcp_p_text_is(const struct dcp_pickle_vm *vm, dcp_pvalue v, const char *text)
{
    return dcp_p_tag(v) == DCP_P_TEXT && dcp_span_is(dcp_p_text(vm, v), text);
}

uint64_t
dcp_p_sequence_count(const struct dcp_pickle_vm *vm, dcp_pvalue list_or_dict)
{
    DCP_ASSERT(dcp_p_tag(list_or_dict) == DCP_P_LIST || dcp_p_tag(list_or_dict) == DCP_P_DICT);
    uint64_t count = 0;
    uint64_t segment = vm->cells.data[dcp_p_payload(list_or_dict)];
    for (; segment != 0; segment = vm->cells.data[segment]) {
        count += vm->cells.data[segment + 1];
    }
    return count;
}

/* ---- errors ---- */

static int
report(struct dcp_pickle_vm *vm, int code, const char *what, const char *quoted)
{
    bool is_corrupt = code == DCP_E_CORRUPT;
    int rc = dcp_error_set(vm->err, code, 0, NULL, "reading a pickle, byte %zu of %zu: %s%s%s; %s",
                           vm->op_pos, vm->len, what, quoted[0] == 0 ? "" : ": ", quoted,
                           is_corrupt ? "the file is damaged, restore it from a copy"
                                      : "only Python's own reader may understand it");
    if (vm->err != NULL && vm->err->code == code && vm->err->offset_bytes == UINT64_MAX) {
        vm->err->offset_bytes = vm->op_pos;
    }
    return rc;
}

int
dcp_pickle_corrupt(struct dcp_pickle_vm *vm, const char *what)
{
    return report(vm, DCP_E_CORRUPT, what, "");
}

int
dcp_pickle_unsupported(struct dcp_pickle_vm *vm, const char *what)
{
    return report(vm, DCP_E_UNSUPPORTED, what, "");
}

size_t
dcp_pickle_quote(char out[DCP_QUOTE_BYTES], size_t used, struct dcp_span text)
{
    for (size_t i = 0; i < text.len && used < DCP_QUOTE_BYTES - 1; i++) {
        uint8_t byte = text.data[i];
        out[used++] = byte >= 0x20 && byte < 0x7F ? (char)byte : '?';
    }
    out[used] = 0;
    return used;
}

int
dcp_pickle_unsupported_text(struct dcp_pickle_vm *vm, const char *what, struct dcp_span text)
{
    char quoted[DCP_QUOTE_BYTES];
    (void)dcp_pickle_quote(quoted, 0, text);
    return report(vm, DCP_E_UNSUPPORTED, what, quoted);
}

static const char unknown_global[] = "a global that is not on the list";

static void
quote_global(char out[DCP_QUOTE_BYTES], struct dcp_span module, struct dcp_span name)
{
    size_t used = dcp_pickle_quote(out, 0, module);
    used = dcp_pickle_quote(out, used, (struct dcp_span){(const uint8_t *)".", 1});
    (void)dcp_pickle_quote(out, used, name);
}

int
dcp_pickle_unknown_global(struct dcp_pickle_vm *vm, struct dcp_span module, struct dcp_span name)
{
    char quoted[DCP_QUOTE_BYTES];
    quote_global(quoted, module, name);
    return report(vm, DCP_E_UNSUPPORTED, unknown_global, quoted);
}

/* ---- foreign values ---- */

static dcp_pvalue
note(struct dcp_pickle_vm *vm, const char *what, const char *quoted)
{
    if (vm->note[0] == 0) {
        (void)snprintf(vm->note, sizeof vm->note, "byte %zu of %zu: %s%s%s", vm->op_pos, vm->len,
                       what, quoted[0] == 0 ? "" : ": ", quoted);
    }
    return dcp_p_make(DCP_P_FOREIGN, 0);
}

dcp_pvalue
dcp_pickle_foreign(struct dcp_pickle_vm *vm, const char *what, struct dcp_span text)
{
    char quoted[DCP_QUOTE_BYTES];
    (void)dcp_pickle_quote(quoted, 0, text);
    return note(vm, what, quoted);
}

dcp_pvalue
dcp_pickle_foreign_global(struct dcp_pickle_vm *vm, struct dcp_span module, struct dcp_span name)
{
    char quoted[DCP_QUOTE_BYTES];
    quote_global(quoted, module, name);
    return note(vm, unknown_global, quoted);
}

void
dcp_pickle_poison(struct dcp_pickle_vm *vm, dcp_pvalue object)
{
    uint32_t count = vm->dialect->classes[dcp_p_class(object)].fields_count;
    for (uint32_t i = 0; i < count; i++) {
        vm->cells.data[dcp_p_arg(object) + i] = dcp_p_make(DCP_P_FOREIGN, 0);
    }
}
