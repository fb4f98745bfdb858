/* The doors: any object -> sa_tensor or a dense auxiliary array; results as the caller's own kind.
 *
 * Order: the DLPack C exchange API of the type (torch >= 2.10), NumPy, __dlpack__. Every function that fails has set a Python exception
 * that names the function and the argument. */
#ifndef SA_ARRAY_H
#define SA_ARRAY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../sinkattn.h"
#include "dlpack_abi.h"

/* What a module keeps. */
typedef struct sa_module {
    PyTypeObject *cache_type, *buffer_type;
    PyObject *exchange_name, *dlpack_name, *device_name, *grad_name, *negated_name; /* interned */
} sa_module;

typedef enum sa_kind { SA_KIND_NUMPY, SA_KIND_EXCHANGE, SA_KIND_DLPACK } sa_kind;

/* What a result must look like: the caller's q. Borrowed references. */
typedef struct sa_like {
    sa_kind kind;
    PyObject *object;
    const DLPackExchangeAPI *api;
    DLDevice device;
} sa_like;

enum { SA_MAX_HELD = 32 };

/* One call's temporaries, released together. */
typedef struct sa_call {
    sa_module *module;
    const char *function;
    PyObject *held[SA_MAX_HELD]; /* owned references: capsules, converted arrays */
    void *memory[SA_MAX_HELD];   /* PyMem blocks */
    int held_count, memory_count;
    float small_floats[SA_MAX_HELD];
    int64_t small_ints[SA_MAX_HELD];
    int small_float_count, small_int_count;
} sa_call;

void sa_call_end(sa_call *call);

/* Keeps an owned reference until the end of the call. On failure it is released. */
int sa_hold(sa_call *call, PyObject *owned);

/* A strided float32 / float16 / bfloat16 array of at most 4 dimensions on the CPU. `like` may be NULL. -1 with an exception. */
int sa_view(sa_call *call, const char *name, PyObject *object, sa_tensor *tensor, sa_like *like);

/* Auxiliary arrays: numbers, lists, arrays of any kind; cast to dense float32 / int64. None leaves data NULL. */
int sa_cast_floats(sa_call *call, const char *name, PyObject *object, sa_floats *out);
int sa_cast_ints(sa_call *call, const char *name, PyObject *object, sa_ints *out);

/* Plain numbers; None leaves *given false. bool is refused. */
int sa_parse_int(sa_call *call, const char *name, PyObject *object, int64_t *out, bool *given);
int sa_parse_bool(sa_call *call, const char *name, PyObject *object, bool *out);
int sa_parse_float(sa_call *call, const char *name, PyObject *object, double *out, bool *given);

/* A new dense array of q's kind. *data points to its memory; `dtype` is q's or SA_F32. */
PyObject *sa_new_result(sa_call *call, const sa_like *like, sa_dtype dtype, int rank, const int64_t *shape, void **data);

/* Turns a result into the caller's kind where that is only possible once it is filled. Steals `result`. */
PyObject *sa_finish_result(sa_call *call, const sa_like *like, PyObject *result);

/* Sets the exception that a status stands for. SA_INTERRUPTED: the one that the poll left. */
void sa_raise(sa_status status);

/* GIL released around a run, with signals polled. */
typedef struct sa_released {
    PyThreadState *state;
    sa_poll poll;
} sa_released;

void sa_release(sa_released *released);
void sa_reacquire(sa_released *released);

extern PyType_Spec sa_buffer_spec, sa_cache_spec;
extern PyMethodDef sa_attend_methods[], sa_merge_methods[], sa_info_methods[];
#ifdef SA_CANARY
extern PyMethodDef sa_canary_methods[];
#endif
sa_module *sa_module_of(PyObject *module);

#endif
