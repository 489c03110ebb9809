// The tile registers of AMX: eight of 16 rows of 64 bytes. Registers 0 to 3 hold sums, 4 and 5 what lies along their
// rows, 6 and 7 what lies along their lanes: register s of sums belongs to 4 + s / 2 and 6 + s % 2.
//
// amx_portable.h has the same in plain C++.
#pragma once

#include <bnb/portable.h>
#include <immintrin.h>

#include <cstdint>

namespace bnb_cpu {
namespace BNB_ISA {

// The registers belong to a thread, which has to say what shape they have before it uses them. It gives them back
// too: a thread that is switched while they are in use has eight kilobytes more to save.
class AmxRegisters {
 public:
  AmxRegisters() { _tile_loadconfig(&kConfig); }
  ~AmxRegisters() { _tile_release(); }
  AmxRegisters(const AmxRegisters&) = delete;
  AmxRegisters& operator=(const AmxRegisters&) = delete;

 private:
  // The format of the instruction. A constant, since GCC's intrinsic says of its first bytes alone that it reads them.
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  alignas(64) static constexpr Config kConfig{
      1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
};

// Sets all of a register to zero.
template <int kRegister>
void amx_zero();

// Rows of 64 bytes, `stride` bytes apart in memory.
template <int kRegister>
void amx_load(const void* from, int64_t stride);
template <int kRegister>
void amx_store(void* to, int64_t stride);

// Adds to the sums: word n of row m gets the products of word k of row m of the one register with word n of row k of
// the other, over all k. A word is two bfloat16 and its sum a float, subnormal numbers counting as zero; or it is
// four signed bytes and its sum an integer modulo 2^32.
template <int kSums>
void amx_dot_bfloat16();
template <int kSums>
void amx_dot_int8();

// The numbers are part of the instructions, and macros of GCC's header put them there.
#define BNB_AMX_REGISTER(number)                                   \
  template <>                                                      \
  inline void amx_zero<number>() {                                 \
    _tile_zero(number);                                            \
  }                                                                \
  template <>                                                      \
  inline void amx_load<number>(const void* from, int64_t stride) { \
    /* GCC's intrinsic does not say that it reads memory. */       \
    __asm__ volatile("" ::: "memory");                             \
    _tile_loadd(number, from, stride);                             \
  }                                                                \
  template <>                                                      \
  inline void amx_store<number>(void* to, int64_t stride) {        \
    _tile_stored(number, to, stride);                              \
  }
BNB_AMX_REGISTER(0)
BNB_AMX_REGISTER(1)
BNB_AMX_REGISTER(2)
BNB_AMX_REGISTER(3)
BNB_AMX_REGISTER(4)
BNB_AMX_REGISTER(5)
BNB_AMX_REGISTER(6)
BNB_AMX_REGISTER(7)
#undef BNB_AMX_REGISTER

#define BNB_AMX_SUMS(sums, rows, lanes)  \
  template <>                            \
  inline void amx_dot_bfloat16<sums>() { \
    _tile_dpbf16ps(sums, rows, lanes);   \
  }                                      \
  template <>                            \
  inline void amx_dot_int8<sums>() {     \
    _tile_dpbssd(sums, rows, lanes);     \
  }
BNB_AMX_SUMS(0, 4, 6)
BNB_AMX_SUMS(1, 4, 7)
BNB_AMX_SUMS(2, 5, 6)
BNB_AMX_SUMS(3, 5, 7)
#undef BNB_AMX_SUMS

}  // namespace BNB_ISA
}  // namespace bnb_cpu
