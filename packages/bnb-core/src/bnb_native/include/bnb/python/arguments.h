// The arguments of one call of an op, as torch hands them to Python, read for a kernel.
//
// Needs Python.h, in its limited form, to be included before, and the GIL.
#pragma once

#include <bnb/dtypes.h>
#include <bnb/tensors.h>

#include <cstdint>
#include <cstring>
#include <string_view>

namespace bnb {

// Reads tensors that lie contiguously, integers, numbers, texts, lists of integers and None.
class Arguments {
 public:
  static constexpr Py_ssize_t kMost = 16;
  static constexpr int kMostFacts = 192;

  // Whether all of a tuple could be read. Never leaves a Python error. What was read is valid as long as the tuple.
  // torch leaves out what has its default at the end: it counts as not given, and as zero.
  bool read(const DlExchange& api, PyObject* tensor_type, PyObject* arguments) {
    const Py_ssize_t count = PyTuple_Size(arguments);
    fact_count_ = 0;
    if (count > kMost) {
      return false;
    }
    for (Py_ssize_t index = count; index < kMost; ++index) {
      values_[index] = Value();
    }
    for (Py_ssize_t index = 0; index < count; ++index) {
      if (!read_one(api, tensor_type, PyTuple_GetItem(arguments, index), &values_[index])) {
        PyErr_Clear();
        return false;
      }
    }
    return true;
  }

  // All about the arguments but the addresses of tensors: calls that are alike in it keep a contract alike, as long
  // as the contract does not look into tensors.
  const int64_t* facts() const { return facts_; }
  int fact_count() const { return fact_count_; }

  bool is_given(int index) const { return values_[index].is_given; }

  // The data of a tensor; null for one that is not given.
  template <class T>
  T* data(int index) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(values_[index].number));
  }

  // Elements of a tensor or items of a list; 0 for what is not given.
  int64_t size(int index) const { return values_[index].size; }

  // The number of bnb::Dtype; -1 where it has none for the tensor.
  int dtype(int index) const { return values_[index].dtype; }

  int64_t integer(int index) const { return values_[index].number; }

  double number(int index) const {
    double value;
    std::memcpy(&value, &values_[index].number, sizeof value);
    return value;
  }

  std::string_view text(int index) const {
    return {reinterpret_cast<const char*>(static_cast<uintptr_t>(values_[index].number)),
            static_cast<size_t>(values_[index].size)};
  }

  // The items of a list of integers.
  const int64_t* integers(int index) const { return facts_ + values_[index].number; }

 private:
  // What kind of argument a fact begins.
  enum Kind : int64_t { kNone, kTensor, kInteger, kTruth, kNumber, kText, kIntegers };

  struct Value {
    int64_t number = 0;
    int64_t size = 0;
    int dtype = -1;
    bool is_given = false;
  };

  bool read_one(const DlExchange& api, PyObject* tensor_type, PyObject* argument, Value* value) {
    *value = Value();
    value->is_given = argument != Py_None;
    if (argument == Py_None) {
      return add(kNone);
    }
    // A subclass is fine: one whose data lies elsewhere does not get to a kernel's device.
    if (PyType_IsSubtype(Py_TYPE(argument), reinterpret_cast<PyTypeObject*>(tensor_type))) {
      return read_tensor(api, argument, value);
    }
    if (PyBool_Check(argument)) {
      value->number = argument == Py_True;
      return add(kTruth) && add(value->number);
    }
    if (PyLong_CheckExact(argument)) {
      return add(kInteger) && add_integer(argument, &value->number);
    }
    if (PyFloat_CheckExact(argument)) {
      const double number = PyFloat_AsDouble(argument);
      std::memcpy(&value->number, &number, sizeof number);
      return add(kNumber) && add(value->number);
    }
    if (PyUnicode_CheckExact(argument)) {
      return read_text(argument, value);
    }
    return PyList_CheckExact(argument) && read_list(argument, value);
  }

  bool read_tensor(const DlExchange& api, PyObject* tensor, Value* value) {
    DlTensor described;
    if (api.describe(tensor, &described) != 0 || !is_contiguous(described, &value->size)) {
      return false;
    }
    value->number = address_of(described);
    value->dtype = number_of_dtype(described);
    if ((value->size != 0 && value->number == 0) || !add(kTensor) || !add(dtype_and_device_of(described)) ||
        !add(described.dimensions)) {
      return false;
    }
    for (int32_t dimension = 0; dimension < described.dimensions; ++dimension) {
      if (!add(described.shape[dimension])) {
        return false;
      }
    }
    return true;
  }

  static int number_of_dtype(const DlTensor& tensor) {
    constexpr int kDlFloat = 2, kDlBFloat = 4;
    if (tensor.dtype_code == kDlBFloat) {
      return static_cast<int>(Dtype::kBFloat16);
    }
    if (tensor.dtype_code != kDlFloat || (tensor.dtype_bits != 16 && tensor.dtype_bits != 32)) {
      return -1;
    }
    return static_cast<int>(tensor.dtype_bits == 16 ? Dtype::kFloat16 : Dtype::kFloat32);
  }

  bool read_text(PyObject* text, Value* value) {
    Py_ssize_t length = 0;
    const char* const characters = PyUnicode_AsUTF8AndSize(text, &length);
    if (characters == nullptr || !add(kText) || !add(length)) {
      return false;
    }
    for (Py_ssize_t index = 0; index < length; index += 8) {
      int64_t word = 0;
      std::memcpy(&word, characters + index, static_cast<size_t>(length - index < 8 ? length - index : 8));
      if (!add(word)) {
        return false;
      }
    }
    value->number = static_cast<int64_t>(reinterpret_cast<uintptr_t>(characters));
    value->size = length;
    return true;
  }

  bool read_list(PyObject* list, Value* value) {
    value->size = PyList_Size(list);
    if (!add(kIntegers) || !add(value->size)) {
      return false;
    }
    value->number = fact_count_;
    for (int64_t index = 0; index < value->size; ++index) {
      PyObject* const item = PyList_GetItem(list, index);
      int64_t ignored;
      if (!PyLong_CheckExact(item) || !add_integer(item, &ignored)) {
        return false;
      }
    }
    return true;
  }

  bool add_integer(PyObject* integer, int64_t* value) {
    *value = PyLong_AsLongLong(integer);
    return (*value != -1 || PyErr_Occurred() == nullptr) && add(*value);
  }

  bool add(int64_t fact) {
    if (fact_count_ == kMostFacts) {
      return false;
    }
    facts_[fact_count_++] = fact;
    return true;
  }

  Value values_[kMost];
  int64_t facts_[kMostFacts];
  int fact_count_ = 0;
};

}  // namespace bnb
