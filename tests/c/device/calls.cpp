/* What the host's half of a call asks of the driver (kernels.h), on the host: one device, whose memory is ours. */
#include <cstdlib>
#include <cstring>
#include <vector>

#include "launch.h"
#include "kv_slots.h"
#include "merge.h"

extern "C" {
#include "kernels.h"
#include "work.h"
#include "../core/policy.h"

void merge(sa_merge_problem);
void kv_append(sa_cuda_slots);
void kv_step_sink_window(sa_cuda_slots), kv_step_h2o(sa_cuda_slots), kv_step_h2o_norm(sa_cuda_slots), kv_step_h2o_ema(sa_cuda_slots),
    kv_step_v_length_h2o(sa_cuda_slots), kv_step_scissorhands(sa_cuda_slots), kv_step_tova(sa_cuda_slots), kv_step_k_norm(sa_cuda_slots),
    kv_step_drawn(sa_cuda_slots);
void kv_evict(sa_cuda_slots);

int64_t sa_dtype_size(sa_dtype dtype)
{
    return dtype == SA_F32 ? 4 : 2;
}

sa_status sa_device_enter(const char *, int, sa_device_scope *scope)
{
    static const sa_cuda_device h200 = {90, 132, 232448, 0, 0};
    scope->device = &h200;
    scope->ordinal = 0;
    return SA_OK;
}

void sa_device_leave(const sa_device_scope *)
{
}

sa_status sa_device_cluster_limit(const char *, const sa_device_scope *, int32_t *limit)
{
    *limit = 8;
    return SA_OK;
}

bool has_wgmma;

bool sa_device_has_wgmma(const sa_device_scope *)
{
    return has_wgmma;
}

/* The copy engine of Hopper is not imitated: a kernel that wants it ends the test. */
sa_status sa_device_map(const char *, const sa_cuda_form *, sa_cuda_prefill *)
{
    return SA_OK;
}

sa_status sa_device_launch(const char *, const sa_device_scope *, const sa_cuda_launch *launch, void *pod, void *)
{
    if (launch->kernel == sa_cuda_kernel_count + SA_KERNEL_MERGE) {
        device::launch_kernel([=] { merge(*(sa_merge_problem *)pod); }, *launch);
    } else {
        device::launch_problem(*launch, pod);
    }
    return SA_OK;
}

sa_status sa_device_stage(const char *, const sa_device_scope *, void *target, const void *source, int64_t bytes, void *)
{
    memcpy(target, source, (size_t)bytes);
    return SA_OK;
}

sa_status sa_device_fill(const char *, void *target, int byte, int64_t bytes, void *)
{
    memset(target, byte, (size_t)bytes);
    return SA_OK;
}

sa_status sa_counters_take(const char *, const sa_device_scope *, void *, int64_t, uint32_t **counters)
{
    *counters = nullptr; /* some of the caller's memory */
    return SA_OK;
}

int64_t sa_cuda_store_slots(const sa_cuda_store *)
{
    abort();
}

static int run(sa_cuda_work *work)
{
    std::vector<char> memory((size_t)work->memory_bytes + 256, (char)0xff);
    const sa_status status = sa_cuda_run(work, (void *)(((uintptr_t)memory.data() + 255) / 256 * 256), nullptr);
    sa_device_leave(&work->scope);
    return status;
}

int run_attend(const sa_attend_params *params)
{
    sa_cuda_work work;
    const sa_status status = sa_cuda_begin(params, nullptr, nullptr, &work);
    return status == SA_OK ? run(&work) : status;
}

int run_mass(const sa_mass_params *params)
{
    sa_cuda_work work;
    const sa_status status = sa_cuda_begin_mass(params, &work);
    return status == SA_OK ? run(&work) : status;
}

int run_backward(const sa_attend_backward_params *params)
{
    sa_cuda_work work;
    const sa_status status = sa_cuda_begin_backward(params, &work);
    return status == SA_OK ? run(&work) : status;
}

/* One part of a call of a KVCache: its tokens into the slots; then, when the weights are known, tokens out of them. */
void run_kv_append(const sa_cuda_slots *slots)
{
    const uint32_t parts = (uint32_t)((slots->tokens + SA_KV_APPEND_WARPS - 1) / SA_KV_APPEND_WARPS);
    device::launch_kernel([=] { kv_append(*slots); }, {0, parts * (uint32_t)(slots->batch * slots->heads_kv), 32 * SA_KV_APPEND_WARPS, 1, 0, 0});
}

void run_kv_evict(const sa_cuda_slots *slots)
{
    static void (*const steps[SA_POLICY_COUNT])(sa_cuda_slots) = {
        kv_step_sink_window, kv_step_h2o, kv_step_h2o_norm, kv_step_h2o_ema, kv_step_v_length_h2o, kv_step_scissorhands, kv_step_tova,
        nullptr, nullptr, kv_step_k_norm, nullptr, nullptr, kv_step_drawn, nullptr};
    const uint32_t streams = (uint32_t)(slots->batch * slots->heads_kv);
    void (*const step)(sa_cuda_slots) = steps[slots->kind];
    if (slots->tokens == 1 && slots->every == 1 && step != nullptr) {
        device::launch_kernel([=] { step(*slots); }, {0, streams, 128, 1, SA_KV_STEP_SHARED, 0});
    } else {
        device::launch_kernel([=] { kv_evict(*slots); }, {0, streams, 32 * SA_KV_EVICT_WARPS, 1, SA_KV_EVICT_SHARED + (uint32_t)SA_KV_SCRATCH(slots->stride), 0});
    }
}

int64_t size_of_kv_slots(void)
{
    return sizeof(sa_cuda_slots);
}

int64_t size_of_backward_params(void)
{
    return sizeof(sa_attend_backward_params);
}
}
