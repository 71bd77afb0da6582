/* fake_cudart.h: what the sources of the fake libcudart.so.13 share. */
#ifndef DCP_FAKE_CUDART_H
#define DCP_FAKE_CUDART_H

#include "fake_cuda.h"
#include "fake_gpu.h"

/* What every function ends with: the runtime remembers the last error of a thread. */
int fake_done(int code);

/* Counted, and failed where a test wants it. */
#define ENTER()                                                                                    \
    do {                                                                                           \
        int code_ = fake_enter(__func__);                                                          \
        if (code_ != FAKE_OK) {                                                                    \
            return fake_done(code_);                                                               \
        }                                                                                          \
    } while (0)

/* The same for what needs a context on the current device, and so creates it. */
#define ENTER_CONTEXT()                                                                            \
    do {                                                                                           \
        int dead_;                                                                                 \
        ENTER();                                                                                   \
        dead_ = fake_context(*fake_current_device());                                              \
        if (dead_ != FAKE_OK) {                                                                    \
            return fake_done(dead_);                                                               \
        }                                                                                          \
    } while (0)

#endif
