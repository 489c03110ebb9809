// The Python module: unpacks arguments, no logic. Pointers are integers (Tensor.data_ptr()), 0 for none;
// `where` is (device index, stream handle). The signatures are in src/bnb_cuda/_C.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <bnb/bind_tensors.h>
#include <bnb/rules.h>

#include "kernels.h"

namespace nb = nanobind;

namespace {

using namespace bnb_gpu;
using Pointer = uintptr_t;

template <class T>
T* as(Pointer address) {
  return reinterpret_cast<T*>(address);
}

Statistics statistics(Pointer absmax, Pointer absmax_8bit, Pointer code, int code_size, Pointer offset,
                      int64_t nested_blocksize) {
  return {as<const float>(absmax),
          as<const uint8_t>(absmax_8bit),
          as<const float>(code),
          as<const float>(offset),
          code_size,
          nested_blocksize};
}

// `path` is a value of bnb_cuda.tuning.Int8Path; 0 finishes the integer product `product`.
void multiply_int8(int path, const Launch& launch, const int32_t* product, const Gemm8& p) {
  if (path == 0) {
    int8_finish(launch, product, p);
  } else if (path == 1) {
    int8_gemm_few(launch, p);
  } else if (path == 2) {
    int8_gemm_tiles(launch, p);
  } else {
    int8_gemm_groups(launch, p);
  }
}

}  // namespace

NB_MODULE(_C, m) {
  m.def("processors", [](int device) { return device_info(device).processors; });
  m.def("capability", [](int device) { return device_info(device).capability; });

  m.def("quantize_4bit", [](int device, Pointer stream, Pointer x, int dtype, int64_t count, int64_t blocksize,
                            int quant_type, Pointer packed, Pointer absmax) {
    quantize_4bit(Launch(device, stream), as<const void>(x), dtype, count, blocksize, quant_type, as<uint8_t>(packed),
                  as<float>(absmax));
  });
  m.def("dequantize_4bit", [](int device, Pointer stream, Pointer packed, Pointer absmax, Pointer absmax_8bit,
                              Pointer code, int code_size, Pointer offset, int64_t nested_blocksize, int64_t count,
                              int64_t blocksize, int quant_type, Pointer out, int dtype) {
    dequantize_4bit(Launch(device, stream), as<const uint8_t>(packed),
                    statistics(absmax, absmax_8bit, code, code_size, offset, nested_blocksize), count, blocksize,
                    quant_type, as<void>(out), dtype);
  });
  m.def("embedding_4bit",
        [](int device, Pointer stream, Pointer indices, bool indices_64bit, int64_t lookups, Pointer packed,
           Pointer absmax, Pointer absmax_8bit, Pointer code, int code_size, Pointer offset, int64_t rows,
           int64_t width, int64_t blocksize, int quant_type, Pointer out, int dtype) {
          embedding_4bit(Launch(device, stream), as<const void>(indices), indices_64bit, lookups,
                         as<const uint8_t>(packed), statistics(absmax, absmax_8bit, code, code_size, offset, 256), rows,
                         width, blocksize, quant_type, as<void>(out), dtype);
        });

  m.def("quantize_blockwise", [](int device, Pointer stream, Pointer x, int dtype, int64_t count, int64_t blocksize,
                                 Pointer code, int code_size, Pointer codes, Pointer absmax) {
    quantize_blockwise(Launch(device, stream), as<const void>(x), dtype, count, blocksize, as<const float>(code),
                       code_size, as<uint8_t>(codes), as<float>(absmax));
  });
  m.def("dequantize_blockwise", [](int device, Pointer stream, Pointer codes, Pointer absmax, Pointer code,
                                   int code_size, int64_t count, int64_t blocksize, Pointer out, int dtype) {
    dequantize_blockwise(Launch(device, stream), as<const uint8_t>(codes), as<const float>(absmax),
                         as<const float>(code), code_size, count, blocksize, as<void>(out), dtype);
  });

  m.attr("MOST_SPLIT") = kMostSplit;
  m.def("gemm_4bit_fits", &gemm_4bit_fits);
  // `path` is a value of bnb_cuda.tuning.Path; plain arithmetic (0) needs the table `table`.
  m.def("gemm_4bit",
        [](int path, int split, int device, Pointer stream, Pointer a, int dtype, int64_t m, int64_t n, int64_t k,
           Pointer packed, Pointer absmax, Pointer absmax_8bit, Pointer code, int code_size, Pointer offset,
           int64_t blocksize, int quant_type, Pointer bias, int bias_dtype, Pointer out, Pointer table) {
          const Launch launch(device, stream);
          const Gemm4 p{as<const void>(a),
                        dtype,
                        m,
                        n,
                        k,
                        as<const uint8_t>(packed),
                        statistics(absmax, absmax_8bit, code, code_size, offset, 256),
                        blocksize,
                        quant_type,
                        as<const void>(bias),
                        bias_dtype,
                        as<void>(out)};
          if (path == 0) {
            gemv_4bit(launch, p, as<const float>(table));
          } else if (path == 1) {
            gemm_4bit_few(launch, p);
          } else if (path == 2) {
            gemm_4bit_tiles(launch, p, split);
          } else if (path == 4) {
            gemm_4bit_groups(launch, p, split);
          } else if (path == 5) {
            gemm_4bit_stream(launch, p);
          } else {
            gemm_4bit_wide(launch, p);
          }
        });

  m.def("int8_quantize_rows", [](int device, Pointer stream, Pointer x, int dtype, int64_t rows, int64_t columns,
                                 float threshold, Pointer codes, Pointer absmax, Pointer flags, Pointer listed,
                                 Pointer count, bool cleared) {
    int8_quantize_rows(Launch(device, stream), as<const void>(x), dtype, rows, columns, threshold, as<int8_t>(codes),
                       as<float>(absmax), {as<unsigned>(flags), as<int>(listed), as<int>(count)}, cleared);
  });
  m.def("int8_double_quantize", [](int device, Pointer stream, Pointer x, int dtype, int64_t rows, int64_t columns,
                                   float threshold, Pointer row_codes, Pointer column_codes, Pointer row_absmax,
                                   Pointer column_absmax, Pointer flags, Pointer listed, Pointer count) {
    int8_double_quantize(Launch(device, stream), as<const void>(x), dtype, rows, columns, threshold,
                         as<int8_t>(row_codes), as<int8_t>(column_codes), as<float>(row_absmax),
                         as<float>(column_absmax), {as<unsigned>(flags), as<int>(listed), as<int>(count)});
  });
  m.def("int8_dequantize_rows", [](int device, Pointer stream, Pointer codes, Pointer absmax, int64_t rows,
                                   int64_t columns, Pointer out, int dtype) {
    int8_dequantize_rows(Launch(device, stream), as<const int8_t>(codes), as<const float>(absmax), rows, columns,
                         as<void>(out), dtype);
  });
  m.def("int8_gemm_fits", &int8_gemm_fits);
  m.def("int8_gemv_fits", &int8_gemv_fits);
  m.attr("OUTLIER_COUNT_WORDS") = Outliers::kCountWords;
  m.def("outlier_flag_words", &outlier_flag_words);
  m.attr("GATHERED_MULTIPLE") = kGatheredMultiple;
  m.def("gathered_room", &gathered_room);
  // `gathered`, `room`: see Gemm8; for path 3 with outliers.
  m.def("int8_gemm",
        [](int path, int device, Pointer stream, Pointer product, Pointer a, Pointer b, int64_t m, int64_t n, int64_t k,
           Pointer a_absmax, Pointer b_absmax, Pointer values, Pointer flags, Pointer listed, Pointer count,
           bool cleared, Pointer gathered, int64_t room, Pointer bias, int bias_dtype, Pointer out, int dtype) {
          const Outliers outliers{as<unsigned>(flags), as<int>(listed), as<int>(count)};
          multiply_int8(path, Launch(device, stream), as<const int32_t>(product),
                        {as<const int8_t>(a), as<const int8_t>(b), m, n, k, as<const float>(a_absmax),
                         as<const float>(b_absmax), as<const void>(values), outliers, cleared, as<void>(gathered), room,
                         as<const void>(bias), bias_dtype, as<void>(out), dtype});
        });
  // Quantization of rows and the product, for all paths but 0. Path 4 needs no memory for what comes between.
  m.def("int8_linear",
        [](int path, int device, Pointer stream, Pointer values, int dtype, int64_t m, int64_t n, int64_t k,
           float threshold, Pointer codes, Pointer absmax, Pointer flags, Pointer listed, Pointer count, bool cleared,
           Pointer gathered, int64_t room, Pointer b, Pointer b_absmax, Pointer bias, int bias_dtype, Pointer out) {
          const Launch launch(device, stream);
          const Outliers outliers{as<unsigned>(flags), as<int>(listed), as<int>(count)};
          Gemm8 p{as<const int8_t>(codes),
                  as<const int8_t>(b),
                  m,
                  n,
                  k,
                  as<const float>(absmax),
                  as<const float>(b_absmax),
                  as<const void>(values),
                  outliers,
                  cleared,
                  as<void>(gathered),
                  room,
                  as<const void>(bias),
                  bias_dtype,
                  as<void>(out),
                  dtype};
          if (path == 4) {
            int8_gemv(launch, p, threshold);
            return;
          }
          int8_quantize_rows(launch, p.values, dtype, m, k, threshold, as<int8_t>(codes), as<float>(absmax), outliers,
                             cleared);
          p.values = threshold > 0.0f ? p.values : nullptr;
          multiply_int8(path, launch, nullptr, p);
        });

  m.attr("OPTIMIZER_COLUMNS") = OptimizerStep::kColumns;
  m.attr("OPTIMIZER_RULES") = bnb::kRules;
  bnb::bind_read_tensors(m);
  m.def("optimizer_units", [](Pointer elements, Pointer first, int64_t tensors) {
    return optimizer_units(as<const int64_t>(elements), as<int64_t>(first), tensors);
  });
  m.def("optimizer_workspace", &optimizer_workspace);
  m.def("optimizer_step", [](int device, Pointer stream, Pointer table, int64_t tensors, int64_t units, int rule,
                             int dtype, double lr, double beta1, double beta2, double beta3, double alpha, double eps,
                             double weight_decay, double gnorm_scale, double step, double max_unorm, bool skip_zeros,
                             Pointer code1, Pointer code2, Pointer schedule, bool schedule_double, Pointer workspace) {
    const OptimizerStep s{as<const int64_t>(table),
                          tensors,
                          units,
                          rule,
                          dtype,
                          lr,
                          beta1,
                          beta2,
                          beta3,
                          alpha,
                          eps,
                          weight_decay,
                          gnorm_scale,
                          step,
                          max_unorm,
                          skip_zeros,
                          as<const float>(code1),
                          as<const float>(code2),
                          as<const void>(schedule),
                          schedule_double,
                          as<void>(workspace)};
    optimizer_step(Launch(device, stream), s);
  });

  m.def("has_managed_memory", &has_managed_memory);
  m.def("allocate_managed", &allocate_managed);
  m.def("free_managed", &free_managed);
  m.def("is_capturing", [](int device, Pointer stream) { return is_capturing(Launch(device, stream)); });
  m.def("prefetch_managed", [](int device, Pointer stream, Pointer address, int64_t bytes, bool to_host) {
    prefetch_managed(Launch(device, stream), address, bytes, to_host);
  });
}
