/* An array as any door gives it: between array.c, which opens the doors, and numbers.c, which reads auxiliary arguments. */
#ifndef SA_RAW_H
#define SA_RAW_H

#include "array.h"
#include "numpy_api.h"

enum { SA_MAX_RANK = 8 };

/* Strides in elements. */
typedef struct sa_raw {
    char *data;
    int rank;
    int64_t shape[SA_MAX_RANK], stride[SA_MAX_RANK];
    DLDataType dtype;
    DLDevice device;
    bool readonly;
} sa_raw;

/* Any array through its door. 1: done, 0: not an array, -1: exception. */
int sa_raw_of_object(sa_call *call, const char *name, PyObject *object, sa_raw *out, sa_like *like);

/* Memory for a cache: dense, writeable, 16-byte aligned, at least so many bytes. */
int sa_check_storage(sa_call *call, const sa_raw *view, int64_t bytes);

int sa_raw_of_numpy(sa_call *call, const char *name, PyArrayObject *array, sa_raw *out);

/* ml_dtypes' bfloat16, by the last part of its type's name: NumPy has no number for it. */
bool sa_is_bfloat16(PyArray_Descr *descr);

/* An attribute that may be missing: 1 with an owned value, 0 without one, -1 with an exception. */
int sa_optional_attribute(PyObject *object, PyObject *name, PyObject **value);

/* What a torch tensor knows beside its memory and the exchange drops without a word. 1: torch-like and fit, 0: not torch-like, -1. */
int sa_refuse_lost_state(sa_call *call, const char *name, PyObject *object);

#endif
