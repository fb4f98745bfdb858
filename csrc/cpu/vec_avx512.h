/* The vocabulary of the kernels for AVX-512 (F, BW, VL, DQ), with BF16 dot products where the compiler flags have them. */
#ifndef SA_VEC_H
#define SA_VEC_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 16, TILE_ROWS = 12, TILE_VECS = 2, DIRECT_TILE_ROWS = 4, DIRECT_TILE_VECS = 8 };

typedef __m512 vec_f32;

#define VEC_INLINE static inline __attribute__((always_inline))

VEC_INLINE vec_f32 vec_zero(void) { return _mm512_setzero_ps(); }
VEC_INLINE vec_f32 vec_set1(float x) { return _mm512_set1_ps(x); }
VEC_INLINE vec_f32 vec_load(const float *p) { return _mm512_loadu_ps(p); }
VEC_INLINE void vec_store(float *p, vec_f32 x) { _mm512_storeu_ps(p, x); }
VEC_INLINE vec_f32 vec_fma(vec_f32 a, vec_f32 b, vec_f32 c) { return _mm512_fmadd_ps(a, b, c); }
VEC_INLINE vec_f32 vec_add(vec_f32 a, vec_f32 b) { return _mm512_add_ps(a, b); }
VEC_INLINE vec_f32 vec_sub(vec_f32 a, vec_f32 b) { return _mm512_sub_ps(a, b); }
VEC_INLINE vec_f32 vec_mul(vec_f32 a, vec_f32 b) { return _mm512_mul_ps(a, b); }
VEC_INLINE vec_f32 vec_div(vec_f32 a, vec_f32 b) { return _mm512_div_ps(a, b); }
VEC_INLINE vec_f32 vec_max(vec_f32 a, vec_f32 b) { return _mm512_max_ps(a, b); }
VEC_INLINE vec_f32 vec_abs(vec_f32 a) { return _mm512_abs_ps(a); }
VEC_INLINE float vec_sum(vec_f32 a) { return _mm512_reduce_add_ps(a); }
VEC_INLINE float vec_largest(vec_f32 a) { return _mm512_reduce_max_ps(a); }

/* 0, 1, 2, ... */
VEC_INLINE vec_f32 vec_iota(void)
{
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

/* a where x < limit, else b; with the sign of `sign`. */
VEC_INLINE vec_f32 vec_select_below(vec_f32 x, float limit, vec_f32 a, vec_f32 b)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_LT_OQ), b, a);
}

VEC_INLINE vec_f32 vec_copysign(vec_f32 magnitude, vec_f32 sign)
{
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}

/* Lane i keeps x where low <= i < high, else becomes `fill`. */
VEC_INLINE vec_f32 vec_keep_range(vec_f32 x, int64_t low, int64_t high, vec_f32 fill)
{
    const unsigned below = high <= 0 ? 0 : high >= LANES ? 0xffffu : (1u << high) - 1;
    const unsigned before = low <= 0 ? 0 : low >= LANES ? 0xffffu : (1u << low) - 1;
    return _mm512_mask_blend_ps((__mmask16)(below & ~before), fill, x);
}

/* 2^x for x <= 0 or so, exactly 0 below -126 and at -inf; NaN stays. Degree 6, relative error 1e-7. */
VEC_INLINE vec_f32 vec_exp2(vec_f32 x)
{
    const vec_f32 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vec_f32 part = _mm512_sub_ps(x, whole);
    vec_f32 y = _mm512_set1_ps(0.00015461444854736328f);
    y = vec_fma(y, part, _mm512_set1_ps(0.0013400427997112274f));
    y = vec_fma(y, part, _mm512_set1_ps(0.009618056938052177f));
    y = vec_fma(y, part, _mm512_set1_ps(0.05550327152013779f));
    y = vec_fma(y, part, _mm512_set1_ps(0.24022650718688965f));
    y = vec_fma(y, part, _mm512_set1_ps(0.6931471824645996f));
    y = vec_fma(y, part, _mm512_set1_ps(1.0f));
    const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return _mm512_maskz_scalef_ps(counts, y, whole);
}

VEC_INLINE vec_f32 vec_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

VEC_INLINE vec_f32 vec_load_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)p)), 16));
}

VEC_INLINE void vec_store_f16(uint16_t *p, vec_f32 x)
{
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

VEC_INLINE void vec_store_bf16(uint16_t *p, vec_f32 x)
{
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
    const __m512i half = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, quiet);
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(half));
}

/* Words of two halves: the first in the low bits. */
VEC_INLINE vec_f32 vec_interleave_halves(const uint16_t *first, const uint16_t *second)
{
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)first));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)second));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

/* LANES x LANES words, in place: rows become columns. */
VEC_INLINE void vec_transpose(vec_f32 rows[LANES])
{
    __m512i a[16], b[16];
    for (int i = 0; i < 8; i++) {
        a[2 * i] = _mm512_unpacklo_epi32(_mm512_castps_si512(rows[2 * i]), _mm512_castps_si512(rows[2 * i + 1]));
        a[2 * i + 1] = _mm512_unpackhi_epi32(_mm512_castps_si512(rows[2 * i]), _mm512_castps_si512(rows[2 * i + 1]));
    }
    for (int i = 0; i < 4; i++) {
        b[4 * i] = _mm512_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 1] = _mm512_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
        b[4 * i + 2] = _mm512_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
        b[4 * i + 3] = _mm512_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* column i of each 4x4 quarter; 128-bit lanes hold the quarters of a row block */
        a[i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
        a[4 + i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
        a[8 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
        a[12 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a[i], a[8 + i], 0x88));
        rows[8 + i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a[i], a[8 + i], 0xdd));
        rows[4 + i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0x88));
        rows[12 + i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0xdd));
    }
}

/* The sums of four vectors, side by side. */
VEC_INLINE void vec_store_four_sums(float *p, vec_f32 a, vec_f32 b, vec_f32 c, vec_f32 d)
{
    const vec_f32 ab = vec_add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const vec_f32 cd = vec_add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const vec_f32 abcd = vec_add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#ifdef __AVX512BF16__
#define VEC_BF16_DOT 1

/* sum + products of the two halves in each word. */
VEC_INLINE vec_f32 vec_dot_bf16(vec_f32 a, vec_f32 b, vec_f32 sum)
{
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_castps_si512(a), (__m512bh)_mm512_castps_si512(b));
}
#endif

#endif
