// Calls each kernel once on a fixed size, for valgrind to count instructions: tools/count_instructions.py.
//
// Usage: instructions ISA. Prints the compiler, then one line per call, "<elements> <name>", in the order of the
// calls. Only what runs inside measured() counts.
#include <bnb/rules.h>

#include <atomic>
#include <functional>

#include "quant_model.h"

using namespace testing;

#if defined(__clang__)
#define BNB_AS_IT_STANDS __attribute__((noinline))
#elif defined(__GNUC__)
#define BNB_AS_IT_STANDS __attribute__((noinline, noclone))
#else
#define BNB_AS_IT_STANDS __declspec(noinline)
#endif

// valgrind finds it by this name.
extern "C" BNB_AS_IT_STANDS void measured(void (*call)(const void*), const void* context) {
  call(context);
  // Keeps the call from being the last thing done here, which the compiler would turn into a jump.
  std::atomic_signal_fence(std::memory_order_seq_cst);
}

namespace {

constexpr int64_t kRows = 64, kWidth = 512, kCount = kRows * kWidth, kBlocksize = 64, kNested = 256;
constexpr int64_t kBlocks = kCount / kBlocksize;

// Everything that the calls read and write; the values do not matter, but they must not be denormal or NaN.
struct Data {
  std::vector<float> values, absmax, bias, stats, offset{0.25f}, code, out, other;
  std::vector<uint16_t> values_bf16;
  std::vector<uint8_t> packed, absmax_8bit, codes, more_codes;
  std::vector<int8_t> ints, weight;
  std::vector<int32_t> sums;
  std::vector<int64_t> indices, columns;

  Data() {
    Random random(7);
    for (int64_t i = 0; i < kCount; ++i) {
      values.push_back(value_of_kind(random, 0));
      codes.push_back(static_cast<uint8_t>(random()));
      more_codes.push_back(static_cast<uint8_t>(random()));
      ints.push_back(static_cast<int8_t>(between(random, -127, 127)));
      weight.push_back(static_cast<int8_t>(between(random, -127, 127)));
      sums.push_back(static_cast<int32_t>(between(random, -1000000, 1000000)));
    }
    values_bf16.resize(static_cast<size_t>(kCount));
    write_elements(values, kBf16, values_bf16.data());
    packed = codes;
    code = dynamic_code(true);
    absmax.assign(static_cast<size_t>(kBlocks), 0.5f);
    absmax_8bit.assign(static_cast<size_t>(kBlocks), 200);
    bias.assign(static_cast<size_t>(kWidth), 0.125f);
    stats.assign(static_cast<size_t>(kWidth), 2.0f);
    out.resize(static_cast<size_t>(kCount));
    other.assign(static_cast<size_t>(kCount), 0.01f);
    for (int64_t i = 0; i < kRows; ++i) {
      indices.push_back(kRows - 1 - i);
    }
    columns.resize(static_cast<size_t>(kWidth));
  }

  const void* x(int dtype) const {
    return dtype == kF32 ? static_cast<const void*>(values.data()) : values_bf16.data();
  }

  static constexpr int kF32 = 0, kBf16 = 2;
};

class Counter {
 public:
  void call(const std::string& name, int64_t elements, const std::function<void()>& function) {
    // Once beforehand: tables that are filled and scratch memory that is taken on the first call do not count.
    function();
    measured([](const void* context) { (*static_cast<const std::function<void()>*>(context))(); }, &function);
    std::printf("%lld %s\n", static_cast<long long>(elements), name.c_str());
  }
};

void count_blocks(Counter& counter, const bnb_cpu::Kernels& k, Data& d) {
  for (const int dtype : {Data::kF32, Data::kBf16}) {
    const std::string suffix = std::string(" ") + kDtypeNames[dtype];
    for (const int type : {0, 1}) {
      const std::string name = (type == 0 ? " nf4" : " fp4") + suffix;
      counter.call("quantize_4bit" + name, kCount, [&] {
        k.quantize_4bit(d.x(dtype), dtype, kCount, kBlocksize, type, d.codes.data(), d.absmax.data(), 1);
      });
    }
    counter.call("dequantize_4bit" + suffix, kCount, [&] {
      k.dequantize_4bit(d.packed.data(), d.absmax.data(), kCount, kBlocksize, 0, d.out.data(), dtype, 1);
    });
    counter.call("dequantize_4bit_nested" + suffix, kCount, [&] {
      k.dequantize_4bit_nested(d.packed.data(), d.absmax.data(), d.absmax_8bit.data(), d.code.data(), 256,
                               d.offset.data(), kCount, kBlocksize, kNested, 0, d.out.data(), dtype, 1);
    });
    counter.call("quantize_blockwise" + suffix, kCount, [&] {
      k.quantize_blockwise(d.x(dtype), dtype, kCount, 256, d.code.data(), 256, d.codes.data(), d.absmax.data(), 1);
    });
    counter.call("dequantize_blockwise" + suffix, kCount, [&] {
      k.dequantize_blockwise(d.packed.data(), d.absmax.data(), d.code.data(), 256, kCount, 256, d.out.data(), dtype, 1);
    });
    counter.call("embedding_4bit" + suffix, kCount, [&] {
      k.embedding_4bit(d.indices.data(), 8, kRows, d.packed.data(), kRows, kWidth, d.absmax.data(), nullptr, nullptr, 0,
                       nullptr, kBlocksize, 0, 0, d.out.data(), dtype, 1);
    });
  }
}

void count_products(Counter& counter, const bnb_cpu::Kernels& k, Data& d) {
  for (const int dtype : {Data::kF32, Data::kBf16}) {
    const std::string suffix = std::string(" ") + kDtypeNames[dtype];
    for (const int64_t rows : {1, 8, 16}) {
      const std::string name = suffix + " M=" + std::to_string(rows);
      counter.call("gemm_4bit" + name, rows * kCount, [&] {
        k.gemm_4bit(d.x(dtype), dtype, rows, d.packed.data(), kRows, kWidth, d.absmax.data(), nullptr, nullptr, 0,
                    nullptr, kBlocksize, nullptr, 0, d.bias.data(), Data::kF32, d.out.data(), 1);
      });
      counter.call("gemm_4bit_transposed" + name, rows * kCount, [&] {
        k.gemm_4bit_transposed(d.x(dtype), dtype, rows, d.packed.data(), kRows, kWidth, d.absmax.data(), nullptr,
                               nullptr, 0, nullptr, kBlocksize, 0, d.out.data(), 1);
      });
      counter.call("int8_linear" + name, rows * kCount, [&] {
        k.int8_linear(d.x(dtype), dtype, rows, d.weight.data(), d.stats.data(), kRows, kWidth, 0.0f, nullptr, 0,
                      d.out.data(), 1);
      });
    }
  }
  counter.call("int8_matmul M=16", 16 * kCount,
               [&] { k.int8_matmul(d.ints.data(), d.weight.data(), 16, kRows, kWidth, d.sums.data(), 1); });
  counter.call("int8_scaled_mm M=16", 16 * kCount, [&] {
    k.int8_scaled_mm(d.ints.data(), d.weight.data(), d.stats.data(), d.stats.data(), 16, kRows, kWidth, nullptr,
                     nullptr, 0, nullptr, 0, d.out.data(), Data::kBf16, 1);
  });
}

void count_int8(Counter& counter, const bnb_cpu::Kernels& k, Data& d) {
  for (const int dtype : {Data::kF32, Data::kBf16}) {
    const std::string suffix = std::string(" ") + kDtypeNames[dtype];
    for (const float threshold : {0.0f, 3.0f}) {
      const std::string name = suffix + (threshold > 0.0f ? " threshold" : "");
      counter.call("int8_vectorwise_quant" + name, kCount, [&] {
        k.int8_vectorwise_quant(d.x(dtype), dtype, kRows, kWidth, threshold, d.ints.data(), d.stats.data(),
                                d.columns.data(), 1);
      });
    }
    counter.call("int8_columnwise_quant" + suffix, kCount, [&] {
      k.int8_columnwise_quant(d.x(dtype), dtype, kRows, kWidth, 0.0f, d.ints.data(), d.stats.data(), 1);
    });
    counter.call("int8_mm_dequant" + suffix, kCount, [&] {
      k.int8_mm_dequant(d.sums.data(), d.stats.data(), d.stats.data(), kRows, kWidth, nullptr, 0, d.out.data(), dtype,
                        1);
    });
  }
  counter.call("int8_vectorwise_dequant", kCount,
               [&] { k.int8_vectorwise_dequant(d.ints.data(), d.stats.data(), kRows, kWidth, d.out.data(), 1); });
}

int64_t address(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)); }

void count_optimizers(Counter& counter, const bnb_cpu::Kernels& k, Data& d) {
  const int64_t steps[] = {2};
  std::vector<float> statistics(2 * kCount / 256, 0.01f);
  for (const bnb::Rule rule : {bnb::Rule::kAdam, bnb::Rule::kLion, bnb::Rule::kAdemamix}) {
    const std::string name = rule == bnb::Rule::kAdam ? "adam" : rule == bnb::Rule::kLion ? "lion" : "ademamix";
    // AdEMAMix keeps two values in its first state.
    const int64_t count = kCount / bnb::first_values(rule);
    const bool second = bnb::second_values(rule) > 0;
    std::vector<float> first_state(static_cast<size_t>(kCount), 0.01f), second_state(first_state);
    std::vector<int64_t> table = {count, address(d.other.data()), address(d.values.data()),
                                  address(first_state.data())};
    if (second) {
      table.push_back(address(second_state.data()));
    }
    counter.call("optimizer_step_32bit " + name, count, [&] {
      k.optimizer_step_32bit(static_cast<int>(rule), 1, table.data(), Data::kF32, steps, nullptr, nullptr, 1e-4, 0.9,
                             0.99, 0.99, 2.0, 1e-8, 0.1, 1.0, 0.0, nullptr, nullptr, false, 1);
    });
    std::vector<float> second_statistics(statistics);
    table = {count, address(d.other.data()), address(d.values.data()), address(d.codes.data()),
             address(statistics.data())};
    if (second) {
      table.insert(table.end(), {address(d.more_codes.data()), address(second_statistics.data())});
    }
    counter.call("optimizer_step_8bit " + name, count, [&] {
      k.optimizer_step_8bit(static_cast<int>(rule), 1, table.data(), Data::kF32, d.code.data(), d.code.data(), steps,
                            nullptr, nullptr, 1e-4, 0.9, 0.99, 0.99, 2.0, 1e-8, 0.1, 1.0, 0.0, false, 1);
    });
  }
}

const char* compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#else
  return "GNU " __VERSION__;
#endif
}

}  // namespace

int main(int argc, char** argv) {
  CHECK(argc == 2, "usage: instructions ISA; supported here: %s ...", bnb_cpu::isa().c_str());
  bnb_cpu::set_isa(argv[1]);
  std::printf("%s\n", compiler());
  Counter counter;
  Data data;
  const bnb_cpu::Kernels& kernels = bnb_cpu::kernels();
  count_blocks(counter, kernels, data);
  count_products(counter, kernels, data);
  count_int8(counter, kernels, data);
  count_optimizers(counter, kernels, data);
  return 0;
}
