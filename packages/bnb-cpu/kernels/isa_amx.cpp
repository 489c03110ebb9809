// Products of many rows in the tile registers of Sapphire Rapids; the rest is that of isa_avx512bf16.cpp.
#define BNB_ISA amx
#define BNB_AVX512VNNI
#define BNB_AVX512BF16
#define BNB_AMX
#include "simd_avx512.h"

#include "kernels-inl.h"
