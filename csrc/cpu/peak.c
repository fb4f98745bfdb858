/* One trial of a peak: the loop of a table, on the pool that the kernels run on. */
#include <time.h>

#include "../core/half.h"
#include "table.h"

enum {
    TASKS_PER_THREAD = 128, /* small tasks: a thread that is late does not make the others wait */
    ROUNDS = 20000,         /* about 50 microseconds */
    READ_FLOATS = 1 << 18,  /* one task reads 1 MiB */
    SEEDS = 64,
};

typedef struct peak_job {
    sa_peak_kind kind;
    const sa_peak_loops *loops;
    const float *data;
    int64_t count;
} peak_job;

static void peak_task(void *context, int64_t index, sa_worker *worker)
{
    const peak_job *job = context;
    float *seed = worker->scratch;
    if (job->kind == SA_PEAK_READ) {
        seed[0] = job->loops->read(job->data + index * READ_FLOATS, READ_FLOATS);
        return;
    }
    for (int i = 0; i < SEEDS; i++) { /* small numbers, as fp32 and as pairs of bf16 */
        seed[i] = sa_float_of_bits(0x3a803a80u + (uint32_t)i * 0x00010001u);
    }
    seed[0] = job->kind == SA_PEAK_FMA ? job->loops->fma(seed, ROUNDS) : job->loops->bf16_dot(seed, ROUNDS);
}

static double now_seconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

sa_status sa_peak(sa_peak_kind kind, const void *data, int64_t bytes, sa_poll poll, double *rate, const char **name)
{
    const sa_cpu_table *table = sa_table_with_peak(kind);
    if (table == NULL) {
        return sa_fail(SA_NOT_IMPLEMENTED, "peak(): no kernel table that is usable here has a loop for this kind");
    }
    peak_job job = {.kind = kind, .loops = table->peak, .data = data, .count = bytes / (int64_t)sizeof(float)};
    int64_t tasks = TASKS_PER_THREAD * sa_get_threads();
    double work = (double)(tasks * ROUNDS) * (double)(kind == SA_PEAK_FMA ? job.loops->fma_flops : job.loops->bf16_dot_flops);
    if (kind == SA_PEAK_READ) {
        tasks = job.count / READ_FLOATS;
        work = (double)(tasks * READ_FLOATS) * (double)sizeof(float);
        if (tasks == 0) {
            return sa_fail(SA_VALUE_ERROR, "peak(): buffer has %lld bytes, expected at least %d", (long long)bytes,
                           READ_FLOATS * (int)sizeof(float));
        }
    }
    const double begin = now_seconds();
    SA_TRY(sa_pool_run(tasks, 1e9, SEEDS * (int64_t)sizeof(float), peak_task, &job, poll));
    *rate = work / (now_seconds() - begin);
    *name = table->name;
    return SA_OK;
}
