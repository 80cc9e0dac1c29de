/* linear_csr_cuda: y[batch, 70] = epilogue(x[batch, 51] W^T + bias), float16, sm_90 */
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

namespace k_4cab72b61524a613 {

enum : int32_t {
  OUT = 70,
  IN = 51,
};

typedef uint16_t elem_t; /* bits of float16 */
static __device__ __forceinline__ float elem_float(elem_t e) { return half_float(e); }
static __device__ __forceinline__ elem_t float_elem(float s) { return float_half(s); }
enum : int32_t { ELEM_CODE = kDLFloat, ELEM_BITS = 8 * sizeof(elem_t) };

enum : int32_t { BLOCKS = 1 }; /* pointers of a row */

struct args_t {
  const elem_t *x;        /* [batch, IN] */
  elem_t *y;              /* [batch, OUT] */
  const elem_t *bias;     /* [OUT] */
  const elem_t *residual; /* [batch, OUT] */
  const elem_t *values;
  const uint16_t *indices;
  const int32_t *pointers;
  int64_t batch;
  int64_t stored; /* elements of the first buffer */
  int32_t device;
  bool aligned; /* x begins at a multiple of 16 bytes */
};

struct workspace_t {
  TVMFFIObjectHandle owner = nullptr;
  void *get(const args_t &a, int64_t bytes) {
    DLTensor like = {};
    like.device = {SPARSEC_DEVICE, a.device};
    like.ndim = 1;
    like.dtype = {kDLUInt, 8, 1};
    like.shape = &bytes;
    if (TVMFFIEnvTensorAlloc(&like, &owner) != 0) return nullptr;
    return ((const DLTensor *)((const char *)owner + sizeof(TVMFFIObject)))->data;
  }
  ~workspace_t() {
    if (owner != nullptr) TVMFFIObjectDecRef(owner);
  }
};
static const char *const NO_MEMORY = "out of device memory for scratch; free some or use a smaller batch";

static __device__ __forceinline__ int32_t row_begin(const args_t &a, int32_t r) { return a.pointers[(int64_t)r * BLOCKS]; }
static __device__ __forceinline__ int32_t row_end(const args_t &a, int32_t r) { return a.pointers[(int64_t)(r + 1) * BLOCKS]; }
static __device__ __forceinline__ elem_t value(const args_t &a, int32_t, int32_t p) { return a.values[p]; }
static __device__ __forceinline__ int32_t column(const args_t &a, int32_t, int32_t p) { return a.indices[p]; }

/* y[b, r] = epilogue(s). */
static __device__ __forceinline__ void emit(const args_t &a, int64_t b, int32_t r, float s) {
  s += elem_float(a.bias[r]);
  s = 0.5f * s * (1.0f + erff(s * 0x1.6a09e6p-1f));
  a.y[b * OUT + r] = float_elem(s);
}

enum : int32_t { WARPS = 4 };

/* y[b0 .. b0 + COUNT): rows past the batch repeat the last one and are not stored. */
template <int COUNT> static __global__ void __launch_bounds__(32 * WARPS) gemv(const args_t a) {
  const int32_t lane = threadIdx.x % 32, r = blockIdx.x * WARPS + threadIdx.x / 32;
  const int64_t b0 = (int64_t)blockIdx.y * COUNT;
  if (r >= OUT) return;
  const elem_t *x[COUNT];
  float s[COUNT];
#pragma unroll
  for (int b = 0; b < COUNT; b++) {
    x[b] = a.x + (b0 + b < a.batch ? b0 + b : a.batch - 1) * IN;
    s[b] = 0.0f;
  }
  const int32_t end = row_end(a, r);
  for (int32_t p = row_begin(a, r) + lane; p < end; p += 32) {
    const float w = elem_float(value(a, r, p));
    const int32_t k = column(a, r, p);
#pragma unroll
    for (int b = 0; b < COUNT; b++) s[b] += w * elem_float(x[b][k]);
  }
#pragma unroll
  for (int b = 0; b < COUNT; b++) {
    for (int step = 16; step > 0; step /= 2) s[b] += lane_xor(s[b], step);
    if (lane == 0 && b0 + b < a.batch) emit(a, b0 + b, r, s[b]);
  }
}

static void launch_gemv(const args_t &a, cudaStream_t stream) {
  const uint32_t blocks = (OUT + WARPS - 1) / WARPS;
  if (a.batch == 1) LAUNCH(gemv<1>, dim3(blocks), 32 * WARPS, 0, stream, a);
  else if (a.batch == 2) LAUNCH(gemv<2>, dim3(blocks), 32 * WARPS, 0, stream, a);
  else if (a.batch <= 4) LAUNCH(gemv<4>, dim3(blocks), 32 * WARPS, 0, stream, a);
  else LAUNCH(gemv<8>, dim3(blocks, (uint32_t)((a.batch + 7) / 8)), 32 * WARPS, 0, stream, a);
}

enum : int32_t { TILE = 32, EDGE = TILE + 1 }; /* the odd edge keeps columns of a tile in different banks */

/* xt[k][b] = x[b][k] of `width` columns k; columns b past the batch are zeros up to `wide`. */
static __global__ void __launch_bounds__(256) transpose(const elem_t *x, int64_t batch, int32_t width, elem_t *xt, int64_t wide) {
  DYNAMIC_SHARED(shared);
  elem_t *tile = (elem_t *)shared;
  const int32_t i = threadIdx.x % TILE, j = threadIdx.x / TILE;
  const int32_t k0 = blockIdx.x * TILE;
  const int64_t b0 = (int64_t)blockIdx.y * TILE;
  for (int32_t n = j; n < TILE; n += 8) {
    const bool real = b0 + n < batch && k0 + i < width;
    tile[n * EDGE + i] = real ? x[(b0 + n) * width + k0 + i] : float_elem(0.0f);
  }
  __syncthreads();
  for (int32_t n = j; n < TILE; n += 8)
    if (k0 + n < width) xt[(int64_t)(k0 + n) * wide + b0 + i] = tile[i * EDGE + n];
}

static void launch_transpose(const elem_t *x, int64_t batch, int32_t width, elem_t *xt, int64_t wide, cudaStream_t stream) {
  const dim3 grid((width + TILE - 1) / TILE, (uint32_t)(wide / TILE));
  LAUNCH(transpose, grid, 256, TILE * EDGE * sizeof(elem_t), stream, x, batch, width, xt, wide);
}

enum : int32_t { PANEL_ROWS = 8 }; /* rows of W in a block: neighbours in y, so that stores fill sectors */

template <int SPAN> static __device__ __forceinline__ void
sum_entries(const args_t &a, const elem_t *xt, int64_t wide, int64_t b, int32_t r, int32_t p, int32_t end, int32_t lane, float (&s)[SPAN]) {
  for (; p < end; p += 32) {
    const int32_t n = end - p < 32 ? end - p : 32;
    const float mine = lane < n ? elem_float(value(a, r, p + lane)) : 0.0f;
    const uint32_t place = lane < n ? column(a, r, p + lane) : 0;
#pragma unroll 4
    for (int32_t j = 0; j < n; j++) {
      const float w = from_lane(mine, j);
      const elem_t *from = xt + (int64_t)bits_from_lane(place, j) * wide + b;
#pragma unroll
      for (int i = 0; i < SPAN; i++) s[i] += w * elem_float(from[32 * i]);
    }
  }
}

/* Stores sums held as (warp = row, lane = row of x) with neighbouring threads on neighbouring rows of W. */
template <int SPAN> static __device__ __forceinline__ void
store_panel(const args_t &a, float *tile, int32_t r0, int64_t b0, const float (&s)[SPAN]) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < SPAN; i++) tile[(lane + 32 * i) * (PANEL_ROWS + 1) + warp] = s[i];
  __syncthreads();
  for (int32_t n = threadIdx.x; n < 32 * SPAN * PANEL_ROWS; n += 32 * PANEL_ROWS) {
    const int32_t r = r0 + n % PANEL_ROWS;
    const int64_t b = b0 + n / PANEL_ROWS;
    if (r < OUT && b < a.batch) emit(a, b, r, tile[n / PANEL_ROWS * (PANEL_ROWS + 1) + n % PANEL_ROWS]);
  }
}

template <int SPAN> static __global__ void __launch_bounds__(32 * PANEL_ROWS) panel(const args_t a, const elem_t *xt, int64_t wide) {
  DYNAMIC_SHARED(shared);
  const int32_t lane = threadIdx.x % 32, r0 = blockIdx.x * PANEL_ROWS, r = r0 + threadIdx.x / 32;
  const int64_t b0 = (int64_t)blockIdx.y * 32 * SPAN;
  float s[SPAN] = {};
  if (r < OUT) sum_entries<SPAN>(a, xt, wide, b0 + lane, r, row_begin(a, r), row_end(a, r), lane, s);
  store_panel<SPAN>(a, (float *)shared, r0, b0, s);
}

template <int SPAN> static const char *launch_panel(const args_t &a, cudaStream_t stream) {
  const int64_t panels = (a.batch + 32 * SPAN - 1) / (32 * SPAN), wide = panels * 32 * SPAN;
  workspace_t scratch;
  elem_t *xt = (elem_t *)scratch.get(a, wide * IN * (int64_t)sizeof(elem_t));
  if (xt == nullptr) return NO_MEMORY;
  launch_transpose(a.x, a.batch, IN, xt, wide, stream);
  const dim3 grid((OUT + PANEL_ROWS - 1) / PANEL_ROWS, (uint32_t)panels);
  LAUNCH(panel<SPAN>, grid, 32 * PANEL_ROWS, 32 * SPAN * (PANEL_ROWS + 1) * sizeof(float), stream, a, xt, wide);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

static const char *launch(const args_t &a, cudaStream_t stream) {
  if (a.batch <= 8) {
    launch_gemv(a, stream);
    const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
  }
  if (a.batch <= 63) {
    return launch_panel<1>(a, stream);
  }
  {
    return launch_panel<2>(a, stream);
  }
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

extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_k_4cab72b61524a613(void *, const TVMFFIAny *args, int32_t count, TVMFFIAny *ret) {
  if (count != 7) return refuse("ValueError", "expected x, y, bias, residual, values, indices, pointers");
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
  if (indices_size != values_size) return refuse("ValueError", "indices has the wrong number of elements");
  a.indices = data_of<const uint16_t>(indices);
  const DLTensor *pointers = tensor_of(args + 6);
  const int64_t pointers_size = elements(pointers, x, kDLInt, 32);
  if (pointers_size < 0) return refuse("ValueError", "pointers must be a contiguous tensor of int32 on the device of x");
  if (pointers_size != (int64_t)OUT * BLOCKS + 1) return refuse("ValueError", "pointers has the wrong number of elements");
  a.pointers = data_of<const int32_t>(pointers);
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
