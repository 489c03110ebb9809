// The interface of amx.h with the registers in memory: what the kernels do with them can be tested, under a sanitizer
// too, on a processor that has none.
#pragma once

#include <bnb/dtypes.h>

#include <cstdint>
#include <cstring>

namespace bnb_cpu {
namespace BNB_ISA {

struct AmxRegister {
  uint32_t words[16][16];
};

// Those of this thread, or null while it has not asked for them.
static thread_local AmxRegister* amx_registers = nullptr;

// As the processor does, ends the program where a register is used that has no shape yet.
BNB_FN AmxRegister& amx_register(int number) {
  if (amx_registers == nullptr) {
    __builtin_trap();
  }
  return amx_registers[number];
}

class AmxRegisters {
 public:
  AmxRegisters() { amx_registers = registers_; }
  ~AmxRegisters() { amx_registers = nullptr; }
  AmxRegisters(const AmxRegisters&) = delete;
  AmxRegisters& operator=(const AmxRegisters&) = delete;

 private:
  AmxRegister registers_[8];
};

template <int kRegister>
void amx_zero() {
  memset(&amx_register(kRegister), 0, sizeof(AmxRegister));
}

template <int kRegister>
void amx_load(const void* from, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) {
    memcpy(amx_register(kRegister).words[row], static_cast<const char*>(from) + row * stride, 64);
  }
}

template <int kRegister>
void amx_store(void* to, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) {
    memcpy(static_cast<char*>(to) + row * stride, amx_register(kRegister).words[row], 64);
  }
}

// Zero in place of a subnormal number.
BNB_FN float amx_flush(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7f800000u) == 0 ? 0.0f : value;
}

BNB_FN float amx_half(uint32_t word, int half) {
  return amx_flush(bnb::to_float(bnb::BFloat16{static_cast<uint16_t>(word >> 16 * half)}));
}

// Products of the first halves of all words and those of the second halves are added up apart.
template <int kSums>
void amx_dot_bfloat16() {
  const AmxRegister &rows = amx_register(4 + kSums / 2), &lanes = amx_register(6 + kSums % 2);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float halves[2] = {};
      for (int k = 0; k < 16; ++k) {
        for (int half = 0; half < 2; ++half) {
          halves[half] = amx_flush(
              __builtin_fmaf(amx_half(rows.words[m][k], half), amx_half(lanes.words[k][n], half), halves[half]));
        }
      }
      float sum;
      memcpy(&sum, &amx_register(kSums).words[m][n], sizeof sum);
      sum = amx_flush(amx_flush(sum) + amx_flush(halves[0] + halves[1]));
      memcpy(&amx_register(kSums).words[m][n], &sum, sizeof sum);
    }
  }
}

template <int kSums>
void amx_dot_int8() {
  const AmxRegister &rows = amx_register(4 + kSums / 2), &lanes = amx_register(6 + kSums % 2);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      for (int k = 0; k < 16; ++k) {
        int8_t first[4], second[4];
        memcpy(first, &rows.words[m][k], sizeof first);
        memcpy(second, &lanes.words[k][n], sizeof second);
        for (int i = 0; i < 4; ++i) {
          amx_register(kSums).words[m][n] += static_cast<uint32_t>(first[i] * second[i]);
        }
      }
    }
  }
}

}  // namespace BNB_ISA
}  // namespace bnb_cpu
