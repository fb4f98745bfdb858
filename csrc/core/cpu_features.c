#include "cpu_features.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static unsigned long long saved_registers(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (unsigned long long)high << 32 | low;
}

static bool made_by_intel(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(0, &a, &b, &c, &d) && b == signature_INTEL_ebx && c == signature_INTEL_ecx && d == signature_INTEL_edx;
}

/* Linux saves tile registers only for a process that has asked for it, all its threads with it. */
static bool tiles_granted(void)
{
#if defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

unsigned sa_cpu_probe(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) {
        return 0;
    }
    const unsigned fma_osxsave_avx_f16c = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29;
    if ((c & fma_osxsave_avx_f16c) != fma_osxsave_avx_f16c) {
        return 0;
    }
    const unsigned long long ymm = 0x6, zmm = 0xe6, tiles = 0x60000;
    const unsigned long long saved = saved_registers();
    if ((saved & ymm) != ymm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        return 0;
    }
    unsigned found = (b & 1u << 5) ? SA_CPU_AVX2 : 0;
    const unsigned f_dq_bw_vl = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;
    unsigned a1, b1, c1, d1;
    const unsigned subleaf1 = __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) ? a1 : 0;
    if ((saved & zmm) == zmm && (b & f_dq_bw_vl) == f_dq_bw_vl) {
        found |= SA_CPU_AVX512;
        found |= (subleaf1 & 1u << 5) ? SA_CPU_AVX512_BF16 : 0;
        found |= (d & 1u << 23) ? SA_CPU_AVX512_FP16 : 0;
        found |= made_by_intel() ? SA_CPU_SLOW_BF16_DOT : 0;
    }
    const unsigned bf16_and_tile = 1u << 22 | 1u << 24;
    if ((saved & tiles) == tiles && (d & bf16_and_tile) == bf16_and_tile && tiles_granted()) {
        found |= SA_CPU_AMX_BF16;
    }
    return found;
}
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

unsigned sa_cpu_probe(void)
{
    unsigned found = SA_CPU_NEON;
#if defined(__linux__)
    const unsigned long bf16 = 1ul << 14; /* HWCAP2_BF16, where the C library's header does not name it yet */
    found |= (getauxval(AT_HWCAP2) & bf16) ? SA_CPU_NEON_BF16 : 0;
#elif defined(__APPLE__)
    int bf16 = 0;
    size_t size = sizeof bf16;
    found |= sysctlbyname("hw.optional.arm.FEAT_BF16", &bf16, &size, NULL, 0) == 0 && bf16 ? SA_CPU_NEON_BF16 : 0;
#endif
    return found;
}
#else
unsigned sa_cpu_probe(void)
{
    return 0;
}
#endif

const char *sa_cpu_features(void)
{
    static const struct {
        unsigned bit;
        const char *name;
    } names[] = {{SA_CPU_AVX2, "avx2 "},          {SA_CPU_AVX512, "avx512 "}, {SA_CPU_AVX512_BF16, "avx512bf16 "},
                 {SA_CPU_AVX512_FP16, "avx512fp16 "}, {SA_CPU_AMX_BF16, "amx_bf16 "}, {SA_CPU_NEON, "neon "},
                 {SA_CPU_NEON_BF16, "neonbf16 "}};
    static _Thread_local char text[96];
    text[0] = '\0';
    const unsigned found = sa_cpu_probe();
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        if (found & names[i].bit) {
            strcat(text, names[i].name);
        }
    }
    const size_t length = strlen(text);
    if (length > 0) {
        text[length - 1] = '\0';
    }
    return text;
}
