// The whole surface of the compiled core. Torch-free: raw pointers, sizes, strides.
//
// Notation: T time, B batch, I input size, H hidden size, R state size (proj_size if > 0, else H),
// G gates (LSTM i,f,g,o; GRU r,z,n; RNN 1), D directions, N rows of a packed sequence.
#pragma once
#include <stdint.h>

namespace fusedseq {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Cell : int { lstm = 0, gru = 1, gru_reset_before = 2, rnn_tanh = 3, rnn_relu = 4 };
enum class Status : int { ok = 0, out_of_memory = 1 };

constexpr int kMaxDirections = 2;

// Values per (row, unit) that forward keeps for backward; cells/<family>.h says which and in what form.
constexpr int saved_values(Cell cell) {
  return cell == Cell::lstm ? 5 : cell == Cell::gru ? 4 : cell == Cell::gru_reset_before ? 3 : 0;
}
constexpr int gate_count(Cell cell) {
  return cell == Cell::lstm ? 4 : cell == Cell::gru || cell == Cell::gru_reset_before ? 3 : 1;
}

// A user tensor whose rows are addressed by (t, b): element (t, b, i) of a padded tensor lies at
// data + t * st + b * sb + i; of a packed one at data + (offset[t] + b) * sb + i, offset = running sum of
// batch_sizes. Strides count elements, the last dimension is dense.
struct Rows {
  void* data;
  int64_t st, sb;
};

// Memory of the caller for what a call needs only while it runs, aligned to 64 bytes. A call that finds too little
// makes its own, which costs it the mapping of every page; `needed` becomes the most that any call would have used.
struct Scratch {
  void* data;
  int64_t bytes, needed;
};

// One layer, all its directions, forward. Nothing is allocated beyond the call; outputs are the caller's.
struct ScanParams {
  Cell cell;
  DType dtype;  // of x, states, weights and outputs; half types compute in float32, reserve is float32
  int threads;
  Scratch* scratch;  // or null
  int64_t T, B, I, H, R, D;
  Rows x;                              // [T,B,I]
  const void* h0;                      // [D,B,R] dense, or null: zeros
  const void* c0;                      // [D,B,H] dense, or null: zeros
  const void* w_ih[kMaxDirections];    // [G*H, I] dense
  const void* w_hh[kMaxDirections];    // [G*H, R] dense
  const void* b_ih[kMaxDirections];    // [G*H] or null
  const void* b_hh[kMaxDirections];    // [G*H] or null
  const void* w_hr[kMaxDirections];    // [R, H] dense or null (then R == H)
  const void* packed[kMaxDirections];  // what CpuTable::pack made of these weights, or null; not used if T = 1
  const int64_t* lengths;              // [B] or null
  const int64_t* batch_sizes;          // [T] or null; excludes lengths
  Rows resets;                         // bool [T,B], data may be null
  Rows y;                              // [T,B,D*R]; rows past a length are left untouched
  Rows c_all;                          // [T,B,D*H], data may be null
  void* h_n;                           // [D,B,R] dense; may be y itself if T = 1, D = 1
  void* c_n;                           // [D,B,H] dense, LSTM only
  void* reserve;                       // [D,N,S*H] compute type, S = saved_values(cell); null: keep nothing
  bool recompute;                      // keep no gates: S = 1, the cell state, for LSTM, and 0 for all others
};

// The backward of the same call. Gradients that come in may be null (zero); dx and the weights' may be
// null (unwanted).
struct ScanGradParams {
  ScanParams fwd;               // as given to forward; y and reserve as forward left them
  Rows dy;                      // [T,B,D*R] or null
  Rows dc_all;                  // [T,B,D*H] or null
  const void* dh_n;             // [D,B,R] dense or null
  const void* dc_n;             // [D,B,H] dense or null
  Rows dx;                      // [T,B,I]; rows past a length are left untouched
  void* dh0;                    // [D,B,R]
  void* dc0;                    // [D,B,H], LSTM only
  void* dw_ih[kMaxDirections];  // compute type, like the weight; all of a direction or none
  void* dw_hh[kMaxDirections];
  void* db_ih[kMaxDirections];
  void* db_hh[kMaxDirections];
  void* dw_hr[kMaxDirections];
};

// Attention: L queries, S keys, E and Ev sizes of a head, Hq and Hkv heads of queries and keys (Hkv divides Hq).

// A tensor [B, H, N, width]: element (b, h, n, e) lies at data + b * sb + h * sh + n * sn + e.
struct Heads {
  void* data;
  int64_t sb, sh, sn;
};
// A table over [B, Hq, L, S], stride 0 where it is broadcast; the last one is 0 or 1.
struct Table {
  void* data;
  int64_t sb, sh, sl, ss;
};

// A query sees the keys from begin to end of a window around its diagonal, cut to its sequence. See fusedseq.Mask.
struct AttentionParams {
  DType dtype;  // of q, k, v, out; half types compute in float32
  int threads;
  int64_t B, Hq, Hkv, L, S, E, Ev;
  Heads q, k, v, out;
  void* lse;  // [B,Hq,L] dense, compute type; natural logarithm
  Table bias;
  DType bias_dtype;            // f64 for f64, else any other
  Table dense;                 // bool
  const void* alibi_slopes;    // [Hq] compute type, or null
  const void* sinks;           // [Hq] compute type, or null
  const int64_t* key_lengths;  // [B] or null
  const int64_t *cu_q, *cu_k;  // [N+1] or null; then B = 1
  int64_t N;
  const uint8_t* global_keys;  // [B,S] bool or null
  int64_t global_sb;
  int causal;           // 0, 1 diagonal from the top left, 2 diagonal to the bottom right; then right is 0
  int64_t left, right;  // -1: unbounded
  double scale, softcap;
  uint32_t threshold;  // dropout: random words below are dropped
  bool dropout;
  double keep_scale;  // what the others are multiplied with
  uint64_t seed;
};

// The backward of the same call. dout or dlse may be null (zero); any result may be null (unwanted), dk and dv only
// together.
struct AttentionGradParams {
  AttentionParams fwd;  // as given to forward; out and lse as forward left them
  Heads dout;
  const void* dlse;  // [B,Hq,L] dense, compute type
  Heads dq, dk, dv;
  Table dbias;   // compute type, dense
  void* dalibi;  // [Hq] compute type
  void* dsinks;  // [Hq] compute type
};

// What stands between the products of a Transformer's layer. Rows are all dimensions but the last, which has d
// elements; every tensor [rows, d] is dense.

enum class Activation : int { identity = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

// Element (r, j) is kept if word (j / 16) % 4 of Philox with counter (16 (j / 64) + j % 16, r mod 2^32, 0, r / 2^32) is
// at least the threshold; see fusedseq/reference/dropout.py.
struct Dropout {
  bool on;
  uint32_t threshold;
  double scale;  // of what is kept
  uint64_t seed;
};

// sum = residual + dropout(x), out = weight (sum - mean) / sqrt(var + eps) + bias with the moments of each row.
struct LayerNormParams {
  DType dtype;  // of all tensors; half types compute in float32
  int threads;
  int64_t rows, d;
  const void* x;              // [rows, d]
  const void* residual;       // [rows, d] or null
  const void *weight, *bias;  // [d], each or null
  void* out;                  // [rows, d]
  void* sum;                  // [rows, d] or null
  double eps;
  Dropout dropout;
};
// dout or dsum may be null (zero), not both; any result may be null (unwanted).
struct LayerNormGradParams {
  LayerNormParams fwd;  // as given to forward
  const void *dout, *dsum;
  void *dx, *dresidual;
  void *dweight, *dbias;  // [d] compute type
};

// out = residual + dropout(activation(x + bias)).
struct BiasActivationParams {
  DType dtype;
  int threads;
  int64_t rows, d;
  Activation activation;
  const void *x, *residual;  // [rows, d]; residual may be null
  const void* bias;          // [d] or null
  void* out;                 // [rows, d]
  Dropout dropout;
};
struct BiasActivationGradParams {
  BiasActivationParams fwd;
  const void* dout;
  void* dx;     // or null
  void* dbias;  // [d] compute type, or null
};

// y = x W^T + bias over M rows, for float32 and float64.
struct LinearParams {
  DType dtype;  // of all tensors
  int threads;
  int64_t M, N, K;
  const void* x;  // [M, K], rows x_pitch elements apart
  int64_t x_pitch;
  const void* w;     // [N, K] dense
  const void* bias;  // [N] or null
  void* y;           // [M, N] dense
};
// Any result may be null (unwanted).
struct LinearGradParams {
  LinearParams fwd;  // as given to forward; y is not read
  const void* dy;    // [M, N], rows dy_pitch elements apart
  int64_t dy_pitch;
  void *dx, *dw, *db;  // [M, K], [N, K], [N], dense
};

// The recurrence of one layer on a GPU, all its directions. The products over all time steps, W_ih x before it and the
// gradients of x and of the weights after it, are the caller's. Everything lies in device memory.
struct CudaScanParams {
  Cell cell;
  DType dtype;  // of states, weights and outputs; half types compute in float32
  int64_t T, B, H, R, D;
  const int64_t* offsets;            // [T] running sum of batch_sizes where rows are packed, or null
  const int32_t* lengths;            // [B] steps of each row, or null: T each
  Rows gates;                        // [T,B,D*G*H] compute type: W_ih x
  const void* b_ih[kMaxDirections];  // [G*H] or null
  const void* b_hh[kMaxDirections];  // [G*H] or null
  const void* h0;                    // [D,B,R] or null: zeros
  const void* c0;                    // [D,B,H] or null: zeros
  const void* w_hh[kMaxDirections];  // [G*H, R]
  const void* w_hr[kMaxDirections];  // [R, H] or null (then R == H)
  Rows resets;                       // bool [T,B], data may be null
  Rows y;                            // [T,B,D*R]; rows past a length are left untouched, here and below
  Rows c_all;                        // [T,B,D*H], data may be null
  void* h_n;                         // [D,B,R]
  void* c_n;                         // [D,B,H], LSTM only
  Rows reserve;                      // [T,B,S*H] of direction 0, compute type; data null: keep nothing
  int64_t reserve_sd;                // from there to direction 1, in elements
  bool recompute;                    // keep no gates: S = 1, the cell state, for LSTM, and 0 for all others
  bool tf32;                         // of float32: the recurrent products round their operands to TF32
  void* workspace;                   // CudaPlan::workspace bytes, aligned to 256
  uint32_t* fault;                   // set to 1 before a launch ends in an error, because a barrier did not complete
  void* stream;
};

// Gradients that come in may be null (zero).
struct CudaScanGradParams {
  CudaScanParams fwd;  // as given to forward, but for what forward alone reads or writes (gates, biases, h_n, c_n)
  Rows dy;             // [T,B,D*R] or null
  Rows dc_all;         // [T,B,D*H] or null
  const void* dh_n;    // [D,B,R] or null
  const void* dc_n;    // [D,B,H] or null
  Rows dgates;         // [T,B,D*G*H]: of W_ih x
  Rows dhn;            // [T,B,D*H]: of W_hn h + b_hn, for a GRU that resets after the product
  Rows dh;             // [T,B,D*R]: of h, for an LSTM with projection
  void* dh0;           // [D,B,R]
  void* dc0;           // [D,B,H], LSTM only
};

// Element (b, u) of a matrix lies at data + b * sb + u * su. A bias is one with sb = 0.
struct Strided {
  void* data;
  int64_t sb, su;
};

// The pointwise part of one step of a cell on a GPU: from both products of its gates to the states. The products are
// the caller's. A GRU that resets before the product has one in the middle and takes two phases; all others have phase
// 0 alone. A matrix whose data is null is zero; results must be there.
struct CudaCellParams {
  Cell cell;
  DType dtype;  // of states and biases; half types compute in float32
  int phase;
  int64_t B, H;
  Strided gx;     // [B,G*H] compute type: W_ih x
  Strided gh;     // [B,G*H] compute type: W_hh h; reset before: [B,2*H] of r and z, in phase 1 [B,H] of W_hn (r h)
  Strided b_ih;   // [G*H]
  Strided b_hh;   // [G*H]
  Strided h;      // [B,H] the state before, GRU only
  Strided c;      // [B,H] the cell state before, LSTM only
  Strided h_new;  // [B,H]; reset before, phase 0: r h
  Strided c_new;  // [B,H] LSTM only
  Strided kept;   // [B,S*H] compute type; null: keep nothing. Reset before: always there, as z waits in it for phase 1
  void* stream;
};

// The backward of the same step, up to the gradients that the products take.
struct CudaCellGradParams {
  Cell cell;
  DType dtype;
  int phase;
  int64_t B, H;
  Strided kept;     // as forward left it
  Strided y;        // [B,H] compute type, RNN only: the state after, best before it was rounded
  Strided h;        // [B,H] the state before, GRU only
  Strided c;        // [B,H] the cell state before, LSTM only
  Strided dh;       // [B,H] gradient of the state after
  Strided dc;       // [B,H] gradient of the cell state after, LSTM only
  Strided drh;      // [B,H] compute type, reset before, phase 1: dn W_hn
  Strided dgates;   // [B,G*H] written: of W_ih x + b_ih. Reset before: z and n in phase 0, r in phase 1
  Strided dinner;   // [B,3*H] written by a GRU that resets after the product: of W_hh h + b_hh
  Strided dh_past;  // [B,H] compute type, written by a GRU: what reaches h past the products
  Strided dc_past;  // [B,H] written by an LSTM: the gradient of c
  void* stream;
};

// Attention on a GPU; everything the pointers name lies in device memory. Half types only; `threads` and the seed of
// `a` are not read, and a bias is float32 or of a half type. A window that reaches past all keys is given as unbounded.
struct CudaAttentionParams {
  AttentionParams a;
  const int64_t* seed;       // of dropout, or null
  const int32_t* positions;  // [1|B, S] the global keys in order, if some lie beyond a window, or null
  const int32_t* ranks;      // [1|B, S+1] how many of them stand before each key
  int64_t positions_sb, ranks_sb;
  // Keys cut into parts, each with sums of its own that a second kernel merges: [parts,B,Hq,L,Ev] and twice
  // [parts,B,Hq,L], float32. Part n has the keys from n * part on; the last one has none but the global ones, if there
  // are any beyond a window.
  int64_t parts, part;  // parts 1: not cut
  float *part_out, *part_top, *part_total;
  uint32_t* fault;  // set to 1 before a launch ends in an error, because a copy or warpgroup did not answer; or null
  bool stuck;       // the producer of a Hopper kernel, which tests make fall silent
  void* stream;
};

// Any result may be null (unwanted), dk and dv only together.
struct CudaAttentionGradParams {
  CudaAttentionParams fwd;  // as given to forward, in one part; out and lse as forward left them
  Heads dout;
  const void* dlse;  // [B,Hq,L] float32, or null (zero)
  Heads dq, dk, dv;  // rows and keys outside all packed sequences are left untouched
  Table dbias;       // float32, dense
  void* dalibi;      // [Hq] float32
  void* dsinks;      // [Hq] float32
  float* lse2;       // [B,Hq,L] scratch: lse in units of ln 2, +inf where a row sees nothing
  float* delta;      // [B,Hq,L] scratch: out . dout - dlse
  float* slopes;     // [B,Hq,L] scratch, zeros where rows are packed: what a row adds to -dalibi; null without dalibi
};

// Where the weights live and how the state travels; docs/gpu-scans.md.
enum class CudaTier : int { step = 0, block = 1, cluster = 2, grid = 3 };

struct CudaPlan {
  CudaTier tier;
  int ranks;  // CTAs that share the hidden units of one direction and tile of rows
  int rows;   // of a tile
  int units;  // of a rank
  int warps;
  bool by_warp;        // tier cluster: kernels whose warps go their own way (cuda/warp_scan.cuh)
  bool holding;        // of half types, in tiers block and cluster: as many weights as fit lie in registers
  int shared;          // bytes of a CTA
  int64_t workspace;   // bytes, zeros where `zeroed`
  int64_t packed;      // tier grid: where in the workspace weights lie that are read at every step; 0: there are none
  int64_t second_fed;  // tier step: where in the workspace lies what the products of odd turns take
  bool zeroed;
  int64_t together;  // groups of one launch, 0: all
  int64_t first;     // group of a launch, of those that come one after the other
  int stuck;         // a rank that tests make fall silent after its first step; -1: none
};

// Entry points of one ISA row of the CPU backend.
struct CpuTable {
  const char* name;
  Status (*forward)(const ScanParams&);
  Status (*backward)(const ScanGradParams&);
  // Weights as forward reads them, one block of memory (aligned to 64 bytes) per direction, for callers that keep them
  // from call to call. Returns the bytes of a block; writes nothing if `into` is null.
  int64_t (*pack)(const ScanParams&, void* const* into);
  Status (*attention_forward)(const AttentionParams&);
  Status (*attention_backward)(const AttentionGradParams&);
  Status (*layer_norm_forward)(const LayerNormParams&);
  Status (*layer_norm_backward)(const LayerNormGradParams&);
  Status (*bias_activation_forward)(const BiasActivationParams&);
  Status (*bias_activation_backward)(const BiasActivationGradParams&);
  Status (*linear_forward)(const LinearParams&);
  Status (*linear_backward)(const LinearGradParams&);
  // y[i] = f(x[i]) over n floats or doubles, which: 0 sigmoid, 1 tanh, 2 2^x. For the accuracy tests.
  void (*math)(int which, DType dtype, const void* x, void* y, int64_t n);
  // Multiply-adds on registers alone, as products of this dtype use them, on the calling thread: the ceiling that
  // benchmarks compare with. Returns how many operations (two for each multiply-add) the rounds took.
  int64_t (*multiply_adds)(DType dtype, int64_t rounds);
};

// The rows this machine can run, slowest first; `count` is filled in.
const CpuTable* const* cpu_tables(int* count);

}  // namespace fusedseq
