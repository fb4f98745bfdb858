/* Auxiliary arguments: numbers, lists and arrays of any real or integer dtype, cast to dense float32 or int64; plain numbers. */
#include <stdlib.h>
#include <string.h>

#include "../core/half.h"
#include "../cuda/driver.h"
#include "device.h"

static double real_at(const char *at, DLDataType dtype)
{
    switch (dtype.code << 8 | dtype.bits) {
    case DL_FLOAT << 8 | 64: return *(const double *)(const void *)at;
    case DL_FLOAT << 8 | 32: return (double)*(const float *)(const void *)at;
    case DL_FLOAT << 8 | 16: return (double)sa_f16_to_f32(*(const uint16_t *)(const void *)at);
    default: return (double)sa_bf16_to_f32(*(const uint16_t *)(const void *)at);
    }
}

static int64_t integer_at(const char *at, DLDataType dtype)
{
    switch (dtype.code << 8 | dtype.bits) {
    case DL_INT << 8 | 8: return *(const int8_t *)at;
    case DL_INT << 8 | 16: return *(const int16_t *)(const void *)at;
    case DL_INT << 8 | 32: return *(const int32_t *)(const void *)at;
    case DL_UINT << 8 | 8: return *(const uint8_t *)at;
    case DL_UINT << 8 | 16: return *(const uint16_t *)(const void *)at;
    case DL_UINT << 8 | 32: return *(const uint32_t *)(const void *)at;
    default: return *(const int64_t *)(const void *)at; /* uint64 above 2^63 turns negative, which every check refuses */
    }
}

static bool is_integer(DLDataType dtype)
{
    return (dtype.code == DL_INT || dtype.code == DL_UINT) && dtype.lanes == 1 && dtype.bits <= 64;
}

static bool is_real(DLDataType dtype)
{
    const bool known = (dtype.code == DL_FLOAT && (dtype.bits == 16 || dtype.bits == 32 || dtype.bits == 64)) ||
                       (dtype.code == DL_BFLOAT && dtype.bits == 16);
    return known && dtype.lanes == 1;
}

/* Real numbers that NumPy turns into float64 and we do not read: long double, and the small floats of ml_dtypes. */
static bool is_exotic(PyArray_Descr *descr)
{
    return descr->type_num == NPY_LONGDOUBLE ||
           (descr->type_num >= NPY_USERDEF && !sa_is_bfloat16(descr) && strstr(descr->typeobj->tp_name, "float") != NULL);
}

/* The raw view of an auxiliary argument; lists and NumPy scalars become arrays first. */
static int open_auxiliary(sa_call *call, const char *name, PyObject *object, sa_raw *out)
{
    sa_like like;
    if (PyArray_Check(object) && is_exotic(PyArray_DESCR((PyArrayObject *)object))) {
        object = PyArray_FROM_OTF(object, NPY_DOUBLE, NPY_ARRAY_DEFAULT | NPY_ARRAY_FORCECAST);
        if (object == NULL || sa_hold(call, object) < 0) {
            return -1;
        }
    }
    int found = PyBool_Check(object) ? 0 : sa_raw_of_object(call, name, object, out, &like);
    if (found == 0 && !PyBool_Check(object)) {
        PyObject *array = PyArray_FROM_O(object);
        if (array == NULL && PyErr_ExceptionMatches(PyExc_ValueError)) {
            PyErr_Clear();
            PyErr_Format(PyExc_ValueError, "%s(): %s has rows of different lengths, expected a regular array", call->function, name);
        }
        if (array == NULL || sa_hold(call, array) < 0) {
            return -1;
        }
        found = sa_raw_of_numpy(call, name, (PyArrayObject *)array, out) < 0 ? -1 : 1;
    }
    if (found < 0) {
        return -1;
    }
    if (found == 0 || out->dtype.code == DL_BOOL || !(is_integer(out->dtype) || is_real(out->dtype)) || out->rank > 4) {
        PyErr_Format(PyExc_TypeError, "%s(): %s is %s%s, expected numbers", call->function, name,
                     found && out->dtype.code == DL_BOOL ? "a bool array: " : "", Py_TYPE(object)->tp_name);
        return -1;
    }
    return 0;
}

static int raw_of_auxiliary(sa_call *call, const char *name, PyObject *object, sa_raw *out)
{
    call->auxiliary = true;
    const int failed = open_auxiliary(call, name, object, out);
    call->auxiliary = false;
    return failed;
}

static int64_t element_count(const sa_raw *view)
{
    int64_t count = 1;
    for (int axis = 0; axis < view->rank; axis++) {
        if (__builtin_mul_overflow(count, view->shape[axis], &count)) {
            return INT64_MAX / 16;
        }
    }
    return count;
}

static const char *element_at(const sa_raw *view, int64_t index)
{
    int64_t offset = 0;
    for (int axis = view->rank - 1; axis >= 0; axis--) {
        offset += index % view->shape[axis] * view->stride[axis];
        index /= view->shape[axis];
    }
    return view->data + offset * (view->dtype.bits / 8);
}

static void *take_memory(sa_call *call, int64_t count, size_t size)
{
    void *memory = call->memory_count < SA_MAX_HELD ? PyMem_Calloc((size_t)(count > 0 ? count : 1), size) : NULL;
    if (memory == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    call->memory[call->memory_count++] = memory;
    return memory;
}

/* An array that stays where it is, for kernels to read. */
static sa_device_numbers numbers_on_device(const sa_raw *view)
{
    static const int floats[] = {SA_NUMBER_F16, SA_NUMBER_F32, SA_NUMBER_F64}; /* 16, 32, 64 bits */
    const int size = view->dtype.bits == 8 ? 0 : view->dtype.bits == 16 ? 1 : view->dtype.bits == 32 ? 2 : 3;
    const int type = view->dtype.code == DL_INT     ? SA_NUMBER_I8 + size
                     : view->dtype.code == DL_UINT  ? SA_NUMBER_U8 + size
                     : view->dtype.code == DL_FLOAT ? floats[size - 1]
                                                    : SA_NUMBER_BF16;
    static const char nothing[1];
    sa_device_numbers numbers = {.data = view->data != NULL ? view->data : nothing, .type = type}; /* empty arrays may have no memory */
    memcpy(numbers.stride, view->stride, sizeof numbers.stride);
    return numbers;
}

/* Brings an array of a device to the host, which waits for all that is before it on the stream of the call. The view then points to the
 * copy, whose strides are the same. */
static int pull(sa_call *call, sa_raw *view)
{
    int64_t low = 0, high = 0;
    const int64_t size = view->dtype.bits / 8;
    for (int axis = 0; axis < view->rank; axis++) {
        const int64_t reach = (view->shape[axis] - 1) * view->stride[axis];
        low += reach < 0 ? reach : 0;
        high += reach > 0 ? reach : 0;
    }
    const bool empty = element_count(view) == 0;
    char *copy = take_memory(call, empty ? 1 : high - low + 1, (size_t)size);
    if (copy == NULL) {
        return -1;
    }
    sa_device_scope scope;
    sa_status status = empty ? SA_OK : sa_device_enter(call->function, view->device.device_id, &scope);
    if (status == SA_OK && !empty) {
        status = sa_device_copy_out(call->function, copy, view->data + low * size, (high - low + 1) * size, call->stream);
        status = status == SA_OK ? sa_device_wait(call->function, call->stream) : status;
        sa_device_leave(&scope);
    }
    sa_raise(status);
    view->data = copy - low * size;
    view->device = (DLDevice){DL_CPU, 0};
    return status == SA_OK ? 0 : -1;
}

static bool checks_values(void)
{
    const char *wish = getenv("SINKATTN_CHECK");
    return wish != NULL && wish[0] != '\0' && strcmp(wish, "0") != 0;
}

int sa_cast_floats(sa_call *call, const char *name, PyObject *object, sa_floats *out)
{
    if (object == Py_None) {
        return 0;
    }
    if (PyFloat_CheckExact(object) && call->small_float_count < SA_MAX_HELD) {
        float *place = &call->small_floats[call->small_float_count++];
        *place = (float)PyFloat_AS_DOUBLE(object);
        *out = (sa_floats){.data = place};
        return 0;
    }
    sa_raw view = {0};
    if (raw_of_auxiliary(call, name, object, &view) < 0) {
        return -1;
    }
    if (sa_is_cuda(view.device)) {
        *out = (sa_floats){.rank = view.rank, .device = numbers_on_device(&view)};
        out->data = out->device.data;
        memcpy(out->shape, view.shape, sizeof out->shape);
        return 0;
    }
    const int64_t count = element_count(&view);
    float *data = take_memory(call, count, sizeof *data);
    if (data == NULL) {
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        const char *at = element_at(&view, i);
        data[i] = is_integer(view.dtype) ? (float)integer_at(at, view.dtype) : (float)real_at(at, view.dtype);
    }
    *out = (sa_floats){.data = data, .rank = view.rank};
    memcpy(out->shape, view.shape, sizeof out->shape);
    return 0;
}

int sa_cast_ints(sa_call *call, const char *name, PyObject *object, sa_ints *out)
{
    if (object == Py_None) {
        return 0;
    }
    if (PyLong_CheckExact(object) && call->small_int_count < SA_MAX_HELD) {
        int64_t *place = &call->small_ints[call->small_int_count++];
        bool given;
        *out = (sa_ints){.data = place};
        return sa_parse_int(call, name, object, place, &given);
    }
    sa_raw view = {0};
    if (raw_of_auxiliary(call, name, object, &view) < 0) {
        return -1;
    }
    const int64_t count = element_count(&view);
    if (!is_integer(view.dtype) && count > 0) {
        PyErr_Format(PyExc_TypeError, "%s(): %s holds floating-point numbers, expected integers", call->function, name);
        return -1;
    }
    if (sa_is_cuda(view.device) && !(call->reads_device || checks_values())) {
        *out = (sa_ints){.rank = view.rank, .device = numbers_on_device(&view)};
        out->data = out->device.data;
        memcpy(out->shape, view.shape, sizeof out->shape);
        return 0;
    }
    if (sa_is_cuda(view.device) && pull(call, &view) < 0) {
        return -1;
    }
    int64_t *data = take_memory(call, count, sizeof *data);
    if (data == NULL) {
        return -1;
    }
    for (int64_t i = 0; i < count; i++) {
        data[i] = integer_at(element_at(&view, i), view.dtype);
    }
    *out = (sa_ints){.data = data, .rank = view.rank};
    memcpy(out->shape, view.shape, sizeof out->shape);
    return 0;
}

int sa_parse_int(sa_call *call, const char *name, PyObject *object, int64_t *out, bool *given)
{
    *given = object != Py_None;
    if (!*given) {
        return 0;
    }
    PyObject *index = PyBool_Check(object) || PyArray_IsScalar(object, Bool) ? NULL : PyNumber_Index(object);
    if (index == NULL) {
        PyErr_Format(PyExc_TypeError, "%s(): %s is %s, expected an int", call->function, name, Py_TYPE(object)->tp_name);
        return -1;
    }
    int overflow;
    const long long value = PyLong_AsLongLongAndOverflow(index, &overflow);
    Py_DECREF(index);
    if (overflow != 0) {
        PyErr_Format(PyExc_ValueError, "%s(): %s does not fit 64 bits", call->function, name);
        return -1;
    }
    *out = value;
    return 0;
}

int sa_parse_float(sa_call *call, const char *name, PyObject *object, double *out, bool *given)
{
    *given = object != Py_None;
    if (!*given) {
        return 0;
    }
    if (!PyFloat_Check(object) && !PyLong_Check(object) && sa_refuse_lost_state(call, name, object) < 0) {
        return -1;
    }
    *out = PyBool_Check(object) || PyArray_IsScalar(object, Bool) ? -1.0 : PyFloat_AsDouble(object);
    if (PyBool_Check(object) || PyArray_IsScalar(object, Bool) || PyErr_Occurred()) {
        PyErr_Format(PyExc_TypeError, "%s(): %s is %s, expected a number", call->function, name, Py_TYPE(object)->tp_name);
        return -1;
    }
    return 0;
}

int sa_parse_bool(sa_call *call, const char *name, PyObject *object, bool *out)
{
    if (object == Py_True || object == Py_False) {
        *out = object == Py_True;
        return 0;
    }
    const int truth = PyLong_Check(object) || PyArray_IsScalar(object, Bool) ? PyObject_IsTrue(object) : -1;
    if (truth < 0) {
        PyErr_Format(PyExc_TypeError, "%s(): %s is %s, expected a bool", call->function, name, Py_TYPE(object)->tp_name);
        return -1;
    }
    *out = truth;
    return 0;
}
