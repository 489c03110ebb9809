// All kernels, compiled once per instruction set: isa_<name>.cpp defines BNB_ISA, includes the vectors
// of that instruction set and then this file. No include guard, and nothing outside the namespace.
#include "embedding4-inl.h"
#include "gemm4-inl.h"
#include "int8_gemm-inl.h"
#include "int8_quant-inl.h"
#include "optim32-inl.h"
#include "optim8-inl.h"
#include "quant4-inl.h"
#include "quant8-inl.h"
#include "table.h"

namespace bnb_cpu {
namespace BNB_ISA {

constexpr Kernels make_table() {
  Kernels kernels{};
  fill_embedding4(kernels);
  fill_gemm4(kernels);
  fill_int8_gemm(kernels);
  fill_int8_quant(kernels);
  fill_optim32(kernels);
  fill_optim8(kernels);
  fill_quant4(kernels);
  fill_quant8(kernels);
  return kernels;
}

const Kernels table = make_table();

}  // namespace BNB_ISA
}  // namespace bnb_cpu
