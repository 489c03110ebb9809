// AVX-512 with the additions of Zen 4 and Sapphire Rapids: those of isa_avx512vnni.cpp and bfloat16 dot products.
#define BNB_ISA avx512bf16
#define BNB_AVX512VNNI
#define BNB_AVX512BF16
#include "simd_avx512.h"

#include "kernels-inl.h"
