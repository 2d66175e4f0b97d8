#include "bind/cuda/library.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "bind/cuda/arguments.h"

namespace py = pybind11;

namespace fusedseq {
namespace {

// What of cublas_api.h is used; its numbers have been the same since version 11.
typedef void* Handle;
struct Functions {
  int (*create)(Handle*);
  int (*set_stream)(Handle, void* stream);
  int (*set_workspace)(Handle, void* memory, size_t bytes);
  int (*multiply)(Handle, int a_op, int b_op, int m, int n, int k, const void* alpha, const void* a, int a_type,
                  int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc,
                  int compute, int algorithm);
};
constexpr int kAsItLies = 0, kTransposed = 1, kBestAlgorithm = -1;

int type_of(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return 0;
    case DType::f64:
      return 1;
    case DType::f16:
      return 2;
    default:
      return 14;  // bfloat16
  }
}
int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
int compute_of(DType dtype, bool tf32) { return dtype == DType::f64 ? 70 : dtype == DType::f32 && tf32 ? 77 : 68; }

template <class F>
void find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("no function ") + name + " in the library");
}

Functions load(const std::string& name) {
  void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (!library) throw std::runtime_error("the library " + name + " is not loaded");
  Functions f;
  find(library, "cublasCreate_v2", f.create);
  find(library, "cublasSetStream_v2", f.set_stream);
  find(library, "cublasSetWorkspace_v2", f.set_workspace);
  find(library, "cublasGemmEx", f.multiply);
  return f;
}

void check(int status, const char* what) {
  if (status) throw std::runtime_error(std::string(what) + " failed with status " + std::to_string(status));
}

constexpr int kDevices = 64;

// A thread's connection to the library: a handle for each device, made when first asked for.
struct Connection {
  std::string name;
  Functions functions{};
  Handle handles[kDevices] = {};
};

Connection& connection(const Library& library) {
  static thread_local Connection mine;
  if (mine.name != library.name) {
    mine = Connection{};
    mine.functions = load(library.name);
    mine.name = library.name;
  }
  if (library.device < 0 || library.device >= kDevices)
    throw std::runtime_error("a device below " + std::to_string(kDevices) + " was expected, got " +
                             std::to_string(library.device));
  Handle& handle = mine.handles[library.device];
  if (!handle) check(mine.functions.create(&handle), "cublasCreate");
  return mine;
}

}  // namespace

void library_product(const Library& library, int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b,
                     void* into, DType dtype, DType result, bool tf32) {
  const Connection& c = connection(library);
  const Handle handle = c.handles[library.device];
  check(c.functions.set_stream(handle, library.stream), "cublasSetStream");
  check(c.functions.set_workspace(handle, library.workspace, size_t(library.bytes)), "cublasSetWorkspace");
  // The library goes by columns, so what it reads and writes are the transposes: into^T = b^T a^T.
  const bool wide = dtype == DType::f64;
  const float one = 1, zero = 0;
  const double wide_one = 1, wide_zero = 0;
  check(c.functions.multiply(handle, b.transposed ? kTransposed : kAsItLies, a.transposed ? kTransposed : kAsItLies,
                             int(N), int(M), int(K), wide ? static_cast<const void*>(&wide_one) : &one, b.data,
                             type_of(dtype), int(b.pitch), a.data, type_of(dtype), int(a.pitch),
                             wide ? static_cast<const void*>(&wide_zero) : &zero, into, type_of(result), int(N),
                             compute_of(dtype, tf32), kBestAlgorithm),
        "cublasGemmEx");
}

const void* LibrarySteps::product(const CudaScanParams& p, int64_t turn) const {
  const DType result = p.dtype == DType::f64 ? DType::f64 : DType::f32;
  for (int64_t d = 0; d < p.D; ++d)
    library_product(library, p.B, N, K, {fed[turn & 1] + d * p.B * K * size_of(p.dtype), K, false}, factor[d],
                    into + d * p.B * N * size_of(result), p.dtype, result, p.tf32);
  return into;
}

namespace {

// name, device, stream, workspace, bytes.
Library library_of(const py::tuple& t) {
  return {t[0].cast<std::string>(), t[1].cast<int>(), pointer(t[2]), pointer(t[3]), t[4].cast<int64_t>()};
}
// Address, pitch, whether it lies transposed.
Matrix matrix_of(const py::handle& x) {
  const py::tuple t = py::reinterpret_borrow<py::tuple>(x);
  return {pointer(t[0]), t[1].cast<int64_t>(), t[2].cast<bool>()};
}

LibrarySteps steps_of(const py::tuple& library, const py::tuple& fed, const py::tuple& factors, int64_t N, int64_t K,
                      uintptr_t into) {
  LibrarySteps steps{library_of(library),          {pointer<const char>(fed[0]), pointer<const char>(fed[1])}, {}, N, K,
                     reinterpret_cast<char*>(into)};
  for (size_t d = 0; d < factors.size(); ++d) steps.factor[d] = matrix_of(factors[d]);
  return steps;
}

void product(const py::tuple& library, const py::tuple& sizes, const py::tuple& a, const py::tuple& b, uintptr_t into,
             int dtype, int result, bool tf32) {
  int64_t size[3];
  for (size_t i = 0; i < 3; ++i) size[i] = sizes[i].cast<int64_t>();
  const Library where = library_of(library);
  const Matrix left = matrix_of(a), right = matrix_of(b);
  py::gil_scoped_release release;
  library_product(where, size[0], size[1], size[2], left, right, reinterpret_cast<void*>(into), DType(dtype),
                  DType(result), tf32);
}

}  // namespace

void bind_cuda_library(py::module_& m) {
  py::class_<LibrarySteps>(m, "LibrarySteps", py::module_local(), "Products of tier step by the vendor's library.")
      .def(py::init(&steps_of));
  m.def("library_product", &product);
}

}  // namespace fusedseq
