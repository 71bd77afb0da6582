/*
 * pickle_values.c: memory, texts and errors of the pickle machine.
 *
 * The machine's arrays are sized from the length of the input before it starts and live on huge
 * pages when they are large: with 4 KiB pages the first touch of that memory would cost as much as
 * running the whole pickle.
 *
 * Threads: a machine belongs to one thread.
 */
#include "pickle_vm.h"

enum {
    FIRST_COUNT = 64,
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

int
dcp_parray_reserve(struct dcp_parray *array, size_t count, struct dcp_error *err)
{
    if (count <= array->cap) {
        return 0;
    }
    size_t cap = array->cap < FIRST_COUNT ? FIRST_COUNT : array->cap;
    while (cap < count) {
        if (cap > SIZE_MAX / 4 / sizeof *array->data) {
            return dcp_error_set(err, DCP_E_NOMEM, 0, NULL, "a pickle of %zu values", count);
        }
        cap *= 2;
    }
    struct dcp_parray grown = {.len = array->len, .cap = cap, .kind = DCP_PARRAY_BLOCK};
    if (cap * sizeof *grown.data >= MAPPED_FROM_BYTES) {
        grown.kind = DCP_PARRAY_MAPPED;
        grown.data = dcp_map_huge(cap * sizeof *grown.data, err);
    } else {
        grown.data = dcp_malloc_array(cap, sizeof *grown.data);
    }
    if (grown.data == NULL) {
        return dcp_error_set(err, DCP_E_NOMEM, 0, NULL,
                             "reading a pickle: room for %zu values: out of memory", cap);
    }
    if (array->len != 0) {
        memcpy(grown.data, array->data, array->len * sizeof *grown.data);
    }
    release(array);
    *array = grown;
    return 0;
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
    return vm->cells.data[dcp_p_payload(list_or_dict) + 2];
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

int
dcp_pickle_unknown_global(struct dcp_pickle_vm *vm, struct dcp_span module, struct dcp_span name)
{
    char quoted[DCP_QUOTE_BYTES];
    size_t used = dcp_pickle_quote(quoted, 0, module);
    used = dcp_pickle_quote(quoted, used, (struct dcp_span){(const uint8_t *)".", 1});
    (void)dcp_pickle_quote(quoted, used, name);
    return report(vm, DCP_E_UNSUPPORTED, "a global that is not on the list", quoted);
}
