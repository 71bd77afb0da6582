/*
 * bridge.cpp: the module `_bridge`, the only C++ here: torch's tensors, process groups and
 * stores as the plain C of dcp_bridge.h, in one table in a capsule.
 *
 * `_native` never links libtorch.  What it needs of it is this table.  Each source includes the
 * leanest headers that declare what it uses; torch/extension.h would triple the build time.
 *
 * torch's C++ classes have no stable layout: a table built for another release would call the wrong
 * virtual function.  So the module refuses to load under another release and tries one tensor
 * before it hands the table out.
 *
 * Process-global state: none but constants.
 */
#include <Python.h> /* must be first */

#include "bridge.h"

#include <torch/headeronly/version.h>

#include <string_view>

namespace
{

using dcp_bridge::comm_from_group;
using dcp_bridge::nccl_comm_of_group;
using dcp_bridge::store_from_group;
using dcp_bridge::tensor_mutable_data;
using dcp_bridge::tensor_view;

constexpr struct dcp_bridge_table table = {
    DCP_BRIDGE_VERSION,  sizeof(struct dcp_bridge_table),
    TORCH_VERSION,       tensor_view,
    tensor_mutable_data, comm_from_group,
    store_from_group,    nccl_comm_of_group,
};

/* "2.13.0+cpu" is release 2.13.0: what follows the plus names the build, not the headers. */
int
check_torch_release(PyObject *torch)
{
    PyObject *version = PyObject_GetAttrString(torch, "__version__");
    if (version == nullptr) {
        return -1;
    }
    const char *text = PyUnicode_AsUTF8(version);
    if (text == nullptr) {
        Py_DECREF(version);
        return -1;
    }
    std::string_view release(text);
    release = release.substr(0, release.find('+'));
    int rc = 0;
    if (release != TORCH_VERSION) {
        PyErr_Format(PyExc_ImportError,
                     "dcp_native._bridge was built for torch " TORCH_VERSION
                     ", but torch %s is installed; its C++ classes differ from release to release. "
                     "Build dcp_native again in this environment: "
                     "pip install --no-build-isolation --force-reinstall --no-deps <dcp_native>",
                     text);
        rc = -1;
    }
    Py_DECREF(version);
    return rc;
}

/* Unpacks one tensor and compares with what Python says of it.  An import inside a FakeTensorMode
 * gets no plain tensor to compare, and passes. */
int
check_unpacking(PyObject *torch)
{
    PyObject *args = Py_BuildValue("((ii))", 2, 3);
    PyObject *kwargs = Py_BuildValue("{s:s}", "device", "cpu");
    PyObject *empty = PyObject_GetAttrString(torch, "empty");
    PyObject *tensor = nullptr;
    PyObject *address = nullptr;
    struct dcp_tensor_view view;
    int rc = -1;
    if (args != nullptr && kwargs != nullptr && empty != nullptr) {
        tensor = PyObject_Call(empty, args, kwargs);
    }
    if (tensor != nullptr && tensor_view(tensor, &view) != DCP_PLAIN_TENSOR) {
        rc = 0;
    } else if (tensor != nullptr) {
        address = PyObject_CallMethod(tensor, "data_ptr", nullptr);
        void *expected = address != nullptr ? PyLong_AsVoidPtr(address) : nullptr;
        if (!PyErr_Occurred()) {
            bool same =
                view.data == expected && view.ndim == 2 && view.sizes[0] == 2 && view.sizes[1] == 3;
            rc = same ? 0 : -1;
            if (!same) {
                PyErr_SetString(PyExc_ImportError,
                                "dcp_native._bridge reads a tensor differently than torch "
                                "does: it was built against the headers of another torch. Build "
                                "dcp_native again in this environment");
            }
        }
    }
    Py_XDECREF(address);
    Py_XDECREF(tensor);
    Py_XDECREF(empty);
    Py_XDECREF(kwargs);
    Py_XDECREF(args);
    return rc;
}

int
add_table(PyObject *module)
{
    PyObject *capsule =
        PyCapsule_New(const_cast<struct dcp_bridge_table *>(&table), DCP_BRIDGE_CAPSULE, nullptr);
    if (capsule == nullptr) {
        return -1;
    }
    int rc = PyModule_AddObjectRef(module, "table", capsule);
    Py_DECREF(capsule);
    return rc != 0 ? rc : PyModule_AddStringConstant(module, "torch_version", TORCH_VERSION);
}

int
bridge_exec(PyObject *module)
{
    PyObject *torch = PyImport_ImportModule("torch");
    if (torch == nullptr) {
        return -1;
    }
    int rc = check_torch_release(torch);
    if (rc == 0) {
        rc = check_unpacking(torch);
    }
    Py_DECREF(torch);
    return rc != 0 ? rc : add_table(module);
}

PyModuleDef_Slot bridge_slots[] = {
    {Py_mod_exec, reinterpret_cast<void *>(bridge_exec)},
#if PY_VERSION_HEX >= 0x030C0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_NOT_SUPPORTED},
#endif
    {0, nullptr},
};

PyModuleDef bridge_module = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "dcp_native._bridge",
    .m_doc = "torch's tensors and process groups as a table of C functions, for dcp_native._native",
    .m_size = 0,
    .m_methods = nullptr,
    .m_slots = bridge_slots,
    .m_traverse = nullptr,
    .m_clear = nullptr,
    .m_free = nullptr,
};

} // namespace

PyMODINIT_FUNC
PyInit__bridge(void)
{
    return PyModuleDef_Init(&bridge_module);
}
