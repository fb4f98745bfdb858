/* What the files that choose kernels share: choose.c (decode, fp32, mass, caches), choose_prefill.c, choose_backward.c. */
#ifndef SA_CUDA_CHOOSE_PARTS_H
#define SA_CUDA_CHOOSE_PARTS_H

#include <stdbool.h>

#include "../core/integers.h"
#include "choose.h"

#define SA_COUNT(...) +1

/* Order: f16 and bf16 by depth for decode, then prefill, then the rest. */
enum {
    FORMS = SA_HOPPER_FORMS(SA_COUNT),
    DECODE = 0,
    PREFILL = DECODE + 6,
    WIDE = PREFILL + 6, /* depth 64 and 128 */
    HOPPER = WIDE + 4,
    WINDOW = HOPPER + 2 * FORMS, /* depth 64 and 128, each with fewer keys and with more */
    ATTEND_F32 = WINDOW + 8,
    ROTATE = ATTEND_F32 + 3,
    COMMIT,
    MASS,
    MASS_HALF,
    MASS_HOPPER = MASS_HALF + 6, /* depth 64 and 128 */
    DECODE_MASS = MASS_HOPPER + 4,
    BACKWARD_ROWS = DECODE_MASS + 6,
    BACKWARD_NUMBERS,
    BACKWARD_KEYS,
    BACKWARD_QUERIES = BACKWARD_KEYS + 9,
    ONE_PASS = BACKWARD_QUERIES + 9, /* depth 64 and 128 */
    FINISH = ONE_PASS + 4,
    DECODE_EVICT = FINISH + 2
};

/* What a launch needs to know of a problem. */
typedef struct outline {
    int64_t group, rows; /* rows: batch rows or packed sequences */
    int64_t keys;        /* keys that a query may see, at most */
    int bucket;          /* 0, 1, 2 for depths up to 64, 128, 256 */
    int64_t depth;       /* of the bucket */
    int64_t key_bytes;   /* of a key and its value */
} outline;

outline sa_cuda_outline_of(const sa_cuda_problem *p);

/* An empty plan, and what of a problem is worked out once for every kernel. */
void sa_cuda_begin_plan(sa_cuda_problem *problem, sa_cuda_plan *plan);

/* Can keys, values and those of the sinks be read 16 bytes at a time? */
bool sa_cuda_reads_pieces(const sa_cuda_problem *p);

/* Half precision and many query rows. */
bool sa_cuda_plan_prefill(sa_cuda_problem *p, const sa_cuda_device *device, const outline *o, sa_cuda_plan *plan);

/* Row tiles of one kv head. Packed sequences are tiled one by one, so each may leave one tile unfilled. */
static inline int64_t tiles_of(const sa_cuda_problem *p, const outline *o, int64_t tile)
{
    return p->sequences > 0 ? ceil_div(p->query_length * o->group, tile) + p->sequences : ceil_div(p->query_length * o->group, tile);
}

static inline int64_t units_of(const sa_cuda_problem *p, const outline *o, int64_t tile)
{
    return tiles_of(p, o, tile) * p->heads_kv * (p->sequences > 0 ? 1 : p->batch);
}

static inline bool push(sa_cuda_plan *plan, int kernel, int64_t grid, int64_t block, int64_t cluster, int64_t shared)
{
    if (grid > INT32_MAX) {
        return false;
    }
    if (grid > 0) {
        plan->launches[plan->launch_count++] =
            (sa_cuda_launch){kernel, (uint32_t)grid, (uint32_t)block, (uint32_t)cluster, (uint32_t)shared, 0};
    }
    return true;
}

static inline int64_t reserve(sa_cuda_plan *plan, int64_t bytes)
{
    const int64_t offset = plan->scratch_bytes;
    plan->scratch_bytes += round_up(bytes, 256);
    return offset;
}

static inline bool tensor_in_pieces(const sa_cuda_tensor *tensor, int64_t depth, int64_t size)
{
    const int64_t strides = tensor->batch | tensor->head | tensor->token;
    return tensor->data == NULL || (((uintptr_t)tensor->data | (uintptr_t)(strides * size) | (uintptr_t)(depth * size)) & 15) == 0;
}

/* Is a score scaled and hidden, and nothing else? */
static inline bool scales_alone(const sa_cuda_problem *p)
{
    return !(p->softcap > 0.0f) && !p->sink_bias.given && !p->alibi_slopes.given;
}

static inline bool is_plain(const sa_cuda_problem *p)
{
    return scales_alone(p) && p->sink_query.data == NULL;
}

#endif
