/*
 * save_outside.c: _native.Save with a planner of the program's own (csrc/core/save_outside.c).
 *
 * After an agree() whose info says `planned_outside`, and not with use_collectives=False:
 *     gather(bytes) -> scatter(tuple) -> add_items -> places -> gather(bytes) -> [set_metadata]
 *     -> settle(failure)
 * gather, scatter and settle are collective; a rank that failed gives b"" and None on the way and
 * its failure in the end.  leave does what is left of them.
 *
 * What a step touches while the GIL is dropped lives in self->exchange.
 */
#include "save_outside.h"

#include "errors.h"

/* ---- messages ---- */

static void
drop_received(struct save_exchange *exchange)
{
    dcp_free(exchange->block);
    dcp_free(exchange->received);
    exchange->block = NULL;
    exchange->received = NULL;
}

void
save_exchange_clean_up(struct save_exchange *exchange)
{
    drop_received(exchange);
    dcp_free(exchange->parts);
    dcp_buf_clean_up(&exchange->part);
    Py_CLEAR(exchange->sent);
    *exchange = (struct save_exchange){0};
}

static uint32_t
ranks_of(const struct save_object *self)
{
    return dcp_group_comm(group_object_get(self->group))->size;
}

/* The phase is left before the call, so that nobody enters it twice, and the next one is entered
 * only when it went well. */
static int
enter(struct save_object *self, enum phase first, enum phase second)
{
    if (group_object_get(self->group) == NULL) {
        return -1;
    }
    if (self->phase != first && self->phase != second) {
        PyErr_SetString(PyExc_RuntimeError, "the save is not at this step of planning");
        return -1;
    }
    return 0;
}

const char save_gather_doc[] =
    "gather(message, /)\n--\n\n"
    "Collective: every rank's bytes to the coordinator.  A list by rank there, None elsewhere.";

static int
step_gather(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;
    struct save_exchange *exchange = &self->exchange;

    return dcp_save_gather(self->save, &exchange->mine, &exchange->block, &exchange->received, err);
}

static PyObject *
received_as_list(struct save_object *self)
{
    PyObject *list;

    if (self->exchange.received == NULL) {
        Py_RETURN_NONE;
    }
    list = PyList_New((Py_ssize_t)ranks_of(self));
    for (uint32_t i = 0; list != NULL && i < ranks_of(self); i++) {
        const struct dcp_span *span = &self->exchange.received[i];
        PyObject *bytes =
            PyBytes_FromStringAndSize((const char *)span->data, (Py_ssize_t)span->len);

        if (bytes == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, (Py_ssize_t)i, bytes);
        }
    }
    drop_received(&self->exchange);
    return list;
}

PyObject *
save_gather(PyObject *object, PyObject *message)
{
    struct save_object *self = as_save(object);
    enum phase next = self->phase == PHASE_GATHERING ? PHASE_SCATTERING : PHASE_SETTLING;
    int rc = 0;

    if (!PyBytes_Check(message)) {
        PyErr_SetString(PyExc_TypeError, "gather() takes bytes");
        return NULL;
    }
    if (enter(self, PHASE_GATHERING, PHASE_PLACING) != 0) {
        return NULL;
    }
    self->phase = PHASE_OVER;
    Py_XSETREF(self->exchange.sent, Py_NewRef(message));
    self->exchange.mine = native_span(message);
    if (save_run_step(object, step_gather, true, &rc) != 0) {
        return NULL;
    }
    self->phase = next;
    return received_as_list(self);
}

const char save_scatter_doc[] = "scatter(parts, /)\n--\n\n"
                                "Collective: the coordinator's tuple of bytes, one for each rank; "
                                "None: it has nothing to give. "
                                " This rank's part.";

static int
step_scatter(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;

    return dcp_save_scatter(self->save, self->exchange.parts, &self->exchange.part, err);
}

/* Borrows from `parts`, which is kept in exchange.sent. */
static int
fill_parts(struct save_object *self, PyObject *parts)
{
    uint32_t ranks = ranks_of(self);
    struct dcp_span *spans = dcp_calloc(ranks, sizeof *spans);

    if (spans == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    dcp_free(self->exchange.parts);
    self->exchange.parts = spans;
    Py_XSETREF(self->exchange.sent, Py_NewRef(parts));
    if (parts == Py_None) {
        return 0;
    }
    if (!PyTuple_Check(parts) || PyTuple_GET_SIZE(parts) != (Py_ssize_t)ranks) {
        PyErr_SetString(PyExc_TypeError, "scatter() takes a tuple of bytes, one for each rank");
        return -1;
    }
    for (uint32_t i = 0; i < ranks; i++) {
        PyObject *part = PyTuple_GET_ITEM(parts, (Py_ssize_t)i);

        if (!PyBytes_Check(part)) {
            PyErr_SetString(PyExc_TypeError, "scatter() takes bytes");
            return -1;
        }
        spans[i] = native_span(part);
    }
    return 0;
}

PyObject *
save_scatter(PyObject *object, PyObject *parts)
{
    struct save_object *self = as_save(object);
    int rc = 0;

    if (enter(self, PHASE_SCATTERING, PHASE_SCATTERING) != 0 || fill_parts(self, parts) != 0) {
        return NULL;
    }
    self->phase = PHASE_OVER;
    dcp_buf_clear(&self->exchange.part);
    if (save_run_step(object, step_scatter, true, &rc) != 0) {
        return NULL;
    }
    self->phase = PHASE_PLACING;
    return PyBytes_FromStringAndSize((const char *)self->exchange.part.data,
                                     (Py_ssize_t)self->exchange.part.len);
}

/* ---- what this rank writes ---- */

const char save_add_items_doc[] =
    "add_items(write_items, resolve, *, rank, thread_count=1, single_file_per_rank=True)\n--\n\n"
    "This rank's plan and its layout, of torch's WriteItems; resolve(write_item) gives a tensor or "
    "a BytesIO.  Tensors are borrowed until the save ends or is staged.";

static int
step_lay_out(void *arg, struct dcp_error *err)
{
    return dcp_save_lay_out(as_save(arg)->save, err);
}

PyObject *
save_add_items(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"write_items",          "resolve", "rank", "thread_count",
                            "single_file_per_rank", NULL};
    struct save_object *self = as_save(object);
    struct module_state *state = module_state_of(Py_TYPE(object));
    struct save_items_options options = {0};
    unsigned int rank = 0, thread_count = 1;
    PyObject *write_items, *resolve;
    int single = 1;

    if (state == NULL ||
        !PyArg_ParseTupleAndKeywords(args, kwargs, "OO|$IIp:add_items", names, &write_items,
                                     &resolve, &rank, &thread_count, &single)) {
        return NULL;
    }
    options.rank = rank;
    options.thread_count = thread_count;
    options.single_file_per_rank = single != 0;
    options.devices = &self->devices;
    save_drop_sources(self);
    if (save_items_build_given(&state->native, write_items, resolve, &options, &self->items) != 0) {
        save_drop_sources(self);
        return NULL;
    }
    if (save_take_devices(self) != 0) {
        return NULL;
    }
    dcp_save_set_plan(self->save, &self->items.plan);
    return save_run_here(object, step_lay_out) < 0 ? NULL : Py_NewRef(Py_None);
}

const char save_places_doc[] =
    "places()\n--\n\n"
    "Where the records of add_items will lie: (index of the item, file name, offset, length), in "
    "the order of the files.";

PyObject *
save_places(PyObject *object, PyObject *unused)
{
    const struct save_object *self = as_save(object);
    const struct dcp_layout *layout = dcp_save_laid_out(self->save);
    const struct dcp_plan *plan = dcp_save_plan(self->save);
    struct dcp_save_info info;
    PyObject *list;

    (void)unused;
    if (layout == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "the save has no items yet");
        return NULL;
    }
    dcp_save_get_info(self->save, &info);
    list = PyList_New((Py_ssize_t)layout->records_count);
    for (uint32_t i = 0; list != NULL && i < layout->records_count; i++) {
        const struct dcp_placed_record *record = &layout->records[i];
        char name[DCP_CLAIM_NAME_BYTES];
        PyObject *row;

        dcp_data_file_name(name, sizeof name, plan->rank,
                           info.n0 + layout->files[record->file].index);
        row = Py_BuildValue("(IsKK)", (unsigned int)record->item, name,
                            (unsigned long long)record->offset_bytes,
                            (unsigned long long)record->length_bytes);
        if (row == NULL) {
            Py_CLEAR(list);
        } else {
            PyList_SET_ITEM(list, (Py_ssize_t)i, row);
        }
    }
    return list;
}

const char save_set_metadata_doc[] = "set_metadata(pickle, /)\n--\n\n"
                                     "The pickled Metadata to publish, on the rank that commits.";

static int
step_set_metadata(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;

    return dcp_save_set_metadata(self->save, &self->exchange.mine, err);
}

PyObject *
save_set_metadata(PyObject *object, PyObject *pickle)
{
    struct save_object *self = as_save(object);

    if (!PyBytes_Check(pickle)) {
        PyErr_SetString(PyExc_TypeError, "set_metadata() takes bytes");
        return NULL;
    }
    Py_XSETREF(self->exchange.sent, Py_NewRef(pickle));
    self->exchange.mine = native_span(pickle);
    return save_run_here(object, step_set_metadata) < 0 ? NULL : Py_NewRef(Py_None);
}

/* ---- the end of planning ---- */

const char save_settle_doc[] =
    "settle(failure, /)\n--\n\n"
    "Collective: every rank knows what it writes, or none goes on.  None, or the failures of all "
    "ranks.";

static int
step_settle(void *arg, struct dcp_error *err)
{
    struct save_object *self = arg;

    return dcp_save_settle_plan(self->save, self->mine_given ? &self->mine : NULL, &self->failures,
                                err);
}

PyObject *
save_settle(PyObject *object, PyObject *record)
{
    struct save_object *self = as_save(object);
    PyObject *result;

    /* One rank alone has nobody to exchange with. */
    if (enter(self, PHASE_SETTLING, ranks_of(self) == 1 ? PHASE_GATHERING : PHASE_SETTLING) != 0) {
        return NULL;
    }
    self->phase = PHASE_OVER;
    result = save_run_collective(object, step_settle, record);
    save_exchange_clean_up(&self->exchange);
    if (result == Py_None) {
        self->phase = PHASE_AGREED;
    }
    return result;
}

bool
save_is_outside(const struct save_object *self)
{
    return self->phase >= PHASE_GATHERING && self->phase <= PHASE_SETTLING;
}

PyObject *
save_leave_outside(PyObject *object, PyObject *record)
{
    struct save_object *self = as_save(object);
    PyObject *nothing = PyBytes_FromStringAndSize("", 0);
    PyObject *result = nothing;

    while (result != NULL && self->phase != PHASE_SETTLING) {
        result = self->phase == PHASE_SCATTERING ? save_scatter(object, Py_None)
                                                 : save_gather(object, nothing);
        Py_XDECREF(result);
    }
    Py_XDECREF(nothing);
    return result == NULL ? NULL : save_settle(object, record);
}
