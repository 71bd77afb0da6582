/*
 * stage_copy.c: `copy_storages`: whole storages of CPU tensors into others, in one call.
 *
 * A stager collects what it has to copy while it walks a state dict, and hands it over at once:
 * then the GIL is given up once for all of it, not once per tensor.  In a thread beside a busy
 * trainer each time that it is taken back costs up to 5 ms.
 *
 * Everything is checked before the first byte moves.  Signals are served while bytes move: memory
 * is copied in pieces, and after each 100 ms the GIL is taken to look.
 *
 * Threads: needs the GIL, which it gives up while it copies.  The list holds the tensors; nobody
 * resizes their storages meanwhile, which is a stager's contract with its caller.
 */
#include "stage_copy.h"

#include <time.h>

#include "dcp_limits.h"
#include "module.h"

/* Below this, giving up the GIL costs more than copying. */
static const uint64_t GIL_BYTES = 64u << 10;
static const int64_t LOOK_NS = 100 * 1000 * 1000;

struct copy {
    uint8_t *to;
    const uint8_t *from;
    uint64_t bytes;
};

struct copies {
    struct copy *items; /* owned */
    size_t count, next;
    uint64_t offset_bytes; /* of items[next]: copied up to here */
    uint64_t total_bytes;
};

static int64_t
now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Without the GIL.  Copies on, until all is done (true) or it is time to look for signals. */
static bool
copies_run(struct copies *copies)
{
    int64_t until = now_ns() + LOOK_NS;

    while (copies->next < copies->count) {
        const struct copy *copy = &copies->items[copies->next];
        uint64_t left = copy->bytes - copies->offset_bytes;
        uint64_t len = left < DCP_PIECE_BYTES ? left : DCP_PIECE_BYTES;

        memcpy(copy->to + copies->offset_bytes, copy->from + copies->offset_bytes, (size_t)len);
        copies->offset_bytes += len;
        if (copies->offset_bytes == copy->bytes) {
            copies->offset_bytes = 0;
            copies->next++;
        }
        if (now_ns() >= until) {
            break;
        }
    }
    return copies->next == copies->count;
}

/* -1 with an exception, which a signal handler raised. */
static int
copies_run_all(struct copies *copies)
{
    bool done = copies->total_bytes < GIL_BYTES && copies_run(copies);

    while (!done) {
        Py_BEGIN_ALLOW_THREADS done = copies_run(copies);
        Py_END_ALLOW_THREADS if (!done && PyErr_CheckSignals() != 0)
        {
            return -1;
        }
    }
    return 0;
}

/* Memory of a tensor's whole storage; -1 with an exception when there is none to be had. */
static int
storage_view(const struct native_state *state, PyObject *tensor, struct dcp_tensor_view *ret)
{
    if (state->bridge->tensor_view(tensor, ret) == DCP_NOT_A_TENSOR) {
        PyErr_Format(PyExc_TypeError, "copy_storages wants pairs of tensors, not of %.200s",
                     Py_TYPE(tensor)->tp_name);
        return -1;
    }
    if (!(ret->flags & DCP_TENSOR_CPU) || !(ret->flags & DCP_TENSOR_STRIDED) ||
        (ret->storage == NULL && ret->storage_bytes > 0)) {
        PyErr_SetString(PyExc_ValueError,
                        "a tensor whose storage is to be copied has no plain memory of the CPU");
        return -1;
    }
    return 0;
}

static int
copy_from_pair(const struct native_state *state, PyObject *pair, struct copy *ret)
{
    struct dcp_tensor_view to, from;

    if (!PyTuple_CheckExact(pair) || PyTuple_GET_SIZE(pair) != 2) {
        PyErr_SetString(PyExc_TypeError, "copy_storages wants pairs (to, from) of tensors");
        return -1;
    }
    if (storage_view(state, PyTuple_GET_ITEM(pair, 0), &to) != 0 ||
        storage_view(state, PyTuple_GET_ITEM(pair, 1), &from) != 0) {
        return -1;
    }
    if (to.storage_bytes != from.storage_bytes) {
        PyErr_Format(PyExc_ValueError,
                     "a storage of %llu bytes is to be copied into one of %llu: the tensor's "
                     "memory was freed or resized",
                     (unsigned long long)from.storage_bytes, (unsigned long long)to.storage_bytes);
        return -1;
    }
    *ret = (struct copy){.to = to.storage, .from = from.storage, .bytes = to.storage_bytes};
    return 0;
}

PyDoc_STRVAR(copy_storages_doc,
             "copy_storages(pairs, /)\n--\n\n"
             "Copy whole storages: of each pair (to, from) of CPU tensors, all bytes of the second "
             "one's storage into the first one's, which has the same size and is not shared by "
             "copy-on-write. Without the GIL; signals are served. ValueError, before anything is "
             "copied, when sizes differ or a tensor is not plain memory of the CPU.");

static PyObject *
module_copy_storages(PyObject *module, PyObject *pairs)
{
    struct module_state *state = PyModule_GetState(module);
    struct copies copies = {0};
    PyObject *held; /* a tuple of our own: nobody takes a tensor out of it meanwhile */
    int rc = -1;

    if (native_state_load(module) != 0) {
        return NULL;
    }
    held = PySequence_Tuple(pairs);
    if (held == NULL) {
        return NULL;
    }
    copies.items = PyMem_Calloc((size_t)PyTuple_GET_SIZE(held) + 1, sizeof *copies.items);
    if (copies.items == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(held); i++) {
        struct copy *copy = &copies.items[copies.count];

        if (copy_from_pair(&state->native, PyTuple_GET_ITEM(held, i), copy) != 0) {
            goto done;
        }
        copies.total_bytes += copy->bytes; /* of memory that exists: no overflow */
        copies.count += copy->bytes > 0 ? 1 : 0;
    }
    rc = copies_run_all(&copies);
done:
    PyMem_Free(copies.items);
    Py_DECREF(held);
    return rc == 0 ? Py_NewRef(Py_None) : NULL;
}

PyMethodDef stage_copy_methods[] = {
    {"copy_storages", module_copy_storages, METH_O, copy_storages_doc},
    {NULL, NULL, 0, NULL},
};
