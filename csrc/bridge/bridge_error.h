/*
 * bridge_error.h: C++ exceptions as error records, for the sources of `_bridge`.
 *
 * dcp_error_set belongs to the core, which is linked into `_native` only.
 */
#ifndef DCP_BRIDGE_ERROR_H
#define DCP_BRIDGE_ERROR_H

#include "dcp_error.h"

#include <c10/util/Exception.h>

#include <cstdio>
#include <exception>
#include <string>

namespace dcp_bridge
{

/* As dcp_error_set: the first failure is kept, and `code` comes back. */
inline int
set_error(struct dcp_error *err, int code, int rank, const std::string &message) noexcept
{
    if (err == nullptr || err->code != DCP_OK) {
        return code;
    }
    *err = {};
    err->code = code;
    err->rank = rank;
    err->offset_bytes = UINT64_MAX;
    std::snprintf(err->message, sizeof err->message, "%s", message.c_str());
    return code;
}

/* The text of the exception being handled, without torch's C++ backtrace. */
inline std::string
current_exception_text()
{
    try {
        throw;
    } catch (const c10::Error &e) {
        return e.what_without_backtrace();
    } catch (const std::exception &e) {
        return e.what();
    } catch (...) {
        return "an exception of unknown type";
    }
}

} // namespace dcp_bridge

#endif
