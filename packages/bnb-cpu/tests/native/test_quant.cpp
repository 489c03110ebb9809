// Block-wise kernels of every instruction set against the model, on arrays between guard pages.
#include "quant_model.h"

using namespace testing;

namespace {

struct Call {
  int64_t count, blocksize;
  int dtype, quant_type, kind, threads;
  Guarded::Place place;

  std::string describe(const char* kernel) const {
    return bnb_cpu::isa() + " " + kernel + " count " + std::to_string(count) + " blocksize " +
           std::to_string(blocksize) + " " + kDtypeNames[dtype] + " type " + std::to_string(quant_type) + " kind " +
           std::to_string(kind) + " threads " + std::to_string(threads);
  }
  int64_t blocks() const { return count / blocksize + (count % blocksize != 0); }
};

Call random_call(Random& random, int64_t most) {
  Call call;
  call.count = between(random, 0, 3) == 0 ? between(random, 0, most) : between(random, 0, 200);
  call.blocksize =
      one_of<int64_t>(random, {2, 4, 6, 10, 16, 32, 62, 64, 66, 100, 128, 256, 512, 4096, int64_t{1} << 62});
  call.dtype = static_cast<int>(between(random, 0, 2));
  call.quant_type = static_cast<int>(between(random, 0, 1));
  call.kind = static_cast<int>(between(random, 0, 5));
  call.threads = static_cast<int>(one_of<int64_t>(random, {1, 1, 2, 4}));
  call.place = between(random, 0, 1) == 0 ? Guarded::kAtEnd : Guarded::kAtStart;
  return call;
}

std::vector<float> random_values(Random& random, const Call& call) {
  std::vector<float> x;
  for (int64_t i = 0; i < call.count; ++i) {
    x.push_back(value_of_kind(random, call.kind));
  }
  if (call.kind == 1) {
    for (size_t i = 0; i < x.size(); i += 16) {
      x[i] = 1.0f;
    }
  }
  return rounded(x, call.dtype);
}

void check_quantize_4bit(const Call& call, const std::vector<float>& x) {
  const std::string where = call.describe("quantize_4bit");
  std::vector<uint8_t> codes;
  std::vector<float> absmax;
  model_quantize_4bit(x, call.blocksize, call.quant_type, codes, absmax);
  const Guarded in(call.count * size_of(call.dtype), call.place), packed((call.count + 1) / 2, call.place);
  const Guarded statistics(call.blocks() * 4, call.place);
  write_elements(x, call.dtype, in.as<void>());
  bnb_cpu::kernels().quantize_4bit(in.as<void>(), call.dtype, call.count, call.blocksize, call.quant_type,
                                   packed.as<uint8_t>(), statistics.as<float>(), call.threads);
  check_same_bytes(packed.as<uint8_t>(), codes, where);
  check_same_floats(read_elements(statistics.as<void>(), 0, call.blocks()), absmax, where);
  packed.check("packed");
  statistics.check("absmax");
}

void check_dequantize_4bit(const Call& call, Random& random) {
  std::vector<uint8_t> codes;
  for (int64_t i = 0; i < (call.count + 1) / 2; ++i) {
    codes.push_back(static_cast<uint8_t>(random()));
  }
  const int64_t blocks = call.blocks(), nested_blocksize = between(random, 1, 5), code_size = between(random, 1, 256);
  const int64_t outer_blocks = blocks / nested_blocksize + (blocks % nested_blocksize != 0);
  const std::vector<float> code = random_code(random, code_size);
  std::vector<uint8_t> absmax_8bit;
  std::vector<float> absmax, outer, expanded;
  const float offset = value_of_kind(random, 0);
  for (int64_t i = 0; i < outer_blocks; ++i) {
    outer.push_back(value_of_kind(random, call.kind));
  }
  for (int64_t i = 0; i < blocks; ++i) {
    absmax.push_back(value_of_kind(random, call.kind));
    absmax_8bit.push_back(static_cast<uint8_t>(random()));
    const int64_t index = std::min<int64_t>(absmax_8bit.back(), code_size - 1);
    const float product = code[static_cast<size_t>(index)] * outer[static_cast<size_t>(i / nested_blocksize)];
    expanded.push_back(product + offset);
  }
  const auto expected = [&](const std::vector<float>& scales) {
    std::vector<float> values;
    for (int64_t i = 0; i < call.count; ++i) {
      const uint8_t byte = codes[static_cast<size_t>(i / 2)];
      values.push_back(values_4bit(call.quant_type)[i % 2 == 0 ? byte / 16 : byte % 16] *
                       scales[static_cast<size_t>(i / call.blocksize)]);
    }
    return rounded(values, call.dtype);
  };

  const Guarded packed(static_cast<int64_t>(codes.size()), call.place), scales(blocks * 4, call.place);
  const Guarded out(call.count * size_of(call.dtype), call.place);
  packed.fill(codes.data());
  scales.fill(absmax.data());
  bnb_cpu::kernels().dequantize_4bit(packed.as<uint8_t>(), scales.as<float>(), call.count, call.blocksize,
                                     call.quant_type, out.as<void>(), call.dtype, call.threads);
  check_same_floats(read_elements(out.as<void>(), call.dtype, call.count), expected(absmax),
                    call.describe("dequantize_4bit"));
  out.check("out");

  const Guarded outer_scales(outer_blocks * 4, call.place), inner_codes(blocks, call.place);
  const Guarded table(code_size * 4, call.place), nested_out(out.bytes(), call.place);
  outer_scales.fill(outer.data());
  inner_codes.fill(absmax_8bit.data());
  table.fill(code.data());
  bnb_cpu::kernels().dequantize_4bit_nested(
      packed.as<uint8_t>(), outer_scales.as<float>(), inner_codes.as<uint8_t>(), table.as<float>(), code_size, &offset,
      call.count, call.blocksize, nested_blocksize, call.quant_type, nested_out.as<void>(), call.dtype, call.threads);
  check_same_floats(read_elements(nested_out.as<void>(), call.dtype, call.count), expected(expanded),
                    call.describe("dequantize_4bit_nested"));
  nested_out.check("out");
}

void check_blockwise(Call call, const std::vector<float>& x, Random& random) {
  call.blocksize = between(random, 0, 2) == 0 ? between(random, 1, 300) : call.blocksize;
  const std::vector<float> code =
      between(random, 0, 1) == 0 ? code_of_256(random) : random_code(random, between(random, 1, 256));
  const auto code_size = static_cast<int64_t>(code.size());
  std::vector<uint8_t> expected;
  std::vector<float> absmax;
  model_quantize_blockwise(x, call.blocksize, code, expected, absmax);
  const Guarded in(call.count * size_of(call.dtype), call.place), codes(call.count, call.place);
  const Guarded statistics(call.blocks() * 4, call.place), table(code_size * 4, call.place);
  write_elements(x, call.dtype, in.as<void>());
  table.fill(code.data());
  bnb_cpu::kernels().quantize_blockwise(in.as<void>(), call.dtype, call.count, call.blocksize, table.as<float>(),
                                        code_size, codes.as<uint8_t>(), statistics.as<float>(), call.threads);
  check_same_bytes(codes.as<uint8_t>(), expected, call.describe("quantize_blockwise"));
  check_same_floats(read_elements(statistics.as<void>(), 0, call.blocks()), absmax,
                    call.describe("quantize_blockwise absmax"));
  codes.check("codes");
  statistics.check("absmax");

  // Any bytes may be decoded, those beyond the codebook too.
  std::vector<float> values;
  for (int64_t i = 0; i < call.count; ++i) {
    const auto byte = static_cast<uint8_t>(random());
    codes.as<uint8_t>()[i] = byte;
    values.push_back(code[static_cast<size_t>(std::min<int64_t>(byte, code_size - 1))] *
                     absmax[static_cast<size_t>(i / call.blocksize)]);
  }
  const Guarded out(call.count * size_of(call.dtype), call.place);
  bnb_cpu::kernels().dequantize_blockwise(codes.as<uint8_t>(), statistics.as<float>(), table.as<float>(), code_size,
                                          call.count, call.blocksize, out.as<void>(), call.dtype, call.threads);
  check_same_floats(read_elements(out.as<void>(), call.dtype, call.count), rounded(values, call.dtype),
                    call.describe("dequantize_blockwise"));
  out.check("out");
}

void check_call(const Call& call, Random& random) {
  const std::vector<float> x = random_values(random, call);
  check_quantize_4bit(call, x);
  check_dequantize_4bit(call, random);
  check_blockwise(call, x, random);
}

}  // namespace

int main() {
  for (const std::string& isa : bnb_cpu::supported_isas()) {
    bnb_cpu::set_isa(isa);
    Random random(20240501);
    for (int i = 0; i < 500; ++i) {
      check_call(random_call(random, 3000), random);
    }
    // Enough for several threads, and for results that are written past the caches.
    for (int dtype = 0; dtype < 3; ++dtype) {
      for (const int64_t blocksize : {int64_t{64}, int64_t{100}, int64_t{4096}}) {
        check_call({(int64_t{4} << 20) / size_of(dtype) + 77, blocksize, dtype, dtype % 2, 0, 4, Guarded::kAtStart},
                   random);
      }
    }
  }
  return 0;
}
