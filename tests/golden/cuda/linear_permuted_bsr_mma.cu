/* linear_permuted_bsr_mma: y[batch, 70] = epilogue(x[batch, 51] W^T + bias), float16, sm_90 */
#include <stdint.h>
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#ifndef SPARSEC_DEVICE
#define SPARSEC_DEVICE kDLCUDA
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
__device__ __forceinline__ float half_float(uint16_t e) { return __half2float(__ushort_as_half(e)); }
__device__ __forceinline__ uint16_t float_half(float s) { return __half_as_ushort(__float2half_rn(s)); }
__device__ __forceinline__ float bf16_float(uint16_t e) { return __uint_as_float((uint32_t)e << 16); }
__device__ __forceinline__ uint16_t float_bf16(float s) { return __bfloat16_as_ushort(__float2bfloat16_rn(s)); }
__device__ __forceinline__ float lane_xor(float s, int mask) { return __shfl_xor_sync(0xffffffffu, s, mask); }
__device__ __forceinline__ float from_lane(float s, int lane) { return __shfl_sync(0xffffffffu, s, lane); }
__device__ __forceinline__ uint32_t bits_from_lane(uint32_t s, int lane) { return __shfl_sync(0xffffffffu, s, lane); }
__device__ __forceinline__ bool any_lane(bool s) { return __any_sync(0xffffffffu, s); }
__device__ __forceinline__ int count_bits(uint32_t s) { return __popc(s); }
__device__ __forceinline__ void warp_sync() { __syncwarp(); }
#endif

#ifndef SPARSEC_COPIES
#define SPARSEC_COPIES
/* 16 bytes from global to shared memory behind the processor's back; zeros when `real` is false. */
__device__ __forceinline__ void copy_async(void *to, const void *from, bool real) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(real ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/* Waits until at most `pending` of the groups committed by this thread are under way. */
template <int pending> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory");
}
#endif

#ifndef SPARSEC_MMA
#define SPARSEC_MMA
/* Four (two) 8 x 8 matrices of 16-bit entries; lane l gives the address of row l % 8 of matrix l / 8. */
__device__ __forceinline__ void load_matrix_4(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}
__device__ __forceinline__ void load_matrix_2(uint32_t (&r)[2], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
}
/* d (16 x 8, fp32) += a (16 x 16, by rows) b (16 x 8, by columns). */
__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

namespace k_7db228a85b361c15 {

enum : int32_t {
  OUT = 70,
  IN = 51,
};

typedef uint16_t elem_t; /* bits of float16 */
static __device__ __forceinline__ float elem_float(elem_t e) { return half_float(e); }
static __device__ __forceinline__ elem_t float_elem(float s) { return float_half(s); }
enum : int32_t { ELEM_CODE = kDLFloat, ELEM_BITS = 8 * sizeof(elem_t) };

enum : int32_t { R = 16, C = 16, BLOCK_ROWS = 5 }; /* rows and columns of a block */

enum : int32_t {
  WARPS = 4,
  STAGES = 4, /* tiles of W and x that a warp has under way */
  SLABS = (OUT + 15) / 16,
  SLICES = C / 16, /* tiles in a block, along the inputs */
};

struct args_t {
  const elem_t *x;        /* [batch, IN] */
  elem_t *y;              /* [batch, OUT] */
  const elem_t *bias;     /* [OUT] */
  const elem_t *residual; /* [batch, OUT] */
  const elem_t *values;
  const uint16_t *indices;
  const int32_t *pointers;
  const int32_t *row_places;
  int64_t batch;
  int64_t stored; /* elements of the first buffer */
  int32_t device;
  bool aligned; /* x begins at a multiple of 16 bytes */
};

/* y[b, r] = epilogue(s). */
static __device__ __forceinline__ void emit(const args_t &a, int64_t b, int32_t r, float s) {
  r = a.row_places[r]; /* rows were reordered: this is the output that row r is */
  s += elem_float(a.bias[r]);
  s = 0.5f * s * (1.0f + erff(s * 0x1.6a09e6p-1f));
  a.y[b * OUT + r] = float_elem(s);
}

__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_half(d, a, b); }

/* Where chunk `chunk` of 8 entries of a row lies in a tile WIDTH entries wide. Chunks change places from row to row so
   that the eight rows which ldmatrix reads at once lie in different banks. */
template <int WIDTH> static __device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int CHUNKS = WIDTH / 8;
  return row * WIDTH + (chunk ^ row / (8 / CHUNKS) % CHUNKS) * 8;
}

template <int WIDTH> static __device__ __forceinline__ float entry(const elem_t *tile, int row, int k) {
  return elem_float(tile[swizzled<WIDTH>(row, k / 8) + k % 8]);
}

/* Starts copying x[b0 .. b0 + N)[k0 .. k0 + WIDTH) into a tile; zeros behind the last row and the last input. */
template <int WIDTH, int N, int THREADS> static __device__ __forceinline__ void
stage(elem_t *tile, const args_t &a, int64_t b0, int32_t k0, int32_t thread) {
  for (int32_t i = thread; i < N * (WIDTH / 8); i += THREADS) {
    const int32_t n = i / (WIDTH / 8), k = k0 + i % (WIDTH / 8) * 8;
    const int64_t b = b0 + n;
    elem_t *to = tile + swizzled<WIDTH>(n, i % (WIDTH / 8));
#pragma unroll
    for (int e = 0; e < 8; e++) to[e] = b < a.batch && k + e < IN ? a.x[b * IN + k + e] : (elem_t)0;
  }
}

/* Fragments of the 16 x 16 entries of W at (row, k), and of the N x 16 entries of x at k. */
template <int WIDTH> static __device__ __forceinline__ void load_w(uint32_t (&f)[4], const elem_t *tile, int row, int k) {
  const int lane = threadIdx.x % 32;
  load_matrix_4(f, tile + swizzled<WIDTH>(row + lane % 16, k / 8 + lane / 16));
}

template <int WIDTH, int N> static __device__ __forceinline__ void load_x(uint32_t (&f)[N / 8][2], const elem_t *tile, int k) {
  const int lane = threadIdx.x % 32;
  if constexpr (N == 8) {
    load_matrix_2(f[0], tile + swizzled<WIDTH>(lane % 8, k / 8 + lane / 8 % 2));
  } else {
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
      uint32_t pair[4];
      load_matrix_4(pair, tile + swizzled<WIDTH>(8 * n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
      f[n][0] = pair[0], f[n][1] = pair[1], f[n + 1][0] = pair[2], f[n + 1][1] = pair[3];
    }
  }
}

template <int N, class Use> static __device__ __forceinline__ void drain(float *scratch, const float (&d)[N / 8][4], Use use) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N / 8; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) scratch[(8 * n + lane % 4 * 2 + i % 2) * 17 + lane / 4 + i / 2 * 8] = d[n][i];
  warp_sync();
  for (int i = lane; i < 16 * N; i += 32) use(i % 16, i / 16, scratch[i / 16 * 17 + i % 16]);
  warp_sync();
}


template <int N> static __global__ void __launch_bounds__(32 * WARPS) blocks(const args_t a) {
  constexpr int32_t STAGE = (16 + N) * 16;
  DYNAMIC_SHARED(shared);
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, slab = blockIdx.x * WARPS + warp, r0 = slab * 16;
  const int64_t b0 = (int64_t)blockIdx.y * N;
  if (slab >= SLABS) return;
  elem_t *tiles = (elem_t *)shared + warp * STAGES * STAGE;
  const int32_t begin = a.pointers[r0 / R], steps = (a.pointers[r0 / R + 1] - begin) * SLICES;
  float sums[N / 8][4] = {};

  auto fetch = [&](int32_t step) {
    if (step < steps) {
      const int32_t p = begin + step / SLICES, slice = step % SLICES * 16;
      elem_t *tile = tiles + step % STAGES * STAGE;
      const elem_t *w = a.values + ((int64_t)p * R + r0 % R + lane / 2) * C + slice + lane % 2 * 8;
      copy_async(tile + swizzled<16>(lane / 2, lane % 2), w, true);
      stage<16, N, 32>(tile + 256, a, b0, a.indices[p] * C + slice, lane);
    }
    copy_commit();
  };

  for (int32_t step = 0; step < STAGES - 1; step++) fetch(step);
  for (int32_t step = 0; step < steps; step++) {
    copy_wait<STAGES - 2>();
    warp_sync(); /* the tile of this step is there for all lanes, and all have read that of the last step */
    fetch(step + STAGES - 1);
    const elem_t *tile = tiles + step % STAGES * STAGE;
    uint32_t w[4], x[N / 8][2];
    load_w<16>(w, tile, 0, 0);
    load_x<16, N>(x, tile + 256, 0);
#pragma unroll
    for (int n = 0; n < N / 8; n++) mma(sums[n], w, x[n]);
  }
  copy_wait<0>();
  warp_sync();
  drain<N>((float *)tiles, sums, [&](int32_t r, int32_t n, float s) {
    if (r0 + r < OUT && b0 + n < a.batch) emit(a, b0 + n, r0 + r, s);
  });
}

template <int N> static const char *launch_blocks(const args_t &a, cudaStream_t stream) {
  constexpr int32_t SHARED = WARPS * STAGES * (16 + N) * 16 * (int32_t)sizeof(elem_t);
  static_assert(STAGES * (16 + N) * 16 * sizeof(elem_t) >= N * 17 * sizeof(float), "a warp drains through its tiles");
  static_assert(SHARED <= 48 * 1024, "more shared memory must be asked for");
  if ((uintptr_t)a.values % 16) return "values must begin at a multiple of 16 bytes";
  const dim3 grid((SLABS + WARPS - 1) / WARPS, (uint32_t)((a.batch + N - 1) / N));
  LAUNCH(blocks<N>, grid, 32 * WARPS, SHARED, stream, a);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

static const char *launch(const args_t &a, cudaStream_t stream) {
  if (a.batch <= 8) return launch_blocks<8>(a, stream);
  if (a.batch <= 16) return launch_blocks<16>(a, stream);
  if (a.batch <= 32) return launch_blocks<32>(a, stream);
  return launch_blocks<64>(a, stream);
}

static int refuse(const char *kind, const char *message) {
  TVMFFIErrorSetRaisedFromCStr(kind, message);
  return -1;
}

static const DLTensor *tensor_of(const TVMFFIAny *any) {
  if (any->type_index == kTVMFFIDLTensorPtr) return (const DLTensor *)any->v_ptr;
  if (any->type_index == kTVMFFITensor) return (const DLTensor *)((const char *)any->v_obj + sizeof(TVMFFIObject));
  return nullptr;
}

/* Elements of a contiguous tensor of this type on the device of `like`, or -1. */
static int64_t elements(const DLTensor *t, const DLTensor *like, int code, int bits) {
  if (t == nullptr || t->device.device_type != SPARSEC_DEVICE || t->device.device_id != like->device.device_id) return -1;
  if (t->dtype.code != code || t->dtype.bits != bits || t->dtype.lanes != 1) return -1;
  int64_t count = 1;
  bool dense = true;
  for (int32_t i = t->ndim - 1; i >= 0; i--) {
    dense &= t->strides == nullptr || t->shape[i] == 1 || t->strides[i] == count;
    count *= t->shape[i];
  }
  return dense || count == 0 ? count : -1;
}

template <class T> static T *data_of(const DLTensor *t) { return (T *)((char *)t->data + t->byte_offset); }

extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_k_7db228a85b361c15(void *, const TVMFFIAny *args, int32_t count, TVMFFIAny *ret) {
  if (count != 8) return refuse("ValueError", "expected x, y, bias, residual, values, indices, pointers, row_places");
  const DLTensor *x = tensor_of(args), *y = tensor_of(args + 1);
  const int64_t inputs = x == nullptr ? -1 : elements(x, x, ELEM_CODE, ELEM_BITS);
  if (inputs < 0) return refuse("ValueError", "x must be a contiguous CUDA tensor of float16");
  const int64_t outputs = elements(y, x, ELEM_CODE, ELEM_BITS);
  if (outputs < 0) return refuse("ValueError", "y must be a contiguous tensor of float16 on the device of x");
  args_t a = {};
  a.x = data_of<const elem_t>(x);
  a.y = data_of<elem_t>(y);
  a.batch = inputs / IN;
  a.aligned = (uintptr_t)a.x % 16 == 0;
  if (a.batch * IN != inputs) return refuse("ValueError", "x must hold rows of 51 elements");
  if (a.batch * OUT != outputs) return refuse("ValueError", "y must hold 70 elements for each row of x");
  if (elements(tensor_of(args + 2), x, ELEM_CODE, ELEM_BITS) != OUT) return refuse("ValueError", "bias must hold 70 x float16 on the device of x");
  a.bias = data_of<const elem_t>(tensor_of(args + 2));
  if (args[3].type_index != kTVMFFINone) return refuse("ValueError", "this kernel was compiled without a residual: pass None");
  const DLTensor *values = tensor_of(args + 4);
  const int64_t values_size = elements(values, x, ELEM_CODE, ELEM_BITS);
  if (values_size < 0) return refuse("ValueError", "values must be a contiguous tensor of float16 on the device of x");
  a.values = data_of<const elem_t>(values);
  a.stored = values_size;
  const DLTensor *indices = tensor_of(args + 5);
  const int64_t indices_size = elements(indices, x, kDLInt, 16);
  if (indices_size < 0) return refuse("ValueError", "indices must be a contiguous tensor of int16 on the device of x");
  if (indices_size != values_size / (R * C)) return refuse("ValueError", "indices has the wrong number of elements");
  a.indices = data_of<const uint16_t>(indices);
  const DLTensor *pointers = tensor_of(args + 6);
  const int64_t pointers_size = elements(pointers, x, kDLInt, 32);
  if (pointers_size < 0) return refuse("ValueError", "pointers must be a contiguous tensor of int32 on the device of x");
  if (pointers_size != BLOCK_ROWS + 1) return refuse("ValueError", "pointers has the wrong number of elements");
  a.pointers = data_of<const int32_t>(pointers);
  const DLTensor *row_places = tensor_of(args + 7);
  const int64_t row_places_size = elements(row_places, x, kDLInt, 32);
  if (row_places_size < 0) return refuse("ValueError", "row_places must be a contiguous tensor of int32 on the device of x");
  if (row_places_size != OUT) return refuse("ValueError", "row_places has the wrong number of elements");
  a.row_places = data_of<const int32_t>(row_places);
  ret->type_index = kTVMFFINone;
  ret->zero_padding = 0;
  ret->v_int64 = 0;
  if (a.batch == 0) return 0;
  a.device = x->device.device_id;
  int current = a.device;
  cudaGetDevice(&current);
  if (current != a.device) cudaSetDevice(a.device);
  const char *failure = launch(a, (cudaStream_t)TVMFFIEnvGetStream(SPARSEC_DEVICE, a.device));
  if (current != a.device) cudaSetDevice(current);
  return failure == nullptr ? 0 : refuse("RuntimeError", failure);
}

} // namespace
