// Calls of an op that are like one before: the same kinds of arguments, other data.
//
// A contract's checks look at kinds of arguments alone, and so does the way from a call to its kernel. For a product
// with a weight that fits the caches both take longer than the kernel; a call that is like an earlier one needs
// neither. Needs Python.h, in its limited form, to be included before, and the GIL.
#pragma once

#include <bnb/python/arguments.h>

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace bnb {

// A reference to a Python object.
class Reference {
 public:
  explicit Reference(PyObject* owned) : object_(owned) {}
  Reference(Reference&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object_); }

  static Reference borrowed(PyObject* object) {
    Py_XINCREF(object);
    return Reference(object);
  }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

class Repeats {
 public:
  // Runs a kernel without the GIL; `context` is what the function of that name gave. Answers false, having done
  // nothing, for arguments that it does not take.
  using Run = bool (*)(const Arguments& arguments, void* out, int64_t context);

  // `exchange`: torch.Tensor.__dlpack_c_exchange_api__. `allocate`: makes a result. `context`: a function without
  // arguments that returns an integer for `run`.
  Repeats(Run run, PyObject* exchange, PyObject* tensor_type, PyObject* allocate, PyObject* context)
      : run_(run),
        api_(exchange_of(exchange)),
        tensor_type_(Reference::borrowed(tensor_type)),
        allocate_(Reference::borrowed(allocate)),
        context_(Reference::borrowed(context)) {}

  // The result, None where the call is not like one that was noted, or null with a Python error.
  PyObject* call(PyObject* arguments) {
    Arguments read;
    if (api_ == nullptr || calls_.empty() || !read.read(*api_, tensor_type_.get(), arguments)) {
      return none();
    }
    const Call* const like = find(read);
    if (like == nullptr) {
      return none();
    }
    // Python may run other threads from here on, and they may forget the call.
    const Reference layout = Reference::borrowed(like->layout.get()),
                    options = Reference::borrowed(like->options.get());
    const Reference context(PyObject_CallObject(context_.get(), nullptr));
    if (context.get() == nullptr) {
      return nullptr;
    }
    const int64_t context_number = PyLong_AsLongLong(context.get());
    if (context_number == -1 && PyErr_Occurred() != nullptr) {
      return nullptr;
    }
    Reference result(PyObject_Call(allocate_.get(), layout.get(), options.get()));
    DlTensor out;
    if (result.get() == nullptr || api_->describe(result.get(), &out) != 0) {
      return nullptr;
    }
    bool has_run;
    {
      const WithoutGil without_gil;
      has_run = run_(read, reinterpret_cast<void*>(static_cast<uintptr_t>(address_of(out))), context_number);
    }
    return has_run ? result.release() : none();
  }

  // Takes calls like this one, which has kept the contract. `allocate` makes results like its own from `layout`, a
  // tuple of arguments, and `options`, a dict of arguments by name.
  void note(PyObject* layout, PyObject* options, PyObject* arguments) {
    Arguments read;
    if (api_ == nullptr || !read.read(*api_, tensor_type_.get(), arguments) || find(read) != nullptr) {
      return;
    }
    if (calls_.size() >= kMostCalls) {
      calls_.clear();
    }
    const int64_t* const facts = read.facts();
    calls_.emplace(hash(read), Call{std::vector<int64_t>(facts, facts + read.fact_count()), Reference::borrowed(layout),
                                    Reference::borrowed(options)});
  }

 private:
  // Far more than the layers of a model have kinds.
  static constexpr size_t kMostCalls = 1024;

  struct Call {
    std::vector<int64_t> facts;
    Reference layout;
    Reference options;
  };

  static PyObject* none() { return Reference::borrowed(Py_None).release(); }

  // FNV-1a over words, whose upper half is folded down as tables look at the lower bits.
  static uint64_t hash(const Arguments& arguments) {
    uint64_t value = 0xcbf29ce484222325u;
    for (int index = 0; index < arguments.fact_count(); ++index) {
      value = (value ^ static_cast<uint64_t>(arguments.facts()[index])) * 0x100000001b3u;
    }
    return value ^ value >> 32;
  }

  const Call* find(const Arguments& arguments) const {
    const auto [first, last] = calls_.equal_range(hash(arguments));
    for (auto call = first; call != last; ++call) {
      const std::vector<int64_t>& facts = call->second.facts;
      if (std::equal(facts.begin(), facts.end(), arguments.facts(), arguments.facts() + arguments.fact_count())) {
        return &call->second;
      }
    }
    return nullptr;
  }

  Run run_;
  const DlExchange* api_;
  Reference tensor_type_, allocate_, context_;
  std::unordered_multimap<uint64_t, Call> calls_;
};

}  // namespace bnb
