/* One CPUID probe. A feature counts only when the operating system saves its registers too. */
#ifndef SA_CPU_FEATURES_H
#define SA_CPU_FEATURES_H

typedef enum sa_cpu_feature {
    SA_CPU_AVX2 = 1,        /* with FMA and F16C */
    SA_CPU_AVX512 = 2,      /* F, BW, VL, DQ */
    SA_CPU_AVX512_BF16 = 4,
    SA_CPU_AVX512_FP16 = 8,
    SA_CPU_AMX_BF16 = 16,
    SA_CPU_NEON = 32,
    SA_CPU_NEON_BF16 = 128,    /* BFDOT */
    SA_CPU_SLOW_BF16_DOT = 64, /* vdpbf16ps at half the arithmetic of fp32 FMA: Intel, whose bf16 unit is AMX */
} sa_cpu_feature;

unsigned sa_cpu_probe(void);

/* The present ones, space-separated. */
const char *sa_cpu_features(void);

#endif
