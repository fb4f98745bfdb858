/* A whole step of a KVCache in one launch: attention, the new token into a slot, the policy's learning, and the token that leaves.
 * decode.cuh attends, decode_evict.cuh has the end; where it does not serve (choose.c, kv_call.c), kv_step.cu comes behind the attention.
 * bytes = those of decode.cu, and slots * (24 to 40)
 * Not timed yet. */
#include "decode.cuh"

#define SA_DECODE_EVICT(name, depth)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(32 * SA_DECODE_WARPS, 1)                                                                  \
        decode_evict_##name##_##depth(const __grid_constant__ sa_cuda_eviction e)                                                          \
    {                                                                                                                                      \
        sa::decode<sa::name, depth, true>(e.problem, &e);                                                                                  \
    }

SA_DECODE_EVICT(f16, 64)
SA_DECODE_EVICT(f16, 128)
SA_DECODE_EVICT(f16, 256)
SA_DECODE_EVICT(bf16, 64)
SA_DECODE_EVICT(bf16, 128)
SA_DECODE_EVICT(bf16, 256)
