/* The state of an online softmax and its algebra: the one place where it is written for the device. csrc/core/softmax.h has the words.
 *
 * A state (maximum, sum) stands for sum * 2^maximum; scores are kept in log2 units, weighted values scale with the sum. */
#ifndef SA_CUDA_SOFTMAX_CUH
#define SA_CUDA_SOFTMAX_CUH

#include "ptx.cuh"

namespace sa
{

constexpr float log2e = 1.4426950408889634f, ln2 = 0.6931471805599453f;
constexpr float infinity = __builtin_huge_valf();

/* What 2^x is taken relative to: the maximum, or anything finite for a state that is empty. */
__device__ __forceinline__ float anchor_of(float maximum)
{
    return maximum == -infinity ? 0.0f : maximum;
}

/* The fast instructions are right to 2 units in the last place, which is enough for what happens a few times a row. */

/* Rescales a state from its own maximum to a larger one; 0 for an empty state. */
__device__ __forceinline__ float factor_to(float maximum, float larger)
{
    return maximum == -infinity ? 0.0f : exp2_fast(maximum - larger);
}

struct softmax_end {
    float factor; /* multiply the weighted values by it: 0 where nothing was seen */
    float lse;    /* natural log, the sink included */
};

/* Closes a row: joins the sink logit (log2 units, -inf for none) and normalises. A NaN among the scores stays one. */
__device__ __forceinline__ softmax_end close(float maximum, float sum, float sink)
{
    if (sink == infinity) {
        return {0.0f, infinity};
    }
    if (maximum == -infinity && sum == 0.0f) {
        return {0.0f, sink * ln2};
    }
    const float anchor = anchor_of(fmaxf(maximum, sink));
    const float keys = exp2_fast(anchor_of(maximum) - anchor), total = sum * keys + exp2_fast(sink - anchor);
    return {__fdividef(keys, total), ln2 * (anchor + __log2f(total))};
}

} // namespace sa

#endif
