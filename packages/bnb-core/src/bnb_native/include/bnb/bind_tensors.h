// `read_tensors` as a function of a backend's Python module, for bitsandbytes.backends.bound. Needs
// nanobind/nanobind.h to be included before.
#pragma once

#include <bnb/tensors.h>

namespace bnb {

// Arguments are those of bnb::read_tensors, `kinds` and `table` as addresses.
inline void bind_read_tensors(nanobind::module_& module) {
  module.def("read_tensors",
             [](nanobind::handle exchange, nanobind::tuple types, nanobind::tuple lists, nanobind::list states,
                nanobind::tuple keys, nanobind::tuple shared, int64_t count, bool record, uintptr_t kinds,
                uintptr_t table) -> int {
               return read_tensors(exchange.ptr(), types.ptr(), lists.ptr(), states.ptr(), keys.ptr(), shared.ptr(),
                                   count, record, reinterpret_cast<TensorKind*>(kinds),
                                   reinterpret_cast<int64_t*>(table));
             });
}

}  // namespace bnb
