#include "check.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "integers.h"

enum { MAX_DEPTH = 256, SIZE_BITS = 52, STRIDE_BITS = 56 };

int64_t sa_dtype_size(sa_dtype dtype)
{
    return dtype == SA_F32 ? 4 : 2;
}

const char *sa_dtype_name(sa_dtype dtype)
{
    return dtype == SA_F32 ? "float32" : dtype == SA_F16 ? "float16" : "bfloat16";
}

/* A shape as text, for messages. */
typedef struct text {
    char characters[112];
} text;

static text shape_text(const int64_t *shape, int rank)
{
    text out = {"["};
    for (int axis = 0; axis < rank; axis++) {
        const size_t used = strlen(out.characters);
        snprintf(out.characters + used, sizeof out.characters - used, "%s%" PRId64, axis ? ", " : "", shape[axis]);
    }
    strncat(out.characters, "]", sizeof out.characters - strlen(out.characters) - 1);
    return out;
}

static sa_status check_rank(const char *function, const char *name, int rank, int expected, const char *axes)
{
    if (rank != expected) {
        return sa_fail(SA_VALUE_ERROR, "%s(): %s has %d dimensions, expected %d: %s", function, name, rank, expected, axes);
    }
    return SA_OK;
}

static sa_status check_shape(const char *function, const char *name, const int64_t *shape, int rank, const int64_t *expected,
                             int expected_rank, const char *axes)
{
    if (rank == expected_rank && memcmp(shape, expected, (size_t)rank * sizeof *shape) == 0) {
        return SA_OK;
    }
    const text came = shape_text(shape, rank), wanted = shape_text(expected, expected_rank);
    return sa_fail(SA_VALUE_ERROR, "%s(): %s has shape %s, expected %s %s", function, name, came.characters, axes, wanted.characters);
}

sa_status sa_check_size(const char *function, const char *name, const int64_t *shape, int rank, int64_t item_size)
{
    int64_t bytes = item_size;
    for (int axis = 0; axis < rank; axis++) {
        if (shape[axis] < 0) {
            const text came = shape_text(shape, rank);
            return sa_fail(SA_VALUE_ERROR, "%s(): %s has a negative extent: %s", function, name, came.characters);
        }
        /* An empty axis does not excuse the others: offsets are computed from them. The limit is beyond what a machine addresses and
         * leaves room for what is derived: a few hundred bytes for each row, partial results for each head. */
        if (!product_fits(bytes, max_i64(shape[axis], 1), &bytes) || bytes >> SIZE_BITS != 0) {
            const text came = shape_text(shape, rank);
            return sa_fail(SA_VALUE_ERROR, "%s(): %s has shape %s, whose size does not fit %d bits", function, name, came.characters,
                           SIZE_BITS);
        }
    }
    return SA_OK;
}

static bool is_empty(const sa_tensor *tensor)
{
    for (int axis = 0; axis < tensor->rank; axis++) {
        if (tensor->shape[axis] == 0) {
            return true;
        }
    }
    return false;
}

/* Element offsets of the first and the last element in memory. */
typedef struct extent {
    int64_t low, high;
} extent;

/* False where an offset, or one step past an end (empty ranges begin there), is too far away. Strides of empty axes count as well. */
static bool extent_of(const sa_tensor *tensor, extent *out)
{
    extent reach = {0, 0};
    for (int axis = 0; axis < tensor->rank; axis++) {
        const int64_t stride = tensor->stride[axis], limit = (int64_t)1 << STRIDE_BITS;
        int64_t past;
        if (!product_fits(stride, max_i64(tensor->shape[axis], 1), &past) || past < -limit || past > limit) {
            return false;
        }
        *(past < 0 ? &reach.low : &reach.high) += past - stride;
    }
    *out = is_empty(tensor) ? (extent){0, -1} : reach;
    return true;
}

static sa_status check_reach(const char *function, const char *name, const sa_tensor *tensor)
{
    SA_TRY(sa_check_size(function, name, tensor->shape, tensor->rank, sa_dtype_size(tensor->dtype)));
    extent reach;
    if (!extent_of(tensor, &reach)) {
        return sa_fail(SA_VALUE_ERROR, "%s(): the strides of %s do not fit %d bits", function, name, STRIDE_BITS);
    }
    return SA_OK;
}

static sa_status check_memory(const char *function, const char *name, const sa_tensor *tensor)
{
    SA_TRY(check_reach(function, name, tensor));
    const int last = tensor->rank - 1;
    if (tensor->stride[last] != 1 && tensor->shape[last] > 1 && !is_empty(tensor)) {
        return sa_fail(SA_VALUE_ERROR, "%s(): the last axis of %s has stride %" PRId64 ", expected 1 (make it contiguous along the last axis)",
                       function, name, tensor->stride[last]);
    }
    return SA_OK;
}

static sa_status check_dtype(const char *function, const char *name, const sa_tensor *tensor, sa_dtype expected)
{
    if (tensor->dtype != expected) {
        return sa_fail(SA_TYPE_ERROR, "%s(): %s is %s, expected %s (the dtype of q)", function, name, sa_dtype_name(tensor->dtype),
                       sa_dtype_name(expected));
    }
    return SA_OK;
}

static sa_status check_depth(const char *function, const char *name, int64_t depth)
{
    if (depth < 1 || depth > MAX_DEPTH) {
        return sa_fail(SA_VALUE_ERROR, "%s(): %s has head_dim %" PRId64 ", expected 1 to %d", function, name, depth, MAX_DEPTH);
    }
    return SA_OK;
}

static sa_status check_axis(const char *function, const char *name, int64_t came, const char *axis, int64_t expected, const char *as)
{
    if (came != expected) {
        return sa_fail(SA_VALUE_ERROR, "%s(): %s has %s %" PRId64 ", expected %" PRId64 " (same as %s)", function, name, axis, came, expected,
                       as);
    }
    return SA_OK;
}

static sa_status check_heads(const char *function, const sa_tensor *query, const sa_tensor *key, const sa_tensor *value)
{
    if (query->shape[1] < 1 || key->shape[1] < 1) {
        return sa_fail(SA_VALUE_ERROR, "%s(): %s has 0 heads, expected at least 1", function, query->shape[1] < 1 ? "q" : "k");
    }
    if (value->shape[1] != key->shape[1]) {
        return sa_fail(SA_VALUE_ERROR, "%s(): v has %" PRId64 " heads, expected %" PRId64 " (same as k)", function, value->shape[1],
                       key->shape[1]);
    }
    if (query->shape[1] % key->shape[1] != 0) {
        return sa_fail(SA_VALUE_ERROR, "%s(): q has %" PRId64 " heads, expected a multiple of %" PRId64 " (the heads of k)", function,
                       query->shape[1], key->shape[1]);
    }
    return SA_OK;
}

static sa_status check_inputs(const sa_attend_params *params)
{
    const char *function = params->function;
    const sa_tensor *query = &params->query, *key = &params->key, *value = &params->value;
    SA_TRY(check_rank(function, "q", query->rank, 4, "[batch, heads_q, query_length, head_dim]"));
    SA_TRY(check_rank(function, "k", key->rank, 4, "[batch, heads_kv, kv_length, head_dim]"));
    SA_TRY(check_rank(function, "v", value->rank, 4, "[batch, heads_kv, kv_length, v_head_dim]"));
    SA_TRY(check_dtype(function, "k", key, query->dtype));
    SA_TRY(check_dtype(function, "v", value, query->dtype));
    SA_TRY(check_depth(function, "q", query->shape[3]));
    SA_TRY(check_depth(function, "v", value->shape[3]));
    SA_TRY(check_axis(function, "k", key->shape[0], "batch", query->shape[0], "q"));
    SA_TRY(check_axis(function, "v", value->shape[0], "batch", query->shape[0], "q"));
    SA_TRY(check_axis(function, "k", key->shape[3], "head_dim", query->shape[3], "q"));
    SA_TRY(check_axis(function, "v", value->shape[2], "length", key->shape[2], "k"));
    SA_TRY(check_heads(function, query, key, value));
    SA_TRY(check_memory(function, "q", query));
    SA_TRY(check_memory(function, "k", key));
    SA_TRY(check_memory(function, "v", value));
    /* results that the call makes: out, and lse / mass in fp32 */
    const int64_t out[4] = {query->shape[0], query->shape[1], query->shape[2], value->shape[3]};
    const int64_t mass[3] = {key->shape[0], key->shape[1], key->shape[2]};
    SA_TRY(sa_check_size(function, "out", out, 4, 4));
    return sa_check_size(function, "mass", mass, 3, 4);
}

static sa_status check_sink_tensors(const sa_attend_params *params)
{
    const char *function = params->function;
    const sa_tensor *query = &params->query, *sink_query = &params->sink_query;
    const sa_tensor *sink_key = &params->sink_key, *sink_value = &params->sink_value;
    if (sink_query->rank) {
        SA_TRY(check_dtype(function, "sink_q", sink_query, query->dtype));
        SA_TRY(check_shape(function, "sink_q", sink_query->shape, sink_query->rank, query->shape, 4, "the shape of q"));
        SA_TRY(check_memory(function, "sink_q", sink_query));
        if (params->pinned == 0) {
            return sa_fail(SA_VALUE_ERROR, "%s(): sink_q needs sinks > 0", function);
        }
    }
    if (sink_key->rank || sink_value->rank) {
        const int64_t key_shape[3] = {params->key.shape[1], sink_key->rank > 1 ? sink_key->shape[1] : 0, query->shape[3]};
        const int64_t value_shape[3] = {params->key.shape[1], key_shape[1], params->value.shape[3]};
        SA_TRY(check_dtype(function, "sink_kv[0]", sink_key, query->dtype));
        SA_TRY(check_dtype(function, "sink_kv[1]", sink_value, query->dtype));
        SA_TRY(check_shape(function, "sink_kv[0]", sink_key->shape, sink_key->rank, key_shape, 3, "[heads_kv, learned, head_dim]"));
        SA_TRY(check_shape(function, "sink_kv[1]", sink_value->shape, sink_value->rank, value_shape, 3, "[heads_kv, learned, v_head_dim]"));
        SA_TRY(check_memory(function, "sink_kv[0]", sink_key));
        SA_TRY(check_memory(function, "sink_kv[1]", sink_value));
    }
    return SA_OK;
}

/* Do two tensors of known extent touch the same bytes? Judged by their outer bounds. */
static bool overlap(const sa_tensor *a, const sa_tensor *b)
{
    extent reach_a, reach_b;
    if (a->rank == 0 || b->rank == 0 || !extent_of(a, &reach_a) || !extent_of(b, &reach_b) || is_empty(a) || is_empty(b)) {
        return false;
    }
    const int64_t size_a = sa_dtype_size(a->dtype), size_b = sa_dtype_size(b->dtype);
    const intptr_t begin_a = (intptr_t)a->data + reach_a.low * size_a, end_a = (intptr_t)a->data + (reach_a.high + 1) * size_a;
    const intptr_t begin_b = (intptr_t)b->data + reach_b.low * size_b, end_b = (intptr_t)b->data + (reach_b.high + 1) * size_b;
    return begin_a < end_b && begin_b < end_a;
}

/* Two elements at one address? Axes by growing stride must each step over all that the inner ones reach. */
static bool overlaps_itself(const sa_tensor *tensor)
{
    if (is_empty(tensor)) {
        return false;
    }
    int64_t reached = 0;
    bool used[4] = {false};
    for (int step = 0; step < tensor->rank; step++) {
        int next = -1;
        for (int axis = 0; axis < tensor->rank; axis++) {
            const int64_t stride = tensor->stride[axis];
            if (!used[axis] && (next < 0 || llabs(stride) < llabs(tensor->stride[next]))) {
                next = axis;
            }
        }
        used[next] = true;
        if (tensor->shape[next] > 1) {
            if (llabs(tensor->stride[next]) <= reached) {
                return true;
            }
            reached += llabs(tensor->stride[next]) * (tensor->shape[next] - 1);
        }
    }
    return false;
}

static sa_status check_output(const sa_attend_params *params)
{
    const sa_tensor *output = &params->output, *query = &params->query;
    const char *function = params->function;
    if (output->rank == 0) {
        return SA_OK; /* made by the caller of this check */
    }
    const int64_t shape[4] = {query->shape[0], query->shape[1], query->shape[2], params->value.shape[3]};
    SA_TRY(check_dtype(function, "out", output, query->dtype));
    SA_TRY(check_shape(function, "out", output->shape, output->rank, shape, 4, "[batch, heads_q, query_length, v_head_dim]"));
    SA_TRY(check_memory(function, "out", output));
    if (output->readonly) {
        return sa_fail(SA_VALUE_ERROR, "%s(): out is read-only, expected a writeable array", function);
    }
    if (overlaps_itself(output)) {
        return sa_fail(SA_VALUE_ERROR, "%s(): out overlaps itself: two of its elements share memory", function);
    }
    const struct {
        const sa_tensor *tensor;
        const char *name;
    } inputs[] = {{query, "q"},
                  {&params->key, "k"},
                  {&params->value, "v"},
                  {&params->sink_query, "sink_q"},
                  {&params->sink_key, "sink_kv[0]"},
                  {&params->sink_value, "sink_kv[1]"}};
    for (size_t i = 0; i < sizeof inputs / sizeof inputs[0]; i++) {
        if (overlap(output, inputs[i].tensor)) {
            return sa_fail(SA_VALUE_ERROR, "%s(): out overlaps %s in memory, expected memory of its own", function, inputs[i].name);
        }
    }
    return SA_OK;
}

sa_status sa_check_tensors(const sa_attend_params *params)
{
    SA_TRY(check_inputs(params));
    SA_TRY(check_sink_tensors(params));
    return check_output(params);
}

sa_status sa_check_scores(const sa_attend_params *params)
{
    const char *function = params->function;
    const int64_t heads = params->query.shape[1], batch = params->query.shape[0];
    if (params->has_scale && !isfinite((float)params->scale)) {
        return sa_fail(SA_VALUE_ERROR, "%s(): scale is %g, expected a finite number", function, params->scale);
    }
    if (params->has_softcap && !((float)params->softcap > 0.0f && isfinite((float)params->softcap))) {
        return sa_fail(SA_VALUE_ERROR, "%s(): softcap is %g, expected a finite number above 0", function, params->softcap);
    }
    const sa_floats *logits = &params->sink_logits, *bias = &params->sink_bias, *slopes = &params->alibi_slopes;
    if (logits->data != NULL && logits->rank > 0) {
        const int64_t shape[2] = {heads, logits->shape[1]};
        SA_TRY(check_shape(function, "sink_logits", logits->shape, logits->rank, shape, logits->rank == 2 ? 2 : 1,
                           logits->rank == 2 ? "[heads_q, logits]" : "[heads_q]"));
    }
    if (bias->data != NULL) {
        const int64_t shape[2] = {heads, params->pinned};
        if (params->pinned == 0) {
            return sa_fail(SA_VALUE_ERROR, "%s(): sink_bias needs sinks > 0", function);
        }
        SA_TRY(check_shape(function, "sink_bias", bias->shape, bias->rank, shape, 2, "[heads_q, sinks]"));
    }
    if (slopes->data != NULL) {
        const int64_t shape[2] = {batch, heads};
        SA_TRY(slopes->rank == 2 ? check_shape(function, "alibi_slopes", slopes->shape, 2, shape, 2, "[batch, heads_q]")
                                 : check_shape(function, "alibi_slopes", slopes->shape, slopes->rank, shape + 1, 1, "[heads_q]"));
    }
    return SA_OK;
}

sa_status sa_check_per_query(const sa_attend_params *params, const char *name, const sa_floats *numbers)
{
    return check_shape(params->function, name, numbers->shape, numbers->rank, params->query.shape, 3, "[batch, heads_q, query_length]");
}

/* Given, and with values that may be read: kernels clamp the others. */
static bool on_host(const sa_ints *numbers)
{
    return numbers->data != NULL && numbers->device.data == NULL;
}

sa_status sa_check_lengths(const sa_attend_params *params, const sa_ints *lengths, const char *name, int64_t limit, const char *limit_name)
{
    if (lengths->data == NULL) {
        return SA_OK;
    }
    const int64_t batch = params->query.shape[0];
    SA_TRY(check_shape(params->function, name, lengths->shape, lengths->rank, &batch, 1, "[batch]"));
    for (int64_t b = 0; on_host(lengths) && b < batch; b++) {
        if (lengths->data[b] < 0 || lengths->data[b] > limit) {
            return sa_fail(SA_VALUE_ERROR, "%s(): %s[%" PRId64 "] is %" PRId64 ", expected 0 to %" PRId64 " (%s)", params->function, name, b,
                           lengths->data[b], limit, limit_name);
        }
    }
    return SA_OK;
}

static sa_status check_window(const sa_attend_params *params)
{
    const sa_ints *window = &params->window;
    if (window->data == NULL) {
        return SA_OK;
    }
    if (window->rank == 0) {
        if (on_host(window) && window->data[0] < 1) {
            return sa_fail(SA_VALUE_ERROR, "%s(): window is %" PRId64 ", expected at least 1 (the query itself counts), or None",
                           params->function, window->data[0]);
        }
        return SA_OK;
    }
    const int64_t heads = params->query.shape[1];
    SA_TRY(check_shape(params->function, "window", window->shape, window->rank, &heads, 1, "one number or [heads_q]"));
    for (int64_t head = 0; on_host(window) && head < heads; head++) {
        if (window->data[head] < 0) {
            return sa_fail(SA_VALUE_ERROR, "%s(): window[%" PRId64 "] is %" PRId64 ", expected at least 1, or 0 for no window",
                           params->function, head, window->data[head]);
        }
    }
    return SA_OK;
}

static sa_status check_padding(const sa_attend_params *params)
{
    const int64_t kv_length = params->key.shape[2];
    SA_TRY(sa_check_lengths(params, &params->starts, "starts", kv_length, "the length of k"));
    SA_TRY(sa_check_lengths(params, &params->lengths, "lengths", kv_length, "the length of k"));
    SA_TRY(sa_check_lengths(params, &params->query_lengths, "q_lengths", params->query.shape[2], "the length of q"));
    if (on_host(&params->starts) && on_host(&params->lengths)) {
        for (int64_t b = 0; b < params->query.shape[0]; b++) {
            const int64_t end = params->starts.data[b] + params->lengths.data[b];
            if (end > kv_length) {
                return sa_fail(SA_VALUE_ERROR, "%s(): starts[%" PRId64 "] + lengths[%" PRId64 "] is %" PRId64 ", expected at most %" PRId64 " (the length of k)",
                               params->function, b, b, end, kv_length);
            }
        }
    }
    return SA_OK;
}

static sa_status check_cumulative(const sa_attend_params *params, const sa_ints *offsets, const char *name, int64_t end, const char *of)
{
    if (offsets->rank != 1 || offsets->shape[0] < 1) {
        return sa_fail(SA_VALUE_ERROR, "%s(): %s has %d dimensions, expected 1: [sequences + 1]", params->function, name, offsets->rank);
    }
    const int64_t last = offsets->shape[0] - 1;
    if (!on_host(offsets)) {
        return SA_OK;
    }
    if (offsets->data[0] != 0 || offsets->data[last] != end) {
        return sa_fail(SA_VALUE_ERROR, "%s(): %s goes from %" PRId64 " to %" PRId64 ", expected 0 to %" PRId64 " (the length of %s)",
                       params->function, name, offsets->data[0], offsets->data[last], end, of);
    }
    for (int64_t i = 0; i < last; i++) {
        if (offsets->data[i + 1] < offsets->data[i]) {
            return sa_fail(SA_VALUE_ERROR, "%s(): %s falls from %" PRId64 " to %" PRId64 " at %" PRId64 ", expected offsets that never fall",
                           params->function, name, offsets->data[i], offsets->data[i + 1], i + 1);
        }
    }
    return SA_OK;
}

static sa_status check_packed(const sa_attend_params *params)
{
    const sa_ints *query = &params->cumulative_query, *key = &params->cumulative_key;
    const char *function = params->function;
    if (query->data == NULL && key->data == NULL) {
        return SA_OK;
    }
    if (query->data == NULL || key->data == NULL) {
        return sa_fail(SA_VALUE_ERROR, "%s(): %s is missing: cu_seqlens_q and cu_seqlens_k come together", function,
                       query->data == NULL ? "cu_seqlens_q" : "cu_seqlens_k");
    }
    if (params->starts.data != NULL || params->lengths.data != NULL || params->query_lengths.data != NULL) {
        return sa_fail(SA_VALUE_ERROR, "%s(): cu_seqlens_q and starts, lengths or q_lengths exclude each other", function);
    }
    SA_TRY(check_axis(function, "q", params->query.shape[0], "batch", 1, "packed sequences"));
    SA_TRY(check_cumulative(params, query, "cu_seqlens_q", params->query.shape[2], "q"));
    SA_TRY(check_cumulative(params, key, "cu_seqlens_k", params->key.shape[2], "k"));
    return check_axis(function, "cu_seqlens_k", key->shape[0], "length", query->shape[0], "cu_seqlens_q");
}

sa_status sa_attend_check(const sa_attend_params *params)
{
    if (params->pinned < 0) {
        return sa_fail(SA_VALUE_ERROR, "%s(): sinks is %" PRId64 ", expected at least 0", params->function, params->pinned);
    }
    SA_TRY(sa_check_tensors(params));
    SA_TRY(sa_check_scores(params));
    SA_TRY(check_window(params));
    SA_TRY(check_padding(params));
    return check_packed(params);
}

static sa_status check_lse(const sa_attend_params *params, const char *name, const sa_tensor *lse)
{
    if (lse->dtype != SA_F32) {
        return sa_fail(SA_TYPE_ERROR, "%s(): %s is %s, expected float32 (as attend returns it)", params->function, name,
                       sa_dtype_name(lse->dtype));
    }
    SA_TRY(check_shape(params->function, name, lse->shape, lse->rank, params->query.shape, 3, "[batch, heads_q, query_length]"));
    return check_reach(params->function, name, lse);
}

static sa_status check_like_output(const sa_attend_params *params, const char *name, const sa_tensor *tensor)
{
    const sa_tensor *query = &params->query;
    const int64_t shape[4] = {query->shape[0], query->shape[1], query->shape[2], params->value.shape[3]};
    SA_TRY(check_dtype(params->function, name, tensor, query->dtype));
    SA_TRY(check_shape(params->function, name, tensor->shape, tensor->rank, shape, 4, "[batch, heads_q, query_length, v_head_dim]"));
    return check_memory(params->function, name, tensor);
}

sa_status sa_attend_backward_check(const sa_attend_backward_params *params)
{
    const sa_attend_params *attend = &params->attend;
    SA_TRY(sa_attend_check(attend));
    SA_TRY(check_like_output(attend, "dout", &params->output_gradient));
    SA_TRY(check_like_output(attend, "out", &params->output));
    SA_TRY(check_lse(attend, "lse", &params->lse));
    return params->lse_gradient.rank == 0 ? SA_OK : check_lse(attend, "dlse", &params->lse_gradient);
}

sa_status sa_mass_check(const sa_mass_params *params)
{
    SA_TRY(sa_attend_check(&params->attend));
    SA_TRY(sa_check_per_query(&params->attend, "lse", &params->lse));
    return params->row_weights.data != NULL ? sa_check_per_query(&params->attend, "row_weights", &params->row_weights) : SA_OK;
}
