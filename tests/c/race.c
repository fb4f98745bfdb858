/* The pool and what runs on it, for the thread sanitizer: several callers at once with every kernel table, the number of threads changed
 * under them, calls cancelled, and forks in the middle. Results must be those of a lone thread, bit for bit.
 *
 * Prints how many calls were compared; any report of the sanitizer, and any difference, ends the process. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../../csrc/core/pool.h"
#include "../../csrc/sinkattn.h"

enum { CALLERS = 4, HEADS_Q = 4, HEADS_KV = 2, QUERIES = 24, KEYS = 600, DEPTH = 32, STEPS = 6 };

#define REQUIRE(condition)                                                                 \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition); \
            _exit(3);                                                                      \
        }                                                                                  \
    } while (0)

static float query[HEADS_Q * QUERIES * DEPTH], key[HEADS_KV * KEYS * DEPTH];
static float expected[HEADS_Q * QUERIES * DEPTH], expected_mass[HEADS_KV * KEYS];
static float expected_steps[STEPS][HEADS_Q * DEPTH];
static atomic_long compared, cancelled;
static atomic_bool done;

static sa_tensor tensor(float *data, int64_t heads, int64_t length)
{
    return (sa_tensor){data, {1, heads, length, DEPTH}, {heads * length * DEPTH, length * DEPTH, DEPTH, 1}, 4, SA_F32, false};
}

static sa_attend_params params_of(float *out, float *mass)
{
    sa_attend_params p = {.function = "attend", .causal = true, .mass_queries = -1, .mass = mass};
    p.query = tensor(query, HEADS_Q, QUERIES);
    p.key = p.value = tensor(key, HEADS_KV, KEYS);
    p.output = tensor(out, HEADS_Q, QUERIES);
    return p;
}

static void attend(float *out, float *mass)
{
    const sa_attend_params p = params_of(out, mass);
    REQUIRE(sa_attend_check(&p) == SA_OK && sa_attend(&p, (sa_poll){NULL, NULL}) == SA_OK);
}

/* A stream of single tokens and a chunk, with keys to turn. */
static void stream(float steps[STEPS][HEADS_Q * DEPTH])
{
    static const double frequencies[4] = {1.0, 0.3, 0.1, 0.01};
    sa_cache_config config = {.batch = 1, .heads_kv = HEADS_KV, .depth = DEPTH, .depth_v = DEPTH, .pinned = 2, .window = 300};
    config.inv_freq = frequencies;
    config.inv_freq_count = 4;
    config.attention_scaling = 1.0;
    config.slot_positions = true;
    sa_cache *cache;
    REQUIRE(sa_cache_new(&config, &cache) == SA_OK);
    float *whole = malloc(HEADS_Q * 500 * DEPTH * sizeof *whole);
    for (int i = -1; i < STEPS; i++) {
        const int64_t tokens = i < 0 ? 500 : 1;
        sa_attend_params p = {.function = "SinkCache.attend", .mass_queries = -1, .pinned = 2};
        p.query = tensor(key, HEADS_Q, tokens);
        p.query.stride[1] = DEPTH; /* any numbers: heads overlap in memory */
        p.key = p.value = tensor(key, HEADS_KV, tokens);
        p.output = tensor(i < 0 ? whole : steps[i], HEADS_Q, tokens);
        REQUIRE(sa_cache_attend_check(cache, &p) == SA_OK && sa_cache_attend(cache, &p, (sa_poll){NULL, NULL}) == SA_OK);
    }
    free(whole);
    sa_cache_free(cache);
}

static bool at_once(void *context)
{
    (void)context;
    return true;
}

/* Long enough to be asked whether it should stop. */
static void cancel(void)
{
    enum { LONG = 3000 };
    float *memory = calloc(2 * LONG * DEPTH, sizeof *memory);
    sa_attend_params p = {.function = "attend", .causal = false, .mass_queries = -1};
    p.query = p.key = p.value = tensor(memory, 1, LONG);
    p.output = tensor(memory + LONG * DEPTH, 1, LONG);
    const sa_status status = sa_attend(&p, (sa_poll){at_once, NULL});
    REQUIRE(status == SA_OK || status == SA_INTERRUPTED);
    atomic_fetch_add(&cancelled, status == SA_INTERRUPTED);
    free(memory);
}

static void compare(void)
{
    static _Thread_local float out[HEADS_Q * QUERIES * DEPTH], mass[HEADS_KV * KEYS], steps[STEPS][HEADS_Q * DEPTH];
    attend(out, mass);
    REQUIRE(memcmp(out, expected, sizeof out) == 0 && memcmp(mass, expected_mass, sizeof mass) == 0);
    stream(steps);
    REQUIRE(memcmp(steps, expected_steps, sizeof steps) == 0);
    atomic_fetch_add(&compared, 2 + STEPS);
}

static void *caller(void *argument)
{
    const long rounds = (long)(intptr_t)argument;
    for (long i = 0; i < rounds; i++) {
        compare();
        if (i % 8 == 3) {
            cancel();
        }
    }
    return NULL;
}

static void *meddler(void *unused)
{
    (void)unused;
    for (int64_t i = 0; !atomic_load(&done); i++) {
        sa_set_threads(1 + i % 5);
        REQUIRE(sa_get_threads() >= 1);
        usleep(500);
    }
    return NULL;
}

/* A child starts while others compute; it has no workers and must not wait for any. */
static void *forker(void *argument)
{
    for (long i = 0; i < (long)(intptr_t)argument && !atomic_load(&done); i++) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(60);
            compare();
            _exit(0);
        }
        int status;
        REQUIRE(child > 0 && waitpid(child, &status, 0) == child && status == 0);
        usleep(3000);
    }
    return NULL;
}

static void race(long rounds, long forks)
{
    pthread_t threads[CALLERS], other[2];
    atomic_store(&done, false);
    pthread_create(&other[0], NULL, meddler, NULL);
    pthread_create(&other[1], NULL, forker, (void *)(intptr_t)forks);
    for (int i = 0; i < CALLERS; i++) {
        pthread_create(&threads[i], NULL, caller, (void *)(intptr_t)rounds);
    }
    for (int i = 0; i < CALLERS; i++) {
        pthread_join(threads[i], NULL);
    }
    atomic_store(&done, true);
    pthread_join(other[0], NULL);
    pthread_join(other[1], NULL);
}

int main(int count, char **arguments)
{
    const long rounds = count > 1 ? atol(arguments[1]) : 30, forks = count > 2 ? atol(arguments[2]) : 10;
    uint32_t random = 1;
    for (size_t i = 0; i < sizeof query / sizeof query[0]; i++) {
        query[i] = (float)(int32_t)(random = random * 1664525u + 1013904223u) * 0x1p-31f;
    }
    for (size_t i = 0; i < sizeof key / sizeof key[0]; i++) {
        key[i] = (float)(int32_t)(random = random * 1664525u + 1013904223u) * 0x1p-31f;
    }
    for (int table = 0; table < sa_table_count(); table++) {
        if (sa_table_use(sa_table_name(table)) == SA_OK) {
            sa_set_threads(1);
            attend(expected, expected_mass);
            stream(expected_steps);
            race(table == 0 ? rounds / 8 + 1 : rounds, forks);
        }
    }
    printf("%ld calls compared, %ld cancelled\n", (long)compared, (long)cancelled);
    return 0;
}
