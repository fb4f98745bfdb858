/* Mistakes on purpose, built with SINKATTN_CANARY=1 alone: a sanitizer or valgrind that misses them has nothing to say about the rest. */
#include "array.h"

#ifdef SA_CANARY
#include <string.h>

/* "memory": reads the byte behind a block of the interpreter's. "integer": a sum beyond 64 bits. */
static PyObject *canary(PyObject *module, PyObject *kind)
{
    (void)module;
    const char *name = PyUnicode_AsUTF8(kind);
    if (name == NULL) {
        return NULL;
    }
    if (strcmp(name, "memory") == 0) {
        volatile char *block = PyMem_Calloc(16, 1);
        const char behind = block != NULL ? block[16] : 0;
        PyMem_Free((void *)(uintptr_t)block);
        return PyLong_FromLong(behind);
    }
    volatile int64_t most = INT64_MAX;
    return PyLong_FromLongLong(most + 1);
}

PyMethodDef sa_canary_methods[] = {{"__canary__", canary, METH_O, NULL}, {0}};
#endif
