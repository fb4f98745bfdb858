/* The doors: any object -> sa_tensor or an auxiliary array; results as the caller's own kind.
 *
 * Order: NumPy, the DLPack C exchange API of the type (torch >= 2.10), __dlpack__, __cuda_array_interface__. Every function that fails
 * has set a Python exception that names the function and the argument. */
#ifndef SA_ARRAY_H
#define SA_ARRAY_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../sinkattn.h"
#include "dlpack_abi.h"

/* What a module keeps. */
typedef struct sa_module {
    PyTypeObject *cache_type, *cuda_cache_type, *kv_type, *cuda_kv_type, *buffer_type;
    PyObject *exchange_name, *dlpack_name, *device_name, *interface_name, *grad_name, *negated_name; /* interned */
    PyObject *libraries; /* sinkattn._libraries, once it was needed */
    PyObject *autocast, *modes, *forward; /* torch's, once there was a tensor: see torch_state.c */
    PyObject *operator; /* sinkattn.torch's attend, once it was needed */
#ifndef Py_GIL_DISABLED
    PyTypeObject *table_type; /* the last type that had an exchange table, and the table */
    const struct DLPackExchangeAPI *table;
#endif
} sa_module;

typedef enum sa_kind { SA_KIND_NUMPY, SA_KIND_EXCHANGE, SA_KIND_DLPACK } sa_kind; /* the last: or __cuda_array_interface__ */

/* What a result must look like: the caller's q. Borrowed references. */
typedef struct sa_like {
    sa_kind kind;
    PyObject *object;
    const DLPackExchangeAPI *api;
    DLDevice device;
} sa_like;

enum { SA_MAX_HELD = 32, SA_MAX_JOINED = 4 };

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

    const char *device_of; /* who decided the device, for messages; NULL: q */
    DLDevice device;
    bool device_known, stream_known;
    bool auxiliary;    /* what is being opened is no tensor */
    bool reads_device; /* auxiliary arrays on a device are copied to the host, which waits for them */
    bool has_operator;   /* the function is also an operator of torch */
    bool below_autograd; /* and it is the operator who calls: gradients are its business */
    bool watched;        /* whether torch must see the call was asked */
    bool to_operator;    /* it failed, and goes to the operator */
    bool wait;         /* until the work is done, before the call returns: a library does not tell its stream */
    void *stream;
    const DLPackExchangeAPI *stream_api; /* whose current stream it is, if a table told it */
    void *joined[SA_MAX_JOINED];         /* streams of other libraries: they go on after the call */
    int joined_count;
} sa_call;

void sa_call_end(sa_call *call);

/* Keeps an owned reference until the end of the call. On failure it is released. */
int sa_hold(sa_call *call, PyObject *owned);

/* A strided float32 / float16 / bfloat16 array of at most 4 dimensions. `like` may be NULL. -1 with an exception. */
int sa_view(sa_call *call, const char *name, PyObject *object, sa_tensor *tensor, sa_like *like);

/* Auxiliary arrays: numbers, lists, arrays of any kind; cast to dense float32 / int64, or left as they are on a device. None leaves data
 * NULL. SINKATTN_CHECK=1 has integers read from the device, so that they are checked like those of the host. */
int sa_cast_floats(sa_call *call, const char *name, PyObject *object, sa_floats *out);
int sa_cast_ints(sa_call *call, const char *name, PyObject *object, sa_ints *out);

/* Plain numbers; None leaves *given false. bool is refused. */
int sa_parse_int(sa_call *call, const char *name, PyObject *object, int64_t *out, bool *given);
int sa_parse_bool(sa_call *call, const char *name, PyObject *object, bool *out);
int sa_parse_float(sa_call *call, const char *name, PyObject *object, double *out, bool *given);

/* A new dense array of q's kind. *data points to its memory; `dtype` is q's or SA_F32. */
PyObject *sa_new_result(sa_call *call, const sa_like *like, sa_dtype dtype, int rank, const int64_t *shape, void **data);

/* Memory of q's device for the length of the call, from the allocator that results come from. */
int sa_new_memory(sa_call *call, const sa_like *like, int64_t bytes, void **data);

/* Memory of a CUDA device from the driver, freed with the object. */
PyObject *sa_new_device_buffer(sa_call *call, DLDevice device, int64_t bytes, void **data);

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

extern PyType_Spec sa_buffer_spec, sa_cache_spec, sa_cuda_cache_spec, sa_kv_spec, sa_cuda_kv_spec;
/* The arguments that both caches are made from; `device` and `allocate` are those of the CUDA cache, else NULL. The frequencies are
 * borrowed from `buffer`, to be released after use. */
int sa_parse_cache_config(PyObject *arguments, sa_cache_config *config, Py_buffer *buffer, int *device, PyObject **allocate);

/* The same for a KVCache: (.., budgets: int64 bytes [kv_heads], .., policy: (name, window, kernel, maximum, decay, seed), ..). Both buffers
 * are to be released after use. */
int sa_parse_kv_config(PyObject *arguments, sa_kv_config *config, Py_buffer *frequencies, Py_buffer *budgets, int *device, PyObject **allocate);

/* What a state holds, (slots, the blocks of save()) as buffers, into a cache. SA_INTERRUPTED: with an exception. */
sa_status sa_load_kv(PyObject *const *arguments, Py_ssize_t count, sa_kv_cache *cache);
PyObject *sa_wrap_kv(PyTypeObject *type, sa_kv_cache *cache); /* steals it */

extern PyMethodDef sa_attend_methods[], sa_mass_methods[], sa_backward_methods[], sa_merge_methods[], sa_info_methods[];
#ifdef SA_CANARY
extern PyMethodDef sa_canary_methods[];
#endif
sa_module *sa_module_of(PyObject *module);

#endif
