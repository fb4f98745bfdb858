/* The CUDA driver, found at run time: libcuda.so.1 is opened at the first use of a CUDA array, never linked.
 *
 * No context is ever created. A call uses the thread's current context if it belongs to the device of the arrays, else the primary
 * one, which is what every framework uses, for the length of the call. Work goes to the caller's stream and nothing here waits, but for
 * the functions that say so. `function` is the name that the user called, for messages. */
#ifndef SA_DRIVER_H
#define SA_DRIVER_H

#include <stdbool.h>

#include "../core/status.h"
#include "choose.h"
#include "driver_abi.h"

enum { SA_MAX_DEVICES = 64 };

/* A device made current. Enter and leave on one thread, in pairs. */
typedef struct sa_device_scope {
    const sa_cuda_device *device;
    CUdevice handle;
    int ordinal;
    bool primary; /* the current context is the device's primary one */
    bool pushed;
} sa_device_scope;

/* Can the device be used? Without a context being touched. */
sa_status sa_device_check(const char *function, int ordinal);

sa_status sa_device_enter(const char *function, int ordinal, sa_device_scope *scope);
void sa_device_leave(const sa_device_scope *scope);

/* The device that an address belongs to. `what` names it in messages. */
sa_status sa_device_of_pointer(const char *function, const char *what, const void *pointer, int *ordinal);

/* Memory. `what` names it in messages. Allocating and freeing may wait for the device: not in the hot call. */
sa_status sa_device_allocate(const char *function, const char *what, int64_t bytes, void **memory);
void sa_device_free(int ordinal, void *memory);

/* Copies and fills are asynchronous; what goes to the host is there when sa_device_wait has returned. sa_device_copy_in takes its bytes
 * before it returns, and must not be captured into a graph: sa_device_stage (kernels.h) may. */
sa_status sa_device_copy_in(const char *function, void *target, const void *source, int64_t bytes, void *stream);
sa_status sa_device_copy_out(const char *function, void *target, const void *source, int64_t bytes, void *stream);
sa_status sa_device_copy(const char *function, void *target, const void *source, int64_t bytes, void *stream);
sa_status sa_device_fill(const char *function, void *target, int byte, int64_t bytes, void *stream);
sa_status sa_device_wait(const char *function, void *stream);
sa_status sa_device_capturing(const char *function, void *stream, bool *capturing);

/* Lets `waiting` wait, on the device, for what is in `stream` now. */
sa_status sa_device_order(const char *function, void *stream, void *waiting);

/* One sentence for users: what was built and what was found, or what is missing and what to do. With `probe` the driver is initialised
 * (after which a forked child cannot use CUDA) and devices are named; without, only what can be known for free. */
const char *sa_cuda_sentence(bool probe);
int sa_cuda_device_count(void); /* initialises; 0 where CUDA cannot be used */

/* --- for kernels.c --------------------------------------------------------------------------------------------------------------- */

/* The entries of driver_abi.h, valid once a device was entered. */
typedef struct sa_driver {
#define SA_ENTRY(name, arguments) CUresult(*name) arguments;
    SA_DRIVER_ENTRIES(SA_ENTRY)
#undef SA_ENTRY
    CUresult (*cuFuncLoad)(CUfunction function); /* from 12.4 on; before, getting the function loads it */
} sa_driver;

extern sa_driver sa_driver_entries;

/* The exception that a driver's error stands for: its text, and what was tried. */
sa_status sa_driver_failure(const char *function, const char *what, CUresult result);

#define SA_TRY_DRIVER(function, call)                                \
    do {                                                             \
        const CUresult try_result = sa_driver_entries.call;          \
        if (try_result != CUDA_SUCCESS) {                            \
            return sa_driver_failure(function, #call, try_result);   \
        }                                                            \
    } while (0)

/* The image of kernels compiled from NAME.cu, NULL where it was not built. */
const char *sa_cuda_image(const char *name);

#endif
