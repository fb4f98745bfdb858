/* sa_status -> exception, and the released GIL. */
#include "array.h"

void sa_raise(sa_status status)
{
    switch (status) {
    case SA_OK:
    case SA_INTERRUPTED: break; /* the poll saw a pending exception and left it */
    case SA_TYPE_ERROR: PyErr_SetString(PyExc_TypeError, sa_message()); break;
    case SA_VALUE_ERROR: PyErr_SetString(PyExc_ValueError, sa_message()); break;
    case SA_NOT_IMPLEMENTED: PyErr_SetString(PyExc_NotImplementedError, sa_message()); break;
    case SA_RUNTIME_ERROR: PyErr_SetString(PyExc_RuntimeError, sa_message()); break;
    case SA_NO_MEMORY: PyErr_SetString(PyExc_MemoryError, sa_message()); break;
    }
}

static bool pending_signal(void *context)
{
    sa_released *released = context;
    PyEval_RestoreThread(released->state);
    const bool stop = PyErr_CheckSignals() != 0;
    released->state = PyEval_SaveThread();
    return stop;
}

void sa_release(sa_released *released)
{
    released->poll = (sa_poll){pending_signal, released};
    released->state = PyEval_SaveThread();
}

void sa_reacquire(sa_released *released)
{
    PyEval_RestoreThread(released->state);
}
