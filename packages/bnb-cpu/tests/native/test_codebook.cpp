// 8-bit block-wise quantization with codebooks of all kinds: the codes of every point of the grid, and of the floats
// where one point ends and the next begins.
#include "quant_model.h"

using namespace testing;

namespace {

constexpr int kPoints = 65536;

// The grid position of a number, as the model has it; it never falls with the number.
int position_of(float scaled) {
  return static_cast<int>(std::floor((std::min(1.0f, std::max(-1.0f, scaled)) + 1.0f) * 32767.5f + 0.5f));
}

// The floats in ascending order by number, without NaN.
int32_t number_of(float value) {
  const auto bits = static_cast<int32_t>(bits_of(value));
  return bits < 0 ? INT32_MIN - bits : bits;
}
float float_number(int32_t number) {
  return number < 0 ? -float_of(static_cast<uint32_t>(-number)) : float_of(static_cast<uint32_t>(number));
}

// The lowest float of [-1, 1] with the position or a higher one.
float first_float_at(int position) {
  int32_t low = number_of(-1.0f), high = number_of(1.0f);
  while (low < high) {
    const auto middle = static_cast<int32_t>(low + (int64_t{high} - low) / 2);
    if (position_of(float_number(middle)) >= position) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return float_number(low);
}

// Both ends of every position and a number in between, zeros of both signs, and the largest magnitude, 1.
std::vector<float> numbers_of_all_positions() {
  std::vector<float> x;
  for (int position = 0; position < kPoints; ++position) {
    const float first = first_float_at(position);
    x.push_back(first);
    x.push_back(static_cast<float>(position) / 32767.5f - 1.0f);
    if (position > 0) {
      x.push_back(float_number(number_of(first) - 1));
    }
  }
  x.insert(x.end(), {0.0f, -0.0f, 1.0f, -1.0f, 1e-45f, -1e-45f});
  return x;
}

// The code of every position. Boundaries ascend, so that no search has to begin anew.
std::vector<uint8_t> codes_of_positions(const std::vector<float>& code) {
  std::vector<uint8_t> codes;
  size_t nearest = 0;
  for (int position = 0; position < kPoints; ++position) {
    const float point = static_cast<float>(position) / 32767.5f - 1.0f;
    while (nearest + 1 < code.size() && point > (code[nearest] + code[nearest + 1]) * 0.5f) {
      ++nearest;
    }
    codes.push_back(static_cast<uint8_t>(nearest));
  }
  return codes;
}

std::vector<float> evenly(float first, float last, int count) {
  std::vector<float> code;
  for (int i = 0; i < count; ++i) {
    code.push_back(first + (last - first) * static_cast<float>(i) / static_cast<float>(count - 1));
  }
  return code;
}

// Values of a format with a sign, some bits of exponent and the rest of mantissa.
std::vector<float> small_floats(int exponent_bits) {
  const int mantissa_bits = 7 - exponent_bits;
  std::vector<float> code;
  for (int exponent = 0; exponent < 1 << exponent_bits; ++exponent) {
    for (int mantissa = 0; mantissa < 1 << mantissa_bits; ++mantissa) {
      const float fraction = std::ldexp(static_cast<float>(mantissa), -mantissa_bits);
      const float value = std::ldexp(exponent == 0 ? 2.0f * fraction : 1.0f + fraction, exponent);
      code.insert(code.end(), {value, -value});
    }
  }
  const float most = *std::max_element(code.begin(), code.end());
  for (float& value : code) {
    value /= most;
  }
  std::sort(code.begin(), code.end());
  return code;
}

// Values one, two or some points apart around `middle`, more of them than any bucket can tell apart.
std::vector<float> cluster(Random& random, float middle) {
  std::vector<float> code{-1.0f, 1.0f};
  for (int i = 0; i < 100; ++i) {
    code.push_back(middle + static_cast<float>(between(random, -60, 60)) / 32767.5f);
  }
  std::sort(code.begin(), code.end());
  return code;
}

std::vector<float> repeated(std::vector<float> code, float value, int times) {
  code.insert(code.end(), static_cast<size_t>(times), value);
  std::sort(code.begin(), code.end());
  return code;
}

// Boundaries at random points and beside powers of two, where the steps of logarithmic tables are.
std::vector<float> near_powers(Random& random) {
  std::vector<float> code;
  for (int i = 0; i < 15; ++i) {
    const float at = std::ldexp(1.0f, i - 15) + static_cast<float>(between(random, -2, 2)) / 65535.0f;
    code.insert(code.end(), {at, -at});
  }
  std::sort(code.begin(), code.end());
  return code;
}

std::vector<std::vector<float>> codebooks(Random& random) {
  std::vector<std::vector<float>> all = {
      dynamic_code(true),
      dynamic_code(false),
      evenly(-1.0f, 1.0f, 256),
      evenly(0.0f, 1.0f, 256),
      evenly(-3.0f, 5.0f, 200),
      repeated(evenly(-1.0f, 1.0f, 255), 0.0f, 1),
      repeated(evenly(-1.0f, 1.0f, 17), 0.0f, 239),
      repeated(evenly(-1.0f, 1.0f, 17), -1.0f, 50),
      repeated(evenly(-1.0f, 1.0f, 17), 1.0f, 50),
      repeated(evenly(-1.0f, 1.0f, 17), 0.3f, 2),
      repeated({}, 0.5f, 256),
      repeated({}, -7.0f, 3),
      {0.0f},
      {-1.0f, 1.0f},
      {2.0f, 3.0f, 4.0f},
      {-4.0f, -3.0f, -2.0f},
      {-9.0f, -8.0f, -1.0f, 0.25f, 1.0f, 8.0f, 9.0f},
      // A code for each point: at the ends of the grid, and where it is coarse in a logarithmic table.
      evenly(-1.0f, -1.0f + 255.0f / 32767.5f, 256),
      evenly(-127.5f / 32767.5f, 127.5f / 32767.5f, 256),
      evenly(1.0f - 255.0f / 32767.5f, 1.0f, 256),
  };
  for (const int exponent_bits : {2, 3, 4, 5}) {
    all.push_back(small_floats(exponent_bits));
  }
  for (const float middle : {-0.999f, -0.4f, -1e-3f, 0.0f, 2e-4f, 0.0625f, 0.7f, 0.999f}) {
    all.push_back(cluster(random, middle));
  }
  for (int i = 0; i < 5; ++i) {
    all.push_back(near_powers(random));
  }
  for (const int64_t size : {int64_t{256}, int64_t{256}, int64_t{100}, int64_t{30}, int64_t{12}, int64_t{5}}) {
    all.push_back(random_code(random, size));
  }
  return all;
}

// Quantizes everything as one block, and in blocks that end in the middle of vectors.
void check_codes(const std::vector<float>& x, const std::vector<float>& code, int64_t blocksize,
                 const std::vector<uint8_t>& expected, const std::string& where) {
  const auto count = static_cast<int64_t>(x.size());
  const int64_t blocks = (count + blocksize - 1) / blocksize;
  const Guarded in(4 * count, Guarded::kAtEnd), codes(count, Guarded::kAtEnd), absmax(4 * blocks, Guarded::kAtEnd);
  const Guarded table(static_cast<int64_t>(4 * code.size()), Guarded::kAtEnd);
  in.fill(x.data());
  table.fill(code.data());
  bnb_cpu::kernels().quantize_blockwise(in.as<void>(), 0, count, blocksize, table.as<float>(),
                                        static_cast<int64_t>(code.size()), codes.as<uint8_t>(), absmax.as<float>(), 1);
  check_same_bytes(codes.as<uint8_t>(), expected, where);
  codes.check("codes");
}

}  // namespace

int main() {
  Random random(20250807);
  const std::vector<float> plain = numbers_of_all_positions();
  // With a largest magnitude of 1 in every block, values are what they are scaled to.
  constexpr int64_t kBlock = 331;
  std::vector<float> blocks, odd = plain;
  for (const float value : plain) {
    if (blocks.size() % kBlock == 0) {
      blocks.push_back(1.0f);
    }
    blocks.push_back(value);
  }
  for (size_t i = 0; i < odd.size(); i += 5) {
    odd[i] = one_of<float>(random, {NAN, -NAN, float_of(0x7f800001u)});
  }
  const std::vector<std::string> isas = bnb_cpu::supported_isas();
  const std::vector<std::vector<float>> all = codebooks(random);
  for (size_t i = 0; i < all.size(); ++i) {
    const std::vector<uint8_t> codes = codes_of_positions(all[i]);
    const auto expected = [&](const std::vector<float>& x) {
      std::vector<uint8_t> wanted;
      for (const float value : x) {
        wanted.push_back(std::isnan(value) ? uint8_t{0} : codes[static_cast<size_t>(position_of(value))]);
      }
      return wanted;
    };
    const std::vector<uint8_t> of_plain = expected(plain), of_blocks = expected(blocks), of_odd = expected(odd);
    for (const std::string& isa : isas) {
      bnb_cpu::set_isa(isa);
      const std::string where = isa + " codebook " + std::to_string(i);
      check_codes(plain, all[i], int64_t{1} << 40, of_plain, where);
      check_codes(blocks, all[i], kBlock, of_blocks, where + " in blocks");
      check_codes(odd, all[i], int64_t{1} << 40, of_odd, where + " with NaN");
    }
  }
  return 0;
}
