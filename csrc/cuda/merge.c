/* The host's half of merge: parts -> POD -> one launch; tables of many parts go to the device first. */
#include "merge.h"

#include <string.h>

#include "../core/integers.h"
#include "kernels.h"
#include "work.h"

/* Both alignments of a tensor's rows: what is read in pieces begins at a multiple of 16 bytes and has no gaps. */
static bool in_pieces(const sa_tensor *tensor)
{
    const int64_t size = sa_dtype_size(tensor->dtype), depth = tensor->shape[tensor->rank - 1];
    uintptr_t bits = (uintptr_t)tensor->data | (uintptr_t)(depth * size);
    for (int axis = 0; axis < tensor->rank - 1; axis++) {
        bits |= (uintptr_t)(tensor->shape[axis] > 1 ? tensor->stride[axis] * size : 0);
    }
    return (bits & 15) == 0 && (depth == 1 || tensor->stride[tensor->rank - 1] == 1);
}

static sa_merge_part describe_part(const sa_part *from)
{
    sa_merge_part part = {.out = from->out.data, .lse = from->lse.data};
    const int missing = 4 - from->out.rank;
    memcpy(part.out_stride + missing, from->out.stride, (size_t)from->out.rank * sizeof from->out.stride[0]);
    memcpy(part.lse_stride + missing, from->lse.stride, (size_t)from->lse.rank * sizeof from->lse.stride[0]);
    return part;
}

static void describe(const sa_part *parts, int64_t count, void *out, float *lse, sa_merge_problem *problem)
{
    const sa_tensor *first = &parts[0].out;
    *problem = (sa_merge_problem){.out = out, .lse = lse, .extent = {1, 1, 1}, .count = count, .rows = 1};
    for (int axis = 0; axis < first->rank - 1; axis++) {
        problem->extent[4 - first->rank + axis] = first->shape[axis];
        problem->rows *= first->shape[axis];
    }
    problem->depth = first->shape[first->rank - 1];
    problem->dtype = (int32_t)first->dtype;
    problem->aligned = ((uintptr_t)out & 15) == 0;
    for (int64_t i = 0; i < count; i++) {
        problem->aligned = problem->aligned && in_pieces(&parts[i].out);
    }
}

/* More parts than a launch carries: the table lies in the caller's memory. */
static sa_status stage_parts(const char *function, const sa_device_scope *scope, const sa_part *parts, void *memory, void *stream,
                             sa_merge_problem *problem)
{
    for (int64_t first = 0; first < problem->count; first += SA_MERGE_PARTS) {
        const int64_t count = min_i64(problem->count - first, SA_MERGE_PARTS);
        for (int64_t i = 0; i < count; i++) {
            problem->parts[i] = describe_part(&parts[first + i]);
        }
        SA_TRY(sa_device_stage(function, scope, (sa_merge_part *)memory + first, problem->parts, count * (int64_t)sizeof(sa_merge_part), stream));
    }
    problem->more = memory;
    return SA_OK;
}

static sa_status run(const char *function, const sa_device_scope *scope, const sa_part *parts, void *memory, void *stream,
                     sa_merge_problem *problem)
{
    const int64_t pieces = ceil_div(problem->depth * sa_dtype_size((sa_dtype)problem->dtype), 16);
    const int64_t grid = min_i64(ceil_div(problem->rows * pieces, SA_MERGE_THREADS), SA_MERGE_CTAS);
    const sa_cuda_launch launch = {sa_cuda_kernel_count + SA_KERNEL_MERGE, (uint32_t)grid, SA_MERGE_THREADS, 1, 0, 0};
    if (grid == 0) {
        return SA_OK;
    }
    if (problem->count > SA_MERGE_PARTS) {
        SA_TRY(stage_parts(function, scope, parts, memory, stream, problem));
    } else {
        for (int64_t i = 0; i < problem->count; i++) {
            problem->parts[i] = describe_part(&parts[i]);
        }
    }
    return sa_device_launch(function, scope, &launch, problem, stream);
}

int64_t sa_cuda_merge_bytes(int64_t count)
{
    return count > SA_MERGE_PARTS ? count * (int64_t)sizeof(sa_merge_part) : 0;
}

sa_status sa_cuda_merge(const char *function, int device, const sa_part *parts, int64_t count, void *out, float *lse, void *memory,
                        void *stream)
{
    sa_device_scope scope;
    sa_merge_problem problem;
    describe(parts, count, out, lse, &problem);
    SA_TRY(sa_device_enter(function, device, &scope));
    const sa_status status = run(function, &scope, parts, memory, stream, &problem);
    sa_device_leave(&scope);
    return status;
}
