/* fake_cuda.h: what the fake runtime asks the fake driver beyond fake_gpu.h. */
#ifndef DCP_FAKE_CUDA_H
#define DCP_FAKE_CUDA_H

struct fake_host_call {
    void (*fn)(void *arg);
    void *arg;
};

void fake_host_call_run(void *call);
const char *fake_error_text(int code);
const char *fake_error_name(int code);
int fake_attribute(int attribute); /* the same numbers in the driver and the runtime */
/* A driver function by name: a real one, one that answers "not supported", or NULL where the name
 * is none of the driver's. */
void *fake_driver_function(const char *name);
/* Says on stderr and in the text of "not supported" what was asked for. */
int fake_absent(const char *name);
/* The same, as the last error of the calling thread (in the runtime). */
int fake_refuse(const char *name);

#endif
