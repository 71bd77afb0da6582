/*
 * debug_plan.h: functions of `_native` that show plans to the tests.
 */
#ifndef DCP_DEBUG_PLAN_H
#define DCP_DEBUG_PLAN_H

#include "native_state.h"

/* `_debug_plan` and `_debug_targets`, ended by a zero entry: for PyModule_AddFunctions. */
extern PyMethodDef debug_plan_methods[];

#endif
