/* What an instruction set offers: one struct of functions, chosen once. Every table serves every problem. */
#ifndef SA_TABLE_H
#define SA_TABLE_H

#include "../core/pool.h"
#include "../core/problem.h"

/* Loops at the machine's limits, timed by sa_peak. A loop that the instruction set lacks is NULL. */
typedef struct sa_peak_loops {
    float (*fma)(const float *seed, int64_t rounds);      /* seed: 64 floats */
    float (*bf16_dot)(const float *seed, int64_t rounds); /* seed: 64 pairs of bf16 */
    float (*read)(const float *data, int64_t count);
    int64_t fma_flops, bf16_dot_flops; /* of a round */
} sa_peak_loops;

typedef struct sa_cpu_table {
    const char *name;
    unsigned needs; /* sa_cpu_feature bits */
    sa_status (*attend)(const sa_problem *problem, sa_poll poll);
    sa_status (*mass)(const sa_problem *problem, sa_poll poll); /* the mass alone: lse is given */
    sa_status (*attend_backward)(const sa_backward *backward, sa_poll poll);
    const sa_peak_loops *peak; /* nullable */
} sa_cpu_table;

extern const sa_cpu_table sa_table_reference;
#ifdef SA_HAVE_AVX2
extern const sa_cpu_table sa_table_avx2;
#endif
#ifdef SA_HAVE_AVX512
extern const sa_cpu_table sa_table_avx512;
#endif
#ifdef SA_HAVE_AVX512BF16
extern const sa_cpu_table sa_table_avx512bf16;
#endif
#ifdef SA_HAVE_AMX
extern const sa_cpu_table sa_table_amx;
#endif
#ifdef SA_HAVE_NEON
extern const sa_cpu_table sa_table_neon;
#endif
#ifdef SA_HAVE_NEONBF16
extern const sa_cpu_table sa_table_neonbf16;
#endif

/* The table in use. */
const sa_cpu_table *sa_table(void);

/* The table in use if it has loops for a peak, else the widest usable one that has; NULL: none. */
const sa_cpu_table *sa_table_with_peak(sa_peak_kind kind);

/* Ways through the kernels, counted so that show_config() can tell what ran. */
typedef enum sa_path { SA_PATH_DIRECT, SA_PATH_PACKED, SA_PATH_MASS, SA_PATH_BACKWARD, SA_PATH_REFERENCE, SA_PATH_COUNT } sa_path;

void sa_path_count_row(sa_path path);

#endif
