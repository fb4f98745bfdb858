/* Preloaded before the C library: refuses the n-th request for memory, or for a thread, that comes from the extension's own code, and
 * counts what that code holds. The shipped extension is tested as it is: it needs no hook, and no site can be forgotten. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

void *__libc_malloc(size_t size);
void *__libc_calloc(size_t count, size_t size);
void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *memory);

static uintptr_t code_low, code_high;
static atomic_long countdown, live;
static atomic_bool threads_refused;

static int find_code(struct dl_phdr_info *info, size_t size, void *name)
{
    (void)size;
    if (info->dlpi_name == NULL || strstr(info->dlpi_name, name) == NULL) {
        return 0;
    }
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type == PT_LOAD && (info->dlpi_phdr[i].p_flags & PF_X)) {
            code_low = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            code_high = code_low + info->dlpi_phdr[i].p_memsz;
        }
    }
    return 1;
}

/* Watches the code of the loaded object whose path contains `name`. False where there is none. */
bool faults_watch(const char *name)
{
    (void)dl_iterate_phdr(find_code, (void *)(uintptr_t)name);
    return code_high > code_low;
}

/* Refuses the `n`-th request from now on; 0: none. */
void faults_refuse(long n)
{
    atomic_store(&countdown, n);
}

void faults_refuse_threads(bool refuse)
{
    atomic_store(&threads_refused, refuse);
}

/* Blocks that the watched code has allocated and not freed. */
long faults_live(void)
{
    return atomic_load(&live);
}

static bool watched(const void *caller)
{
    return (uintptr_t)caller >= code_low && (uintptr_t)caller < code_high;
}

static bool refused(const void *caller)
{
    if (watched(caller) && atomic_load(&countdown) > 0 && atomic_fetch_sub(&countdown, 1) == 1) {
        errno = ENOMEM;
        return true;
    }
    return false;
}

static void *counted(const void *caller, void *memory)
{
    if (memory != NULL && watched(caller)) {
        atomic_fetch_add(&live, 1);
    }
    return memory;
}

void *malloc(size_t size)
{
    const void *caller = __builtin_return_address(0);
    return refused(caller) ? NULL : counted(caller, __libc_malloc(size));
}

void *calloc(size_t count, size_t size)
{
    const void *caller = __builtin_return_address(0);
    return refused(caller) ? NULL : counted(caller, __libc_calloc(count, size));
}

int posix_memalign(void **memory, size_t alignment, size_t size)
{
    const void *caller = __builtin_return_address(0);
    void *got = refused(caller) ? NULL : counted(caller, __libc_memalign(alignment, size));
    if (got == NULL) {
        return ENOMEM;
    }
    *memory = got;
    return 0;
}

void free(void *memory)
{
    if (memory != NULL && watched(__builtin_return_address(0))) {
        atomic_fetch_sub(&live, 1);
    }
    __libc_free(memory);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    static int (*next)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (atomic_load(&threads_refused) && watched(__builtin_return_address(0))) {
        return EAGAIN;
    }
    if (next == NULL) {
        *(void **)&next = dlsym(RTLD_NEXT, "pthread_create");
    }
    return next(thread, attributes, start, argument);
}
