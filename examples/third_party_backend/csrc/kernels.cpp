// Kernels of the device for three ops. They take addresses and sizes and know nothing of torch; the formats
// are those of <bnb/...>. The contracts of the ops have been checked before.
#include <bnb/codebooks.h>
#include <bnb/dtypes.h>
#include <bnb/quant.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

constexpr float kNf4[16] = {BNB_NF4_VALUES};
constexpr float kFp4[16] = {BNB_FP4_VALUES};

// Launches so far, by which a test can tell that the kernels really ran.
std::atomic<int64_t> launches{0};

template <class T>
const T* input(uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

const float* table_of(int quant_type) {
  return static_cast<bnb::QuantType>(quant_type) == bnb::QuantType::kFp4 ? kFp4 : kNf4;
}

// Calls `run` with a value of the type that a dtype stands for.
template <class Run>
void with_dtype(int dtype, const Run& run) {
  switch (static_cast<bnb::Dtype>(dtype)) {
    case bnb::Dtype::kFloat32:
      return run(float());
    case bnb::Dtype::kFloat16:
      return run(bnb::Half());
    case bnb::Dtype::kBFloat16:
      return run(bnb::BFloat16());
  }
}

void dequantize_4bit(uintptr_t packed, uintptr_t absmax, int64_t count, int64_t blocksize, int quant_type, int dtype,
                     uintptr_t out) {
  ++launches;
  const float* table = table_of(quant_type);
  with_dtype(dtype, [&](auto type) {
    auto* to = reinterpret_cast<decltype(type)*>(out);
    for (int64_t i = 0; i < count; ++i) {
      const float value = table[bnb::nibble_at(input<uint8_t>(packed), i)];
      bnb::from_float(value * input<float>(absmax)[i / blocksize], to[i]);
    }
  });
}

// out[m, n] = sum over k of a[m, k] * weight[n, k], + bias[n]; summed in double, rounded once.
void gemm_4bit(uintptr_t a, uintptr_t packed, uintptr_t absmax, uintptr_t bias, int64_t rows, int64_t columns,
               int64_t width, int64_t blocksize, int quant_type, int dtype, uintptr_t out) {
  ++launches;
  const float* table = table_of(quant_type);
  std::vector<float> weight(static_cast<size_t>(width));
  with_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t n = 0; n < columns; ++n) {
      for (int64_t k = 0; k < width; ++k) {
        const int64_t i = n * width + k;
        weight[k] = table[bnb::nibble_at(input<uint8_t>(packed), i)] * input<float>(absmax)[i / blocksize];
      }
      for (int64_t m = 0; m < rows; ++m) {
        const T* row = input<T>(a) + m * width;
        double sum = bias ? bnb::to_float(input<T>(bias)[n]) : 0.0;
        for (int64_t k = 0; k < width; ++k) {
          sum += static_cast<double>(bnb::to_float(row[k])) * weight[k];
        }
        bnb::from_float(static_cast<float>(sum), reinterpret_cast<T*>(out)[m * columns + n]);
      }
    }
  });
}

void int8_linear_matmul(uintptr_t a, uintptr_t b, int64_t rows, int64_t columns, int64_t width, uintptr_t out) {
  ++launches;
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < columns; ++n) {
      const int8_t* left = input<int8_t>(a) + m * width;
      const int8_t* right = input<int8_t>(b) + n * width;
      int32_t sum = 0;
      for (int64_t k = 0; k < width; ++k) {
        sum += left[k] * right[k];
      }
      reinterpret_cast<int32_t*>(out)[m * columns + n] = sum;
    }
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("dequantize_4bit", &dequantize_4bit, without_gil);
  m.def("gemm_4bit", &gemm_4bit, without_gil);
  m.def("int8_linear_matmul", &int8_linear_matmul, without_gil);
  m.def("launches", [] { return launches.load(); });
}
