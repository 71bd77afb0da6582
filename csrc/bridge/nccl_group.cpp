/*
 * nccl_group.cpp: the raw NCCL communicator of a c10d::ProcessGroup.
 *
 * No header and no symbol of CUDA or NCCL is used, so that one source serves torch's builds with
 * CUDA and without.  Which class the backend is says the name of its type; what gives its
 * communicator is found by its mangled name in the library of torch that has it.  Both classes of
 * torch that have one are known: ProcessGroupNCCL, which connects when it is first used unless
 * init_process_group got a device_id and which looks up the calling thread's current device, and
 * nccl2's of that name, new in 2.14.
 *
 * A wrapper that checks collectives (TORCH_DISTRIBUTED_DEBUG=DETAIL) is looked through, and so is
 * the "nccl-lazy" backend: its collectives are those of an nccl2 backend inside, and what it
 * connects by and by are pairs of ranks for sends and receives.
 *
 * No C++ exception leaves this file.  Threads: needs the GIL.
 */
#include <pybind11/conduit/pybind11_conduit_v1.h> /* must be first: it includes Python.h */

#include "bridge.h"
#include "bridge_error.h"

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#if __has_include(<torch/csrc/distributed/c10d/lazy/LazyBackend.hpp>)
#include <torch/csrc/distributed/c10d/lazy/LazyBackend.hpp>
#define HAS_LAZY_BACKEND 1
#endif

#include <dlfcn.h>

#include <chrono>
#include <string>
#include <string_view>
#include <typeinfo>

namespace
{

using dcp_bridge::current_exception_text;
using dcp_bridge::set_error;

using BackendPtr = c10::intrusive_ptr<c10d::Backend>;

/* What a member function without arguments is to whoever calls it by its address. */
using CommPtrOf = int64_t(const void *self);
using WrappedOf = BackendPtr(const void *self);

struct Known {
    std::string_view type; /* of typeid */
    const char *function;
};

constexpr Known KNOWN[] = {
    {"N4c10d16ProcessGroupNCCLE", "_ZN4c10d16ProcessGroupNCCL10getCommPtrEv"},
    {"N4c10d5nccl216ProcessGroupNCCLE", "_ZNK4c10d5nccl216ProcessGroupNCCL10getCommPtrEv"},
};

constexpr std::string_view WRAPPER = "N4c10d19ProcessGroupWrapperE";
constexpr std::string_view LAZY = "N4c10d5nccl220ProcessGroupNCCLLazyE";

/* Of a library that is loaded; it stays so, for torch never unloads one. */
template <typename Function>
Function *
find(const char *library, const char *name)
{
    void *handle = dlopen(library, RTLD_NOW | RTLD_NOLOAD);
    if (handle == nullptr) {
        return nullptr;
    }
    auto *found = reinterpret_cast<Function *>(dlsym(handle, name));
    dlclose(handle);
    return found;
}

std::string_view
type_of(const BackendPtr &backend)
{
    const c10d::Backend &object = *backend;
    return typeid(object).name();
}

#ifdef HAS_LAZY_BACKEND
/* Its class is LazyBackend<nccl2::ProcessGroupNCCL>, whose header needs NCCL's.  The template lays
 * out its members alike for every backend, which it holds by pointers, and the bridge runs with the
 * release of torch alone that it was compiled against. */
BackendPtr
primary_of(const BackendPtr &lazy)
{
    using Lazy = c10d::LazyBackend<c10d::Backend>;
    return static_cast<const Lazy *>(dynamic_cast<const void *>(lazy.get()))->getPrimary();
}
#else
BackendPtr
primary_of(const BackendPtr &lazy)
{
    return lazy;
}
#endif

BackendPtr
unwrap(BackendPtr backend)
{
    while (type_of(backend) == WRAPPER) {
        auto *wrapped =
            find<WrappedOf>("libtorch_cpu.so", "_ZNK4c10d19ProcessGroupWrapper12getWrappedPgEv");
        if (wrapped == nullptr) {
            break;
        }
        backend = wrapped(dynamic_cast<void *>(backend.get()));
    }
    return type_of(backend) == LAZY ? primary_of(backend) : backend;
}

/* Fails with DCP_E_UNSUPPORTED for a class of which no communicator can be had, ever. */
int
find_comm_ptr(const BackendPtr &backend, CommPtrOf **ret_function, struct dcp_error *err)
{
    std::string_view type = type_of(backend);
    for (const Known &known : KNOWN) {
        if (type == known.type) {
            *ret_function = find<CommPtrOf>("libtorch_cuda.so", known.function);
            if (*ret_function != nullptr) {
                return 0;
            }
        }
    }
    return set_error(err, DCP_E_UNSUPPORTED, backend->getRank(),
                     "its backend for CUDA is " + backend->getBackendName() + " (" +
                         std::string(type) + "), which gives no NCCL communicator");
}

int
fill(const BackendPtr &backend, struct dcp_bridge_nccl *ret, struct dcp_error *err)
{
    CommPtrOf *comm_ptr_of = nullptr;
    int rc = find_comm_ptr(backend, &comm_ptr_of, err);
    if (rc != 0) {
        return rc;
    }
    int64_t raw = comm_ptr_of(dynamic_cast<void *>(backend.get()));
    if (raw == 0) {
        return set_error(
            err, DCP_E_MISSING, backend->getRank(),
            "its NCCL communicator is not connected yet: no collective has run on this "
            "device, and init_process_group got no device_id");
    }
    std::chrono::milliseconds timeout = backend->getBackendOptions()->timeout;
    ret->raw = reinterpret_cast<void *>(raw);
    ret->rank = static_cast<uint32_t>(backend->getRank());
    ret->size = static_cast<uint32_t>(backend->getSize());
    bool has_timeout = timeout.count() > 0 && timeout < std::chrono::hours(24 * 365);
    ret->timeout_ns = has_timeout ? static_cast<uint64_t>(timeout.count()) * 1000000u : 0;
    return 0;
}

} // namespace

int
dcp_bridge::nccl_comm_of_group(void *process_group, struct dcp_bridge_nccl *ret,
                               struct dcp_error *err) noexcept
try {
    auto *object = static_cast<PyObject *>(process_group);
    auto *group = pybind11_conduit_v1::get_type_pointer_ephemeral<c10d::ProcessGroup>(object);
    if (group == nullptr) {
        PyErr_Clear();
        return set_error(err, DCP_E_INVALID, -1,
                         std::string("process_group is a ") + Py_TYPE(object)->tp_name +
                             ", not a torch.distributed.ProcessGroup");
    }
    if (!group->hasBackendForDeviceType(c10::DeviceType::CUDA)) {
        return set_error(err, DCP_E_UNSUPPORTED, group->getRank(), "it has no backend for CUDA");
    }
    return fill(unwrap(group->getBackend(c10::DeviceType::CUDA)), ret, err);
} catch (...) {
    PyErr_Clear();
    return set_error(err, DCP_E_COMM, -1,
                     "its NCCL communicator cannot be had: " + current_exception_text());
}
