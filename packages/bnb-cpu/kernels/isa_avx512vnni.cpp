// AVX-512 with the additions of Ice Lake and Zen 4: byte permutes and int8 dot products.
#define BNB_ISA avx512vnni
#define BNB_AVX512VNNI
#include "simd_avx512.h"

#include "kernels-inl.h"
