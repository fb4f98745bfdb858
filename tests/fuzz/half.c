/* bf16 and fp16 against the definition of rounding, in double arithmetic: nearest multiple of the last place, ties to even. */
#include "fuzz.h"

static double rounded(float value, int digits, int lowest, double largest)
{
    const double x = (double)value;
    if (!isfinite(x) || x == 0.0) {
        return x;
    }
    const double unit = ldexp(1.0, (int)fmax(ilogb(x), lowest) - digits);
    const double nearest = nearbyint(x / unit) * unit;
    return fabs(nearest) > largest ? copysign(INFINITY, x) : nearest;
}

static bool same(float a, double b)
{
    return isnan(b) ? isnan(a) : (double)a == b && !signbit(a) == !signbit(b);
}

static void check_value(uint32_t bits)
{
    const float value = sa_float_of_bits(bits);
    FUZZ_REQUIRE(sa_bits_of_float(value) == bits || isnan(value));
    FUZZ_REQUIRE(same(sa_f16_to_f32(sa_f32_to_f16(value)), rounded(value, 10, -14, 65504.0)));
    FUZZ_REQUIRE(same(sa_bf16_to_f32(sa_f32_to_bf16(value)), rounded(value, 7, -126, 0x1.fep127)));
}

static void check_half(uint16_t bits)
{
    const float wide = sa_f16_to_f32(bits), brain = sa_bf16_to_f32(bits);
    FUZZ_REQUIRE(isnan(wide) || sa_f32_to_f16(wide) == bits);
    FUZZ_REQUIRE(isnan(brain) || sa_f32_to_bf16(brain) == bits);
    FUZZ_REQUIRE(isnan(wide) == ((bits & 0x7fff) > 0x7c00) && isnan(brain) == ((bits & 0x7fff) > 0x7f80));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input in = {data, size};
    while (in.size >= 4) {
        uint32_t bits = 0;
        for (int i = 0; i < 4; i++) {
            bits = bits << 8 | fuzz_byte(&in);
        }
        check_value(bits);
        check_half((uint16_t)bits);
        check_half((uint16_t)(bits >> 16));
    }
    return 0;
}
