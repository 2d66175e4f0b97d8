// fusedseq._cpu: integers in (addresses, sizes, strides), a params struct, one call with the GIL released.
#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <string>

#include "bind/attention.h"
#include "bind/call.h"
#include "bind/rows.h"
#include "bind/scratch.h"
#include "bind/step.h"
#include "fusedseq.h"
#include "memory.h"

namespace py = pybind11;
using namespace fusedseq;

namespace {

const CpuTable* active = nullptr;

const CpuTable* find(const std::string& name) {
  int count;
  const CpuTable* const* rows = cpu_tables(&count);
  for (int i = 0; i < count; ++i)
    if (name == rows[i]->name) return rows[i];
  return nullptr;
}

py::list isas() {
  int count;
  const CpuTable* const* rows = cpu_tables(&count);
  py::list names;
  for (int i = 0; i < count; ++i) names.append(rows[i]->name);
  return names;
}

void set_isa(const std::string& name) {
  const CpuTable* row = find(name);
  if (!row) throw py::value_error("isa: expected one of " + std::string(py::str(isas())) + ", got '" + name + "'");
  active = row;
}

Rows rows(const py::handle& x) {
  if (x.is_none()) return {nullptr, 0, 0};
  const py::tuple t = py::reinterpret_borrow<py::tuple>(x);
  return {pointer(t[0]), t[1].cast<int64_t>(), t[2].cast<int64_t>()};
}

void scan_sizes(ScanParams& p, const py::tuple& sizes) {
  int64_t* const into[] = {&p.T, &p.B, &p.I, &p.H, &p.R, &p.D};
  for (size_t i = 0; i < 6; ++i) *into[i] = sizes[i].cast<int64_t>();
}

// Per direction (w_ih, w_hh, b_ih, b_hh, w_hr).
template <class T>
void weights(const py::tuple& all, T* (&w_ih)[2], T* (&w_hh)[2], T* (&b_ih)[2], T* (&b_hh)[2], T* (&w_hr)[2]) {
  for (size_t d = 0; d < 2; ++d) {
    const bool there = d < all.size();
    const py::tuple t = there ? py::reinterpret_borrow<py::tuple>(all[d]) : py::tuple();
    w_ih[d] = there ? pointer<T>(t[0]) : nullptr;
    w_hh[d] = there ? pointer<T>(t[1]) : nullptr;
    b_ih[d] = there ? pointer<T>(t[2]) : nullptr;
    b_hh[d] = there ? pointer<T>(t[3]) : nullptr;
    w_hr[d] = there ? pointer<T>(t[4]) : nullptr;
  }
}

// A layer's weights as forward reads them, kept from call to call.
class Panels {
 public:
  Panels(int cell, int dtype, int threads, const py::tuple& sizes, const py::tuple& w) : table_(active), p_{} {
    p_.cell = Cell(cell);
    p_.dtype = DType(dtype);
    p_.threads = threads < 1 ? 1 : threads;
    scan_sizes(p_, sizes);
    weights<const void>(w, p_.w_ih, p_.w_hh, p_.b_ih, p_.b_hh, p_.w_hr);
    bytes = table_->pack(p_, nullptr);
    void* into[kMaxDirections] = {};
    for (int64_t d = 0; d < p_.D; ++d) {
      into[d] = memory_[d] = allocate_scratch(bytes);
      if (!into[d]) throw std::bad_alloc();
    }
    py::gil_scoped_release release;
    table_->pack(p_, into);
  }
  ~Panels() {
    for (char* block : memory_) free(block);
  }
  Panels(const Panels&) = delete;

  // Of another row of the table they are of no use, for other sizes they are a mistake.
  void give(ScanParams& p) const {
    if (p.cell != p_.cell || p.dtype != p_.dtype || p.I != p_.I || p.H != p_.H || p.R != p_.R || p.D != p_.D)
      throw py::value_error("panels: they were packed for another cell, dtype or size");
    for (int64_t d = 0; d < p.D && table_ == active; ++d) p.packed[d] = memory_[d];
  }

  int64_t bytes;  // of one direction

 private:
  const CpuTable* const table_;
  ScanParams p_;
  char* memory_[kMaxDirections] = {};
};

ScanParams scan_params(KeptScratch& scratch, int cell, int dtype, int threads, const py::tuple& sizes,
                       const py::handle& x, const py::handle& h0, const py::handle& c0, const py::tuple& w,
                       const py::handle& lengths, const py::handle& batch_sizes, const py::handle& resets,
                       const py::handle& y, const py::handle& c_all, const py::handle& h_n, const py::handle& c_n,
                       const py::handle& reserve, bool recompute) {
  ScanParams p{};
  p.cell = Cell(cell);
  p.dtype = DType(dtype);
  p.threads = threads < 1 ? 1 : threads;
  p.scratch = &scratch;
  scan_sizes(p, sizes);
  p.x = rows(x);
  p.h0 = pointer(h0);
  p.c0 = pointer(c0);
  weights<const void>(w, p.w_ih, p.w_hh, p.b_ih, p.b_hh, p.w_hr);
  p.lengths = pointer<const int64_t>(lengths);
  p.batch_sizes = pointer<const int64_t>(batch_sizes);
  p.resets = rows(resets);
  p.y = rows(y);
  p.c_all = rows(c_all);
  p.h_n = pointer(h_n);
  p.c_n = pointer(c_n);
  p.reserve = pointer(reserve);
  p.recompute = recompute;
  return p;
}

void scan_forward(KeptScratch& scratch, int cell, int dtype, int threads, const py::tuple& sizes, const py::handle& x,
                  const py::handle& h0, const py::handle& c0, const py::tuple& w, const py::handle& lengths,
                  const py::handle& batch_sizes, const py::handle& resets, const py::handle& y, const py::handle& c_all,
                  const py::handle& h_n, const py::handle& c_n, const py::handle& reserve, bool recompute,
                  const Panels* panels) {
  ScanParams p = scan_params(scratch, cell, dtype, threads, sizes, x, h0, c0, w, lengths, batch_sizes, resets, y, c_all,
                             h_n, c_n, reserve, recompute);
  if (panels) panels->give(p);
  call(active->forward, p);
  scratch.grow();
}

void scan_backward(KeptScratch& scratch, int cell, int dtype, int threads, const py::tuple& sizes, const py::handle& x,
                   const py::handle& h0, const py::handle& c0, const py::tuple& w, const py::handle& lengths,
                   const py::handle& batch_sizes, const py::handle& resets, const py::handle& y,
                   const py::handle& reserve, bool recompute, const py::handle& dy, const py::handle& dc_all,
                   const py::handle& dh_n, const py::handle& dc_n, const py::handle& dx, const py::handle& dh0,
                   const py::handle& dc0, const py::tuple& dw) {
  const py::none none;
  ScanGradParams p{};
  p.fwd = scan_params(scratch, cell, dtype, threads, sizes, x, h0, c0, w, lengths, batch_sizes, resets, y, none, none,
                      none, reserve, recompute);
  p.dy = rows(dy);
  p.dc_all = rows(dc_all);
  p.dh_n = pointer(dh_n);
  p.dc_n = pointer(dc_n);
  p.dx = rows(dx);
  p.dh0 = pointer(dh0);
  p.dc0 = pointer(dc0);
  weights<void>(dw, p.dw_ih, p.dw_hh, p.db_ih, p.db_hh, p.dw_hr);
  call(active->backward, p);
  scratch.grow();
}

void apply_math(int which, int dtype, uintptr_t x, uintptr_t y, int64_t n) {
  active->math(which, DType(dtype), reinterpret_cast<const void*>(x), reinterpret_cast<void*>(y), n);
}

int64_t multiply_adds(int dtype, int64_t rounds) {
  py::gil_scoped_release release;
  return active->multiply_adds(DType(dtype), rounds);
}

}  // namespace

const CpuTable& fusedseq::active_row() { return *active; }

PYBIND11_MODULE(_cpu, m) {
  m.doc() =
      "Fused sequence kernels for the CPU. Takes addresses, sizes and strides; fusedseq.backends.cpu is its caller.";
  int count;
  const CpuTable* const* available = cpu_tables(&count);
  active = available[count - 1];
  m.def("isas", &isas, "Rows of the ISA table this machine can run, slowest first.");
  m.def("isa", [] { return active->name; }, "The row in use.");
  m.def("set_isa", &set_isa, "Uses the named row.");
  py::class_<KeptScratch>(m, "Scratch", "Memory that one thread's calls share, as much as they need up to a limit.")
      .def(py::init<int64_t>())
      .def_readonly("bytes", &KeptScratch::bytes);
  py::class_<Panels>(m, "Panels", "The weights of one layer as the forward scan reads them.")
      .def(py::init<int, int, int, const py::tuple&, const py::tuple&>())
      .def_readonly("bytes", &Panels::bytes);
  m.def("scan_forward", &scan_forward);
  m.def("scan_backward", &scan_backward);
  py::class_<Step>(m, "Step", "One step of a stack of layers whose sizes are settled.")
      .def(py::init<const py::object&, int, int, const py::tuple&, int64_t, int, bool, bool>())
      .def_property_readonly("run", [](const py::object& step) { return run_function(step, &active); })
      .def("backward", [](const Step& step, int threads, const py::handle& dh, const py::handle& dc,
                          const py::handle& x, const py::handle& h0, const py::handle& c0, const py::handle& h_n,
                          const py::handle& reserve, const py::handle& weights, const py::handle& dx,
                          const py::handle& dh0, const py::handle& dc0, const py::handle& dweights) {
        step.backward(*active, threads, dh, dc, x, h0, c0, h_n, reserve, weights, dx, dh0, dc0, dweights);
      });
  bind_attention(m);
  bind_rows(m);
  m.def("apply_math", &apply_math);
  m.def("multiply_adds", &multiply_adds);
}
