/* NumPy's C API, imported once in module.c. Built against NumPy 2, runs on 1.26 and later. */
#ifndef SA_NUMPY_API_H
#define SA_NUMPY_API_H

#define NPY_NO_DEPRECATED_API NPY_1_25_API_VERSION
#define NPY_TARGET_VERSION NPY_1_25_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL sinkattn_numpy_api
#ifndef SA_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#include <numpy/arrayobject.h>
#pragma GCC diagnostic pop

#endif
