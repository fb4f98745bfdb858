/* One call on CUDA: plan -> memory -> release the GIL -> launch -> settle the streams. */
#include "../cuda/work.h"
#include "bind_params.h"
#include "device.h"

/* A planned call, whose device is current. */
typedef struct planned {
    void *work;
    sa_status (*run)(void *work, void *memory, void *stream);
    int64_t memory_bytes;
    const sa_device_scope *scope;
} planned;

static sa_status launch(sa_call *call, const planned *plan, void *memory)
{
    SA_TRY(plan->run(plan->work, memory, call->stream));
    return sa_settle_streams(call);
}

/* Memory, launches, end. */
static int finish(sa_call *call, const planned *plan, const sa_like *like)
{
    void *memory = NULL;
    if (plan->memory_bytes > 0 && sa_new_memory(call, like, plan->memory_bytes, &memory) < 0) {
        sa_device_leave(plan->scope);
        return -1;
    }
    sa_released released; /* a full queue blocks a launch, and what drains it may need the GIL */
    sa_release(&released);
    const sa_status status = launch(call, plan, memory);
    sa_reacquire(&released);
    sa_device_leave(plan->scope);
    sa_raise(status);
    return status == SA_OK ? 0 : -1;
}

static sa_status run_work(void *work, void *memory, void *stream)
{
    return sa_cuda_run(work, memory, stream);
}

/* `status`: of planning. */
static int finish_work(sa_call *call, sa_status status, sa_cuda_work *work, const sa_like *like)
{
    sa_raise(status);
    return status == SA_OK ? finish(call, &(planned){work, run_work, work->memory_bytes, &work->scope}, like) : -1;
}

int sa_run_on_cuda(sa_call *call, const sa_attend_params *params, const sa_cuda_store *cache, const sa_like *like)
{
    sa_cuda_work work;
    return finish_work(call, sa_cuda_begin(params, cache, call->stream, &work), &work, like);
}

int sa_run_mass_on_cuda(sa_call *call, const sa_mass_params *params, const sa_like *like)
{
    sa_cuda_work work;
    return finish_work(call, sa_cuda_begin_mass(params, &work), &work, like);
}

int sa_run_backward_on_cuda(sa_call *call, const sa_attend_backward_params *params, const sa_like *like)
{
    sa_cuda_work work;
    return finish_work(call, sa_cuda_begin_backward(params, &work), &work, like);
}

static sa_status run_kv(void *work, void *memory, void *stream)
{
    return sa_cuda_kv_run(work, memory, stream);
}

int sa_run_kv_on_cuda(sa_call *call, const sa_attend_params *params, sa_cuda_kv *store, const sa_like *like)
{
    sa_cuda_kv_work work;
    const sa_status status = sa_cuda_kv_plan(store, params, call->stream, &work);
    sa_raise(status);
    return status == SA_OK ? finish(call, &(planned){&work, run_kv, work.memory_bytes, &work.scope}, like) : -1;
}
