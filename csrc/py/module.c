/*
 * module.c: the extension module `dcp_native._native`: its state, its types, its functions.
 *
 * Read it from the end: the definition names the slots, the slots the functions.  The module does
 * nothing at import but make its types; torch is looked into at the first use (native_state_load).
 */
#include "module.h"

#include <unistd.h>

#include "archive_object.h"
#include "dcp_crc32.h"
#include "debug_plan.h"
#include "errors.h"
#include "export_object.h"
#include "key_tree.h"
#include "metadata_table.h"
#include "read_records.h"
#include "safetensors_header.h"
#include "stage_copy.h"
#include "trace_object.h"
#include "verify_object.h"

struct module_state *
module_state_of(PyTypeObject *type)
{
    PyObject *module = PyType_GetModuleByDef(type, &native_module);

    return module == NULL ? NULL : PyModule_GetState(module);
}

PyObject *
module_error_class(PyObject *object)
{
    struct module_state *state = module_state_of(Py_TYPE(object));

    return state == NULL ? PyExc_RuntimeError : state->error_class;
}

int
failure_from_python(PyObject *record, struct dcp_failure *ret, bool *ret_given)
{
    char *bytes;
    Py_ssize_t len;

    *ret_given = record != Py_None;
    memset(ret, 0, sizeof *ret);
    if (!*ret_given) {
        return 0;
    }
    if (PyBytes_AsStringAndSize(record, &bytes, &len) != 0) {
        return -1;
    }
    if (len > DCP_MAX_FAILURE_BYTES) {
        PyErr_Format(PyExc_ValueError, "a failure record has %zd bytes, at most %d are sent", len,
                     DCP_MAX_FAILURE_BYTES);
        return -1;
    }
    ret->kind = DCP_FAILURE_PYTHON;
    ret->bytes = (uint8_t *)bytes;
    ret->len = (size_t)len;
    return 0;
}

PyDoc_STRVAR(crc32_doc, "crc32(data, crc=0, /)\n--\n\n"
                        "CRC32 (zip's polynomial) of a buffer, continued from `crc`.");

static PyObject *
module_crc32(PyObject *module, PyObject *args)
{
    Py_buffer view;
    unsigned int crc = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "y*|I:crc32", &view, &crc)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS crc = dcp_crc32(crc, view.buf, (size_t)view.len);
    Py_END_ALLOW_THREADS PyBuffer_Release(&view);
    return PyLong_FromUnsignedLong(crc);
}

PyDoc_STRVAR(trim_doc, "trim()\n--\n\n"
                       "Give the memory that is kept between saves back to the system.");

static PyObject *
module_trim(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    dcp_arena_trim();
    dcp_engine_trim();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(live_bytes_doc, "live_bytes()\n--\n\n"
                             "Bytes that the core has allocated now, mappings included.");

static PyObject *
module_live_bytes(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromUnsignedLongLong(dcp_alloc_live_bytes());
}

PyDoc_STRVAR(peak_bytes_doc,
             "peak_bytes(reset=False, /)\n--\n\n"
             "The most bytes that the core has had at a time since the last reset.");

static PyObject *
module_peak_bytes(PyObject *module, PyObject *args)
{
    int reset = 0;
    uint64_t peak = dcp_alloc_peak_bytes();

    (void)module;
    if (!PyArg_ParseTuple(args, "|p:peak_bytes", &reset)) {
        return NULL;
    }
    if (reset) {
        dcp_alloc_reset_peak();
    }
    return PyLong_FromUnsignedLongLong(peak);
}

PyDoc_STRVAR(peek_save_id_doc,
             "peek_save_id(image, /)\n--\n\n"
             "Save id (hex) of a `.metadata` image that dcp_native wrote, else None.");

static PyObject *
module_peek_save_id(PyObject *module, PyObject *image)
{
    struct dcp_save_id id;
    char *bytes;
    Py_ssize_t len;
    char text[2 * sizeof id.bytes + 1];

    (void)module;
    if (PyBytes_AsStringAndSize(image, &bytes, &len) != 0) {
        return NULL;
    }
    if (!dcp_metadata_peek_save_id((const uint8_t *)bytes, (size_t)len, &id)) {
        Py_RETURN_NONE;
    }
    for (size_t i = 0; i < sizeof id.bytes; i++) {
        PyOS_snprintf(text + 2 * i, 3, "%02x", id.bytes[i]);
    }
    return PyUnicode_FromString(text);
}

PyDoc_STRVAR(check_metadata_doc,
             "check_metadata(image, /, *, pickle=False)\n--\n\n"
             "Read a `.metadata` image without making Python objects; with `pickle`, its pickle "
             "even where the index would do. None, or what of it only Python could rebuild "
             "(unknown globals, attributes of others). NativeError when it is damaged "
             "(dcp_code CORRUPT) or foreign where a load needs it (UNSUPPORTED).");

static PyObject *
module_check_metadata(PyObject *module, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"", "pickle", NULL};
    struct module_state *state = PyModule_GetState(module);
    struct dcp_metadata md = {0};
    struct dcp_error err;
    const char *image;
    Py_ssize_t len;
    int pickle = 0, rc;
    PyObject *result;

    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y#|$p:check_metadata", names, &image, &len,
                                     &pickle)) {
        return NULL;
    }
    dcp_error_clear(&err);
    Py_BEGIN_ALLOW_THREADS rc =
        pickle ? dcp_metadata_read_pickle((const uint8_t *)image, (size_t)len, &md, &err)
               : dcp_metadata_read((const uint8_t *)image, (size_t)len, &md, &err);
    Py_END_ALLOW_THREADS if (rc != 0)
    {
        return native_set_error(state->error_class, &err);
    }
    result = md.foreign[0] == 0 ? Py_NewRef(Py_None) : PyUnicode_FromString(md.foreign);
    dcp_metadata_clean_up(&md);
    return result;
}

static PyMethodDef module_methods[] = {
    {"crc32", module_crc32, METH_VARARGS, crc32_doc},
    {"trim", module_trim, METH_NOARGS, trim_doc},
    {"live_bytes", module_live_bytes, METH_NOARGS, live_bytes_doc},
    {"peak_bytes", module_peak_bytes, METH_VARARGS, peak_bytes_doc},
    TRACE_FUNCTIONS,
    {"peek_save_id", module_peek_save_id, METH_O, peek_save_id_doc},
    {"check_metadata", (PyCFunction)(void (*)(void))module_check_metadata,
     METH_VARARGS | METH_KEYWORDS, check_metadata_doc},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject *
add_type(PyObject *module, PyType_Spec *spec)
{
    PyTypeObject *type = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);

    if (type != NULL && PyModule_AddType(module, type) != 0) {
        Py_CLEAR(type);
    }
    return type;
}

static int
module_exec(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);

    state->error_class = PyErr_NewExceptionWithDoc(
        "dcp_native.NativeError",
        "What only this package can report: a damaged or foreign file, a failed checksum, a save "
        "that was superseded, a group that can no longer be used.  `dcp_code` names the kind.",
        PyExc_RuntimeError, NULL);
    if (state->error_class == NULL ||
        PyModule_AddObjectRef(module, "NativeError", state->error_class) != 0 ||
        PyModule_AddStringConstant(module, "built_for_torch", DCP_BUILT_FOR_TORCH) != 0 ||
        PyModule_AddFunctions(module, debug_plan_methods) != 0 ||
        PyModule_AddFunctions(module, export_methods) != 0 ||
        PyModule_AddFunctions(module, metadata_table_methods) != 0 ||
        PyModule_AddFunctions(module, key_tree_methods) != 0 ||
        PyModule_AddFunctions(module, stage_copy_methods) != 0 ||
        PyModule_AddFunctions(module, read_records_methods) != 0 ||
        PyModule_AddFunctions(module, safetensors_methods) != 0 ||
        PyModule_AddFunctions(module, verify_methods) != 0 ||
        PyModule_AddFunctions(module, archive_methods) != 0) {
        return -1;
    }
    state->group_type = add_type(module, &group_type_spec);
    state->save_type = add_type(module, &save_type_spec);
    state->load_type = add_type(module, &load_type_spec);
    state->store_type = add_type(module, &store_type_spec);
    state->writer_process_type = add_type(module, &writer_process_type_spec);
    state->watch_type = add_type(module, &watch_type_spec);
    return state->group_type == NULL || state->save_type == NULL || state->load_type == NULL ||
                   state->store_type == NULL || state->writer_process_type == NULL ||
                   state->watch_type == NULL
               ? -1
               : 0;
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    struct module_state *state = PyModule_GetState(module);

    Py_VISIT(state->error_class);
    Py_VISIT(state->group_type);
    Py_VISIT(state->save_type);
    Py_VISIT(state->load_type);
    Py_VISIT(state->store_type);
    Py_VISIT(state->writer_process_type);
    Py_VISIT(state->watch_type);
    return native_state_traverse(&state->native, visit, arg);
}

static int
module_clear(PyObject *module)
{
    struct module_state *state = PyModule_GetState(module);

    Py_CLEAR(state->error_class);
    Py_CLEAR(state->group_type);
    Py_CLEAR(state->save_type);
    Py_CLEAR(state->load_type);
    Py_CLEAR(state->store_type);
    Py_CLEAR(state->writer_process_type);
    Py_CLEAR(state->watch_type);
    native_state_clear(&state->native);
    return 0;
}

static void
module_free(void *module)
{
    module_clear(module);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

struct PyModuleDef native_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "dcp_native._native",
    .m_doc = "Planner, engine, commit and file formats of dcp_native, in C.",
    .m_size = sizeof(struct module_state),
    .m_methods = module_methods,
    .m_slots = module_slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__native(void)
{
    return PyModuleDef_Init(&native_module);
}
