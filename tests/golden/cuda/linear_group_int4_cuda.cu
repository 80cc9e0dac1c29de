/* linear_group_int4_cuda: y[batch, 70] = epilogue(x[batch, 48] W^T + bias), float16, sm_90 */
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

namespace k_845f2c4011b36445 {

enum : int32_t {
  OUT = 70,
  IN = 48,
};

typedef uint16_t elem_t; /* bits of float16 */
static __device__ __forceinline__ float elem_float(elem_t e) { return half_float(e); }
static __device__ __forceinline__ elem_t float_elem(float s) { return float_half(s); }
enum : int32_t { ELEM_CODE = kDLFloat, ELEM_BITS = 8 * sizeof(elem_t) };

struct args_t {
  const elem_t *x;        /* [batch, IN] */
  elem_t *y;              /* [batch, OUT] */
  const elem_t *bias;     /* [OUT] */
  const elem_t *residual; /* [batch, OUT] */
  const elem_t *values;
  const uint16_t *codes;
  const int32_t *indices;
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

/* y[b, r] = epilogue(s). */
static __device__ __forceinline__ void emit(const args_t &a, int64_t b, int32_t r, float s) {
  s += elem_float(a.bias[r]);
  s = 0.5f * s * (1.0f + erff(s * 0x1.6a09e6p-1f));
  a.y[b * OUT + r] = float_elem(s);
}

enum : int32_t { GROUP = 16, BITS = 4, GROUPS = IN / GROUP };

static __device__ __forceinline__ float decoded(float scale, float low, uint64_t codes, int i) {
  return elem_float(float_elem(fmaf(scale, (float)((uint32_t)(codes >> BITS * i) & ((1u << BITS) - 1)), low)));
}

/* s[b] += 16 values of W times 16 inputs of the rows of x. */
template <int COUNT> static __device__ __forceinline__ void
add_group(float (&s)[COUNT], const elem_t *const (&x)[COUNT], int32_t group, const elem_t *scale, uint64_t codes) {
  const float step = elem_float(scale[0]), low = elem_float(scale[1]);
#pragma unroll
  for (int i = 0; i < GROUP; i++) {
    const float w = decoded(step, low, codes, i);
#pragma unroll
    for (int b = 0; b < COUNT; b++) s[b] += w * elem_float(x[b][group * GROUP + i]);
  }
}

/* COUNT rows of x from b0; rows past the batch repeat the last one, and nobody stores their sums. */
template <int COUNT> static __device__ __forceinline__ void rows_of(const elem_t *(&x)[COUNT], const args_t &a, int64_t b0) {
#pragma unroll
  for (int b = 0; b < COUNT; b++) x[b] = a.x + (b0 + b < a.batch ? b0 + b : a.batch - 1) * IN;
}

/* The sums of a warp's lanes, in every lane. */
template <int COUNT> static __device__ __forceinline__ void reduce(float (&s)[COUNT]) {
#pragma unroll
  for (int b = 0; b < COUNT; b++)
#pragma unroll
    for (int step = 16; step > 0; step /= 2) s[b] += lane_xor(s[b], step);
}

enum : int32_t { WARPS = 4, LEAST = 64 }; /* LEAST: groups and row ends of a warp */

static __device__ __forceinline__ int32_t row_begin(const args_t &a, int32_t r) { return a.pointers[r]; }
static __device__ __forceinline__ int32_t row_end(const args_t &a, int32_t r) { return a.pointers[r + 1]; }

/* How many of the first `step` steps of the merged list are row ends: row r ends at step row_end(r) + r. */
static __device__ __forceinline__ int32_t rows_before(const args_t &a, int64_t step) {
  int32_t low = step > a.stored / 2 ? (int32_t)(step - a.stored / 2) : 0, high = step < OUT ? (int32_t)step : OUT;
  while (low < high) {
    const int32_t mid = low + (high - low) / 2;
    if ((int64_t)row_end(a, mid) + mid < step) low = mid + 1;
    else high = mid;
  }
  return low;
}

/* s[b] += groups [p, end), one to a lane. */
template <int COUNT> static __device__ __forceinline__ void
sum_groups(float (&s)[COUNT], const args_t &a, const elem_t *const (&x)[COUNT], int32_t p, int32_t end) {
  for (p += threadIdx.x % 32; p < end; p += 32) {
    const uint16_t *codes = a.codes + (int64_t)p * BITS;
    const uint64_t bits = codes[0] | (uint64_t)codes[1] << 16 | (uint64_t)codes[2] << 32 | (uint64_t)codes[3] << 48;
    add_group<COUNT>(s, x, a.indices[p], a.values + 2 * (int64_t)p, bits);
  }
  reduce<COUNT>(s);
}

template <int COUNT> static __global__ void __launch_bounds__(32 * WARPS)
gemv(const args_t a, float *ends, float *carries, int32_t workers, int32_t share) {
  const int32_t lane = threadIdx.x % 32, worker = blockIdx.x * WARPS + threadIdx.x / 32;
  const int64_t b0 = (int64_t)blockIdx.y * COUNT, total = a.stored / 2 + OUT;
  if (worker >= workers) return;
  const elem_t *x[COUNT];
  rows_of<COUNT>(x, a, b0);
  const int64_t from = (int64_t)worker * share, to = from + share < total ? from + share : total;
  const int32_t last = rows_before(a, to);
  int32_t r = rows_before(a, from), p = (int32_t)(from - r);
  for (; r <= last; r++) { /* the last one is cut: its end is not ours */
    float s[COUNT] = {};
    const int32_t end = r < last ? row_end(a, r) : (int32_t)(to - last);
    sum_groups<COUNT>(s, a, x, p, end);
    float *to_sums = r < last ? ends + (int64_t)blockIdx.y * COUNT * OUT + (int64_t)r * COUNT : carries + ((int64_t)blockIdx.y * workers + worker) * COUNT;
#pragma unroll
    for (int b = 0; b < COUNT; b++)
      if (lane == 0) to_sums[b] = s[b];
    p = end;
  }
}

template <int COUNT> static __global__ void __launch_bounds__(128)
finish(const args_t a, const float *ends, const float *carries, int32_t workers, int32_t share) {
  const int64_t i = (int64_t)blockIdx.x * 128 + threadIdx.x;
  if (i >= a.batch * OUT) return;
  const int32_t r = (int32_t)(i % OUT), panel = (int32_t)(i / OUT / COUNT), b = (int32_t)(i / OUT % COUNT);
  const int64_t first = ((int64_t)row_begin(a, r) + r + share - 1) / share - 1, last = ((int64_t)row_end(a, r) + r) / share - 1;
  float s = 0.0f;
  for (int64_t w = first < 0 ? 0 : first; w <= last; w++) s += carries[((int64_t)panel * workers + w) * COUNT + b];
  emit(a, i / OUT, r, s + ends[((int64_t)panel * OUT + r) * COUNT + b]);
}

template <int COUNT> static const char *launch_gemv(const args_t &a, cudaStream_t stream) {
  int processors = 1;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, a.device);
  const int64_t total = a.stored / 2 + OUT, panels = (a.batch + COUNT - 1) / COUNT, even = total / (32 * processors);
  const int32_t share = (int32_t)(even > LEAST ? even : LEAST), workers = (int32_t)((total + share - 1) / share);
  workspace_t scratch;
  float *ends = (float *)scratch.get(a, panels * COUNT * (OUT + workers) * (int64_t)sizeof(float));
  if (ends == nullptr) return NO_MEMORY;
  float *carries = ends + panels * COUNT * OUT;
  LAUNCH(gemv<COUNT>, dim3((workers + WARPS - 1) / WARPS, (uint32_t)panels), 32 * WARPS, 0, stream, a, ends, carries, workers, share);
  LAUNCH(finish<COUNT>, dim3((uint32_t)((a.batch * OUT + 127) / 128)), 128, 0, stream, a, ends, carries, workers, share);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

static const char *launch(const args_t &a, cudaStream_t stream) {
  if (a.batch == 1) return launch_gemv<1>(a, stream);
  return a.batch <= 4 ? launch_gemv<4>(a, stream) : launch_gemv<8>(a, stream);
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

extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_k_845f2c4011b36445(void *, const TVMFFIAny *args, int32_t count, TVMFFIAny *ret) {
  if (count != 8) return refuse("ValueError", "expected x, y, bias, residual, values, codes, indices, pointers");
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
  if (a.batch * IN != inputs) return refuse("ValueError", "x must hold rows of 48 elements");
  if (a.batch * OUT != outputs) return refuse("ValueError", "y must hold 70 elements for each row of x");
  if (elements(tensor_of(args + 2), x, ELEM_CODE, ELEM_BITS) != OUT) return refuse("ValueError", "bias must hold 70 x float16 on the device of x");
  a.bias = data_of<const elem_t>(tensor_of(args + 2));
  if (args[3].type_index != kTVMFFINone) return refuse("ValueError", "this kernel was compiled without a residual: pass None");
  const DLTensor *values = tensor_of(args + 4);
  const int64_t values_size = elements(values, x, ELEM_CODE, ELEM_BITS);
  if (values_size < 0) return refuse("ValueError", "values must be a contiguous tensor of float16 on the device of x");
  a.values = data_of<const elem_t>(values);
  a.stored = values_size;
  const DLTensor *codes = tensor_of(args + 5);
  const int64_t codes_size = elements(codes, x, kDLInt, 16);
  if (codes_size < 0) return refuse("ValueError", "codes must be a contiguous tensor of int16 on the device of x");
  if (codes_size != values_size / 2 * BITS) return refuse("ValueError", "codes has the wrong number of elements");
  a.codes = data_of<const uint16_t>(codes);
  const DLTensor *indices = tensor_of(args + 6);
  const int64_t indices_size = elements(indices, x, kDLInt, 32);
  if (indices_size < 0) return refuse("ValueError", "indices must be a contiguous tensor of int32 on the device of x");
  if (indices_size != values_size / 2) return refuse("ValueError", "indices has the wrong number of elements");
  a.indices = data_of<const int32_t>(indices);
  const DLTensor *pointers = tensor_of(args + 7);
  const int64_t pointers_size = elements(pointers, x, kDLInt, 32);
  if (pointers_size < 0) return refuse("ValueError", "pointers must be a contiguous tensor of int32 on the device of x");
  if (pointers_size != OUT + 1) return refuse("ValueError", "pointers has the wrong number of elements");
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
