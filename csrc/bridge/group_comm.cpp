/*
 * group_comm.cpp: the CPU backend of a c10d::ProcessGroup as a comm table.
 *
 * The backend is called directly, below torch.distributed: no Python runs and no GIL is held, so a
 * collective can wait on a thread of ours.  Sizes must be equal on all ranks, which the callers see
 * to (comm_bytes.c); gloo aborts the process or truncates where they are not.
 *
 * No C++ exception leaves this file.  A failed collective poisons its group for us: peers may be
 * anywhere in the protocol, and gloo may have closed its pairs.
 *
 * Threads: comm_from_group and destroy need the GIL; collectives do not, and are called by one
 * thread at a time per group.
 */
#include <pybind11/conduit/pybind11_conduit_v1.h> /* must be first: it includes Python.h */

#include "bridge.h"
#include "bridge_error.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

namespace
{

using dcp_bridge::current_exception_text;
using dcp_bridge::set_error;

/* Bytes of one call to a backend, all ranks together: lengths of 2^31 and more overflow an int in
 * some transports.  Defined smaller by the test of the splitting. */
#ifndef DCP_BRIDGE_CALL_BYTES
#define DCP_BRIDGE_CALL_BYTES (size_t{1} << 30)
#endif

struct GroupComm {
    c10::intrusive_ptr<c10d::Backend> backend; /* owned; released under the GIL */
    std::string kind;                          /* dcp_comm.kind borrows its text */
    int rank;
    int size;
    std::atomic<bool> poisoned{false};
    std::string first_failure; /* valid once `poisoned` */
};

/* A FakeTensorMode or other dispatch mode of the calling thread must not see our buffers. */
class WithoutPythonModes
{
    c10::impl::ExcludeDispatchKeyGuard guard{
        c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot})};
};

at::Tensor
bytes_tensor(const void *data, size_t bytes)
{
    return at::from_blob(const_cast<void *>(data), {static_cast<int64_t>(bytes)},
                         at::TensorOptions().dtype(at::kByte));
}

/* One tensor of `bytes` for each rank, `stride` bytes apart. */
std::vector<at::Tensor>
rank_tensors(const GroupComm *comm, const void *data, size_t stride, size_t bytes)
{
    std::vector<at::Tensor> parts;
    parts.reserve(static_cast<size_t>(comm->size));
    for (int i = 0; i < comm->size; i++) {
        parts.push_back(bytes_tensor(
            static_cast<const uint8_t *>(data) + static_cast<size_t>(i) * stride, bytes));
    }
    return parts;
}

/* The deadline is the group's own.  Never wait(ms): it can return while gloo still uses the
 * buffers. */
void
finish(const c10::intrusive_ptr<c10d::Work> &work)
{
    work->wait(kNoTimeout);
}

std::string
describe(const GroupComm *comm, const char *what, size_t bytes)
{
    return std::string(what) + " of " + std::to_string(bytes) + " bytes by rank " +
           std::to_string(comm->rank) + " of " + std::to_string(comm->size) + " over " + comm->kind;
}

int
fail(GroupComm *comm, const char *what, size_t bytes, struct dcp_error *err) noexcept
try {
    comm->first_failure = current_exception_text();
    comm->poisoned = true;
    bool timed_out = comm->first_failure.find("imed out") != std::string::npos;
    return set_error(err, timed_out ? DCP_E_TIMEOUT : DCP_E_COMM, comm->rank,
                     describe(comm, what, bytes) + " failed: " + comm->first_failure +
                         "; see that all ranks are alive and make the same calls in the same order,"
                         " then make a new process group");
} catch (...) {
    comm->poisoned = true;
    return set_error(err, DCP_E_COMM, comm->rank, what);
}

int
refuse(GroupComm *comm, const char *what, size_t bytes, struct dcp_error *err) noexcept
try {
    return set_error(err, DCP_E_COMM, comm->rank,
                     describe(comm, what, bytes) +
                         " refused: an earlier call on this process group failed (" +
                         comm->first_failure + "); make a new process group");
} catch (...) {
    return set_error(err, DCP_E_COMM, comm->rank, what);
}

/* Runs body(offset, n) for pieces of a message, the same ones on every rank.  `parts` is how many
 * ranks' messages one call carries. */
template <typename Body>
int
run_pieces(void *ctx, const char *what, size_t bytes, int parts, struct dcp_error *err,
           Body body) noexcept
{
    auto *comm = static_cast<GroupComm *>(ctx);
    if (comm->poisoned) {
        return refuse(comm, what, bytes, err);
    }
    try {
        WithoutPythonModes guard;
        size_t most = std::max<size_t>(DCP_BRIDGE_CALL_BYTES / static_cast<size_t>(parts), 4096);
        for (size_t offset = 0; offset < bytes; offset += most) {
            body(comm, offset, std::min(most, bytes - offset));
        }
        return 0;
    } catch (...) {
        return fail(comm, what, bytes, err);
    }
}

int
size_of(void *ctx)
{
    return static_cast<GroupComm *>(ctx)->size;
}

int
group_all_reduce_min(void *ctx, int64_t *lanes, size_t count, struct dcp_error *err) noexcept
{
    return run_pieces(ctx, "all_reduce", count * sizeof *lanes, 1, err,
                      [lanes](GroupComm *comm, size_t offset, size_t n) {
                          std::vector<at::Tensor> part{
                              at::from_blob(lanes + offset / sizeof *lanes,
                                            {static_cast<int64_t>(n / sizeof *lanes)},
                                            at::TensorOptions().dtype(at::kLong))};
                          c10d::AllreduceOptions opts;
                          opts.reduceOp = c10d::ReduceOp::MIN;
                          finish(comm->backend->allreduce(part, opts));
                      });
}

int
group_gather(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
             struct dcp_error *err) noexcept
{
    return run_pieces(
        ctx, "gather", bytes, size_of(ctx), err, [=](GroupComm *comm, size_t offset, size_t n) {
            std::vector<at::Tensor> in{
                bytes_tensor(static_cast<const uint8_t *>(send) + offset, n)};
            std::vector<std::vector<at::Tensor>> out;
            if (static_cast<uint32_t>(comm->rank) == root) {
                out.push_back(rank_tensors(comm, static_cast<uint8_t *>(recv) + offset, bytes, n));
            }
            c10d::GatherOptions opts;
            opts.rootRank = root;
            finish(comm->backend->gather(out, in, opts));
        });
}

int
group_all_gather(void *ctx, const void *send, void *recv, size_t bytes,
                 struct dcp_error *err) noexcept
{
    return run_pieces(
        ctx, "all_gather", bytes, size_of(ctx), err, [=](GroupComm *comm, size_t offset, size_t n) {
            at::Tensor in = bytes_tensor(static_cast<const uint8_t *>(send) + offset, n);
            if (n == bytes) {
                at::Tensor out = bytes_tensor(recv, n * static_cast<size_t>(comm->size));
                finish(comm->backend->_allgather_base(out, in));
                return;
            }
            std::vector<at::Tensor> ins{in};
            std::vector<std::vector<at::Tensor>> outs{
                rank_tensors(comm, static_cast<uint8_t *>(recv) + offset, bytes, n)};
            finish(comm->backend->allgather(outs, ins));
        });
}

int
group_scatter(void *ctx, uint32_t root, const void *send, void *recv, size_t bytes,
              struct dcp_error *err) noexcept
{
    return run_pieces(
        ctx, "scatter", bytes, size_of(ctx), err, [=](GroupComm *comm, size_t offset, size_t n) {
            std::vector<at::Tensor> out{bytes_tensor(static_cast<uint8_t *>(recv) + offset, n)};
            std::vector<std::vector<at::Tensor>> in;
            if (static_cast<uint32_t>(comm->rank) == root) {
                in.push_back(
                    rank_tensors(comm, static_cast<const uint8_t *>(send) + offset, bytes, n));
            }
            c10d::ScatterOptions opts;
            opts.rootRank = root;
            finish(comm->backend->scatter(out, in, opts));
        });
}

int
group_broadcast(void *ctx, uint32_t root, void *buf, size_t bytes, struct dcp_error *err) noexcept
{
    return run_pieces(
        ctx, "broadcast", bytes, 1, err, [=](GroupComm *comm, size_t offset, size_t n) {
            std::vector<at::Tensor> part{bytes_tensor(static_cast<uint8_t *>(buf) + offset, n)};
            c10d::BroadcastOptions opts;
            opts.rootRank = root;
            finish(comm->backend->broadcast(part, opts));
        });
}

void
group_destroy(void *ctx) noexcept
{
    delete static_cast<GroupComm *>(ctx);
}

/* nullptr when the object is no ProcessGroup; the conduit's Python error is dropped. */
c10d::ProcessGroup *
group_of(PyObject *object)
{
    auto *group = pybind11_conduit_v1::get_type_pointer_ephemeral<c10d::ProcessGroup>(object);
    if (group == nullptr) {
        PyErr_Clear();
    }
    return group;
}

} // namespace

int
dcp_bridge::comm_from_group(void *process_group, struct dcp_comm *ret_comm,
                            struct dcp_error *err) noexcept
try {
    auto *object = static_cast<PyObject *>(process_group);
    c10d::ProcessGroup *group = group_of(object);
    if (group == nullptr) {
        return set_error(err, DCP_E_INVALID, -1,
                         std::string("process_group is a ") + Py_TYPE(object)->tp_name +
                             ", not a torch.distributed.ProcessGroup; only members of a group can "
                             "save with it");
    }
    if (!group->hasBackendForDeviceType(c10::DeviceType::CPU)) {
        return set_error(
            err, DCP_E_COMM, group->getRank(),
            "process group \"" + group->getGroupName() +
                "\" has no backend for CPU tensors, which planning needs; make it with "
                "init_process_group(\"cpu:gloo,cuda:nccl\"), or pass a gloo group "
                "(new_group(backend=\"gloo\")) as process_group");
    }
    auto comm = std::make_unique<GroupComm>();
    comm->backend = group->getBackend(c10::DeviceType::CPU);
    comm->kind = comm->backend->getBackendName();
    comm->rank = group->getRank();
    comm->size = group->getSize();
    *ret_comm = {};
    ret_comm->kind = comm->kind.c_str();
    ret_comm->rank = static_cast<uint32_t>(comm->rank);
    ret_comm->size = static_cast<uint32_t>(comm->size);
    ret_comm->all_reduce_min = group_all_reduce_min;
    ret_comm->gather = group_gather;
    ret_comm->all_gather = group_all_gather;
    ret_comm->scatter = group_scatter;
    ret_comm->broadcast = group_broadcast;
    ret_comm->destroy = group_destroy;
    ret_comm->ctx = comm.release();
    return 0;
} catch (...) {
    PyErr_Clear();
    return set_error(err, DCP_E_COMM, -1,
                     "cannot use the CPU backend of the process group: " +
                         current_exception_text());
}
