/*
 * group_store.cpp: the store of a c10d::ProcessGroup as a store table.
 *
 * The store is cloned, so that a call of ours that is stuck blocks no call of the trainer.  Only
 * calls that are answered at once are made: wait() and get() of a missing key print warnings to
 * stderr when they time out, and no timeout is kept when the host of the store is frozen.
 *
 * No C++ exception leaves this file.
 *
 * Threads: store_from_group needs the GIL.  The calls and destroy do not: a clone has no Python
 * object behind it, except that of a store written in Python, which takes the GIL by itself.
 */
#include <pybind11/conduit/pybind11_conduit_v1.h> /* must be first: it includes Python.h */

#include "bridge.h"
#include "bridge_error.h"

#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace
{

using dcp_bridge::current_exception_text;
using dcp_bridge::set_error;

using StorePtr = c10::intrusive_ptr<c10d::Store>;

constexpr std::chrono::milliseconds GET_TIMEOUT = std::chrono::seconds(5);

struct GroupStore {
    StorePtr store;
};

/* Lets go of the GIL while it lives. */
class WithoutGil
{
    PyThreadState *state = PyEval_SaveThread();

  public:
    WithoutGil() = default;
    WithoutGil(const WithoutGil &) = delete;
    WithoutGil &operator=(const WithoutGil &) = delete;
    ~WithoutGil()
    {
        PyEval_RestoreThread(state);
    }
};

/* Runs body(store); its exceptions become records. */
template <typename Body>
int
run_call(void *ctx, const char *what, const char *key, struct dcp_error *err, Body body) noexcept
try {
    return body(*static_cast<GroupStore *>(ctx)->store);
} catch (...) {
    try {
        return set_error(err, DCP_E_COMM, -1,
                         std::string(what) + " of \"" + key +
                             "\" in the process group's store failed: " + current_exception_text() +
                             "; the process that hosts the store (by default rank 0, or the "
                             "launcher of its machine) may be gone: see that it is alive");
    } catch (...) {
        return set_error(err, DCP_E_COMM, -1, what);
    }
}

std::vector<uint8_t>
value_of(const void *bytes, size_t len)
{
    auto *first = static_cast<const uint8_t *>(bytes);
    return {first, first + len};
}

int
store_set(void *ctx, const char *key, const void *bytes, size_t len, struct dcp_error *err) noexcept
{
    return run_call(ctx, "set", key, err, [=](c10d::Store &store) {
        store.set(key, value_of(bytes, len));
        return 0;
    });
}

int
store_set_once(void *ctx, const char *key, const void *bytes, size_t len,
               struct dcp_error *err) noexcept
{
    return run_call(ctx, "compare_set", key, err, [=](c10d::Store &store) {
        (void)store.compareSet(key, std::vector<uint8_t>(), value_of(bytes, len));
        return 0;
    });
}

int
store_get(void *ctx, const char *key, void *buf, size_t cap, size_t *ret_len,
          struct dcp_error *err) noexcept
{
    return run_call(ctx, "get", key, err, [=](c10d::Store &store) -> int {
        std::vector<uint8_t> value = store.get(key);
        if (value.size() > cap) {
            return set_error(err, DCP_E_LIMIT, -1,
                             std::string("\"") + key + "\" in the process group's store has " +
                                 std::to_string(value.size()) + " bytes, at most " +
                                 std::to_string(cap) + " were expected");
        }
        if (!value.empty()) {
            std::memcpy(buf, value.data(), value.size());
        }
        *ret_len = value.size();
        return 0;
    });
}

int
store_add(void *ctx, const char *key, int64_t delta, int64_t *ret_value,
          struct dcp_error *err) noexcept
{
    return run_call(ctx, "add", key, err, [=](c10d::Store &store) {
        *ret_value = store.add(key, delta);
        return 0;
    });
}

int
store_check(void *ctx, const char *key, bool *ret_there, struct dcp_error *err) noexcept
{
    return run_call(ctx, "check", key, err, [=](c10d::Store &store) {
        *ret_there = store.check({key});
        return 0;
    });
}

int
store_remove(void *ctx, const char *key, struct dcp_error *err) noexcept
{
    return run_call(ctx, "delete_key", key, err, [=](c10d::Store &store) {
        (void)store.deleteKey(key); /* false: it was not there */
        return 0;
    });
}

void
store_destroy(void *ctx) noexcept
{
    delete static_cast<GroupStore *>(ctx);
}

/* The group's own store is let go of under the GIL: Python may hold the only other reference. */
StorePtr
clone_of(const StorePtr &store)
{
    WithoutGil guard;
    StorePtr clone = store->clone();
    auto theirs = store->getTimeout();

    /* A get() of a key that somebody removes meanwhile waits for it. */
    clone->setTimeout(GET_TIMEOUT);
    if (store->getTimeout() != theirs) {
        clone->setTimeout(theirs); /* stores in memory clone themselves as themselves */
    }
    return clone;
}

} // namespace

int
dcp_bridge::store_from_group(void *process_group, struct dcp_store *ret_store,
                             struct dcp_error *err) noexcept
try {
    auto *object = static_cast<PyObject *>(process_group);
    auto *group = pybind11_conduit_v1::get_type_pointer_ephemeral<c10d::ProcessGroup>(object);
    if (group == nullptr) {
        PyErr_Clear(); /* the conduit's */
        return set_error(err, DCP_E_INVALID, -1,
                         std::string("process_group is a ") + Py_TYPE(object)->tp_name +
                             ", not a torch.distributed.ProcessGroup; only members of a group can "
                             "save with it");
    }
    StorePtr store = group->getStore();
    if (!store) {
        return set_error(err, DCP_E_COMM, group->getRank(),
                         "the process group has no store, over which the ranks of a background "
                         "save agree; pass a group made by init_process_group or new_group");
    }
    auto client = std::make_unique<GroupStore>();
    client->store = clone_of(store);
    *ret_store = {};
    ret_store->kind = "store";
    ret_store->set = store_set;
    ret_store->set_once = store_set_once;
    ret_store->get = store_get;
    ret_store->add = store_add;
    ret_store->check = store_check;
    ret_store->remove = store_remove;
    ret_store->destroy = store_destroy;
    ret_store->ctx = client.release();
    return 0;
} catch (...) {
    PyErr_Clear();
    return set_error(err, DCP_E_COMM, -1,
                     "cannot connect to the store of the process group: " +
                         current_exception_text());
}
