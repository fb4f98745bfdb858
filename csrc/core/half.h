/* bf16 and fp16 <-> fp32, bit exact: round to nearest even, NaN stays NaN, subnormals kept. */
#ifndef SA_HALF_H
#define SA_HALF_H

#include <stdint.h>
#include <string.h>

static inline float sa_float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t sa_bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float sa_bf16_to_f32(uint16_t half)
{
    return sa_float_of_bits((uint32_t)half << 16);
}

static inline uint16_t sa_f32_to_bf16(float value)
{
    const uint32_t bits = sa_bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)((bits >> 16) | 0x40u); /* quiet, and not rounded into infinity */
    }
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float sa_f16_to_f32(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) {
        return sa_float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | (magnitude > 0x7c00u ? 0x400000u : 0u));
    }
    if (magnitude < 0x400u) { /* subnormal: an integer multiple of 2^-24 */
        const float value = (float)magnitude * 0x1p-24f;
        return sign ? -value : value;
    }
    return sa_float_of_bits(sign | ((magnitude << 13) + 0x38000000u));
}

static inline uint16_t sa_f32_to_f16(float value)
{
    const uint32_t bits = sa_bits_of_float(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    }
    if (magnitude >= 0x477ff000u) { /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (magnitude < 0x38800000u) { /* below 2^-14: adding 0.5 rounds to multiples of 2^-24 in the last bits of a float */
        const float shifted = sa_float_of_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (sa_bits_of_float(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

#endif
