/* Results as the caller's own kind, and the buffer type that carries them to frameworks known by __dlpack__ alone. */
#include <stdlib.h>
#include <string.h>

#include "../cuda/driver.h"
#include "device.h"

typedef struct buffer {
    PyObject_HEAD
    DLTensor tensor;
    int64_t shape[4], stride[4];
} buffer;

static DLDataType dl_dtype(sa_dtype dtype)
{
    return (DLDataType){dtype == SA_BF16 ? DL_BFLOAT : DL_FLOAT, (uint8_t)(8 * sa_dtype_size(dtype)), 1};
}

static DLTensor describe(const DLDevice device, sa_dtype dtype, int rank, int64_t *shape, int64_t *stride)
{
    int64_t dense = 1;
    for (int axis = rank - 1; axis >= 0; axis--) {
        stride[axis] = dense;
        dense *= shape[axis] > 0 ? shape[axis] : 1;
    }
    return (DLTensor){.device = device, .ndim = rank, .dtype = dl_dtype(dtype), .shape = shape, .strides = stride};
}

static sa_status allocate_on(const char *function, DLDevice device, int64_t bytes, void **data)
{
    sa_device_scope scope;
    SA_TRY(sa_device_enter(function, device.device_id, &scope));
    const sa_status status = sa_device_allocate(function, "a result", bytes, data);
    sa_device_leave(&scope);
    return status;
}

static PyObject *new_buffer(sa_call *call, DLDevice device, sa_dtype dtype, int rank, const int64_t *shape)
{
    buffer *self = PyObject_New(buffer, call->module->buffer_type);
    if (self == NULL) {
        return NULL;
    }
    int64_t bytes = sa_dtype_size(dtype);
    for (int axis = 0; axis < rank; axis++) {
        self->shape[axis] = shape[axis];
        bytes *= shape[axis];
    }
    self->tensor = describe(device, dtype, rank, self->shape, self->stride);
    if (sa_is_cuda(device)) {
        self->tensor.device.device_type = DL_CUDA;
        const sa_status status = allocate_on(call->function, device, bytes, &self->tensor.data);
        if (status != SA_OK) {
            Py_DECREF(self);
            sa_raise(status);
            return NULL;
        }
    } else if (posix_memalign(&self->tensor.data, 64, (size_t)(bytes > 0 ? bytes : 1)) != 0) {
        self->tensor.data = NULL;
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void buffer_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    buffer *self = (buffer *)object;
    if (self->tensor.device.device_type == DL_CUDA) {
        sa_device_free(self->tensor.device.device_id, self->tensor.data);
    } else {
        free(self->tensor.data);
    }
    PyObject_Free(object);
    Py_DECREF(type);
}

/* Managed tensors keep the buffer alive; a consumer may delete them from any thread. */
static void release_owner(PyObject *owner)
{
    if (Py_IsInitialized()) {
        const PyGILState_STATE gil = PyGILState_Ensure();
        Py_DECREF(owner);
        PyGILState_Release(gil);
    }
}

static void delete_versioned(DLManagedTensorVersioned *managed)
{
    release_owner(managed->manager_ctx);
    free(managed);
}

static void delete_legacy(DLManagedTensor *managed)
{
    release_owner(managed->manager_ctx);
    free(managed);
}

static void drop_versioned(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        delete_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    }
}

static void drop_legacy(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        delete_legacy(PyCapsule_GetPointer(capsule, "dltensor"));
    }
}

static PyObject *versioned_capsule(buffer *self)
{
    DLManagedTensorVersioned *managed = calloc(1, sizeof *managed);
    if (managed == NULL) {
        return PyErr_NoMemory();
    }
    *managed = (DLManagedTensorVersioned){{1, 0}, self, delete_versioned, 0, self->tensor};
    PyObject *capsule = PyCapsule_New(managed, "dltensor_versioned", drop_versioned);
    if (capsule == NULL) {
        free(managed);
        return NULL;
    }
    Py_INCREF(self);
    return capsule;
}

static PyObject *legacy_capsule(buffer *self)
{
    DLManagedTensor *managed = calloc(1, sizeof *managed);
    if (managed == NULL) {
        return PyErr_NoMemory();
    }
    *managed = (DLManagedTensor){self->tensor, self, delete_legacy};
    PyObject *capsule = PyCapsule_New(managed, "dltensor", drop_legacy);
    if (capsule == NULL) {
        free(managed);
        return NULL;
    }
    Py_INCREF(self);
    return capsule;
}

static PyObject *buffer_dlpack(PyObject *self, PyObject *arguments, PyObject *keywords)
{
    (void)arguments;
    PyObject *version = keywords != NULL ? PyDict_GetItemString(keywords, "max_version") : NULL;
    const bool versioned =
        version != NULL && PyTuple_Check(version) && PyTuple_GET_SIZE(version) == 2 && PyLong_AsLong(PyTuple_GET_ITEM(version, 0)) >= 1;
    return versioned ? versioned_capsule((buffer *)self) : legacy_capsule((buffer *)self);
}

static PyObject *buffer_device(PyObject *self, PyObject *unused)
{
    (void)unused;
    const DLDevice device = ((buffer *)self)->tensor.device;
    return Py_BuildValue("(ii)", device.device_type, device.device_id);
}

/* Version 3, for libraries that know no DLPack. It has no bfloat16. The memory is ready: the call that filled it has waited. */
static PyObject *buffer_interface(PyObject *object, void *unused)
{
    (void)unused;
    const buffer *self = (buffer *)object;
    if (self->tensor.device.device_type != DL_CUDA || self->tensor.dtype.code == DL_BFLOAT) {
        PyErr_SetString(PyExc_AttributeError, "__cuda_array_interface__");
        return NULL;
    }
    PyObject *shape = PyTuple_New(self->tensor.ndim);
    for (int axis = 0; shape != NULL && axis < self->tensor.ndim; axis++) {
        PyTuple_SET_ITEM(shape, axis, PyLong_FromLongLong(self->shape[axis]));
    }
    return shape == NULL ? NULL
                         : Py_BuildValue("{s:N,s:s,s:(KO),s:O,s:i}", "shape", shape, "typestr", self->tensor.dtype.bits == 32 ? "<f4" : "<f2",
                                         "data", (unsigned long long)(uintptr_t)self->tensor.data, Py_False, "strides", Py_None, "version", 3);
}

static PyGetSetDef buffer_getters[] = {
    {"__cuda_array_interface__", buffer_interface, NULL, NULL, NULL},
    {0},
};

static PyMethodDef buffer_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))buffer_dlpack, METH_VARARGS | METH_KEYWORDS, NULL},
    {"__dlpack_device__", buffer_device, METH_NOARGS, NULL},
    {0},
};

static PyType_Slot buffer_slots[] = {
    {Py_tp_dealloc, buffer_dealloc},
    {Py_tp_methods, buffer_methods},
    {Py_tp_getset, buffer_getters},
    {Py_tp_doc, "A result on its way into another array library."},
    {0},
};

PyType_Spec sa_buffer_spec = {
    .name = "sinkattn._core.Buffer",
    .basicsize = sizeof(buffer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = buffer_slots,
};

/* --- making results --------------------------------------------------------------------------------------------------------------- */

static PyObject *numpy_result(const sa_like *like, sa_dtype dtype, int rank, const int64_t *shape, void **data)
{
    PyArray_Descr *descr;
    if (dtype == SA_BF16) { /* only arrays of the caller's own bfloat16 come here */
        descr = PyArray_DESCR((PyArrayObject *)like->object);
        Py_INCREF(descr);
    } else {
        descr = PyArray_DescrFromType(dtype == SA_F32 ? NPY_FLOAT32 : NPY_FLOAT16);
    }
    npy_intp extents[4];
    for (int axis = 0; axis < rank; axis++) {
        extents[axis] = (npy_intp)shape[axis];
    }
    PyObject *array = PyArray_NewFromDescr(&PyArray_Type, descr, rank, extents, NULL, NULL, 0, NULL);
    if (array != NULL) {
        *data = PyArray_DATA((PyArrayObject *)array);
    }
    return array;
}

/* Libraries call every failure one of memory, and may say so at length: the first line names the trouble. */
static void set_error(void *context, const char *kind, const char *message)
{
    (void)context;
    (void)kind;
    const bool memory = strstr(message, "out of memory") != NULL || strstr(message, "allocate") != NULL;
    PyObject *line = PyUnicode_DecodeUTF8(message, (Py_ssize_t)strcspn(message, "\n"), "replace");
    if (line != NULL) {
        PyErr_SetObject(memory ? PyExc_MemoryError : PyExc_RuntimeError, line);
        Py_DECREF(line);
    }
}

static DLManagedTensorVersioned *exchange_memory(const sa_like *like, DLDataType dtype, int rank, const int64_t *shape)
{
    int64_t extents[4] = {0}, stride[4] = {0};
    memcpy(extents, shape, (size_t)rank * sizeof *shape);
    DLTensor prototype = describe(like->device, SA_F32, rank, extents, stride);
    prototype.dtype = dtype;
    DLManagedTensorVersioned *managed = NULL;
    if (like->api->allocate(&prototype, &managed, NULL, set_error) != 0) {
        if (!PyErr_Occurred()) {
            PyErr_NoMemory();
        }
        return NULL;
    }
    return managed;
}

static void *data_of(const DLTensor *tensor)
{
    return (char *)tensor->data + tensor->byte_offset;
}

static PyObject *exchange_result(const sa_like *like, sa_dtype dtype, int rank, const int64_t *shape, void **data)
{
    DLManagedTensorVersioned *managed = exchange_memory(like, dl_dtype(dtype), rank, shape);
    if (managed == NULL) {
        return NULL;
    }
    *data = data_of(&managed->dl_tensor);
    void *object = NULL;
    if (like->api->managed_to_object(managed, &object) != 0) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_RuntimeError, "the array library did not take its own allocation back");
        }
        return NULL;
    }
    return object;
}

/* From the allocator of the library of `like`, asked in Python. Py_None where there is no way to ask. */
static PyObject *library_memory(sa_call *call, const sa_like *like, const char *dtype, int rank, const int64_t *shape, void **data)
{
    PyObject *extents = PyTuple_New(rank);
    for (int axis = 0; extents != NULL && axis < rank; axis++) {
        PyTuple_SET_ITEM(extents, axis, PyLong_FromLongLong(shape[axis]));
    }
    PyObject *array = extents != NULL ? sa_ask_library(call, "empty", "(ONz)", like->object, extents, dtype) : NULL;
    if (array == NULL || array == Py_None) {
        return array;
    }
    sa_raw view = {0};
    sa_like own;
    if (sa_raw_of_object(call, "a new array", array, &view, &own) != 1) {
        Py_DECREF(array);
        return NULL;
    }
    *data = view.data;
    return array;
}

/* A result on CUDA for a library without a table: made by it where it can be asked, else a buffer that it imports in the end. */
static PyObject *library_result(sa_call *call, const sa_like *like, sa_dtype dtype, int rank, const int64_t *shape, void **data)
{
    PyObject *array = library_memory(call, like, dtype == SA_F32 ? "float32" : NULL, rank, shape, data);
    if (array != Py_None) {
        return array;
    }
    Py_DECREF(array);
    array = new_buffer(call, like->device, dtype, rank, shape);
    if (array != NULL) {
        *data = ((buffer *)array)->tensor.data;
    }
    return array;
}

static void delete_memory(PyObject *capsule)
{
    DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "sinkattn.memory");
    managed->deleter(managed);
}

PyObject *sa_new_device_buffer(sa_call *call, DLDevice device, int64_t bytes, void **data)
{
    const int64_t words = (bytes + 3) / 4;
    PyObject *owner = new_buffer(call, device, SA_F32, 1, &words);
    *data = owner != NULL ? ((buffer *)owner)->tensor.data : NULL;
    return owner;
}

int sa_new_memory(sa_call *call, const sa_like *like, int64_t bytes, void **data)
{
    PyObject *owner = NULL;
    if (like->kind == SA_KIND_EXCHANGE) {
        DLManagedTensorVersioned *managed = exchange_memory(like, (DLDataType){DL_UINT, 8, 1}, 1, &bytes);
        owner = managed != NULL ? PyCapsule_New(managed, "sinkattn.memory", delete_memory) : NULL;
        *data = managed != NULL ? data_of(&managed->dl_tensor) : NULL;
    } else {
        owner = library_memory(call, like, "uint8", 1, &bytes, data);
        if (owner == Py_None) {
            Py_DECREF(owner);
            owner = sa_new_device_buffer(call, like->device, bytes, data);
        }
    }
    return owner == NULL ? -1 : sa_hold(call, owner);
}

PyObject *sa_new_result(sa_call *call, const sa_like *like, sa_dtype dtype, int rank, const int64_t *shape, void **data)
{
    if (like->kind == SA_KIND_NUMPY) {
        return numpy_result(like, dtype, rank, shape, data);
    }
    if (like->kind == SA_KIND_EXCHANGE) {
        return exchange_result(like, dtype, rank, shape, data);
    }
    if (sa_is_cuda(like->device)) {
        return library_result(call, like, dtype, rank, shape, data);
    }
    PyObject *result = new_buffer(call, like->device, dtype, rank, shape);
    if (result != NULL) {
        *data = ((buffer *)result)->tensor.data;
    }
    return result;
}

/* The from_dlpack of an object's library: its array namespace, else the package of its type. Owned; NULL without exception: it has none. */
static PyObject *find_from_dlpack(PyObject *object)
{
    PyObject *space = PyObject_CallMethod(object, "__array_namespace__", NULL);
    if (space == NULL) {
        PyErr_Clear();
        PyObject *module = PyObject_GetAttrString((PyObject *)Py_TYPE(object), "__module__");
        PyObject *parts = module != NULL && PyUnicode_Check(module) ? PyObject_CallMethod(module, "partition", "s", ".") : NULL;
        PyObject *modules = PyImport_GetModuleDict();
        space = parts != NULL ? PyDict_GetItem(modules, PyTuple_GET_ITEM(parts, 0)) : NULL;
        Py_XINCREF(space);
        Py_XDECREF(parts);
        Py_XDECREF(module);
    }
    PyObject *function = space != NULL ? PyObject_GetAttrString(space, "from_dlpack") : NULL;
    Py_XDECREF(space);
    if (function == NULL) {
        PyErr_Clear();
    }
    return function;
}

/* For a library without from_dlpack: a NumPy array over the buffer, which NumPy's own import cannot make of bfloat16. */
static PyObject *numpy_over_buffer(PyObject *result)
{
    buffer *self = (buffer *)result;
    PyArray_Descr *descr = NULL;
    if (self->tensor.dtype.code == DL_BFLOAT) {
        PyObject *module = PyImport_ImportModule("ml_dtypes");
        PyObject *type = module != NULL ? PyObject_GetAttrString(module, "bfloat16") : NULL;
        if (type == NULL || !PyArray_DescrConverter(type, &descr)) {
            descr = NULL;
        }
        Py_XDECREF(type);
        Py_XDECREF(module);
    } else {
        descr = PyArray_DescrFromType(self->tensor.dtype.bits == 32 ? NPY_FLOAT32 : NPY_FLOAT16);
    }
    if (descr == NULL) {
        return NULL;
    }
    npy_intp extents[4];
    for (int axis = 0; axis < self->tensor.ndim; axis++) {
        extents[axis] = (npy_intp)self->shape[axis];
    }
    PyObject *array =
        PyArray_NewFromDescr(&PyArray_Type, descr, self->tensor.ndim, extents, NULL, self->tensor.data, NPY_ARRAY_CARRAY, NULL);
    if (array != NULL && PyArray_SetBaseObject((PyArrayObject *)array, Py_NewRef(result)) < 0) {
        Py_CLEAR(array);
    }
    return array;
}

static PyObject *take_on_cuda(sa_call *call, const sa_like *like, PyObject *result)
{
    if (Py_TYPE(result) != call->module->buffer_type) {
        return result; /* the library made it */
    }
    PyObject *converted = sa_ask_library(call, "take", "(OO)", like->object, result);
    Py_DECREF(result);
    return converted;
}

PyObject *sa_finish_result(sa_call *call, const sa_like *like, PyObject *result)
{
    if (like->kind != SA_KIND_DLPACK || result == NULL) {
        return result;
    }
    if (sa_is_cuda(like->device)) {
        return take_on_cuda(call, like, result);
    }
    PyObject *from_dlpack = find_from_dlpack(like->object);
    PyObject *converted = from_dlpack != NULL ? PyObject_CallOneArg(from_dlpack, result) : numpy_over_buffer(result);
    Py_XDECREF(from_dlpack);
    Py_DECREF(result);
    return converted;
}
