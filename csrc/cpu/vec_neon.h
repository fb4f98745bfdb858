/* The vocabulary of the kernels for NEON on aarch64, with BF16 dot products where the compiler flags have them. See vec_avx512.h: same
 * names, same order. */
#ifndef SA_VEC_H
#define SA_VEC_H

#include <arm_neon.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 4, TILE_ROWS = 9, TILE_VECS = 2, DIRECT_TILE_ROWS = 4, DIRECT_TILE_VECS = 8 };

typedef float32x4_t vec_f32;

#define VEC_INLINE static inline __attribute__((always_inline))

VEC_INLINE vec_f32 vec_zero(void) { return vdupq_n_f32(0.0f); }
VEC_INLINE vec_f32 vec_set1(float x) { return vdupq_n_f32(x); }
VEC_INLINE vec_f32 vec_load(const float *p) { return vld1q_f32(p); }
VEC_INLINE void vec_store(float *p, vec_f32 x) { vst1q_f32(p, x); }
VEC_INLINE vec_f32 vec_fma(vec_f32 a, vec_f32 b, vec_f32 c) { return vfmaq_f32(c, a, b); }
VEC_INLINE vec_f32 vec_add(vec_f32 a, vec_f32 b) { return vaddq_f32(a, b); }
VEC_INLINE vec_f32 vec_sub(vec_f32 a, vec_f32 b) { return vsubq_f32(a, b); }
VEC_INLINE vec_f32 vec_mul(vec_f32 a, vec_f32 b) { return vmulq_f32(a, b); }
VEC_INLINE vec_f32 vec_div(vec_f32 a, vec_f32 b) { return vdivq_f32(a, b); }
VEC_INLINE vec_f32 vec_max(vec_f32 a, vec_f32 b) { return vmaxnmq_f32(a, b); } /* the number where one is NaN */
VEC_INLINE vec_f32 vec_abs(vec_f32 a) { return vabsq_f32(a); }
VEC_INLINE float vec_sum(vec_f32 a) { return vaddvq_f32(a); }
VEC_INLINE float vec_largest(vec_f32 a) { return vmaxnmvq_f32(a); }

VEC_INLINE vec_f32 vec_iota(void)
{
    static const float lanes[LANES] = {0, 1, 2, 3};
    return vld1q_f32(lanes);
}

VEC_INLINE vec_f32 vec_select_below(vec_f32 x, float limit, vec_f32 a, vec_f32 b)
{
    return vbslq_f32(vcltq_f32(x, vdupq_n_f32(limit)), a, b);
}

VEC_INLINE vec_f32 vec_copysign(vec_f32 magnitude, vec_f32 sign)
{
    return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude);
}

VEC_INLINE vec_f32 vec_keep_range(vec_f32 x, int64_t low, int64_t high, vec_f32 fill)
{
    const vec_f32 lane = vec_iota();
    const float from = (float)(low < 0 ? 0 : low > LANES ? LANES : low), to = (float)(high < 0 ? 0 : high > LANES ? LANES : high);
    const uint32x4_t inside = vandq_u32(vcgeq_f32(lane, vdupq_n_f32(from)), vcltq_f32(lane, vdupq_n_f32(to)));
    return vbslq_f32(inside, x, fill);
}

VEC_INLINE vec_f32 vec_exp2(vec_f32 x)
{
    const vec_f32 whole = vrndnq_f32(x);
    const vec_f32 part = vsubq_f32(x, whole);
    vec_f32 y = vdupq_n_f32(0.00015461444854736328f);
    y = vec_fma(y, part, vdupq_n_f32(0.0013400427997112274f));
    y = vec_fma(y, part, vdupq_n_f32(0.009618056938052177f));
    y = vec_fma(y, part, vdupq_n_f32(0.05550327152013779f));
    y = vec_fma(y, part, vdupq_n_f32(0.24022650718688965f));
    y = vec_fma(y, part, vdupq_n_f32(0.6931471824645996f));
    y = vec_fma(y, part, vdupq_n_f32(1.0f));
    const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(whole), 23);
    const uint32x4_t scaled = vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(y), exponent));
    return vreinterpretq_f32_u32(vbicq_u32(scaled, vcltq_f32(x, vdupq_n_f32(-126.0f))));
}

VEC_INLINE vec_f32 vec_load_f16(const uint16_t *p)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

VEC_INLINE vec_f32 vec_load_bf16(const uint16_t *p)
{
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

VEC_INLINE void vec_store_f16(uint16_t *p, vec_f32 x)
{
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x)));
}

VEC_INLINE void vec_store_bf16(uint16_t *p, vec_f32 x)
{
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    const uint32x4_t quiet = vorrq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(0x40));
    vst1_u16(p, vmovn_u32(vbslq_u32(vceqq_f32(x, x), rounded, quiet)));
}

VEC_INLINE vec_f32 vec_interleave_halves(const uint16_t *first, const uint16_t *second)
{
    return vreinterpretq_f32_u32(vorrq_u32(vmovl_u16(vld1_u16(first)), vshll_n_u16(vld1_u16(second), 16)));
}

VEC_INLINE void vec_transpose(vec_f32 rows[LANES])
{
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(rows[0], rows[1])), b = vreinterpretq_f64_f32(vtrn2q_f32(rows[0], rows[1]));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(rows[2], rows[3])), d = vreinterpretq_f64_f32(vtrn2q_f32(rows[2], rows[3]));
    rows[0] = vreinterpretq_f32_f64(vzip1q_f64(a, c));
    rows[1] = vreinterpretq_f32_f64(vzip1q_f64(b, d));
    rows[2] = vreinterpretq_f32_f64(vzip2q_f64(a, c));
    rows[3] = vreinterpretq_f32_f64(vzip2q_f64(b, d));
}

VEC_INLINE void vec_store_four_sums(float *p, vec_f32 a, vec_f32 b, vec_f32 c, vec_f32 d)
{
    vst1q_f32(p, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}

#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define VEC_BF16_DOT 1

VEC_INLINE vec_f32 vec_dot_bf16(vec_f32 a, vec_f32 b, vec_f32 sum)
{
    return vbfdotq_f32(sum, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
}
#endif

#endif
