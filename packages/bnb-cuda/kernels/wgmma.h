// Matrix products of a group of four warps on compute capability 9.0: the left operand in registers or
// shared memory, the right one in shared memory, the sum in registers.
//
// Shared memory holds rows of 128 bytes, 16-byte pieces swizzled by row: piece p of row r lies at place
// p ^ (r % 8). Tiles begin at multiples of 1024 bytes.
#pragma once

#include "copies.h"

// Only the architecture-specific target has these instructions.
#if !defined(BNB_HIP) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define BNB_WGMMA 1
#else
#define BNB_WGMMA 0
#endif

namespace bnb_gpu {

constexpr int kGroupThreads = 4 * kLanes;
constexpr int kSwizzledRowBytes = 128;
constexpr int kSwizzleTile = 1024;

// Where a byte of a row lies in a tile.
__device__ __forceinline__ unsigned swizzled_place(unsigned row, unsigned byte) {
  return row * kSwizzledRowBytes + ((byte / 16) ^ (row % 8)) * 16 + byte % 16;
}

// All warps of a group of four call these, right after their kind of work is known.
template <int kCount>
__device__ __forceinline__ void keep_fewer_registers() {
#if BNB_WGMMA
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

template <int kCount>
__device__ __forceinline__ void take_more_registers() {
#if BNB_WGMMA
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

// Descriptor of a tile in shared memory. The pieces of 32 bytes along a row add 2 each.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile) {
  const uint64_t address = static_cast<uint64_t>(__cvta_generic_to_shared(tile));
  constexpr uint64_t kGroupStride = uint64_t{kSwizzleTile / 16} << 32, kSwizzle128 = uint64_t{1} << 62;
  return (address & 0x3ffffu) >> 4 | uint64_t{1} << 16 | kGroupStride | kSwizzle128;
}

// Makes this thread's writes to shared memory visible to the matrix units and the copy engine; a barrier follows.
__device__ __forceinline__ void publish_to_matrix_units() {
#if BNB_WGMMA
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before the first product of a batch, after its registers were written.
__device__ __forceinline__ void begin_products() {
#if BNB_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void commit_products() {
#if BNB_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `kPending` of the latest batches are still under way: the left operands of the others are
// free. No sum may be read.
template <int kPending>
__device__ __forceinline__ void wait_for_products_but() {
#if BNB_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits for all products; `sums` is not read before.
template <class Sum, int kCount>
__device__ __forceinline__ void wait_for_products(Sum (&sums)[kCount]) {
#if BNB_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<Sum, float>) {
      asm volatile("" : "+f"(sums[i])::"memory");
    } else {
      asm volatile("" : "+r"(sums[i])::"memory");
    }
  }
#endif
}

#define BNB_SUMS4(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define BNB_SUMS16(c, i) BNB_SUMS4(c, i), BNB_SUMS4(c, i + 4), BNB_SUMS4(c, i + 8), BNB_SUMS4(c, i + 12)
#define BNB_PLACES16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define BNB_SUMS32(c, i) BNB_SUMS16(c, i), BNB_SUMS16(c, i + 16)
#define BNB_PLACES32 BNB_PLACES16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

#define BNB_SUMS128(c, i) BNB_SUMS32(c, i), BNB_SUMS32(c, i + 32), BNB_SUMS32(c, i + 64), BNB_SUMS32(c, i + 96)

#define BNB_PLACES64                                                                                              \
  BNB_PLACES32                                                                                                    \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define BNB_PLACES128                                                                                        \
  BNB_PLACES64                                                                                               \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89" \
  ",%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"     \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// d = a @ b.T (+ d) for 64 rows of a in registers, 32 to 256 rows of b and 16 columns, 16-bit values.
#define BNB_PRODUCT_HALF(type, rows, places, a0, a1, a2, a3, b, keep, ...)                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" keep                                                        \
               ", 0;\n"                                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" rows "k16.f32." type "." type " {" places "}, {%" a0 ",%" a1 \
               ",%" a2 ",%" a3 "}, %" b ", p, 1, 1, 0;\n}\n"                                                    \
               : __VA_ARGS__                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_tile), "r"(static_cast<int>(add)))

template <class T>
__device__ __forceinline__ void multiply_group(float (&d)[16], const unsigned (&a)[4], uint64_t b_tile, bool add) {
#if BNB_WGMMA
  if constexpr (std::is_same_v<T, half_t>) {
    BNB_PRODUCT_HALF("f16", "32", BNB_PLACES16, "16", "17", "18", "19", "20", "21", BNB_SUMS16("+f", 0));
  } else {
    BNB_PRODUCT_HALF("bf16", "32", BNB_PLACES16, "16", "17", "18", "19", "20", "21", BNB_SUMS16("+f", 0));
  }
#endif
}

template <class T>
__device__ __forceinline__ void multiply_group(float (&d)[32], const unsigned (&a)[4], uint64_t b_tile, bool add) {
#if BNB_WGMMA
  if constexpr (std::is_same_v<T, half_t>) {
    BNB_PRODUCT_HALF("f16", "64", BNB_PLACES32, "32", "33", "34", "35", "36", "37", BNB_SUMS16("+f", 0),
                     BNB_SUMS16("+f", 16));
  } else {
    BNB_PRODUCT_HALF("bf16", "64", BNB_PLACES32, "32", "33", "34", "35", "36", "37", BNB_SUMS16("+f", 0),
                     BNB_SUMS16("+f", 16));
  }
#endif
}

template <class T>
__device__ __forceinline__ void multiply_group(float (&d)[64], const unsigned (&a)[4], uint64_t b_tile, bool add) {
#if BNB_WGMMA
  if constexpr (std::is_same_v<T, half_t>) {
    BNB_PRODUCT_HALF("f16", "128", BNB_PLACES64, "64", "65", "66", "67", "68", "69", BNB_SUMS32("+f", 0),
                     BNB_SUMS32("+f", 32));
  } else {
    BNB_PRODUCT_HALF("bf16", "128", BNB_PLACES64, "64", "65", "66", "67", "68", "69", BNB_SUMS32("+f", 0),
                     BNB_SUMS32("+f", 32));
  }
#endif
}

template <class T>
__device__ __forceinline__ void multiply_group(float (&d)[128], const unsigned (&a)[4], uint64_t b_tile, bool add) {
#if BNB_WGMMA
  if constexpr (std::is_same_v<T, half_t>) {
    BNB_PRODUCT_HALF("f16", "256", BNB_PLACES128, "128", "129", "130", "131", "132", "133", BNB_SUMS128("+f", 0));
  } else {
    BNB_PRODUCT_HALF("bf16", "256", BNB_PLACES128, "128", "129", "130", "131", "132", "133", BNB_SUMS128("+f", 0));
  }
#endif
}

// The same with both operands in shared memory. `kind` names the columns of one product and its types.
#define BNB_PRODUCT_SHARED(kind, last, rows, places, a, b, keep, ...)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" keep                                                      \
               ", 0;\n"                                                                                       \
               "wgmma.mma_async.sync.aligned.m64n" rows kind " {" places "}, %" a ", %" b ", p" last ";\n}\n" \
               : __VA_ARGS__                                                                                  \
               : "l"(a_tile), "l"(b_tile), "r"(static_cast<int>(add)))

// int8, 32 columns, exact in int32.
#define BNB_PRODUCT_INT8(...) BNB_PRODUCT_SHARED("k32.s32.s8.s8", "", __VA_ARGS__)

__device__ __forceinline__ void multiply_group(int (&d)[16], uint64_t a_tile, uint64_t b_tile, bool add) {
#if BNB_WGMMA
  BNB_PRODUCT_INT8("32", BNB_PLACES16, "16", "17", "18", BNB_SUMS16("+r", 0));
#endif
}

__device__ __forceinline__ void multiply_group(int (&d)[32], uint64_t a_tile, uint64_t b_tile, bool add) {
#if BNB_WGMMA
  BNB_PRODUCT_INT8("64", BNB_PLACES32, "32", "33", "34", BNB_SUMS32("+r", 0));
#endif
}

__device__ __forceinline__ void multiply_group(int (&d)[64], uint64_t a_tile, uint64_t b_tile, bool add) {
#if BNB_WGMMA
  BNB_PRODUCT_INT8("128", BNB_PLACES64, "64", "65", "66", BNB_SUMS32("+r", 0), BNB_SUMS32("+r", 32));
#endif
}

__device__ __forceinline__ void multiply_group(int (&d)[128], uint64_t a_tile, uint64_t b_tile, bool add) {
#if BNB_WGMMA
  BNB_PRODUCT_INT8("256", BNB_PLACES128, "128", "129", "130", BNB_SUMS128("+r", 0));
#endif
}

// 16-bit values, 16 columns. The registers hold the bits of float32 sums, so that they can be those of integers that
// came before.
#define BNB_PRODUCT_TWO_BYTES(...)                                        \
  if constexpr (std::is_same_v<T, half_t>) {                              \
    BNB_PRODUCT_SHARED("k16.f32.f16.f16", ", 1, 1, 0, 0", __VA_ARGS__);   \
  } else {                                                                \
    BNB_PRODUCT_SHARED("k16.f32.bf16.bf16", ", 1, 1, 0, 0", __VA_ARGS__); \
  }

template <class T>
__device__ __forceinline__ void multiply_group(int (&d)[16], uint64_t a_tile, uint64_t b_tile, bool add) {
#if BNB_WGMMA
  BNB_PRODUCT_TWO_BYTES("32", BNB_PLACES16, "16", "17", "18", BNB_SUMS16("+r", 0))
#endif
}

template <class T>
__device__ __forceinline__ void multiply_group(int (&d)[32], uint64_t a_tile, uint64_t b_tile, bool add) {
#if BNB_WGMMA
  BNB_PRODUCT_TWO_BYTES("64", BNB_PLACES32, "32", "33", "34", BNB_SUMS32("+r", 0))
#endif
}

template <class T>
__device__ __forceinline__ void multiply_group(int (&d)[64], uint64_t a_tile, uint64_t b_tile, bool add) {
#if BNB_WGMMA
  BNB_PRODUCT_TWO_BYTES("128", BNB_PLACES64, "64", "65", "66", BNB_SUMS32("+r", 0), BNB_SUMS32("+r", 32))
#endif
}

template <class T>
__device__ __forceinline__ void multiply_group(int (&d)[128], uint64_t a_tile, uint64_t b_tile, bool add) {
#if BNB_WGMMA
  BNB_PRODUCT_TWO_BYTES("256", BNB_PLACES128, "128", "129", "130", BNB_SUMS128("+r", 0))
#endif
}

}  // namespace bnb_gpu
