/*
 * dtensor_box.c: DTensor offsets by arithmetic, where torch makes index tensors (25 to 180 us a
 * call, and memory proportional to the shard).
 *
 * Mesh dimensions are applied from left to right; a Shard(dim) cuts what is left of `dim` into
 * ceil(left / n) sized parts, as torch.chunk does, so late ranks may get less or nothing.  A rank
 * whose part of a dimension is empty has its offset at the end of the global dimension: that is
 * what torch writes into metadata.  Only exact Shard and Replicate placements are computed here;
 * for the rest (_StridedShard, Partial, subclasses, symbolic sizes) torch is asked.
 *
 * All functions need the GIL.
 */
#include "dtensor_box.h"

int
native_has_hook(PyObject *object, PyObject *name, PyObject *stock)
{
    PyObject *hook;
    int rc = native_optional_attr(object, name, &hook);

    if (rc > 0) {
        rc = !(stock != NULL && PyMethod_Check(hook) && PyMethod_GET_FUNCTION(hook) == stock);
        Py_DECREF(hook);
    }
    return rc;
}

void
mesh_cache_clean_up(struct mesh_cache *cache)
{
    for (int i = 0; i < MESH_CACHE_ENTRIES; i++) {
        Py_CLEAR(cache->entries[i].mesh);
    }
    cache->next = 0;
}

/* 0, or 1 when they are not `ndim` plain non-negative ints (symbolic ones), or -1. */
static int
ints_from(PyObject *tuple, int64_t *ret, uint32_t *ret_ndim)
{
    Py_ssize_t count;

    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) > MESH_MAX_DIMS) {
        return 1;
    }
    count = PyTuple_GET_SIZE(tuple);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyTuple_GET_ITEM(tuple, i);

        if (!PyLong_CheckExact(item)) {
            return 1;
        }
        ret[i] = PyLong_AsLongLong(item);
        if (ret[i] < 0) {
            return PyErr_Occurred() ? -1 : 1;
        }
    }
    *ret_ndim = (uint32_t)count;
    return 0;
}

/* 0, 1 (ask torch) or -1. */
static int
ask_mesh(const struct native_state *state, PyObject *mesh, struct mesh_entry *entry)
{
    PyObject *coordinate = native_call(mesh, state->name_get_coordinate);
    PyObject *shape = NULL;
    uint32_t coordinate_ndim;
    int rc = -1;

    entry->inside = false;
    if (coordinate == Py_None) {
        rc = 0;
    } else if (coordinate != NULL) {
        shape = PyObject_GetAttr(mesh, state->name_shape);
        rc = shape == NULL ? -1 : ints_from(shape, entry->shape, &entry->ndim);
        if (rc == 0) {
            rc = ints_from(coordinate, entry->coordinate, &coordinate_ndim);
        }
        if (rc == 0) {
            rc = coordinate_ndim != entry->ndim;
        }
        entry->inside = rc == 0;
    }
    Py_XDECREF(shape);
    Py_XDECREF(coordinate);
    return rc;
}

static int
find_mesh(const struct native_state *state, struct mesh_cache *cache, PyObject *mesh,
          const struct mesh_entry **ret)
{
    struct mesh_entry entry;
    int rc;

    for (int i = 0; i < MESH_CACHE_ENTRIES; i++) {
        if (cache->entries[i].mesh == mesh) {
            *ret = &cache->entries[i];
            return 0;
        }
    }
    rc = ask_mesh(state, mesh, &entry);
    if (rc == 0) {
        PyObject *old = cache->entries[cache->next].mesh;

        entry.mesh = Py_NewRef(mesh);
        cache->entries[cache->next] = entry;
        *ret = &cache->entries[cache->next];
        cache->next = (cache->next + 1) % MESH_CACHE_ENTRIES;
        Py_XDECREF(old);
    }
    return rc;
}

/* Cuts the box by one placement.  0, 1 (ask torch) or -1. */
static int
cut(const struct native_state *state, PyObject *placement, int64_t parts, int64_t part,
    struct dtensor_box *box)
{
    PyObject *type = (PyObject *)Py_TYPE(placement);
    PyObject *dim_object;
    long dim;
    uint64_t left, chunk, start, end;

    if (type == state->replicate_type) {
        return 0;
    }
    if (type != state->shard_type || parts <= 0 || part >= parts) {
        return 1;
    }
    dim_object = PyObject_GetAttr(placement, state->name_dim);
    dim = dim_object != NULL ? PyLong_AsLong(dim_object) : -1;
    Py_XDECREF(dim_object);
    if (dim < 0 || dim >= (long)box->ndim) {
        return PyErr_Occurred() ? -1 : 1;
    }
    left = box->sizes[dim];
    chunk = left / (uint64_t)parts + (left % (uint64_t)parts != 0);
    start = dcp_min_u64(left, chunk * (uint64_t)part);
    end = dcp_min_u64(left, start + chunk);
    box->sizes[dim] = end - start;
    box->offsets[dim] = end == start ? box->size[dim] : box->offsets[dim] + start;
    return 0;
}

static int
apply_placements(const struct native_state *state, const struct mesh_entry *mesh,
                 PyObject *placements, struct dtensor_box *box)
{
    int rc = 0;

    if (!PyTuple_CheckExact(placements) || PyTuple_GET_SIZE(placements) != (Py_ssize_t)mesh->ndim ||
        box->view.sizes == NULL || box->view.ndim > DCP_MAX_DIMS) {
        return 1;
    }
    box->ndim = box->view.ndim;
    for (uint32_t d = 0; d < box->ndim; d++) {
        if (box->view.sizes[d] < 0) {
            return 1;
        }
        box->size[d] = box->sizes[d] = (uint64_t)box->view.sizes[d];
        box->offsets[d] = 0;
    }
    for (uint32_t m = 0; m < mesh->ndim && rc == 0; m++) {
        rc = cut(state, PyTuple_GET_ITEM(placements, (Py_ssize_t)m), mesh->shape[m],
                 mesh->coordinate[m], box);
    }
    return rc;
}

/* Returns new. */
static PyObject *
slot_value(PyObject *object, Py_ssize_t offset, PyObject *name)
{
    PyObject *value = offset == 0 ? NULL : *(PyObject **)((char *)object + offset);

    return value != NULL ? Py_NewRef(value) : PyObject_GetAttr(object, name);
}

enum dtensor_answer
dtensor_box_find(const struct native_state *state, struct mesh_cache *cache, PyObject *dtensor,
                 struct dtensor_box *box)
{
    PyObject *spec = slot_value(dtensor, state->spec_offset, state->name_spec);
    PyObject *mesh = spec != NULL ? PyObject_GetAttr(spec, state->name_mesh) : NULL;
    PyObject *placements = mesh != NULL ? PyObject_GetAttr(spec, state->name_placements) : NULL;
    const struct mesh_entry *entry = NULL;
    int rc = placements != NULL ? find_mesh(state, cache, mesh, &entry) : -1;

    box->local = NULL;
    if (rc == 0 && !entry->inside) {
        rc = DTENSOR_OUTSIDE_MESH;
    } else if (rc == 0) {
        rc = state->bridge->tensor_view(dtensor, &box->view) == DCP_NOT_A_TENSOR
                 ? 1
                 : apply_placements(state, entry, placements, box);
        if (rc == 0) {
            box->local = slot_value(dtensor, state->local_tensor_offset, state->name_local_tensor);
            rc = box->local == NULL
                     ? -1
                     : state->bridge->tensor_view(box->local, &box->local_view) != DCP_PLAIN_TENSOR;
        }
        rc = rc > 0 ? (int)DTENSOR_ASK_TORCH : rc;
    } else if (rc > 0) {
        rc = DTENSOR_ASK_TORCH;
    }
    if (rc != DTENSOR_NATIVE) {
        Py_CLEAR(box->local);
    }
    Py_XDECREF(placements);
    Py_XDECREF(mesh);
    Py_XDECREF(spec);
    return (enum dtensor_answer)rc;
}

int
dtensor_is_outside_mesh(const struct native_state *state, PyObject *dtensor)
{
    PyObject *mesh = PyObject_GetAttr(dtensor, state->name_device_mesh);
    PyObject *coordinate = mesh != NULL ? native_call(mesh, state->name_get_coordinate) : NULL;
    int rc = coordinate == NULL ? -1 : coordinate == Py_None;

    Py_XDECREF(coordinate);
    Py_XDECREF(mesh);
    return rc;
}
