// Addresses of thousands of torch tensors in one call, each checked to be what it was when first read.
//
// torch hands out what a DLPack tensor says about one of its own through a table of C functions, the attribute
// `torch.Tensor.__dlpack_c_exchange_api__` (torch 2.10 and later; the struct is part of the DLPack standard, 1.2).
// Nothing is linked for it. Needs Python.h, in its limited form, to be included before, and the GIL.
#pragma once

#include <cstdint>

namespace bnb {

// --- the part of DLPack that is needed --------------------------------------------------------------

struct DlTensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dimensions;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DlExchange {
  uint32_t major, minor;
  DlExchange* previous;
  void (*allocate)();
  void (*export_managed)();
  void (*import_managed)();
  int (*describe)(void* tensor, DlTensor* out);
  void (*current_stream)();
};

// Where the data of a tensor lies.
inline int64_t address_of(const DlTensor& tensor) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset);
}

// The dtype in the lowest sixteen bits, then the device's type and number.
inline int64_t dtype_and_device_of(const DlTensor& tensor) {
  return tensor.dtype_code | static_cast<int64_t>(tensor.dtype_bits) << 8 |
         static_cast<int64_t>(tensor.device_type & 0xffff) << 16 | static_cast<int64_t>(tensor.device_index) << 32;
}

// Whether the elements, which are counted, lie one after the other.
inline bool is_contiguous(const DlTensor& tensor, int64_t* elements) {
  int64_t count = 1;
  bool contiguous = true;
  for (int32_t dimension = tensor.dimensions - 1; dimension >= 0; --dimension) {
    const int64_t size = tensor.shape[dimension];
    contiguous &= size == 1 || tensor.strides == nullptr || tensor.strides[dimension] == count;
    count *= size;
  }
  *elements = count;
  return tensor.dtype_lanes == 1 && (contiguous || count == 0);
}

// The table behind the attribute `__dlpack_c_exchange_api__`, or null where it is missing or another version. Never
// leaves a Python error.
inline const DlExchange* exchange_of(PyObject* capsule) {
  const auto* const api = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  PyErr_Clear();
  return api == nullptr || api->major != 1 || api->describe == nullptr ? nullptr : api;
}

// What must not change from step to step.
struct TensorKind {
  int64_t elements;
  int64_t dtype_and_device;
};

// What the answer of a reader means to its caller.
enum Reading : int { kOther = 0, kSameAddresses = 1, kNewAddresses = 2 };

// Reads tensors of exactly the given types; subclasses may lie elsewhere than they say.
class TensorReader {
 public:
  // `capsule`: the attribute. `types`: a tuple of types.
  TensorReader(PyObject* capsule, PyObject* types) : api_(exchange_of(capsule)), types_(types) {}

  bool usable() const { return api_ != nullptr; }

  // Puts the address of a plain, contiguous tensor into `address`. With `record` its kind is put into `kind`,
  // otherwise it must be that kind. Never leaves a Python error.
  // `may_be_negated`: the tensor may be a result of torch's automatic differentiation.
  Reading read(PyObject* tensor, bool may_be_negated, bool record, TensorKind* kind, int64_t* address) const {
    DlTensor described;
    if (!has_type(tensor)) {
      return kOther;
    }
    if (api_->describe(tensor, &described) != 0) {
      // Sparse, without memory, or on a device that DLPack does not know.
      PyErr_Clear();
      return kOther;
    }
    TensorKind found;
    if (!is_contiguous(described, &found.elements) || (may_be_negated && found.elements == 1 && is_negated(tensor))) {
      return kOther;
    }
    found.dtype_and_device = dtype_and_device_of(described);
    const int64_t data = address_of(described);
    if (found.elements != 0 && data == 0) {
      return kOther;
    }
    if (record) {
      *kind = found;
    } else if (found.elements != kind->elements || found.dtype_and_device != kind->dtype_and_device) {
      return kOther;
    }
    const Reading reading = data == *address ? kSameAddresses : kNewAddresses;
    *address = data;
    return reading;
  }

 private:
  bool has_type(PyObject* tensor) const {
    PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
    for (Py_ssize_t index = 0, count = PyTuple_Size(types_); index < count; ++index) {
      if (PyTuple_GetItem(types_, index) == type) {
        return true;
      }
    }
    return false;
  }

  // The imaginary parts of conjugated numbers are tensors whose memory has the other sign. They show by their
  // strides, unless there is one alone.
  static bool is_negated(PyObject* tensor) {
    PyObject* const answer = PyObject_CallMethod(tensor, "is_neg", nullptr);
    const bool negated = answer != Py_False;
    Py_XDECREF(answer);
    PyErr_Clear();
    return negated;
  }

  const DlExchange* api_;
  PyObject* types_;
};

// Reads all tensors of a step of many parameters into a table: a column of `count` addresses for each of `lists`,
// a tuple of lists of tensors, then one for each of `keys`, a tuple of keys of the dicts in the list `states`. A key
// that is None leaves its column as it is. For each key in the tuple `shared`, all dicts must hold one object.
// `kinds` has as many entries as the columns. The answer is kOther as soon as a tensor is not as expected.
inline Reading read_tensors(PyObject* capsule, PyObject* types, PyObject* lists, PyObject* states, PyObject* keys,
                            PyObject* shared, int64_t count, bool record, TensorKind* kinds, int64_t* table) {
  const TensorReader reader(capsule, types);
  if (!reader.usable() || PyList_Size(states) != count) {
    PyErr_Clear();
    return kOther;
  }
  Reading all = kSameAddresses;
  const auto take = [&](PyObject* tensor, bool may_be_negated) {
    const Reading reading = tensor == nullptr ? kOther : reader.read(tensor, may_be_negated, record, kinds++, table++);
    all = reading == kSameAddresses ? all : reading;
    return reading != kOther;
  };
  for (Py_ssize_t column = 0; column < PyTuple_Size(lists); ++column) {
    PyObject* const tensors = PyTuple_GetItem(lists, column);
    if (PyList_Size(tensors) != count) {
      PyErr_Clear();
      return kOther;
    }
    for (int64_t index = 0; index < count; ++index) {
      if (!take(PyList_GetItem(tensors, index), true)) {
        return kOther;
      }
    }
  }
  for (Py_ssize_t column = 0; column < PyTuple_Size(keys); ++column) {
    PyObject* const key = PyTuple_GetItem(keys, column);
    if (key == Py_None) {
      kinds += count;
      table += count;
      continue;
    }
    for (int64_t index = 0; index < count; ++index) {
      if (!take(PyDict_GetItem(PyList_GetItem(states, index), key), false)) {
        return kOther;
      }
    }
  }
  for (Py_ssize_t column = 0; column < PyTuple_Size(shared); ++column) {
    PyObject* const key = PyTuple_GetItem(shared, column);
    PyObject* const first = count > 0 ? PyDict_GetItem(PyList_GetItem(states, 0), key) : nullptr;
    for (int64_t index = 0; index < count; ++index) {
      if (first == nullptr || PyDict_GetItem(PyList_GetItem(states, index), key) != first) {
        return kOther;
      }
    }
  }
  return all;
}

}  // namespace bnb
