#define BNB_ISA scalar
#include "simd_scalar.h"

#include "kernels-inl.h"
