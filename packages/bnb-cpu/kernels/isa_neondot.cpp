// Advanced SIMD with the int8 dot products of Armv8.2.
#define BNB_ISA neondot
#define BNB_NEON_DOT
#include "simd_neon.h"

#include "kernels-inl.h"
