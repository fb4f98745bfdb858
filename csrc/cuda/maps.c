#include "maps.h"

#include <stdalign.h>
#include <string.h>

/* Axes from the innermost on: columns, two of heads and tokens, batch rows. */
typedef struct axes {
    int64_t length[4], stride[4], box[4];
} axes;

static sa_status encode(const char *function, const sa_cuda_problem *p, void *data, const axes *a, sa_cuda_map *to)
{
    alignas(64) sa_cuda_map map; /* the driver wants it aligned */
    uint64_t lengths[4], strides[3];
    uint32_t box[4], steps[4] = {1, 1, 1, 1};
    for (int i = 0; i < 4; i++) {
        lengths[i] = (uint64_t)a->length[i];
        box[i] = (uint32_t)a->box[i];
        if (i > 0) { /* an axis of one element may have any stride */
            strides[i - 1] = a->length[i] == 1 ? 16 : (uint64_t)a->stride[i] * 2;
        }
    }
    SA_TRY_DRIVER(function, cuTensorMapEncodeTiled(&map, p->dtype == SA_CUDA_BF16 ? CU_TENSOR_MAP_BFLOAT16 : CU_TENSOR_MAP_FLOAT16, 4, data,
                                                   lengths, strides, box, steps, 0, CU_TENSOR_MAP_SWIZZLE_128B,
                                                   CU_TENSOR_MAP_L2_PROMOTION_256B, 0));
    memcpy(to, &map, sizeof map);
    return SA_OK;
}

static sa_status encode_keys(const char *function, const sa_cuda_problem *p, const sa_cuda_tensor *keys, int64_t depth, int64_t rows,
                             sa_cuda_map *to)
{
    const axes a = {{depth, p->kv_length, p->heads_kv, p->batch}, {1, keys->token, keys->head, keys->batch}, {64, rows, 1, 1}};
    return encode(function, p, keys->data, &a, to);
}

static sa_status encode_queries(const char *function, const sa_cuda_form *form, const sa_cuda_problem *p, const sa_cuda_tensor *queries,
                                sa_cuda_map *to)
{
    const axes a = {{p->depth, p->heads_q, p->query_length, p->batch},
                    {1, queries->head, queries->token, queries->batch},
                    {64, p->group, form->rows / p->group, 1}};
    return encode(function, p, queries->data, &a, to);
}

sa_status sa_device_map(const char *function, const sa_cuda_form *form, sa_cuda_prefill *prefill)
{
    const sa_cuda_problem *p = &prefill->problem;
    SA_TRY(encode_queries(function, form, p, &p->query, &prefill->query));
    if (p->sink_query.data != NULL) {
        SA_TRY(encode_queries(function, form, p, &p->sink_query, &prefill->second_query));
    }
    SA_TRY(encode_keys(function, p, &p->key, p->depth, form->keys, &prefill->key));
    SA_TRY(encode_keys(function, p, &p->value, p->depth_v, form->keys, &prefill->value));
    SA_TRY(encode_keys(function, p, &p->key, p->depth, SA_HOPPER_FEW, &prefill->few_keys));
    return encode_keys(function, p, &p->value, p->depth_v, SA_HOPPER_FEW, &prefill->few_values);
}
