// Optimizer steps with float32 states, and what both kinds share: constants and norms per parameter.
#include "optim.h"

namespace bnb_gpu {
namespace {

// Constants of each parameter, from a schedule on the device and, with a limit, from the norms that the
// first pass left by unit. One thread block per parameter; the sum has a fixed order.
template <class Scalar>
__global__ void __launch_bounds__(kOptimizerThreads)
    constants_by_tensor(StepArguments a, bnb::Rule rule, bnb::RuleSettings settings, double max_unorm, bool norms,
                        const Scalar* __restrict__ schedule, StepConstants* __restrict__ out) {
  __shared__ double scratch[kLanes];
  const int64_t tensor = blockIdx.x;
  double update_square = 0.0, parameter_square = 0.0;
  if (norms) {
    const int64_t* first = a.table + kFirstUnit * a.tensors;
    const int64_t begin = first[tensor], end = tensor + 1 < a.tensors ? first[tensor + 1] : a.units;
    for (int64_t unit = begin + threadIdx.x; unit < end; unit += kOptimizerThreads) {
      update_square += a.partial[2 * unit];
      parameter_square += a.partial[2 * unit + 1];
    }
    update_square = block_sum(update_square, scratch);
    __syncthreads();
    parameter_square = block_sum(parameter_square, scratch);
  }
  if (threadIdx.x == 0) {
    if (schedule != nullptr) {
      settings.lr = schedule[4 * tensor];
      settings.step = schedule[4 * tensor + 1];
      settings.beta3 = schedule[4 * tensor + 2];
      settings.alpha = schedule[4 * tensor + 3];
    }
    const double clip = norms ? bnb::clip_scale(::sqrt(update_square), max_unorm * ::sqrt(parameter_square)) : 1.0;
    out[tensor].rule = bnb::rule_constants(rule, settings, clip);
    out[tensor].step = static_cast<uint32_t>(static_cast<int64_t>(settings.step));
  }
}

int64_t constants_bytes(int64_t tensors) { return ceil_div(tensors * sizeof(StepConstants), 256) * 256; }

}  // namespace

int64_t optimizer_units(const int64_t* elements, int64_t* first, int64_t tensors) {
  int64_t units = 0;
  for (int64_t i = 0; i < tensors; ++i) {
    first[i] = units;
    units += ceil_div(ceil_div(elements[i], kStateBlock), kUnitBlocks);
  }
  return units;
}

int64_t optimizer_workspace(int64_t tensors, int64_t units, double max_unorm, bool scheduled) {
  if (max_unorm > 0.0) {
    return constants_bytes(tensors) + units * 2 * static_cast<int64_t>(sizeof(double));
  }
  return scheduled ? constants_bytes(tensors) : 0;
}

void run_pass_32bit(const Launch& launch, bnb::Rule rule, int dtype, const StepArguments& a, bool measure) {
  run_pass<Float32Storage>(launch, rule, dtype, a, measure);
}

void optimizer_step(const Launch& launch, const OptimizerStep& s) {
  if (s.units == 0) {
    return;
  }
  const bnb::Rule rule = static_cast<bnb::Rule>(s.rule);
  const bnb::RuleSettings settings{s.lr,  s.beta1,        s.beta2,       s.beta3, s.alpha,
                                   s.eps, s.weight_decay, s.gnorm_scale, s.step};
  StepArguments a{};
  a.table = s.table;
  a.tensors = s.tensors;
  a.units = s.units;
  a.skip_zeros = s.skip_zeros;
  a.code1 = s.code1;
  a.code2 = s.code2;
  a.constants.rule = bnb::rule_constants(rule, settings, 1.0);
  a.constants.step = static_cast<uint32_t>(static_cast<int64_t>(s.step));
  const auto pass = [&](bool measure) {
    (s.code1 != nullptr ? run_pass_8bit : run_pass_32bit)(launch, rule, s.dtype, a, measure);
  };
  const bool norms = s.max_unorm > 0.0;
  StepConstants* constants = static_cast<StepConstants*>(s.workspace);
  const auto fill = [&](bool with_norms) {
    const unsigned grid = static_cast<unsigned>(s.tensors);
    if (s.schedule_double) {
      constants_by_tensor<double><<<grid, kOptimizerThreads, 0, launch.stream()>>>(
          a, rule, settings, s.max_unorm, with_norms, static_cast<const double*>(s.schedule), constants);
    } else {
      constants_by_tensor<float><<<grid, kOptimizerThreads, 0, launch.stream()>>>(
          a, rule, settings, s.max_unorm, with_norms, static_cast<const float*>(s.schedule), constants);
    }
    check_launch("optimizer step");
    a.by_tensor = constants;
  };
  if (s.schedule != nullptr) {
    fill(false);
  }
  if (norms) {
    a.partial = reinterpret_cast<double*>(static_cast<char*>(s.workspace) + constants_bytes(s.tensors));
    pass(true);
    fill(true);
  }
  pass(false);
}

}  // namespace bnb_gpu
