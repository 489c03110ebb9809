// Optimizer steps with 8-bit states.
#include "optim.h"

namespace bnb_gpu {

void run_pass_8bit(const Launch& launch, bnb::Rule rule, int dtype, const StepArguments& a, bool measure) {
  run_pass<CodeStorage>(launch, rule, dtype, a, measure);
}

}  // namespace bnb_gpu
