/* What the caches on CUDA are in Python: memory of the caller's library, its stream, and one call at a time. */
#ifndef SA_CUDA_OBJECT_H
#define SA_CUDA_OBJECT_H

#include <stdatomic.h>

#include "../cuda/driver.h"
#include "device.h"

/* The first member of each. */
typedef struct sa_cuda_object {
    PyObject_HEAD
    const char *name; /* "SinkCache": in messages */
    DLDevice device;
    PyObject *allocate; /* allocate(bytes, first) -> array, or None: from the driver */
    PyObject *storage;
    const DLPackExchangeAPI *api; /* of the storage: its library's current stream is ours; NULL: that of the last call */
    void *stream;
    atomic_flag busy;
} sa_cuda_object;

/* A new object of `size` bytes, all behind its head zero. */
void *sa_cuda_object_new(PyTypeObject *type, size_t size, const char *name, int device, PyObject *allocate);
void sa_cuda_object_free(sa_cuda_object *object);

sa_call sa_cuda_call(const sa_cuda_object *object, PyTypeObject *type, const char *function);

/* Gets memory from allocate(); the object owns it and knows its library's stream. -1 with an exception. */
int sa_cuda_take_storage(sa_call *call, sa_cuda_object *object, int64_t bytes, bool first, void **memory);

/* False, with an exception, where another call is at work. */
bool sa_cuda_enter(sa_cuda_object *object);
void sa_cuda_leave(sa_cuda_object *object);

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

#endif
