// What every binding does with its arguments: addresses as integers, one call with the GIL released.
#pragma once
#include <pybind11/pybind11.h>

#include <new>

#include "fusedseq.h"

namespace fusedseq {

template <class T = void>
T* pointer(const pybind11::handle& x) {
  return x.is_none() ? nullptr : reinterpret_cast<T*>(x.cast<uintptr_t>());
}

template <class P>
void call(Status (*f)(const P&), const P& p) {
  Status status;
  {
    pybind11::gil_scoped_release release;
    status = f(p);
  }
  if (status == Status::out_of_memory) throw std::bad_alloc();
}

}  // namespace fusedseq
