/* Kernels by index: loaded, finalised once per device, launched.
 *
 * Indices are those of sa_cuda_kernels (choose.h), then the host's own. */
#ifndef SA_KERNELS_H
#define SA_KERNELS_H

#include "driver.h"

/* The host's own, behind sa_cuda_kernel_count. */
enum {
    SA_KERNEL_STAGE,
    SA_KERNEL_MERGE,
    SA_KERNEL_KV_APPEND,
    SA_KERNEL_KV_STEP, /* of SinkWindow, and of six more in the order of sa_policy_kind */
    SA_KERNEL_KV_STEP_K_NORM = SA_KERNEL_KV_STEP + 7,
    SA_KERNEL_KV_STEP_DRAWN,
    SA_KERNEL_KV_EVICT,
    SA_KERNEL_KV_MASS,
    SA_KERNEL_KV_WEIGHTS,
    SA_OWN_KERNELS
};

/* `pod` is the kernel's only parameter, passed by value. */
sa_status sa_device_launch(const char *function, const sa_device_scope *scope, const sa_cuda_launch *launch, void *pod, void *stream);

/* Writes bytes of the host to the device, as parameters of kernels: asynchronous, and a captured graph holds the bytes themselves.
 * `bytes` and `target` are multiples of 4. */
sa_status sa_device_stage(const char *function, const sa_device_scope *scope, void *target, const void *source, int64_t bytes, void *stream);

/* Fills cluster_limit, for which a kernel must be loaded. Called once a device, with the device current. */
sa_status sa_device_cluster_limit(const char *function, const sa_device_scope *scope, int32_t *limit);

/* Does the device run what was compiled for sm_90a, and is it there? */
bool sa_device_has_wgmma(const sa_device_scope *scope);

/* How often each kernel was launched since the process started. */
int sa_cuda_kernel_total(void);
const char *sa_cuda_kernel_name(int index);
int64_t sa_cuda_kernel_calls(int index);

#endif
