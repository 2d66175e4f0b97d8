// Arguments of the CUDA module: addresses, sizes and strides by name.
#pragma once
#include <stdexcept>
#include <string>

#include "bind/call.h"

namespace fusedseq {

// Whatever the caller did not name is null.
class Arguments {
 public:
  explicit Arguments(const pybind11::dict& named) : named_(named) {}
  pybind11::object at(const char* name) const {
    return named_.contains(name) ? pybind11::object(named_[name]) : pybind11::none();
  }
  template <class T = void>
  T* pointer(const char* name) const {
    return fusedseq::pointer<T>(at(name));
  }
  int64_t number(const char* name, int64_t otherwise) const {
    const pybind11::object x = at(name);
    return x.is_none() ? otherwise : x.cast<int64_t>();
  }
  bool flag(const char* name) const {
    const pybind11::object x = at(name);
    return !x.is_none() && x.cast<bool>();
  }
  Rows rows(const char* name) const {
    const pybind11::object x = at(name);
    if (x.is_none()) return {nullptr, 0, 0};
    const pybind11::tuple t = x;
    return {fusedseq::pointer(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>()};
  }
  Strided strided(const char* name) const {
    const Rows r = rows(name);
    return {r.data, r.st, r.sb};
  }
  void directions(const char* name, const void* (&into)[kMaxDirections]) const {
    const pybind11::object x = at(name);
    for (size_t d = 0; d < kMaxDirections; ++d) {
      const pybind11::tuple t = x.is_none() ? pybind11::tuple() : pybind11::tuple(x);
      into[d] = d < t.size() ? fusedseq::pointer<const void>(t[d]) : nullptr;
    }
  }

 private:
  const pybind11::dict& named_;
};

inline void check(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace fusedseq
