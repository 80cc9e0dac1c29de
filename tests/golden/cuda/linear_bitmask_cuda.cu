/* linear_bitmask_cuda: y[batch, 70] = epilogue(x[batch, 51] W^T + bias), float16, sm_90 */
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

namespace k_95c5b0c72d6a2c56 {

enum : int32_t {
  OUT = 70,
  IN = 51,
};

typedef uint16_t elem_t; /* bits of float16 */
static __device__ __forceinline__ float elem_float(elem_t e) { return half_float(e); }
static __device__ __forceinline__ elem_t float_elem(float s) { return float_half(s); }
enum : int32_t { ELEM_CODE = kDLFloat, ELEM_BITS = 8 * sizeof(elem_t) };

enum : int32_t {
  MASKS = 2, /* of a row */
  WORDS = (IN + 31) / 32, /* 32 columns each */
  WARPS = 4,
};

struct args_t {
  const elem_t *x;        /* [batch, IN] */
  elem_t *y;              /* [batch, OUT] */
  const elem_t *bias;     /* [OUT] */
  const elem_t *residual; /* [batch, OUT] */
  const elem_t *values;
  const uint32_t *masks;
  const int32_t *pointers;
  int64_t batch;
  int64_t stored; /* elements of the first buffer */
  int32_t device;
  bool aligned; /* x begins at a multiple of 16 bytes */
};

/* y[b, r] = epilogue(s). */
static __device__ __forceinline__ void emit(const args_t &a, int64_t b, int32_t r, float s) {
  s += elem_float(a.bias[r]);
  s = 0.5f * s * (1.0f + erff(s * 0x1.6a09e6p-1f));
  a.y[b * OUT + r] = float_elem(s);
}


/* The bits of columns 32 w to 32 w + 31 of a row. */
static __device__ __forceinline__ uint32_t word(const args_t &a, int32_t r, int32_t w) {
  if (w >= WORDS) return 0;
  return a.masks[(int64_t)r * MASKS + w];
}

template <int COUNT> static __global__ void __launch_bounds__(32 * WARPS) gemv(const args_t a) {
  const int32_t lane = threadIdx.x % 32, r = blockIdx.x * WARPS + threadIdx.x / 32;
  const int64_t b0 = (int64_t)blockIdx.y * COUNT;
  if (r >= OUT) return;
  const elem_t *x[COUNT];
  float s[COUNT];
#pragma unroll
  for (int b = 0; b < COUNT; b++) {
    x[b] = a.x + (b0 + b < a.batch ? b0 + b : a.batch - 1) * IN; /* rows past the batch are not stored */
    s[b] = 0.0f;
  }
  const elem_t *values = a.values + a.pointers[(int64_t)r * 1];
  for (int32_t w0 = 0; w0 < WORDS; w0 += 32) {
    const uint32_t mine = word(a, r, w0 + lane);
    const int32_t n = WORDS - w0 < 32 ? WORDS - w0 : 32;
#pragma unroll 4
    for (int32_t j = 0; j < n; j++) {
      const uint32_t bits = bits_from_lane(mine, j);
      if (bits >> lane & 1) {
        const float w = elem_float(values[count_bits(bits & ((1u << lane) - 1))]);
        const int32_t k = (w0 + j) * 32 + lane;
#pragma unroll
        for (int b = 0; b < COUNT; b++) s[b] += w * elem_float(x[b][k]);
      }
      values += count_bits(bits);
    }
  }
#pragma unroll
  for (int b = 0; b < COUNT; b++) {
    for (int step = 16; step > 0; step /= 2) s[b] += lane_xor(s[b], step);
    if (lane == 0 && b0 + b < a.batch) emit(a, b0 + b, r, s[b]);
  }
}

static const char *launch(const args_t &a, cudaStream_t stream) {
  const uint32_t blocks = (OUT + WARPS - 1) / WARPS;
  if (a.batch == 1) LAUNCH(gemv<1>, dim3(blocks), 32 * WARPS, 0, stream, a);
  else if (a.batch <= 4) LAUNCH(gemv<4>, dim3(blocks), 32 * WARPS, 0, stream, a);
  else LAUNCH(gemv<8>, dim3(blocks, (uint32_t)((a.batch + 7) / 8)), 32 * WARPS, 0, stream, a);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
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

extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_k_95c5b0c72d6a2c56(void *, const TVMFFIAny *args, int32_t count, TVMFFIAny *ret) {
  if (count != 7) return refuse("ValueError", "expected x, y, bias, residual, values, masks, pointers");
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
  const DLTensor *masks = tensor_of(args + 5);
  const int64_t masks_size = elements(masks, x, kDLInt, 32);
  if (masks_size < 0) return refuse("ValueError", "masks must be a contiguous tensor of int32 on the device of x");
  if (masks_size != (int64_t)OUT * MASKS) return refuse("ValueError", "masks has the wrong number of elements");
  a.masks = data_of<const uint32_t>(masks);
  const DLTensor *pointers = tensor_of(args + 6);
  const int64_t pointers_size = elements(pointers, x, kDLInt, 32);
  if (pointers_size < 0) return refuse("ValueError", "pointers must be a contiguous tensor of int32 on the device of x");
  if (pointers_size != (int64_t)OUT * 1 + 1) return refuse("ValueError", "pointers has the wrong number of elements");
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
