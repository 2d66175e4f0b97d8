// Which ISA builds this machine can run. Compiled without ISA flags, so that asking never crashes.
#include "fusedseq.h"

namespace fusedseq {

#define FSQ_ROW(isa)           \
  namespace isa {              \
  extern const CpuTable table; \
  }
FSQ_ROW(baseline)
#if defined(FSQ_HAVE_AVX2)
FSQ_ROW(avx2)
#endif
#if defined(FSQ_HAVE_AVX512)
FSQ_ROW(avx512)
#endif
#if defined(FSQ_HAVE_AVX512BF16)
FSQ_ROW(avx512bf16)
#endif

const CpuTable* const* cpu_tables(int* count) {
  static const CpuTable* rows[4];
  static const int n = [] {
    int k = 0;
    rows[k++] = &baseline::table;
#if defined(FSQ_HAVE_AVX2) || defined(FSQ_HAVE_AVX512) || defined(FSQ_HAVE_AVX512BF16)
    __builtin_cpu_init();
#endif
#if defined(FSQ_HAVE_AVX2)
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (has_avx2) rows[k++] = &avx2::table;
#endif
#if defined(FSQ_HAVE_AVX512)
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512) rows[k++] = &avx512::table;
#endif
#if defined(FSQ_HAVE_AVX512BF16)
    if (has_avx512 && __builtin_cpu_supports("avx512bf16")) rows[k++] = &avx512bf16::table;
#endif
    return k;
  }();
  *count = n;
  return rows;
}

}  // namespace fusedseq
