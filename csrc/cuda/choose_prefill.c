#include "choose_parts.h"

/* Can the copy engine of Hopper walk a tensor? Axes of more than one element go forwards. */
static bool is_walked(const sa_cuda_tensor *tensor, int64_t batch, int64_t heads, int64_t tokens)
{
    const int64_t stride[3] = {tensor->batch, tensor->head, tensor->token}, count[3] = {batch, heads, tokens};
    for (int i = 0; i < 3; i++) {
        if (count[i] > INT32_MAX || (count[i] > 1 && (stride[i] <= 0 || stride[i] >= 1LL << 38))) {
            return false;
        }
    }
    return true;
}

/* The form of the Hopper kernel that serves a call, -1 for none: narrow windows and caches are left to other kernels. The forms that only
 * scale and hide compare dot products before they are scaled. */
static int form_of(const sa_cuda_problem *p, const sa_cuda_device *device)
{
    const bool other = p->cache.keys != NULL || p->slots || p->learned > 0 || p->kv_length == 0 || p->kv_length >= 1 << 29 ||
                       p->group > SA_HOPPER_HEADS || (p->sink_bias.given && p->pinned > SA_HOPPER_FEW);
    const bool walked = p->aligned && tensor_in_pieces(&p->query, p->depth, 2) && tensor_in_pieces(&p->output, p->depth_v, 2) &&
                        is_walked(&p->query, p->batch, p->heads_q, p->query_length) &&
                        is_walked(&p->key, p->batch, p->heads_kv, p->kv_length) && is_walked(&p->value, p->batch, p->heads_kv, p->kv_length) &&
                        (p->sink_query.data == NULL || (tensor_in_pieces(&p->sink_query, p->depth, 2) &&
                                                        is_walked(&p->sink_query, p->batch, p->heads_q, p->query_length)));
    const bool featured = !is_plain(p) || !(p->scale > 0.0f);
    for (int i = 0; device->wgmma && !other && walked && i < FORMS; i++) {
        const sa_cuda_form *form = &sa_cuda_forms[i];
        if (form->featured == featured && p->depth <= form->depth && p->depth_v <= form->width) {
            return i;
        }
    }
    return -1;
}

/* Does the kernel of narrow windows serve a call? All that a tile of rows sees has to fit into registers. */
static bool suits_window(const sa_cuda_problem *p, const sa_cuda_device *device, const outline *o)
{
    const bool other = p->cache.keys != NULL || p->slots || p->learned > 0 || !p->causal;
    const bool fits = o->group <= SA_WINDOW_HEADS && p->pinned <= SA_WINDOW_PINNED && p->common_window > 0 &&
                      p->common_window <= SA_WINDOW_KEYS - SA_WINDOW_SPAN(o->group) + 1 && p->query_length * o->group <= INT32_MAX - 64;
    const bool biased = !p->sink_bias.given || o->group * p->pinned <= SA_WINDOW_BIASES;
    return device->wgmma && o->bucket < 2 && !other && fits && biased && p->aligned && p->scale > 0.0f &&
           tensor_in_pieces(&p->query, p->depth, 2) && tensor_in_pieces(&p->sink_query, p->depth, 2) &&
           tensor_in_pieces(&p->output, p->depth_v, 2);
}

static bool plan_window(sa_cuda_problem *p, const sa_cuda_device *device, const outline *o, sa_cuda_plan *plan)
{
    const int64_t units = units_of(p, o, 64);
    const int more = p->common_window > SA_WINDOW_FEWER_KEYS - SA_WINDOW_SPAN(o->group) + 1;
    const int kernel = WINDOW + (p->dtype == SA_CUDA_BF16 ? 4 : 0) + 2 * o->bucket + more;
    p->splits = 1;
    p->row_tiles = tiles_of(p, o, 64);
    return units <= INT32_MAX &&
           push(plan, kernel, min_i64(units, device->multiprocessors), SA_WINDOW_THREADS, 1, SA_WINDOW_SHARED(o->depth));
}

/* Tiles of 128 rows, which the same kernel has for calls that do to a score nothing but scale and hide it: a tenth faster for rows that see
 * much, a fifth slower for those that see little, and where there are few tiles for all. */
static bool suits_wide(const sa_cuda_problem *p, const sa_cuda_device *device, const outline *o)
{
    const bool changed = p->softcap > 0.0f || p->sink_bias.given || p->alibi_slopes.given;
    return o->bucket < 2 && !changed && p->scale > 0.0f && o->keys >= 1024 &&
           units_of(p, o, SA_PREFILL_WIDE_ROWS) >= 8 * (int64_t)device->multiprocessors;
}

bool sa_cuda_plan_prefill(sa_cuda_problem *p, const sa_cuda_device *device, const outline *o, sa_cuda_plan *plan)
{
    const bool bf16 = p->dtype == SA_CUDA_BF16;
    if (suits_window(p, device, o)) {
        return plan_window(p, device, o, plan);
    }
    plan->form = form_of(p, device);
    p->splits = 1;
    if (plan->form >= 0) {
        const sa_cuda_form *form = &sa_cuda_forms[plan->form];
        const int64_t rows = form->rows / p->group * p->group, units = units_of(p, o, rows);
        p->row_tiles = tiles_of(p, o, rows);
        return units <= INT32_MAX && push(plan, HOPPER + (bf16 ? FORMS : 0) + plan->form, min_i64(units, device->multiprocessors),
                                          SA_HOPPER_THREADS(form->rows), 1, form->shared);
    }
    const bool wide = suits_wide(p, device, o);
    const int64_t rows = wide ? SA_PREFILL_WIDE_ROWS : SA_PREFILL_ROWS;
    const int kernel = wide ? WIDE + (bf16 ? 2 : 0) : PREFILL + (bf16 ? 3 : 0);
    p->row_tiles = tiles_of(p, o, rows);
    return push(plan, kernel + o->bucket, units_of(p, o, rows), 32 * SA_PREFILL_WARPS, 1,
                SA_PREFILL_SHARED(o->depth, rows, wide ? SA_PREFILL_WIDE_KEYS(o->depth) : SA_PREFILL_KEYS));
}
