/* What the host's half of a call asks of the driver (kernels.h), on the host: one device, whose memory is ours. */
#include <cstdlib>
#include <cstring>

#include "launch.h"
#include "merge.h"

extern "C" {
#include "../sinkattn.h"
#include "kernels.h"

void merge(sa_merge_problem);

int64_t sa_dtype_size(sa_dtype dtype)
{
    return dtype == SA_F32 ? 4 : 2;
}

sa_status sa_device_enter(const char *, int, sa_device_scope *)
{
    return SA_OK;
}

void sa_device_leave(const sa_device_scope *)
{
}

sa_status sa_device_launch(const char *, const sa_device_scope *, const sa_cuda_launch *launch, void *pod, void *)
{
    if (launch->kernel != sa_cuda_kernel_count + SA_KERNEL_MERGE) {
        abort();
    }
    device::launch_kernel([=] { merge(*(sa_merge_problem *)pod); }, *launch);
    return SA_OK;
}

sa_status sa_device_stage(const char *, const sa_device_scope *, void *target, const void *source, int64_t bytes, void *)
{
    memcpy(target, source, (size_t)bytes);
    return SA_OK;
}
}
