/* Attention of many query rows on Hopper: tensor boxes by the copy engine, asynchronous matrix products (wgmma), one CTA a multiprocessor.
 *
 *   out = sum_j 2^(s_j - m) v_j / (sum_j 2^(s_j - m) + 2^(sigma - m)),   flops = 4 * depth * visible pairs * heads_q * batch
 *
 * The rows of a tile are the queries of all heads of a group, so that a key is read once for the group. A CTA takes tile after tile, the
 * longest first and to and fro, so that all end together. One warp finds tiles, one copies (hopper_copy.cuh), two or three warpgroups of 64
 * rows multiply (hopper_multiply.cuh), at depths 64 and 128 by turns. Scores of the next slice are computed while the weights of this one meet
 * the values, across the ends of tiles too: a tile is written when the first slice of the next has been weighed. Slices are cut from the last
 * key that the tile sees backwards; up to 16 pinned keys share the last slice with what whole ones leave, where there is room for both.
 * Slices that every row sees whole carry no mask. Largest scores are found as integers, three at a time; the exact ones are looked for where
 * a row may have to be scaled.
 *
 * A form that is `featured` serves softcap, ALiBi, bias of pinned keys, a second query, and scales that are not positive.
 * Not for: caches, learned keys, windows that window_sm90.cu takes, groups of more than SA_HOPPER_HEADS heads, what the copy engine cannot
 * walk (choose_prefill.c). Windows between the two, v4: D 128, 32/8 heads, N 16384, 192 / 256 / 384 / 511 with 4 pinned 0.230 / 0.257 / 0.281 / 0.331
 * ms, where prefill_sm80.cu took 0.778 / 0.866 / 1.04 / 1.24 on the same card, by another job.
 *
 * H200, bf16, medians of 5 to 9 calls timed alone on the device, 2026-11-25. TFLOP/s of dense causal rows (64/8 heads: D 128, N 8192 and
 * 32768; D 64, N 16384) and ms of windows (D 128, N 32768: 1024 with 4 pinned and sink logits, 64/8; 4096 with 4 pinned, 32/8):
 *   v1 copies by a warpgroup, tiles 128 x 128              583   552-564   408-410   3.27-3.29   3.78-3.82
 *   v2 copy engine, values overlap, tiles' ends too        601   614-647   496       3.00        3.51       D 64: tiles 192 x 128
 *   v2 tiles 192 x 80                                      647   644        -        2.71        3.31
 *   v3 a warp finds tiles beforehand                       666   631       530       2.05        3.16
 *   v3 not by turns                                        671   668       534       2.03        3.14
 *   v4 maxima by four chains, uniform addresses            703   662       542       1.93        3.01
 *   v5 pinned keys in the last slice, integer maxima       737   688       560       1.86        2.82
 *   v5 by turns (v4 and both v5 in one run)                738   721       572       1.85        2.84
 *   cuDNN, in the run of v1 and v2                         611   598       479        -           -
 * N 2048, D 128: v4 511, v5 543. Window 1024 with 4 pinned and sink logits at D 64, batch 2: v4 2.63 ms, v5 2.58; a tile of 9 slices takes
 * as long as 10.7 of dense rows. The other forms by `attend` in that run: dense 64/8 heads N 8192, D 96 567 TFLOP/s, 192/128 725; D 256, 16
 * heads, N 16384 680. What the features cost at window 1024 with 4 pinned, D 128 (D 64): softcap 1.6 times (1.95), ALiBi 1.26 (1.41), bias of
 * pinned keys 1.18 (1.30), a second query 1.22 (1.23); lengths, starts, windows by head, sink logits, fp16 0.96 to 1.12. One call in the same
 * run gave 663 at D 128 N 8192 through `attend` with other numbers in it: not looked into.
 * Limited by: v4 at D 64 issued in 47 % of all cycles and had the exponentials' pipe busy in 59 %; without any maxima it had 600 TFLOP/s,
 * without exponentials 614, without sums 570. Long runs vary by 5 % with the clock.
 *
 * A trap: ptxas moves wgmma's wait to the top of its basic block, above the softmax that should hide it; a branch before it keeps it where
 * it is (finish_values). v1 had no overlap inside of a warpgroup for that reason.
 * Tried and lost (v2, v3): 2 or 4 of 16 exponentials by polynomial (2 to 5 % at D 128, more at D 64); queries in registers (nothing);
 * scaling at every new maximum (1 to 3 %); kv heads in sections (8 to 16 % at N 8192); D 128 with 192 x 64, 128 x 96 to 176; two stages
 * instead of three (7 %); D 64 with 128 rows (12 to 20 %). v5: sums by a product with ones (4 to 14 %, and lse is rounded); D 64 with 112 keys
 * (3 % for dense rows; the window 3 % faster), with 96 (5 %); D 128 with 96 keys (registers); turns that last until the keys' products are
 * there (no more than these). Four multiplying warpgroups hang where they ask for more registers than the CTA began with. */
#include "hopper_copy.cuh"
#include "hopper_multiply.cuh"

namespace sa
{

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename F> __device__ __forceinline__ void begin_barriers(hopper_state<F> &s)
{
    if (threadIdx.x == 0) {
        for (int i = 0; i < F::stages; i++) {
            barrier_init(&s.keys_full[i], 1);
            barrier_init(&s.values_full[i], 1);
            barrier_init(&s.keys_free[i], F::warps);
            barrier_init(&s.values_free[i], F::warps);
        }
        for (int i = 0; i < hopper_tiles; i++) {
            barrier_init(&s.tile_full[i], 32);
            barrier_init(&s.tile_free[i], 32 * (F::warps + 1));
        }
        for (int i = 0; i < F::query_tiles; i++) {
            barrier_init(&s.queries_full[i], 1);
            barrier_init(&s.queries_free[i], F::warps);
        }
        barrier_init(&s.dirty, 1);
        fence_async();
    }
    __syncthreads();
}

template <typename T, typename F> __device__ __forceinline__ void prefill_hopper(const sa_cuda_prefill &call)
{
    extern __shared__ __align__(1024) char memory[];
    hopper_state<F> &s = *(hopper_state<F> *)memory;
    const uint32_t elements = shared_address(memory) + SA_HOPPER_STATE;
    static_assert(sizeof(hopper_state<F>) <= SA_HOPPER_STATE, "room for what is known of the rows");
    begin_barriers<F>(s);
    if (threadIdx.x < 128) {
        leave_registers<F::groups == 2 ? 40 : 32>();
        if (threadIdx.x < 32) {
            copier<F> one = {call, s, elements, (int)threadIdx.x, {}, {}, {}, 0};
            one.run_all();
        } else if (threadIdx.x < 64) {
            finder<F> one = {call.problem, s};
            one.run_all();
        }
    } else {
        take_registers<F::groups == 2 ? 232 : 160>();
        /* The same for a warp, which the compiler is to know. */
        const int group = __shfl_sync(~0u, (int)threadIdx.x / 128, 0) - 1;
        const int row = group * 64 + (int)threadIdx.x / 32 % 4 * 16 + (int)threadIdx.x % 32 / 4;
        const int heads = call.problem.group;
        const float scale = call.problem.scale * log2e;
        consumer<T, F> one = {call.problem, s, elements, group, {}, scale, F::featured ? 1.0f : scale, {}, {}};
        for (int half = 0; half < 2; half++) {
            one.rows[half] = (uint32_t)((row + 8 * half) / heads << 16 | (row + 8 * half) % heads);
        }
        one.run_all();
    }
}

#else

template <typename T, typename F> __device__ __forceinline__ void prefill_hopper(const sa_cuda_prefill &)
{
    __trap(); /* choose_prefill.c sends nothing here */
}

#endif

} // namespace sa

#define SA_PREFILL(type, name, depth, width, rows, keys, stages, query_tiles, featured)                                                  \
    extern "C" __global__ void __launch_bounds__(SA_HOPPER_THREADS(rows), 1)                                                               \
        prefill_hopper_##type##_##name(const __grid_constant__ sa_cuda_prefill call)                                                       \
    {                                                                                                                                      \
        sa::prefill_hopper<sa::type, sa::form<rows, depth, width, keys, stages, query_tiles, featured>>(call);                             \
    }
#ifdef SA_LAB
#define SA_PREFILL_(...) SA_PREFILL(__VA_ARGS__)
SA_PREFILL_(bf16, SA_NAME, SA_LAB)
#else
#define SA_BF16(...) SA_PREFILL(bf16, __VA_ARGS__)
#define SA_F16(...) SA_PREFILL(f16, __VA_ARGS__)
SA_HOPPER_FORMS(SA_BF16)
SA_HOPPER_FORMS(SA_F16)
#endif
