/* On which device a call runs, and in which order with what the libraries of its arrays do. */
#ifndef SA_PYTHON_DEVICE_H
#define SA_PYTHON_DEVICE_H

#include "raw.h"

bool sa_is_cuda(DLDevice device);

/* The first tensor decides the device of a call, the others must be there; auxiliary arrays may also be on the host. -1 with an exception. */
int sa_admit_device(sa_call *call, const char *name, DLDevice device);

/* The first CUDA array decides the stream of a call: the one that its library works on. An array of another library is ordered before
 * the call, and that library's stream behind it. */
int sa_follow_exchange(sa_call *call, const DLPackExchangeAPI *api, DLDevice device);
int sa_follow_library(sa_call *call, PyObject *object, DLDevice device);

/* The stream of a call in the code of __dlpack__(stream=...). */
long long sa_dlpack_stream(const sa_call *call);

/* An object with __cuda_array_interface__ and nothing better. */
int sa_raw_of_interface(sa_call *call, const char *name, PyObject *object, sa_raw *out, sa_like *like);

/* After the launches: what sa_follow_* promised. */
sa_status sa_settle_streams(sa_call *call);

/* A function of sinkattn._libraries, called. Owned result. */
PyObject *sa_ask_library(sa_call *call, const char *function, const char *format, ...);

#endif
