// Update rules of the optimizers: one function per rule, and what stands around all of them.
//
// A rule is a template on the type of value, so that `float` and the vectors of a CPU share it. Such a
// type has + - * / among its values and, found by its namespace, `sqrt(V)` and `sign(V)`. A rule updates
// the states and returns the direction u of the step:
//
//   g = gnorm_scale * gradient                (+ weight_decay * p, where the decay is coupled)
//   u = rule(g, states)
//   p = p * (1 - lr * weight_decay) - lr * s * u      (the first factor where the decay is decoupled)
//
// with s the factor that limits the norm of the update, see clip_scale. A complete rule takes p as well, and
// its u has the learning rate and the decay in it: p = p - s * u. Every step is one float32 operation
// with its own rounding: compile without contraction, and all devices get the same bits.
#pragma once

#include <bnb/portable.h>
#include <math.h>

namespace bnb {

// Shared with Python, which passes the number: the order of bitsandbytes.ops.optim_rules.RULES.
enum class Rule : int {
  kAdam = 0,
  kAdemamix = 1,
  kLamb = 2,
  kLambL2 = 3,
  kLion = 4,
  kMomentum = 5,
  kLars = 6,
  kSgd = 7,
  kRmsprop = 8,
  kAdagrad = 9,
  kScheduleFree = 10,
};

// Rules of this header; a later core may know more.
constexpr int kRules = 11;

// The rule whose formula this one uses.
BNB_FN constexpr Rule formula_of(Rule rule) {
  return rule == Rule::kLamb || rule == Rule::kLambL2 ? Rule::kAdam : rule == Rule::kLars ? Rule::kMomentum : rule;
}

// Whether the direction has the learning rate and the weight decay in it.
BNB_FN constexpr bool is_complete(Rule rule) { return rule == Rule::kScheduleFree; }

// Whether the weight decay is added to the gradient instead of being taken from the parameter.
BNB_FN constexpr bool has_coupled_decay(Rule rule) {
  const bool decoupled = formula_of(rule) == Rule::kAdam || rule == Rule::kAdemamix || rule == Rule::kLion;
  return !(decoupled || is_complete(rule)) || rule == Rule::kLambL2;
}

// Values that a parameter's first and second state hold per element of the parameter.
BNB_FN constexpr int first_values(Rule rule) { return rule == Rule::kAdemamix ? 2 : 1; }
BNB_FN constexpr int second_values(Rule rule) {
  return formula_of(rule) == Rule::kAdam || rule == Rule::kAdemamix || rule == Rule::kScheduleFree ? 1 : 0;
}
constexpr int kMostValues = 3;

// --- hyperparameters ---------------------------------------------------------------------------------

struct RuleSettings {
  double lr, beta1, beta2, beta3, alpha, eps, weight_decay, gnorm_scale;
  double step;  // number of this step, from 1
};

// What the formulas use of them. `correction1` is 1 / (1 - beta1^step), `correction2` is
// 1 / sqrt(1 - beta2^step): a factor instead of a quotient per element. `now` and `later` are the parts of the
// learning rate in schedule_free.
template <class V>
struct RuleConstants {
  V beta1, beta2, beta3, rest1, rest2, rest3, correction1, correction2, alpha, eps;
  V gnorm_scale, weight_decay, keep, rate, rest_alpha, now, later;
  // Whole words, so that nothing in between is read that no one has written.
  int32_t first;    // whether it is the first step,
  int32_t coupled;  // and a weight decay is to be added to the gradient
};

// All arithmetic in double, rounded once. `clip` is the factor on the update, see clip_scale.
BNB_FN RuleConstants<float> rule_constants(Rule rule, const RuleSettings& s, double clip) {
  const bool coupled = has_coupled_decay(rule), complete = is_complete(rule);
  const double later = s.lr * s.beta1 * (1.0 - s.alpha);
  RuleConstants<float> c;
  c.beta1 = static_cast<float>(s.beta1);
  c.beta2 = static_cast<float>(s.beta2);
  c.beta3 = static_cast<float>(s.beta3);
  c.rest1 = static_cast<float>(1.0 - s.beta1);
  c.rest2 = static_cast<float>(1.0 - s.beta2);
  c.rest3 = static_cast<float>(1.0 - s.beta3);
  c.correction1 = static_cast<float>(1.0 / (1.0 - pow(s.beta1, s.step)));
  c.correction2 = static_cast<float>(1.0 / sqrt(1.0 - pow(s.beta2, s.step)));
  c.alpha = static_cast<float>(s.alpha);
  c.eps = static_cast<float>(s.eps);
  c.gnorm_scale = static_cast<float>(s.gnorm_scale);
  c.weight_decay = static_cast<float>(s.weight_decay);
  c.keep = coupled || complete ? 1.0f : static_cast<float>(1.0 - s.lr * s.weight_decay);
  c.rate = static_cast<float>(complete ? clip : s.lr * clip);
  c.rest_alpha = static_cast<float>(1.0 - s.alpha);
  c.now = static_cast<float>(s.lr - later);
  c.later = static_cast<float>(later);
  c.first = s.step == 1.0;
  c.coupled = coupled && s.weight_decay > 0.0;
  return c;
}

// The same constants for wider values; `spread` makes one of a number.
template <class V, class Spread>
BNB_FN RuleConstants<V> spread_constants(const RuleConstants<float>& c, const Spread& spread) {
  return {spread(c.beta1),
          spread(c.beta2),
          spread(c.beta3),
          spread(c.rest1),
          spread(c.rest2),
          spread(c.rest3),
          spread(c.correction1),
          spread(c.correction2),
          spread(c.alpha),
          spread(c.eps),
          spread(c.gnorm_scale),
          spread(c.weight_decay),
          spread(c.keep),
          spread(c.rate),
          spread(c.rest_alpha),
          spread(c.now),
          spread(c.later),
          c.first,
          c.coupled};
}

// Factor that limits the norm of the update to `limit`, max_unorm times the norm of the parameter: the
// trust ratio of LAMB (You et al. 2020, arXiv:1904.00962) and LARS (You et al. 2017, arXiv:1708.03888).
// A parameter that is all zero has a limit of 0 and is not limited, or it could never leave zero.
BNB_FN double clip_scale(double update_norm, double limit) {
  return update_norm > limit && limit > 0.0 ? limit / update_norm : 1.0;
}

// --- rules -------------------------------------------------------------------------------------------

// Found for V = float; vectors bring their own.
BNB_FN float sqrt(float a) { return sqrtf(a); }
BNB_FN float sign(float a) { return static_cast<float>((a > 0.0f) - (a < 0.0f)); }

// Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1); with decoupled decay AdamW (Loshchilov and
// Hutter 2019, arXiv:1711.05101). Also LAMB, whose trust ratio is in clip_scale.
template <class V>
BNB_FN V adam(V g, V& m, V& v, const RuleConstants<V>& c) {
  m = m * c.beta1 + c.rest1 * g;
  v = v * c.beta2 + c.rest2 * g * g;
  return m * c.correction1 / (sqrt(v) * c.correction2 + c.eps);
}

// AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1). The slow average is not corrected.
template <class V>
BNB_FN V ademamix(V g, V& fast, V& slow, V& v, const RuleConstants<V>& c) {
  fast = fast * c.beta1 + c.rest1 * g;
  slow = slow * c.beta3 + c.rest3 * g;
  v = v * c.beta2 + c.rest2 * g * g;
  return (fast * c.correction1 + c.alpha * slow) / (sqrt(v) * c.correction2 + c.eps);
}

// Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2).
template <class V>
BNB_FN V lion(V g, V& m, const RuleConstants<V>& c) {
  const V u = sign(m * c.beta1 + c.rest1 * g);
  m = m * c.beta2 + c.rest2 * g;
  return u;
}

// Momentum as in torch's SGD (Sutskever et al. 2013): the decayed sum of gradients, from the first one
// on. Also LARS.
template <class V>
BNB_FN V momentum(V g, V& m, const RuleConstants<V>& c) {
  m = c.first ? g : m * c.beta1 + g;
  return m;
}

// The same with dampening (beta2) and Nesterov's look-ahead (alpha 1, or 0 without).
template <class V>
BNB_FN V sgd(V g, V& m, const RuleConstants<V>& c) {
  m = c.first ? g : m * c.beta1 + c.rest2 * g;
  // beta1 - 1 is the exact negative of 1 - beta1.
  return m + c.alpha * (g - c.rest1 * m);
}

// RMSprop (Tieleman and Hinton 2012, lecture 6.5), epsilon outside of the root as in torch.
template <class V>
BNB_FN V rmsprop(V g, V& v, const RuleConstants<V>& c) {
  v = v * c.beta1 + c.rest1 * g * g;
  return g / (sqrt(v) + c.eps);
}

// Adagrad (Duchi et al. 2011), epsilon outside of the root as in torch.
template <class V>
BNB_FN V adagrad(V g, V& v, const RuleConstants<V>& c) {
  v = v + g * g;
  return g / (sqrt(v) + c.eps);
}

// Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682), a complete rule. Of the sequences z, x and
// y = (1 - beta1) z + beta1 x the parameter holds y and the first state d = z - y; alpha is the weight of z in
// the average x. The decay is that of y.
template <class V>
BNB_FN V schedule_free(V g, V p, V& d, V& v, const RuleConstants<V>& c) {
  v = v * c.beta2 + c.rest2 * g * g;
  const V u = g / (sqrt(v) * c.correction2 + c.eps) + c.weight_decay * p;
  const V moved = c.now * u - c.alpha * d;
  d = c.rest_alpha * d - c.later * u;
  return moved;
}

// The direction of one element. `states` holds the values of the first state, then of the second.
template <Rule kRule, class V>
BNB_FN V direction(V gradient, V p, V* states, const RuleConstants<V>& c) {
  V g = gradient * c.gnorm_scale;
  if (c.coupled) {
    g = g + c.weight_decay * p;
  }
  if constexpr (kRule == Rule::kAdam) {
    return adam(g, states[0], states[1], c);
  } else if constexpr (kRule == Rule::kAdemamix) {
    return ademamix(g, states[0], states[1], states[2], c);
  } else if constexpr (kRule == Rule::kLion) {
    return lion(g, states[0], c);
  } else if constexpr (kRule == Rule::kMomentum) {
    return momentum(g, states[0], c);
  } else if constexpr (kRule == Rule::kSgd) {
    return sgd(g, states[0], c);
  } else if constexpr (kRule == Rule::kRmsprop) {
    return rmsprop(g, states[0], c);
  } else if constexpr (kRule == Rule::kScheduleFree) {
    return schedule_free(g, p, states[0], states[1], c);
  } else {
    static_assert(kRule == Rule::kAdagrad, "a rule without a formula of its own: use formula_of");
    return adagrad(g, states[0], c);
  }
}

// The parameter after the step.
template <class V>
BNB_FN V moved(V p, V u, const RuleConstants<V>& c) {
  return p * c.keep - c.rate * u;
}

// --- stochastic rounding -----------------------------------------------------------------------------
//
// Sixteen random bits are added below the last bit that bfloat16 keeps, and the rest is cut off. The bits
// are a hash of seed, step and index, so that every backend and every resumed run gets the same ones.

// Finalizer of MurmurHash3.
BNB_FN uint32_t mix_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Key of the 2^32 elements from index_high * 2^32 on.
BNB_FN uint32_t rounding_key(uint32_t seed, uint32_t step, uint32_t index_high) {
  return mix_bits(mix_bits(seed ^ mix_bits(step)) + index_high);
}

BNB_FN uint32_t rounding_noise(uint32_t key, uint32_t index_low) { return mix_bits(index_low ^ key) & 0xffffu; }

}  // namespace bnb
