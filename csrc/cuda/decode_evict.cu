/* A whole step of a KVCache in one launch: attention, the new token into a slot, the policy's learning, and the token that leaves.
 * decode.cuh attends, decode_evict.cuh has the end; where it does not serve (choose.c, kv_call.c), kv_step.cu comes behind the attention.
 * bytes = those of decode.cu, and slots * (24 to 40)
 * H200, 2026-11-25, bf16, 32/8 heads, D 128, graph replay of 12 caches in turn, us, append and eviction included:
 *                  B 1, 1024 slots   B 1, 4096   B 8, 1024   B 8, 4096
 *   SinkCache            8.4           12.8        16.3        39.5
 *   H2O                 11.0           14.6        19.7        49.6
 *   H2OEMA              11.1           15.3        19.9        50.5
 *   H2ONorm             11.6           15.2        20.1        49.9
 *   SinkWindow          10.9           14.9        20.0        49.1      with the mass of what leaves; without, kv_step.cu: 11.4 15.8 20.2 44.5
 *   H2O, two kernels    14.2           19.7        23.7        51.2      in another run, beside 8.3 12.5 16.3 39.9
 * These are of the form that stands, but that a CTA without a cluster now writes its output last as well, which is not timed.
 * v1, the output before the sums are taken and four slots a thread at a time: 11.4, 15.0, 19.7, 49.4 in fp16, same run, beside 8.8 12.5 16.5
 * 39.6. At B 8, 4096 the scores take the room of rings: what mass costs there is bandwidth. */
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
