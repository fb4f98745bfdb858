/* Errors are values: every fallible function returns sa_status, the text waits in a thread-local message. */
#ifndef SA_STATUS_H
#define SA_STATUS_H

typedef enum sa_status {
    SA_OK = 0,
    SA_TYPE_ERROR,      /* TypeError in Python */
    SA_VALUE_ERROR,     /* ValueError */
    SA_NOT_IMPLEMENTED, /* NotImplementedError: a backend lacks the combination */
    SA_NO_MEMORY,       /* MemoryError */
    SA_RUNTIME_ERROR,   /* RuntimeError: CUDA failed, with the driver's text */
    SA_INTERRUPTED,     /* the caller's poll asked to stop; it knows why */
} sa_status;

/* Sets the thread's message and returns `status`. The message names the function and the argument, what was expected and what came. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
sa_status
sa_fail(sa_status status, const char *format, ...);

/* The message of the last failure on this thread; valid until the next one. */
const char *sa_message(void);

/* Allocation failure, worded once. `what` names the thing that did not fit. */
sa_status sa_no_memory(const char *what, long long bytes);

#define SA_TRY(expression)                         \
    do {                                           \
        const sa_status try_status = (expression); \
        if (try_status != SA_OK) {                 \
            return try_status;                     \
        }                                          \
    } while (0)

#endif
