/* The kernels behind the libcuda.so.1 of tests/gpu/fake_cuda.c: whole calls of the package, without a device. */
#include <cstring>
#include <string>

#include "launch.h"
#include "kv_slots.h"
#include "merge.h"

extern "C" {
#include "driver_abi.h"

void merge(sa_merge_problem);
void kv_append(sa_cuda_slots);
#define SA_STEPS(_) _(sink_window) _(h2o) _(h2o_norm) _(h2o_ema) _(v_length_h2o) _(scissorhands) _(tova) _(k_norm) _(drawn)
#define SA_DECLARE_STEP(name) void kv_step_##name(sa_cuda_slots);
SA_STEPS(SA_DECLARE_STEP)
void kv_evict(sa_cuda_slots);
void kv_mass(sa_cuda_slots);
void kv_weights(sa_cuda_problem);

void fake_run_kernel(const char *name, const CUlaunchConfig *config, const void *pod)
{
    const std::string wanted = name;
    sa_cuda_launch launch = {0, config->gridDimX, config->blockDimX, 1, config->sharedMemBytes, 0};
    if (config->numAttrs > 0 && config->attrs[0].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
        launch.cluster = config->attrs[0].value.clusterDim.x;
    }
#define SA_RUN(kernel, type)                                                         \
    if (wanted == #kernel) {                                                         \
        device::launch_kernel([=] { kernel(*(const type *)pod); }, launch);          \
        return;                                                                      \
    }
    SA_RUN(merge, sa_merge_problem)
    SA_RUN(kv_append, sa_cuda_slots)
#define SA_RUN_STEP(name) SA_RUN(kv_step_##name, sa_cuda_slots)
    SA_STEPS(SA_RUN_STEP)
    SA_RUN(kv_evict, sa_cuda_slots)
    SA_RUN(kv_mass, sa_cuda_slots)
    SA_RUN(kv_weights, sa_cuda_problem)
    for (; launch.kernel < sa_cuda_kernel_count; launch.kernel++) {
        if (wanted == sa_cuda_kernels[launch.kernel].name) {
            device::launch_problem(launch, pod);
            return;
        }
    }
    abort();
}
}
