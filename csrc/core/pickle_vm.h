/*
 * pickle_vm.h: a machine that runs the pickles of torch, and no others.
 *
 * A pickle is a program; Python's machine calls whatever it names.  This one calls nothing: a
 * dialect lists the globals it knows and says what calling or filling them means.  What it does not
 * know it refuses by name, or lets stand as a FOREIGN value: calls of it, its items and its state
 * are stepped over, and the first such thing is noted.  The result is a graph of tagged 64-bit
 * values that the caller walks; it decides where a foreign value is in the way.
 *
 * Time is linear in the input, nothing recurses, and the arrays are bounded by the input's length
 * (pickle_values.c).  DCP_E_CORRUPT: no pickle, or a damaged one.  DCP_E_UNSUPPORTED: a pickle that
 * Python may still read.  Both give the byte offset.  Threads: a machine belongs to one thread.
 */
#ifndef DCP_PICKLE_VM_H
#define DCP_PICKLE_VM_H

#include <string.h>

#include "dcp_alloc.h"
#include "dcp_limits.h"

/* A value: the tag in the low 4 bits, the payload above. */
typedef uint64_t dcp_pvalue;

enum dcp_ptag {
    DCP_P_UNSET = 0, /* an attribute that was not set; never on the stack */
    DCP_P_NONE = 1,
    DCP_P_BOOL = 2,     /* payload 0 or 1 */
    DCP_P_INT = 3,      /* payload: 60-bit signed integer */
    DCP_P_TEXT = 4,     /* payload: position of its opcode in the input */
    DCP_P_OPAQUE = 5,   /* a float, bytes or huge integer: kept apart, never looked at */
    DCP_P_TUPLE = 6,    /* payload: cell of its header */
    DCP_P_TUPLE1 = 7,   /* a tuple that holds only the tuple at this cell; torch.Size's arguments */
    DCP_P_LIST = 8,     /* payload: cell of its sequence */
    DCP_P_DICT = 9,     /* likewise, keys and values in turn */
    DCP_P_GLOBAL = 10,  /* payload: argument << 8 | class */
    DCP_P_OBJECT = 11,  /* payload: cell of its attributes << 8 | class */
    DCP_P_CUSTOM = 12,  /* the dialect's own: argument << 8 | kind */
    DCP_P_RETIRED = 13, /* the memo of a dict that became an object's attributes */
    DCP_P_FOREIGN = 14, /* only Python could make it: absorbs whatever is put into it */
};

static inline enum dcp_ptag
dcp_p_tag(dcp_pvalue v)
{
    return (enum dcp_ptag)(v & 15);
}

static inline uint64_t
dcp_p_payload(dcp_pvalue v)
{
    return v >> 4;
}

static inline dcp_pvalue
dcp_p_make(enum dcp_ptag tag, uint64_t payload)
{
    return payload << 4 | (uint64_t)tag;
}

static inline int64_t
dcp_p_int(dcp_pvalue v)
{
    return (int64_t)v >> 4;
}

/* Class or kind, and argument, of globals, objects and custom values. */
static inline uint32_t
dcp_p_class(dcp_pvalue v)
{
    return (uint32_t)(v >> 4) & 0xFF;
}

static inline uint64_t
dcp_p_arg(dcp_pvalue v)
{
    return v >> 12;
}

static inline dcp_pvalue
dcp_p_make_class(enum dcp_ptag tag, uint32_t class_id, uint64_t arg)
{
    return dcp_p_make(tag, arg << 8 | class_id);
}

enum dcp_parray_kind { DCP_PARRAY_BORROWED, DCP_PARRAY_BLOCK, DCP_PARRAY_MAPPED };

/* A growing array of values. */
struct dcp_parray {
    uint64_t *data;
    size_t len, cap;
    size_t limit; /* values that the input's length allows; 0: any number */
    enum dcp_parray_kind kind;
};

enum { DCP_P_MAX_CLASSES = 16, DCP_P_MAX_FIELDS = 8, DCP_P_NOTE_BYTES = 256 };

/* A global that the dialect knows, by its class number. */
struct dcp_pclass {
    const char *name;          /* for messages */
    const char *const *fields; /* attributes, in the order of an object's cells */
    uint8_t fields_count;      /* cells of an object; the dialect's own when `fields` is NULL */
    bool is_object;            /* NEWOBJ makes one */
    bool is_open; /* attributes of others are stepped over, not a reason to refuse it */
};

struct dcp_pickle_vm;
struct dcp_pdialect {
    const struct dcp_pclass *classes; /* DCP_P_MAX_CLASSES at most */
    uint32_t classes_count;
    /* module.name as a GLOBAL; refuses what is not allowed, or makes it FOREIGN. */
    int (*find_global)(struct dcp_pickle_vm *vm, struct dcp_span module, struct dcp_span name,
                       dcp_pvalue *ret);
    /* Calls a GLOBAL with a tuple; FOREIGN when the dialect does not know such a call. */
    int (*reduce)(struct dcp_pickle_vm *vm, dcp_pvalue callable, dcp_pvalue args, dcp_pvalue *ret);
    /* Fills an object from a state that is no dict, or poisons it; NULL when there are none. */
    int (*build)(struct dcp_pickle_vm *vm, dcp_pvalue object, dcp_pvalue state);
    /* What a persistent id stands for; NULL when there are none. */
    int (*persistent)(struct dcp_pickle_vm *vm, dcp_pvalue id, dcp_pvalue *ret);
};

struct dcp_pickle_vm {
    const uint8_t *data; /* borrows */
    size_t len;
    size_t pos;    /* of the next byte */
    size_t op_pos; /* of the running opcode */
    struct dcp_parray stack, memo, cells;
    uint64_t memo_count;         /* numbers in use: what the next MEMOIZE gets */
    uint64_t free_dict;          /* dicts to use again, linked by their first cell; 0: none */
    size_t marks[DCP_MAX_DEPTH]; /* heights of the stack */
    uint32_t marks_count;
    bool done;
    const struct dcp_pdialect *dialect;
    void *ctx;                   /* the dialect's */
    char note[DCP_P_NOTE_BYTES]; /* the first foreign thing and where it is; "": there is none */
    struct dcp_error *err;
    /* The text that last stood for an attribute: the same memoised one nearly always comes again.
     */
    dcp_pvalue keys_seen[DCP_P_MAX_CLASSES][DCP_P_MAX_FIELDS];
};

/* `scratch` (may be NULL) is memory of 3 * scratch_count values that is used before any is
 * allocated; it must outlive the machine. */
void dcp_pickle_vm_init(struct dcp_pickle_vm *vm, const uint8_t *data, size_t len,
                        const struct dcp_pdialect *dialect, void *ctx, uint64_t *scratch,
                        size_t scratch_count, struct dcp_error *err);
/* Runs until STOP; what follows it is not looked at. */
int dcp_pickle_vm_run(struct dcp_pickle_vm *vm, dcp_pvalue *ret_value) DCP_MUST_CHECK;
/* Frees what only a running machine needs; the values stay. */
void dcp_pickle_vm_finish(struct dcp_pickle_vm *vm);
void dcp_pickle_vm_clean_up(struct dcp_pickle_vm *vm);

/* Errors of the machine and its dialects: the position is added. */
int dcp_pickle_corrupt(struct dcp_pickle_vm *vm, const char *what);
int dcp_pickle_unsupported(struct dcp_pickle_vm *vm, const char *what);
/* The same with a text of the file: "<what>: <text>". */
int dcp_pickle_unsupported_text(struct dcp_pickle_vm *vm, const char *what, struct dcp_span text);
/* What is printable of a text of the file, for messages. */
enum { DCP_QUOTE_BYTES = 160 };
size_t dcp_pickle_quote(char out[DCP_QUOTE_BYTES], size_t used, struct dcp_span text);
/* DCP_E_UNSUPPORTED for a global that no dialect knows. */
int dcp_pickle_unknown_global(struct dcp_pickle_vm *vm, struct dcp_span module,
                              struct dcp_span name);

/* ---- foreign values ---- */

/* Notes something that only Python could make, unless something was noted before; returns the value
 * that stands for it.  `text` (of the file) may be empty. */
dcp_pvalue dcp_pickle_foreign(struct dcp_pickle_vm *vm, const char *what, struct dcp_span text);
dcp_pvalue dcp_pickle_foreign_global(struct dcp_pickle_vm *vm, struct dcp_span module,
                                     struct dcp_span name);
/* Makes every attribute of an object FOREIGN: whoever needs one sees that it cannot be had. */
void dcp_pickle_poison(struct dcp_pickle_vm *vm, dcp_pvalue object);

/* ---- memory, for the machine ---- */

/* Limits and first sizes of the arrays, by the input's length. */
int dcp_pickle_reserve(struct dcp_pickle_vm *vm) DCP_MUST_CHECK;
/* Room for `count` values in all; DCP_E_UNSUPPORTED beyond the limit. */
int dcp_pickle_grow(struct dcp_pickle_vm *vm, struct dcp_parray *array,
                    size_t count) DCP_MUST_CHECK;
void dcp_parray_clean_up(struct dcp_parray *array);

static inline bool
dcp_span_is(struct dcp_span span, const char *text)
{
    size_t len = strlen(text);
    return span.len == len && memcmp(span.data, text, len) == 0;
}

/* ---- looking at values ---- */

/* The UTF-8 bytes of a TEXT. */
struct dcp_span dcp_p_text(const struct dcp_pickle_vm *vm, dcp_pvalue text);
bool dcp_p_text_is(const struct dcp_pickle_vm *vm, dcp_pvalue v, const char *text);

enum {
    /* What a tuple holds, found out when it was made. */
    DCP_P_ALL_UINTS = 1, /* integers of 0 and more */
    DCP_P_ALL_INTS_OR_TEXTS = 2,
    DCP_P_ALL_TEXTS = 4,
};

static inline uint64_t
dcp_p_tuple_count(const struct dcp_pickle_vm *vm, dcp_pvalue tuple)
{
    return dcp_p_tag(tuple) == DCP_P_TUPLE1 ? 1 : vm->cells.data[dcp_p_payload(tuple)] >> 3;
}

static inline bool
dcp_p_tuple_has(const struct dcp_pickle_vm *vm, dcp_pvalue tuple, unsigned flags)
{
    return dcp_p_tag(tuple) == DCP_P_TUPLE &&
           (vm->cells.data[dcp_p_payload(tuple)] & flags) == flags;
}

/* Element i < count. */
static inline dcp_pvalue
dcp_p_tuple_at(const struct dcp_pickle_vm *vm, dcp_pvalue tuple, uint64_t i)
{
    if (dcp_p_tag(tuple) == DCP_P_TUPLE1) {
        return dcp_p_make(DCP_P_TUPLE, dcp_p_payload(tuple));
    }
    DCP_ASSERT(i < dcp_p_tuple_count(vm, tuple));
    return vm->cells.data[dcp_p_payload(tuple) + 1 + i];
}

static inline bool
dcp_p_is_tuple(dcp_pvalue v)
{
    return dcp_p_tag(v) == DCP_P_TUPLE || dcp_p_tag(v) == DCP_P_TUPLE1;
}

/* Attribute i of an object. */
static inline dcp_pvalue
dcp_p_field(const struct dcp_pickle_vm *vm, dcp_pvalue object, uint32_t i)
{
    return vm->cells.data[dcp_p_arg(object) + i];
}

static inline bool
dcp_p_is_object(dcp_pvalue v, uint32_t class_id)
{
    return dcp_p_tag(v) == DCP_P_OBJECT && dcp_p_class(v) == class_id;
}

static inline bool
dcp_p_is_custom(dcp_pvalue v, uint32_t kind)
{
    return dcp_p_tag(v) == DCP_P_CUSTOM && dcp_p_class(v) == kind;
}

/* Values of a list, or keys and values of a dict. */
uint64_t dcp_p_sequence_count(const struct dcp_pickle_vm *vm, dcp_pvalue list_or_dict);

struct dcp_p_iter {
    uint64_t segment; /* cell; 0 at the end */
    uint64_t i;
};

static inline struct dcp_p_iter
dcp_p_iter_of(const struct dcp_pickle_vm *vm, dcp_pvalue list_or_dict)
{
    return (struct dcp_p_iter){.segment = vm->cells.data[dcp_p_payload(list_or_dict)]};
}

/* The next value; DCP_P_UNSET (0) at the end. */
static inline dcp_pvalue
dcp_p_next(const struct dcp_pickle_vm *vm, struct dcp_p_iter *it)
{
    if (it->segment == 0) {
        return DCP_P_UNSET;
    }
    const uint64_t *segment = vm->cells.data + it->segment;
    dcp_pvalue v = segment[2 + it->i];
    if (++it->i == segment[1]) {
        it->i = 0;
        it->segment = segment[0];
    }
    return v;
}

#endif
