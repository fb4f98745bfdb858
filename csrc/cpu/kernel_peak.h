/* Loops that do nothing but what the kernels are limited by, with the kernels' own vocabulary and flags: the roofs over their figures. */
#ifndef SA_KERNEL_PEAK_H
#define SA_KERNEL_PEAK_H

#include "table.h"

/* A register tile without its loads: each chain waits for itself alone, and there are as many as the kernels keep. */
enum { PEAK_CHAINS = TILE_ROWS * TILE_VECS, READ_CHAINS = 8 };

#define DEFINE_PEAK(NAME, STEP)                                                                             \
    static float NAME(const float *seed, int64_t rounds)                                                    \
    {                                                                                                       \
        const vec_f32 a = vec_load(seed), b = vec_load(seed + LANES);                                       \
        vec_f32 chain[PEAK_CHAINS];                                                                         \
        _Pragma("GCC unroll 32") for (int i = 0; i < PEAK_CHAINS; i++) chain[i] = vec_load(seed + i);       \
        for (int64_t round = 0; round < rounds; round++) {                                                  \
            _Pragma("GCC unroll 32") for (int i = 0; i < PEAK_CHAINS; i++) chain[i] = STEP(a, b, chain[i]); \
        }                                                                                                   \
        vec_f32 sum = vec_zero();                                                                           \
        _Pragma("GCC unroll 32") for (int i = 0; i < PEAK_CHAINS; i++) sum = vec_add(sum, chain[i]);        \
        return vec_sum(sum);                                                                                \
    }

DEFINE_PEAK(peak_fma, vec_fma)
#ifdef VEC_AMX
enum { BF16_DOT_FLOPS = 2 * AMX_SIDE * AMX_SIDE * 2 * AMX_SIDE };

/* A round is one product of tiles; four sums, as in the kernels. */
static float peak_bf16_dot(const float *seed, int64_t rounds)
{
    float sum[AMX_SIDE * AMX_SIDE];
    amx_begin();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, seed, 0); /* one line again and again */
    _tile_loadd(5, seed + AMX_SIDE, 0);
    _tile_loadd(6, seed + 2 * AMX_SIDE, 0);
    _tile_loadd(7, seed + 3 * AMX_SIDE, 0);
    for (int64_t round = 0; round + 4 <= rounds; round += 4) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sum, AMX_LINE);
    amx_end();
    return sum[0];
}
#elif defined(VEC_BF16_DOT)
enum { BF16_DOT_FLOPS = 4 * LANES * PEAK_CHAINS };
DEFINE_PEAK(peak_bf16_dot, vec_dot_bf16)
#endif

static float peak_read(const float *data, int64_t count)
{
    vec_f32 chain[READ_CHAINS], sum = vec_zero();
#pragma GCC unroll 8
    for (int i = 0; i < READ_CHAINS; i++) {
        chain[i] = vec_zero();
    }
    for (int64_t at = 0; at + READ_CHAINS * LANES <= count; at += READ_CHAINS * LANES) {
#pragma GCC unroll 8
        for (int i = 0; i < READ_CHAINS; i++) {
            chain[i] = vec_max(chain[i], vec_load(data + at + i * LANES));
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < READ_CHAINS; i++) {
        sum = vec_add(sum, chain[i]);
    }
    return vec_sum(sum);
}

static const sa_peak_loops peak_loops = {
    .fma = peak_fma,
    .fma_flops = 2 * LANES * PEAK_CHAINS,
#ifdef VEC_BF16_DOT
    .bf16_dot = peak_bf16_dot,
    .bf16_dot_flops = BF16_DOT_FLOPS,
#endif
    .read = peak_read,
};

#endif
