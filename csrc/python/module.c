/* The module: slots and state, nothing else. */
#define SA_IMPORTS_NUMPY
#include "array.h"
#include "numpy_api.h"

sa_module *sa_module_of(PyObject *module)
{
    return PyModule_GetState(module);
}

static int add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **place)
{
    *place = (PyTypeObject *)PyType_FromModuleAndSpec(module, spec, NULL);
    return *place == NULL ? -1 : PyModule_AddType(module, *place);
}

static int execute(PyObject *module)
{
    import_array1(-1);
    sa_module *state = sa_module_of(module);
    state->exchange_name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    state->dlpack_name = PyUnicode_InternFromString("__dlpack__");
    state->device_name = PyUnicode_InternFromString("__dlpack_device__");
    state->interface_name = PyUnicode_InternFromString("__cuda_array_interface__");
    state->grad_name = PyUnicode_InternFromString("requires_grad");
    state->negated_name = PyUnicode_InternFromString("is_neg");
    if (!state->exchange_name || !state->dlpack_name || !state->device_name || !state->interface_name || !state->grad_name ||
        !state->negated_name) {
        return -1;
    }
#ifdef SA_CANARY
    if (PyModule_AddFunctions(module, sa_canary_methods) < 0) {
        return -1;
    }
#endif
    return add_type(module, &sa_cache_spec, &state->cache_type) < 0 ||
                   add_type(module, &sa_cuda_cache_spec, &state->cuda_cache_type) < 0 || add_type(module, &sa_kv_spec, &state->kv_type) < 0 ||
                   add_type(module, &sa_cuda_kv_spec, &state->cuda_kv_type) < 0 || add_type(module, &sa_buffer_spec, &state->buffer_type) < 0 ||
                   PyModule_AddFunctions(module, sa_attend_methods) < 0 || PyModule_AddFunctions(module, sa_merge_methods) < 0 ||
                   PyModule_AddFunctions(module, sa_backward_methods) < 0 || PyModule_AddFunctions(module, sa_mass_methods) < 0 || PyModule_AddFunctions(module, sa_info_methods) < 0
               ? -1
               : 0;
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    sa_module *state = sa_module_of(module);
    Py_VISIT(state->cache_type);
    Py_VISIT(state->cuda_cache_type);
    Py_VISIT(state->kv_type);
    Py_VISIT(state->cuda_kv_type);
    Py_VISIT(state->buffer_type);
    Py_VISIT(state->libraries);
    Py_VISIT(state->autocast);
    Py_VISIT(state->modes);
    Py_VISIT(state->forward);
    Py_VISIT(state->operator);
#ifndef Py_GIL_DISABLED
    Py_VISIT(state->table_type);
#endif
    return 0;
}

static int clear(PyObject *module)
{
    sa_module *state = sa_module_of(module);
    Py_CLEAR(state->cache_type);
    Py_CLEAR(state->cuda_cache_type);
    Py_CLEAR(state->kv_type);
    Py_CLEAR(state->cuda_kv_type);
    Py_CLEAR(state->buffer_type);
    Py_CLEAR(state->libraries);
    Py_CLEAR(state->autocast);
    Py_CLEAR(state->modes);
    Py_CLEAR(state->forward);
    Py_CLEAR(state->operator);
#ifndef Py_GIL_DISABLED
    Py_CLEAR(state->table_type);
#endif
    Py_CLEAR(state->exchange_name);
    Py_CLEAR(state->dlpack_name);
    Py_CLEAR(state->device_name);
    Py_CLEAR(state->interface_name);
    Py_CLEAR(state->grad_name);
    Py_CLEAR(state->negated_name);
    return 0;
}

static void release(void *module)
{
    (void)clear(module);
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_MULTIPLE_INTERPRETERS_SUPPORTED}, /* NumPy's C API is shared: no GIL of one's own */
#endif
#if PY_VERSION_HEX >= 0x030d0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "sinkattn._core",
    .m_doc = "The C core of sinkattn. Private: use the functions of the package.",
    .m_size = sizeof(sa_module),
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = release,
};

PyMODINIT_FUNC PyInit__core(void);
PyMODINIT_FUNC PyInit__core(void)
{
    return PyModuleDef_Init(&definition);
}
