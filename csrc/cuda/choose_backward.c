#include "choose_parts.h"

/* Rows of a tile, shared bytes, and CTAs of a tile, of the two large kernels. */
typedef struct backward_form {
    int64_t keys, queries;
    int64_t keys_shared, queries_shared;
    int64_t parts;
} backward_form;

static backward_form backward_form_of(int64_t depth, int32_t dtype)
{
    if (dtype == SA_CUDA_F32) {
        return (backward_form){SA_BACKWARD_F32_ROWS(depth), SA_BACKWARD_F32_ROWS(depth), SA_BACKWARD_F32_SHARED(depth),
                               SA_BACKWARD_F32_SHARED(depth), 1};
    }
    const int64_t keys = SA_BACKWARD_KEY_BLOCKS(depth), queries = SA_BACKWARD_QUERY_BLOCKS(depth);
    return (backward_form){SA_BACKWARD_ROWS(keys), SA_BACKWARD_ROWS(queries), SA_BACKWARD_SHARED(depth, keys),
                           SA_BACKWARD_SHARED(depth, queries), depth > 128 ? 2 : 1};
}

/* Does the kernel of one pass serve a call? It reads 16 bytes at a time and does to a score nothing but scale and hide it. */
static bool suits_one_pass(const sa_cuda_backward *b, const outline *o)
{
    const sa_cuda_problem *p = &b->forward;
    return b->one_pass && p->dtype != SA_CUDA_F32 && o->bucket < 2 && is_plain(p) && b->aligned;
}

static void reserve_backward(sa_cuda_backward *b, sa_cuda_plan *plan)
{
    const sa_cuda_problem *p = &b->forward;
    const int64_t rows = p->sequences > 0 ? p->sequences : p->batch;
    b->rows_offset = reserve(plan, p->batch * p->heads_q * p->query_length * (int64_t)sizeof(sa_cuda_row));
    b->bias_bytes = p->sink_bias.given ? rows * p->heads_q * p->pinned * (int64_t)sizeof(float) : 0;
    b->bias_offset = reserve(plan, b->bias_bytes);
}

int sa_cuda_choose_backward(sa_cuda_backward *b, sa_cuda_plan *plan)
{
    sa_cuda_problem *p = &b->forward;
    sa_cuda_begin_plan(p, plan);
    b->sums_offset = b->sums_bytes = b->sums_width = 0;
    b->sparse = p->starts.given || p->lengths.given || p->sequences > 0;
    b->aligned = sa_cuda_reads_pieces(p) && tensor_in_pieces(&p->query, p->depth, p->dtype == SA_CUDA_F32 ? 4 : 2) &&
                 tensor_in_pieces(&p->sink_query, p->depth, 2) && tensor_in_pieces(&b->output_gradient, p->depth_v, 2);
    if (p->batch == 0 || p->query_length == 0) {
        return 0;
    }
    const outline o = sa_cuda_outline_of(p);
    const bool one_pass = suits_one_pass(b, &o);
    const backward_form form = one_pass ? (backward_form){SA_ONE_PASS_KEYS, SA_ONE_PASS_SLICE, SA_ONE_PASS_SHARED(o.depth), 0, 1}
                                        : backward_form_of(o.depth, p->dtype);
    const int64_t bands = p->sequences > 0 ? 1 : p->batch, kind = p->dtype * 3 + o.bucket;
    reserve_backward(b, plan);
    if (one_pass) {
        b->sums_width = o.depth;
        b->sums_bytes = p->batch * p->heads_q * p->query_length * o.depth * (int64_t)sizeof(float);
        b->sums_offset = reserve(plan, b->sums_bytes);
    }
    b->learned_tiles = ceil_div(p->learned, form.keys);
    b->key_tiles = ceil_div(p->kv_length, form.keys) + (p->sequences > 0 ? 2 * p->sequences : p->apart ? 1 : 0);
    b->query_tiles = ceil_div(p->query_length, form.queries) + p->sequences;
    const int64_t rows = ceil_div(p->batch * p->heads_q * p->query_length, SA_BACKWARD_ROW_WARPS);
    const int64_t keys = (b->learned_tiles + b->key_tiles * bands) * p->heads_kv * form.parts, queries = b->query_tiles * p->heads_q * bands;
    const int64_t biases = p->sink_bias.given ? ceil_div(p->heads_q * p->pinned, SA_BACKWARD_NUMBER_THREADS) : 0;
    const int64_t pieces = ceil_div(p->batch * p->heads_q * p->query_length * (p->depth / 8), SA_BACKWARD_NUMBER_THREADS);
    const int half = p->dtype == SA_CUDA_BF16, keys_kernel = one_pass ? ONE_PASS + 2 * half + o.bucket : (int)(BACKWARD_KEYS + kind);
    const bool fits =
        push(plan, BACKWARD_ROWS, rows, 32 * SA_BACKWARD_ROW_WARPS, 1, 0) &&
        push(plan, keys_kernel, keys, one_pass ? SA_ONE_PASS_THREADS : 32 * SA_BACKWARD_WARPS, 1, form.keys_shared) &&
        (one_pass ? push(plan, FINISH + half, pieces, SA_BACKWARD_NUMBER_THREADS, 1, 0)
                  : push(plan, (int)(BACKWARD_QUERIES + kind), queries, 32 * SA_BACKWARD_WARPS, 1, form.queries_shared)) &&
        push(plan, BACKWARD_NUMBERS, b->logit_count + biases, SA_BACKWARD_NUMBER_THREADS, 1,
             SA_BACKWARD_NUMBER_THREADS * (int64_t)sizeof(double));
    plan->path = sa_cuda_kernels[one_pass ? keys_kernel : (int)(BACKWARD_QUERIES + kind)].name;
    return fits ? 0 : -1;
}
