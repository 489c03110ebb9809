// Blocks of sums in the tile registers of AMX, in the form that gemm-inl.h asks for. The two sides of a product in
// words of 32 bits are what the instructions multiply.
#pragma once

#include "gemm-inl.h"
#ifdef BNB_AMX_PORTABLE
#include "amx_portable.h"
#else
#include "amx.h"
#endif

namespace bnb_cpu {
namespace BNB_ISA {

// `Product` names the word and, as dot<kSums>(), what is added to a register of sums.
//
// A product of two registers takes 16 cycles, and with two by two registers of sums there is one load of a kilobyte to
// each, which both caches can deliver in that time. A panel of up to 256 rows and 256 steps (272 KiB), its sums (up to
// 576 KiB) and the lanes of a tile (32 KiB) stay in the second-level cache, which has 2 MiB on every processor with
// AMX; the packed lanes behind it are read once per 256 rows.
template <class Product>
class AmxTile {
  using Word = typename Product::Word;
  static constexpr int kSide = 16;

 public:
  using Setup = AmxRegisters;
  static constexpr int kRows = 2 * kSide;
  static constexpr int kWidth = 2 * kSide;
  static constexpr int64_t kUnitSteps = kSide;
  static constexpr int64_t kPanelSteps = 256;
  static constexpr int64_t kPanelRows = 256;
  // A register that is filled in part costs less than another pass over the weight.
  static constexpr bool kRestApart = false;

  static void multiply(int64_t lane_count, int64_t row_count, const Word* scalars, int64_t scalar_stride,
                       const Word* lanes, int64_t lane_stride, int64_t steps, Word* c, int64_t c_stride, bool add) {
    const auto call = [&](auto multiply_registers) {
      multiply_registers(scalars, scalar_stride, lanes, lane_stride, steps, c, c_stride, add);
    };
    if (row_count > kSide) {
      lane_count > kSide ? call(multiply_registers<2, 2>) : call(multiply_registers<2, 1>);
    } else {
      lane_count > kSide ? call(multiply_registers<1, 2>) : call(multiply_registers<1, 1>);
    }
  }

 private:
  template <int kDown, int kAcross>
  static void multiply_registers(const Word* scalars, int64_t scalar_stride, const Word* lanes, int64_t lane_stride,
                                 int64_t steps, Word* c, int64_t c_stride, bool add) {
    constexpr int64_t kBytes = sizeof(Word);
    // Calls body(n, row, lane) for each register of sums.
    const auto for_sums = [](const auto& body) {
      body(Count<0>{}, 0, 0);
      if constexpr (kAcross > 1) {
        body(Count<1>{}, 0, kSide);
      }
      if constexpr (kDown > 1) {
        body(Count<2>{}, kSide, 0);
      }
      if constexpr (kDown > 1 && kAcross > 1) {
        body(Count<3>{}, kSide, kSide);
      }
    };
    for_sums([&](auto sums, int64_t row, int64_t lane) {
      if (add) {
        amx_load<sums.value>(c + row * c_stride + lane, c_stride * kBytes);
      } else {
        amx_zero<sums.value>();
      }
    });
    for (int64_t step = 0; step < steps; step += kSide) {
      amx_load<4>(scalars + step, scalar_stride * kBytes);
      amx_load<6>(lanes, lane_stride * kBytes);
      if constexpr (kAcross > 1) {
        amx_load<7>(lanes + kSide, lane_stride * kBytes);
      }
      if constexpr (kDown > 1) {
        amx_load<5>(scalars + kSide * scalar_stride + step, scalar_stride * kBytes);
      }
      for_sums([](auto sums, int64_t, int64_t) { Product::template dot<sums.value>(); });
      lanes += kSide * lane_stride;
    }
    for_sums([&](auto sums, int64_t row, int64_t lane) {
      amx_store<sums.value>(c + row * c_stride + lane, c_stride * kBytes);
    });
  }
};

}  // namespace BNB_ISA
}  // namespace bnb_cpu
