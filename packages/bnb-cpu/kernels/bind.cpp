// The Python module: hands the functions of the table out as they are, without logic. Arguments are
// positional, pointers are integers (Tensor.data_ptr()), and the GIL is released. The signatures are in
// src/bnb_cpu/_C.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <bnb/bind_tensors.h>
#include <bnb/python/bind_repeats.h>
#include <bnb/rules.h>
#include <type_traits>

#include "dispatch.h"
#include "memory.h"
#include "repeats.h"

namespace nb = nanobind;

namespace {

using bnb_cpu::Kernels;

template <class T>
using Argument = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>;

template <class T>
T unwrap(Argument<T> value) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(value);
  } else {
    return value;
  }
}

template <class Result, class... Arguments>
void bind(nb::module_& module, const char* name, Result (*Kernels::*kernel)(Arguments...)) {
  module.def(
      name,
      [kernel](Argument<Arguments>... arguments) {
        return (bnb_cpu::kernels().*kernel)(unwrap<Arguments>(arguments)...);
      },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

NB_MODULE(_C, m) {
  bnb_cpu::isa();  // An unusable BNB_CPU_ISA fails the import.

  m.attr("OPTIMIZER_RULES") = bnb::kRules;
  m.def("isa", &bnb_cpu::isa);
  m.def("isas", &bnb_cpu::isas);
  m.def("supported_isas", &bnb_cpu::supported_isas);
  m.def("set_isa", &bnb_cpu::set_isa);
  m.def("advise_huge_pages",
        [](uintptr_t data, int64_t bytes) { bnb_cpu::advise_huge_pages(reinterpret_cast<void*>(data), bytes); });
  bnb::bind_read_tensors(m);
  bnb::bind_repeats(m, {{"gemm_4bit", &bnb_cpu::repeat_gemm_4bit}, {"int8_linear", &bnb_cpu::repeat_int8_linear}});

  bind(m, "quantize_4bit", &Kernels::quantize_4bit);
  bind(m, "dequantize_4bit", &Kernels::dequantize_4bit);
  bind(m, "dequantize_4bit_nested", &Kernels::dequantize_4bit_nested);
  bind(m, "quantize_blockwise", &Kernels::quantize_blockwise);
  bind(m, "dequantize_blockwise", &Kernels::dequantize_blockwise);
  bind(m, "embedding_4bit", &Kernels::embedding_4bit);
  bind(m, "gemm_4bit", &Kernels::gemm_4bit);
  bind(m, "gemm_4bit_transposed", &Kernels::gemm_4bit_transposed);
  bind(m, "int8_vectorwise_quant", &Kernels::int8_vectorwise_quant);
  bind(m, "int8_columnwise_quant", &Kernels::int8_columnwise_quant);
  bind(m, "int8_vectorwise_dequant", &Kernels::int8_vectorwise_dequant);
  bind(m, "int8_matmul", &Kernels::int8_matmul);
  bind(m, "int8_mm_dequant", &Kernels::int8_mm_dequant);
  bind(m, "int8_scaled_mm", &Kernels::int8_scaled_mm);
  bind(m, "int8_linear", &Kernels::int8_linear);
  bind(m, "optimizer_step_32bit", &Kernels::optimizer_step_32bit);
  bind(m, "optimizer_step_8bit", &Kernels::optimizer_step_8bit);
}
