/* One call on CUDA: plan -> memory -> release the GIL -> launch -> settle the streams. */
#include "../cuda/work.h"
#include "bind_params.h"
#include "device.h"

static sa_status launch(sa_call *call, sa_cuda_work *work, void *memory)
{
    SA_TRY(sa_cuda_run(work, memory, call->stream));
    return sa_settle_streams(call);
}

/* A begun call: memory, launches, end. */
static int finish(sa_call *call, sa_cuda_work *work, const sa_like *like)
{
    void *memory = NULL;
    if (work->memory_bytes > 0 && sa_new_memory(call, like, work->memory_bytes, &memory) < 0) {
        sa_cuda_end(work);
        return -1;
    }
    sa_released released; /* a full queue blocks a launch, and what drains it may need the GIL */
    sa_release(&released);
    const sa_status status = launch(call, work, memory);
    sa_reacquire(&released);
    sa_cuda_end(work);
    sa_raise(status);
    return status == SA_OK ? 0 : -1;
}

int sa_run_on_cuda(sa_call *call, const sa_attend_params *params, const sa_cuda_store *cache, const sa_like *like)
{
    sa_cuda_work work;
    const sa_status status = sa_cuda_begin(params, cache, call->stream, &work);
    sa_raise(status);
    return status == SA_OK ? finish(call, &work, like) : -1;
}

int sa_run_mass_on_cuda(sa_call *call, const sa_mass_params *params, const sa_like *like)
{
    sa_cuda_work work;
    const sa_status status = sa_cuda_begin_mass(params, &work);
    sa_raise(status);
    return status == SA_OK ? finish(call, &work, like) : -1;
}

int sa_run_backward_on_cuda(sa_call *call, const sa_attend_backward_params *params, const sa_like *like)
{
    sa_cuda_work work;
    const sa_status status = sa_cuda_begin_backward(params, &work);
    sa_raise(status);
    return status == SA_OK ? finish(call, &work, like) : -1;
}

int sa_run_kv_on_cuda(sa_call *call, const sa_attend_params *params, sa_cuda_kv *store, const sa_like *like)
{
    sa_cuda_kv_work work;
    void *memory = NULL;
    sa_status status = sa_cuda_kv_plan(store, params, call->stream, &work);
    if (status != SA_OK || sa_new_memory(call, like, work.memory_bytes, &memory) < 0) {
        if (status == SA_OK) {
            sa_cuda_kv_finish(&work);
        }
        sa_raise(status);
        return -1;
    }
    sa_released released;
    sa_release(&released);
    status = sa_cuda_kv_run(&work, memory, call->stream);
    status = status != SA_OK ? status : sa_settle_streams(call);
    sa_reacquire(&released);
    sa_cuda_kv_finish(&work);
    sa_raise(status);
    return status == SA_OK ? 0 : -1;
}
