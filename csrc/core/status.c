#include "status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[512];

sa_status sa_fail(sa_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return status;
}

const char *sa_message(void)
{
    return message;
}

sa_status sa_no_memory(const char *what, long long bytes)
{
    return sa_fail(SA_NO_MEMORY, "out of memory: %lld bytes for %s", bytes, what);
}
