/* The vocabulary of the kernels for AVX2 with FMA and F16C. See vec_avx512.h: same names, same order. */
#ifndef SA_VEC_H
#define SA_VEC_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 8, TILE_ROWS = 6, TILE_VECS = 2, DIRECT_TILE_ROWS = 2, DIRECT_TILE_VECS = 4 };

typedef __m256 vec_f32;

#define VEC_INLINE static inline __attribute__((always_inline))

VEC_INLINE vec_f32 vec_zero(void) { return _mm256_setzero_ps(); }
VEC_INLINE vec_f32 vec_set1(float x) { return _mm256_set1_ps(x); }
VEC_INLINE vec_f32 vec_load(const float *p) { return _mm256_loadu_ps(p); }
VEC_INLINE void vec_store(float *p, vec_f32 x) { _mm256_storeu_ps(p, x); }
VEC_INLINE vec_f32 vec_fma(vec_f32 a, vec_f32 b, vec_f32 c) { return _mm256_fmadd_ps(a, b, c); }
VEC_INLINE vec_f32 vec_add(vec_f32 a, vec_f32 b) { return _mm256_add_ps(a, b); }
VEC_INLINE vec_f32 vec_sub(vec_f32 a, vec_f32 b) { return _mm256_sub_ps(a, b); }
VEC_INLINE vec_f32 vec_mul(vec_f32 a, vec_f32 b) { return _mm256_mul_ps(a, b); }
VEC_INLINE vec_f32 vec_div(vec_f32 a, vec_f32 b) { return _mm256_div_ps(a, b); }
VEC_INLINE vec_f32 vec_max(vec_f32 a, vec_f32 b) { return _mm256_max_ps(a, b); }
VEC_INLINE vec_f32 vec_abs(vec_f32 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }

VEC_INLINE float vec_sum(vec_f32 a)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

VEC_INLINE float vec_largest(vec_f32 a)
{
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

VEC_INLINE vec_f32 vec_iota(void)
{
    return _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
}

VEC_INLINE vec_f32 vec_select_below(vec_f32 x, float limit, vec_f32 a, vec_f32 b)
{
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_LT_OQ));
}

VEC_INLINE vec_f32 vec_copysign(vec_f32 magnitude, vec_f32 sign)
{
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}

VEC_INLINE vec_f32 vec_keep_range(vec_f32 x, int64_t low, int64_t high, vec_f32 fill)
{
    const vec_f32 lane = vec_iota();
    const float from = (float)(low < 0 ? 0 : low > LANES ? LANES : low), to = (float)(high < 0 ? 0 : high > LANES ? LANES : high);
    const vec_f32 inside = _mm256_and_ps(_mm256_cmp_ps(lane, _mm256_set1_ps(from), _CMP_GE_OQ),
                                         _mm256_cmp_ps(lane, _mm256_set1_ps(to), _CMP_LT_OQ));
    return _mm256_blendv_ps(fill, x, inside);
}

VEC_INLINE vec_f32 vec_exp2(vec_f32 x)
{
    const vec_f32 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vec_f32 part = _mm256_sub_ps(x, whole);
    vec_f32 y = _mm256_set1_ps(0.00015461444854736328f);
    y = vec_fma(y, part, _mm256_set1_ps(0.0013400427997112274f));
    y = vec_fma(y, part, _mm256_set1_ps(0.009618056938052177f));
    y = vec_fma(y, part, _mm256_set1_ps(0.05550327152013779f));
    y = vec_fma(y, part, _mm256_set1_ps(0.24022650718688965f));
    y = vec_fma(y, part, _mm256_set1_ps(0.6931471824645996f));
    y = vec_fma(y, part, _mm256_set1_ps(1.0f));
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    const vec_f32 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
    return _mm256_and_ps(scaled, _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
}

VEC_INLINE vec_f32 vec_load_f16(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

VEC_INLINE vec_f32 vec_load_bf16(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)), 16));
}

VEC_INLINE void vec_store_f16(uint16_t *p, vec_f32 x)
{
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

VEC_INLINE void vec_store_bf16(uint16_t *p, vec_f32 x)
{
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
    const __m256i half = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0x08);
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_castsi256_si128(packed));
}

VEC_INLINE void vec_transpose(vec_f32 rows[LANES])
{
    vec_f32 a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
        b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
        b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
        b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x20);
        rows[4 + i] = _mm256_permute2f128_ps(b[i], b[4 + i], 0x31);
    }
}

VEC_INLINE void vec_store_four_sums(float *p, vec_f32 a, vec_f32 b, vec_f32 c, vec_f32 d)
{
    const vec_f32 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

#endif
