// What isa_amx.cpp has, with its registers in memory: for tests on processors without them.
#define BNB_ISA amxportable
#define BNB_AVX512VNNI
#define BNB_AVX512BF16
#define BNB_AMX
#define BNB_AMX_PORTABLE
#include "simd_avx512.h"

#include "kernels-inl.h"
