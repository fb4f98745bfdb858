/* What the caches on CUDA are in Python: memory of the caller's library, its stream, one call at a time, and the methods that they share. */
#ifndef SA_CUDA_OBJECT_H
#define SA_CUDA_OBJECT_H

#include <stdatomic.h>

#include "../cuda/driver.h"
#include "device.h"

typedef struct sa_cuda_object sa_cuda_object;

typedef struct sa_cuda_shape {
    int64_t batch, pinned, slots; /* slots: of a call's mass */
} sa_cuda_shape;

/* What each kind of cache does in its own way; objects are of that kind. */
typedef struct sa_cuda_kind {
    const char *name, *attend; /* "SinkCache", "SinkCache.attend": in messages */
    sa_cuda_shape (*shape)(const sa_cuda_object *object);
    sa_status (*check)(const sa_cuda_object *object, const sa_attend_params *params);
    int (*run)(sa_call *call, const sa_attend_params *params, sa_cuda_object *object, const sa_like *like);
    sa_cuda_object *(*new_like)(const sa_cuda_object *object, const char *function); /* of the same configuration, laid out and not filled */
    sa_status (*copy)(sa_cuda_object *object, const sa_cuda_object *from, void *stream);
    sa_status (*check_index)(const sa_cuda_object *object, const int64_t *index, int64_t count);
    sa_status (*gather)(sa_cuda_object *object, const sa_cuda_object *before, const int64_t *index, void *stream);
    sa_status (*reset)(sa_cuda_object *object, const sa_device_scope *scope, const bool *rows, void *stream);
    sa_status (*crop)(sa_cuda_object *object, const sa_device_scope *scope, int64_t length, void *stream);
} sa_cuda_kind;

/* The first member of each. */
struct sa_cuda_object {
    PyObject_HEAD
    const sa_cuda_kind *kind;
    DLDevice device;
    PyObject *allocate; /* allocate(bytes, first) -> array, or None: from the driver */
    PyObject *storage;
    const DLPackExchangeAPI *api; /* of the storage: its library's current stream is ours; NULL: that of the last call */
    void *stream;
    atomic_flag busy;
};

/* A new object of `size` bytes, all behind its head zero. */
void *sa_cuda_object_new(PyTypeObject *type, size_t size, const sa_cuda_kind *kind, int device, PyObject *allocate);
void sa_cuda_object_free(sa_cuda_object *object);

sa_call sa_cuda_call(const sa_cuda_object *object, PyTypeObject *type, const char *function);

/* Gets memory from allocate(); the object owns it and knows its library's stream. -1 with an exception. */
int sa_cuda_take_storage(sa_call *call, sa_cuda_object *object, int64_t bytes, bool first, void **memory);

/* One method at work: the object is ours, its device current. */
typedef struct sa_session {
    sa_cuda_object *object;
    const char *function;
    sa_device_scope scope;
    void *stream;
} sa_session;

int sa_session_begin(PyObject *object, const char *function, sa_session *session);

/* Raises what the status stands for, and gives None where it is fine. */
PyObject *sa_session_end(const sa_session *session, sa_status status);

/* The methods of every cache. */
PyObject *sa_cuda_attend(PyObject *self, PyObject *const *arguments); /* [SA_CACHE_ARGUMENTS] */
PyObject *sa_cuda_copy(PyObject *self, PyObject *unused);
PyObject *sa_cuda_reset(PyObject *self, PyObject *mask); /* bytes [batch], or None for all */
PyObject *sa_cuda_reorder(PyObject *self, PyObject *index);
PyObject *sa_cuda_crop(PyObject *self, PyObject *length);

#endif
