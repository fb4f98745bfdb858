#include "../csrc/cuda/prefill_sm90.cu"
#include <cstring>
template <int rows, int keys, int stages, int qt> struct H : sa::form<rows,128,128,keys,stages,qt> { using F=sa::form<rows,128,128,keys,stages,qt>; static size_t total() { return F::shared + SA_HOPPER_ROWS_SHARED(rows); } };
template <int rows, int keys, int stages, int qt> struct H64 : sa::form<rows,64,64,keys,stages,qt> { using F=sa::form<rows,64,64,keys,stages,qt>; static size_t total() { return F::shared + SA_HOPPER_ROWS_SHARED(rows); } };
