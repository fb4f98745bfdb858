/* Decode attention: a few query rows of a kv head against a long cache; with `append` a whole step of a streaming cache in one launch.
 *
 *   out = sum_j 2^(s_j - m) v_j / (sum_j 2^(s_j - m) + 2^(sigma - m)),   s_j = log2(e) * scale * <q, k_j>
 *
 * One CTA per (16 rows, split of the keys); the rows of a tile are the queries of all heads of a group, so every K and V byte crosses
 * the bus once for the group:
 *   bytes = 2 * keys * (depth + depth_v) * heads_kv * batch     flops = 4 * keys * depth * heads_q * batch
 * Warps share nothing while they run: each takes every n-th slice of 16 or 32 keys through a ring of its own, filled by cp.async ahead
 * of time, multiplies with mma.sync (rows padded to 16: the tensor cores have time to spare) and keeps its own (m, l, acc). They meet at
 * the end: warps in shared memory, splits in the distributed shared memory of a cluster, or in scratch where the last CTA to arrive
 * finishes the tile. All sums have a fixed order.
 *
 * H200, bf16, graph replay, K and V cold, median; us for 32/8 heads, D 128, B 1, 4096 / 32768 / 131072 keys; GB/s for B 64, 4096 keys, and
 * for 64/8 heads, D 64, B 64, 16384 keys; us for a step of 4 + 4092 with rotary positions, B 1 / B 8. A plain read of the same bytes
 * takes 6.8 / 32.7 us, and 4204 to 4279 GB/s at B 64, from machine to machine.
 *   v1 set-up in 64 bits by one thread, scores in local memory   16.7 / 60.5 / 206   2917   2405   22.5 / 67.9    2026-11-24
 *   v2 scores by value, queries in registers                     14.2 / 41.0 / 131   4187   4364   21.5 / 48.1    2026-11-24
 *   v3 short set-up for one query a row; clusters of 8           11.7 / 38.4 / 128   4356   4461   19.9 / 45.8    2026-11-25
 *   v4 less code before the first key and after the last         10.3 / 37.1 / 132   4286   4388   14.4 / 41.5    2026-11-25
 *   v5 the token first, a lane for each split, early turns        10.1 / 37.4 / 126  4420   4511   12.1 / 38.8    2026-11-25
 *   v6 asks for its first keys before it knows which, in long calls   10.4 / 38.2 / 126  4378   4438   11.9 / 38.5    2026-11-25
 * v6 gains 1.0 us of the step at B 8 (38.9 without 39.95) and nothing elsewhere. In that run, of a build that differs in calls with mass alone,
 * 10.44 / 37.82 / 126.7 us stood beside torch's cuDNN at 11.53 / 38.20 / 129.5; B 64 had 4385 GB/s, D 64 4412.
 * With mass (decode_mass.cuh) 11.9 us, 53.9 us, B 64 265 us beside 245 us without; steps 14.8 / 42.0 us. The scores of 32768 keys leave room
 * for six warps, and six do not keep the memory busy: a slice takes 1800 cycles, as it does with eight.
 * v4 ran on a machine whose plain read was slower by a tenth at B 64 in that run (3804 GB/s).
 * Limited by, at B 1: code that runs once and cold, about 7 cycles an instruction: of 17100 cycles 2750 pass before the first key is asked
 * for, 7500 while 64 multiprocessors draw at the full rate of the memory, 4500 from the last key to the end.
 * Tried and lost: asking for keys before all else (1.2 to 1.5 us at B 1); the tail run once on nothing while keys are on their way (2.7 us);
 * clusters of 16 (7 fit at a time); two small CTAs a multiprocessor with splits; 16 splits meeting in scratch below
 * 100000 keys; at 131072 keys 8, 32 and 33 splits (134.8, 132.1, 132.3 us beside 125.9 with 16); two or three splits at B 64. Tried and not
 * taken up: beginning before the kernel in front has ended (programmatic launch). It costs 0.4 to 1 us at 4096 keys where that kernel lets
 * the next one begin at once; without that it gains 0.1 us there and 0.3 to 0.6 us in longer calls. */
#include "decode.cuh"

#define SA_DECODE(name, depth)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(32 * SA_DECODE_WARPS, 1)                                                                  \
        decode_##name##_##depth(const __grid_constant__ sa_cuda_problem p)                                                                 \
    {                                                                                                                                      \
        sa::decode<sa::name, depth, false>(p);                                                                                             \
    }                                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(32 * SA_DECODE_WARPS, 1)                                                                  \
        decode_mass_##name##_##depth(const __grid_constant__ sa_cuda_problem p)                                                            \
    {                                                                                                                                      \
        sa::decode<sa::name, depth, true>(p);                                                                                              \
    }

SA_DECODE(f16, 64)
SA_DECODE(f16, 128)
SA_DECODE(f16, 256)
SA_DECODE(bf16, 64)
SA_DECODE(bf16, 128)
SA_DECODE(bf16, 256)
