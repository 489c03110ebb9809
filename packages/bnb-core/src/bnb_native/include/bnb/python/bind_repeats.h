// Repeated calls as functions of a backend's Python module, for bitsandbytes.backends.repeats. Needs
// nanobind/nanobind.h to be included before.
#pragma once

#include <bnb/python/repeats.h>

#include <string>
#include <unordered_map>
#include <utility>

namespace bnb {

// `new_repeats(op, exchange, tensor_type, allocate, context)` makes a handle for an op of `runs`; `call_again` and
// `note_call` take the handle and the arguments of bnb::Repeats.
inline void bind_repeats(nanobind::module_& module, std::unordered_map<std::string, Repeats::Run> runs) {
  namespace nb = nanobind;
  const auto of = [](const nb::capsule& handle) { return static_cast<Repeats*>(handle.data("bnb.repeats")); };
  module.def("new_repeats", [runs = std::move(runs)](nb::str op, nb::handle exchange, nb::handle tensor_type,
                                                     nb::handle allocate, nb::handle context) {
    const auto found = runs.find(op.c_str());
    if (found == runs.end()) {
      throw nb::key_error(op.c_str());
    }
    return nb::capsule(new Repeats(found->second, exchange.ptr(), tensor_type.ptr(), allocate.ptr(), context.ptr()),
                       "bnb.repeats", [](void* repeats) noexcept { delete static_cast<Repeats*>(repeats); });
  });
  module.def("call_again", [of](const nb::capsule& handle, nb::args arguments) {
    PyObject* const result = of(handle)->call(arguments.ptr());
    if (result == nullptr) {
      throw nb::python_error();
    }
    return nb::steal(result);
  });
  module.def("note_call", [of](const nb::capsule& handle, nb::tuple layout, nb::dict options, nb::args arguments) {
    of(handle)->note(layout.ptr(), options.ptr(), arguments.ptr());
  });
}

}  // namespace bnb
