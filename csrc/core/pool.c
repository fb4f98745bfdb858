#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "integers.h"

enum { MAX_THREADS = 256, POLL_NANOSECONDS = 10 * 1000 * 1000, SPIN_NANOSECONDS = 20 * 1000, SPIN_FOR_WORKERS_NANOSECONDS = 100 * 1000 };

/* About ten microseconds of one core: below this a job is done before a sleeping worker is up. */
static const double PARALLEL_FLOPS = 400e3;

struct sa_job {
    sa_task task;
    void *context;
    int64_t count;
    _Atomic int64_t next;
    atomic_bool stopped;
    sa_poll poll;
    int64_t polled_at;
    int caller_processor; /* < 0: not known */
};

typedef struct sa_scratch {
    void *memory;
    int64_t bytes;
} sa_scratch;

static struct {
    pthread_mutex_t owner; /* held by the caller whose job runs */
    pthread_mutex_t lock;  /* guards all that follows */
    pthread_cond_t wake, idle;
    sa_job *job; /* NULL: nothing to join */
    _Atomic uint64_t generation;
    _Atomic int64_t joined; /* written under the lock */
    int64_t started, sleeping;
    bool leaving;
    pthread_t threads[MAX_THREADS];
#if defined(__linux__)
    cpu_set_t allowed; /* processors of the caller that started the first worker */
#endif
    sa_scratch scratch[MAX_THREADS]; /* [0] is the caller's; touched only by the owner, before its job is published */
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER,
          .idle = PTHREAD_COND_INITIALIZER};

static _Atomic int64_t thread_count; /* 0: not decided yet */
static pthread_once_t fork_handler = PTHREAD_ONCE_INIT;

static int64_t now_nanoseconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

static void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The child has no workers, and locks that nobody will release: begin anew. Its scratch stays, nobody else is left to use it. */
static void after_fork_in_child(void)
{
    pthread_mutex_init(&pool.owner, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_cond_init(&pool.idle, NULL);
    pool.job = NULL;
    pool.started = pool.sleeping = 0;
    atomic_store(&pool.joined, 0);
    pool.leaving = false;
}

static void install_fork_handler(void)
{
    pthread_atfork(NULL, NULL, after_fork_in_child);
}

static int64_t default_threads(void)
{
    const char *text = getenv("SINKATTN_NUM_THREADS");
    if (text != NULL && atoll(text) > 0) {
        return min_i64(atoll(text), MAX_THREADS);
    }
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
        return clamp_i64(CPU_COUNT(&set), 1, MAX_THREADS);
    }
#endif
    return clamp_i64(sysconf(_SC_NPROCESSORS_ONLN), 1, MAX_THREADS);
}

int64_t sa_get_threads(void)
{
    int64_t count = atomic_load(&thread_count);
    if (count == 0) {
        count = default_threads();
        atomic_store(&thread_count, count);
    }
    return count;
}

void sa_set_threads(int64_t count)
{
    atomic_store(&thread_count, clamp_i64(count, 1, MAX_THREADS));
}

/* Time for the poll, and does it say stop? */
static bool asked_to_stop(sa_poll poll, int64_t *polled_at)
{
    const int64_t now = now_nanoseconds();
    if (now - *polled_at <= POLL_NANOSECONDS) {
        return false;
    }
    *polled_at = now;
    return poll.stop(poll.context);
}

sa_status sa_pool_ask(sa_poll poll, int64_t *polled_at)
{
    if (*polled_at == 0) {
        *polled_at = now_nanoseconds();
    }
    return poll.stop != NULL && asked_to_stop(poll, polled_at) ? sa_fail(SA_INTERRUPTED, "interrupted") : SA_OK;
}

bool sa_worker_stopped(const sa_worker *worker)
{
    sa_job *job = worker->job;
    if (worker->caller && job->poll.stop != NULL && asked_to_stop(job->poll, &job->polled_at)) {
        atomic_store(&job->stopped, true);
    }
    return atomic_load_explicit(&job->stopped, memory_order_relaxed);
}

static void work(sa_worker *worker)
{
    sa_job *job = worker->job;
    while (!sa_worker_stopped(worker)) {
        const int64_t index = atomic_fetch_add(&job->next, 1);
        if (index >= job->count) {
            break;
        }
        job->task(job->context, index, worker);
    }
}

/* Waits for a generation newer than `seen`: spinning at first, since the next call of a decode loop follows within microseconds. */
static void wait_for_job(uint64_t seen)
{
    const int64_t give_up = now_nanoseconds() + SPIN_NANOSECONDS;
    while (atomic_load(&pool.generation) == seen && now_nanoseconds() < give_up) {
        for (int i = 0; i < 8; i++) {
            pause_briefly();
        }
    }
    pthread_mutex_lock(&pool.lock);
    while (atomic_load(&pool.generation) == seen && !pool.leaving) {
        pool.sleeping++;
        pthread_cond_wait(&pool.wake, &pool.lock);
        pool.sleeping--;
    }
}

static int this_processor(void)
{
#if defined(__linux__)
    return sched_getcpu();
#else
    return -1;
#endif
}

/* A scheduler may wake a worker on the processor that its caller runs on, and leave the two there until long after the job, at half the
 * speed. A worker that finds itself there moves away, and stays away from that processor until the same happens elsewhere. */
static void keep_off(int processor)
{
#if defined(__linux__)
    if (processor >= 0 && processor < CPU_SETSIZE && sched_getcpu() == processor) {
        cpu_set_t others = pool.allowed;
        CPU_CLR((size_t)processor, &others);
        if (CPU_COUNT(&others) > 0) {
            (void)sched_setaffinity(0, sizeof others, &others);
        }
    }
#else
    (void)processor;
#endif
}

static void *worker_main(void *argument)
{
    const int64_t index = (int64_t)(intptr_t)argument;
    uint64_t seen = 0;
    for (;;) {
        wait_for_job(seen); /* returns with the lock */
        if (pool.leaving) {
            pthread_mutex_unlock(&pool.lock);
            return NULL;
        }
        seen = atomic_load(&pool.generation);
        sa_worker worker = {.job = pool.job, .caller = false};
        if (worker.job != NULL) { /* else the scratch may be the owner's to move */
            worker.scratch = pool.scratch[index].memory;
            pool.joined++;
            pthread_mutex_unlock(&pool.lock);
            keep_off(worker.job->caller_processor);
            work(&worker);
            pthread_mutex_lock(&pool.lock);
            if (--pool.joined == 0) {
                pthread_cond_signal(&pool.idle);
            }
        }
        pthread_mutex_unlock(&pool.lock);
    }
}

static void stop_workers(void)
{
    pthread_mutex_lock(&pool.lock);
    pool.leaving = true;
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    for (int64_t i = 0; i < pool.started; i++) {
        pthread_join(pool.threads[i], NULL);
    }
    pool.started = 0;
    pool.leaving = false;
}

/* Brings the number of workers to `wanted`; fewer where the system refuses threads. */
static void start_workers(int64_t wanted)
{
    if (pool.started == wanted) {
        return;
    }
    if (pool.started > wanted) {
        stop_workers();
    }
    pthread_once(&fork_handler, install_fork_handler);
#if defined(__linux__)
    if (pool.started == 0 && sched_getaffinity(0, sizeof pool.allowed, &pool.allowed) != 0) {
        CPU_ZERO(&pool.allowed); /* more processors than a set holds: nobody is moved */
    }
#endif
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool.started < wanted) {
        void *argument = (void *)(intptr_t)(pool.started + 1);
        if (pthread_create(&pool.threads[pool.started], NULL, worker_main, argument) != 0) {
            break;
        }
        pool.started++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static sa_status grow(sa_scratch *scratch, int64_t bytes)
{
    if (scratch->bytes >= bytes) {
        return SA_OK;
    }
    void *old = scratch->memory;
    *scratch = (sa_scratch){NULL, 0}; /* first: another thread may fork here, and its child must not see what is freed */
    free(old);
    if (posix_memalign(&scratch->memory, 64, (size_t)bytes) != 0) {
        scratch->memory = NULL;
        return sa_no_memory("kernel scratch", bytes);
    }
    scratch->bytes = bytes;
    return SA_OK;
}

static sa_status run_alone(sa_job *job, sa_scratch *scratch, int64_t scratch_bytes)
{
    SA_TRY(grow(scratch, scratch_bytes));
    sa_worker worker = {.scratch = scratch->memory, .job = job, .caller = true};
    work(&worker);
    return SA_OK;
}

/* Spinning at first: the last tasks are about to end, and a caller that a worker must wake may be moved to that worker's processor. */
static void wait_for_workers(sa_worker *caller)
{
    pthread_mutex_lock(&pool.lock);
    pool.job = NULL; /* whoever wakes up now is too late to join */
    pthread_mutex_unlock(&pool.lock);
    const int64_t give_up = now_nanoseconds() + SPIN_FOR_WORKERS_NANOSECONDS;
    while (atomic_load(&pool.joined) > 0 && now_nanoseconds() < give_up) {
        pause_briefly();
    }
    pthread_mutex_lock(&pool.lock);
    while (pool.joined > 0) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += POLL_NANOSECONDS / 2;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        pthread_cond_timedwait(&pool.idle, &pool.lock, &until);
        pthread_mutex_unlock(&pool.lock);
        (void)sa_worker_stopped(caller);
        pthread_mutex_lock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
}

static sa_status run_together(sa_job *job, int64_t threads, int64_t scratch_bytes)
{
    start_workers(threads - 1);
    for (int64_t i = 0; i <= pool.started; i++) {
        SA_TRY(grow(&pool.scratch[i], scratch_bytes));
    }
    job->caller_processor = this_processor();
    pthread_mutex_lock(&pool.lock);
    pool.job = job;
    atomic_fetch_add(&pool.generation, 1);
    if (pool.sleeping > 0) {
        pthread_cond_broadcast(&pool.wake);
    }
    pthread_mutex_unlock(&pool.lock);

    sa_worker worker = {.scratch = pool.scratch[0].memory, .job = job, .caller = true};
    work(&worker);
    wait_for_workers(&worker);
    return SA_OK;
}

sa_status sa_pool_run(int64_t count, double flops, int64_t scratch_bytes, sa_task task, void *context, sa_poll poll)
{
    sa_job job = {.task = task, .context = context, .count = count, .poll = poll, .polled_at = now_nanoseconds()};
    const int64_t bytes = round_up(max_i64(scratch_bytes, 64), 64);
    const int64_t threads = min_i64(sa_get_threads(), count);
    sa_status status;
    if (pthread_mutex_trylock(&pool.owner) != 0) {
        sa_scratch own = {NULL, 0};
        status = run_alone(&job, &own, bytes);
        free(own.memory);
    } else {
        status = threads > 1 && flops > PARALLEL_FLOPS ? run_together(&job, sa_get_threads(), bytes) : run_alone(&job, &pool.scratch[0], bytes);
        pthread_mutex_unlock(&pool.owner);
    }
    SA_TRY(status);
    return atomic_load(&job.stopped) ? sa_fail(SA_INTERRUPTED, "interrupted") : SA_OK;
}
