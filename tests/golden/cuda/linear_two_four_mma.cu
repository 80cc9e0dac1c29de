/* linear_two_four_mma: y[batch, 70] = epilogue(x[batch, 51] W^T + bias), float16, sm_90 */
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

#ifndef SPARSEC_MMA_SP
#define SPARSEC_MMA_SP
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define SPARSEC_SP "mma.sp::ordered_metadata"
#else
#define SPARSEC_SP "mma.sp"
#endif
/* d (16 x 8) += a (16 x 32, two of four stored) b (32 x 8). Lanes 0 and 1 of each quad hold the places of the stored
   entries: columns 0 to 15 and 16 to 31, row lane / 4 in the low half and row lane / 4 + 8 in the high one. */
__device__ __forceinline__ void mma_sp_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) {
  asm(SPARSEC_SP ".sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places));
}
__device__ __forceinline__ void mma_sp_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) {
  asm(SPARSEC_SP ".sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places));
}
#endif

namespace k_57c512c5d54c9c15 {

enum : int32_t {
  OUT = 70,
  IN = 51,
};

typedef uint16_t elem_t; /* bits of float16 */
static __device__ __forceinline__ float elem_float(elem_t e) { return half_float(e); }
static __device__ __forceinline__ elem_t float_elem(float s) { return float_half(s); }
enum : int32_t { ELEM_CODE = kDLFloat, ELEM_BITS = 8 * sizeof(elem_t) };

enum : int32_t {
  DEPTH = 64, /* inputs of a tile */
  TILES = (IN + DEPTH - 1) / DEPTH,
  STORED = TILES * DEPTH / 2, /* values of a row */
  SLABS = (OUT + 15) / 16,
  WARPS = 4,
  STAGES = 3, /* tiles of x under way */
  MIN_TILES = 4, /* of a split */
};

struct args_t {
  const elem_t *x;        /* [batch, IN] */
  elem_t *y;              /* [batch, OUT] */
  const elem_t *bias;     /* [OUT] */
  const elem_t *residual; /* [batch, OUT] */
  const elem_t *values;
  const uint16_t *places;
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

/* Whether any entry of a fragment of x is infinite or NaN: then zeros that fill a tile must not be multiplied. */
template <int COUNT, int WORDS> static __device__ __forceinline__ bool nonfinite(const uint32_t (&f)[COUNT][WORDS]) {
  bool found = false;
#pragma unroll
  for (int i = 0; i < COUNT; i++)
#pragma unroll
    for (int w = 0; w < WORDS; w++)
      found |= (f[i][w] & 0x7c00u) == 0x7c00u || (f[i][w] & 0x7c000000u) == 0x7c000000u;
  return any_lane(found);
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

static __global__ void __launch_bounds__(256) finish(const args_t a, const float *parts, int32_t splits) {
  const int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x, size = a.batch * OUT;
  if (i >= size) return;
  float s = 0.0f;
  for (int32_t p = 0; p < splits; p++) s += parts[p * size + i];
  emit(a, i / OUT, (int32_t)(i % OUT), s);
}

/* As many splits as let every multiprocessor hold two blocks, each with some tiles of its own. */
static int32_t choose_splits(const args_t &a, int64_t blocks, int32_t tiles) {
  int processors = 1;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, a.device);
  const int64_t wanted = 2 * processors / blocks, most = (tiles + MIN_TILES - 1) / MIN_TILES;
  return (int32_t)(wanted < 1 ? 1 : wanted < most ? wanted : most);
}

/* Launches `kernel` for panels of N rows of x, in splits where one block each would leave the device idle. */
template <int N, class Kernel> static const char *
launch_split(const args_t &a, cudaStream_t stream, Kernel *kernel, int32_t row_tiles, int32_t tiles, int32_t threads, int32_t shared) {
  const int64_t panels = (a.batch + N - 1) / N;
  const int32_t splits = choose_splits(a, row_tiles * panels, tiles);
  workspace_t scratch;
  float *parts = nullptr;
  if (splits > 1) {
    parts = (float *)scratch.get(a, splits * a.batch * OUT * (int64_t)sizeof(float));
    if (parts == nullptr) return NO_MEMORY;
  }
  if (shared > 48 * 1024 && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) != cudaSuccess)
    return "the device has too little shared memory for this kernel";
  LAUNCH(kernel, dim3(row_tiles, splits, (uint32_t)panels), threads, shared, stream, a, parts, splits);
  if (splits > 1) LAUNCH(finish, dim3((uint32_t)((a.batch * OUT + 255) / 256)), 256, 0, stream, a, parts, splits);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}


/* Values and places of 16 rows and 64 inputs, as two operands of mma.sp. */
struct slab_t {
  uint32_t values[2][4], places[2];
};

static __device__ __forceinline__ void load_slab(slab_t &slab, const args_t &a, int32_t r0, int32_t tile) {
  const int32_t lane = threadIdx.x % 32, quad = lane % 4;
  const elem_t *low = a.values + (int64_t)(r0 + lane / 4) * STORED + tile * (DEPTH / 2) + 2 * quad;
  const uint16_t *places = a.places + (int64_t)(r0 + lane / 4) * (STORED / 8) + tile * (DEPTH / 16) + quad % 2;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    slab.values[half][0] = *(const uint32_t *)(low + 16 * half);
    slab.values[half][1] = *(const uint32_t *)(low + 8 * STORED + 16 * half);
    slab.values[half][2] = *(const uint32_t *)(low + 16 * half + 8);
    slab.values[half][3] = *(const uint32_t *)(low + 8 * STORED + 16 * half + 8);
    slab.places[half] = places[2 * half] | (uint32_t)places[STORED + 2 * half] << 16;
  }
}

/* The sum of one output and 32 inputs, over stored entries only: for tiles of x that hold an infinite or NaN input. */
static __device__ float exact_sum(const args_t &a, const elem_t *x_tile, int32_t r, int32_t n, int32_t tile, int half) {
  const int64_t row = (int64_t)r * STORED + tile * (DEPTH / 2) + 16 * half;
  float s = 0.0f;
  for (int c = 0; c < 16; c++) {
    const float w = elem_float(a.values[row + c]);
    const int place = a.places[(row + c) / 8] >> (c % 8 / 2 * 4 + c % 2 * 2) & 3;
    if (w != 0.0f) s += w * entry<DEPTH>(x_tile, n, 32 * half + c / 2 * 4 + place);
  }
  return s;
}

template <int N> static __global__ void __launch_bounds__(32 * WARPS) slabs(const args_t a, float *parts, int32_t splits) {
  DYNAMIC_SHARED(shared);
  elem_t *const x_tiles = (elem_t *)shared;
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, r0 = (blockIdx.x * WARPS + warp) * 16;
  const int64_t b0 = (int64_t)blockIdx.z * N;
  const int32_t from = (int32_t)((int64_t)TILES * blockIdx.y / splits), to = (int32_t)((int64_t)TILES * (blockIdx.y + 1) / splits);
  const bool real = r0 < OUT; /* warps past the last output only help to fetch x */
  float sums[N / 8][4] = {};
  slab_t next = {};

  auto fetch = [&](int32_t t) {
    if (t < to) stage<DEPTH, N, 32 * WARPS>(x_tiles + t % STAGES * N * DEPTH, a, b0, t * DEPTH, threadIdx.x);
    copy_commit();
  };

  for (int32_t t = from; t < from + STAGES - 1; t++) fetch(t);
  if (real) load_slab(next, a, r0, from);
  for (int32_t t = from; t < to; t++) {
    copy_wait<STAGES - 2>();
    __syncthreads(); /* the tile of this step is there for all, and all have read that of the last one */
    fetch(t + STAGES - 1);
    if (!real) continue;
    const elem_t *x_tile = x_tiles + t % STAGES * N * DEPTH;
    const slab_t slab = next;
    if (t + 1 < to) load_slab(next, a, r0, t + 1);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t low[N / 8][2], high[N / 8][2];
      load_x<DEPTH, N>(low, x_tile, 32 * half);
      load_x<DEPTH, N>(high, x_tile, 32 * half + 16);
      const bool exact = nonfinite(low) | nonfinite(high);
#pragma unroll
      for (int n = 0; n < N / 8; n++) {
        if (exact) {
#pragma unroll
          for (int i = 0; i < 4; i++)
            sums[n][i] += exact_sum(a, x_tile, r0 + lane / 4 + i / 2 * 8, 8 * n + lane % 4 * 2 + i % 2, t, half);
        } else {
          const uint32_t x[4] = {low[n][0], low[n][1], high[n][0], high[n][1]};
          mma_sp_half(sums[n], slab.values[half], x, slab.places[half]);
        }
      }
    }
  }
  copy_wait<0>();
  __syncthreads();
  if (!real) return;
  drain<N>((float *)shared + warp * N * 17, sums, [&](int32_t r, int32_t n, float s) {
    if (r0 + r >= OUT || b0 + n >= a.batch) return;
    if (splits == 1) emit(a, b0 + n, r0 + r, s);
    else parts[(blockIdx.y * a.batch + b0 + n) * OUT + r0 + r] = s;
  });
}

template <int N> static const char *launch_slabs(const args_t &a, cudaStream_t stream) {
  constexpr int32_t TILED = STAGES * N * DEPTH * (int32_t)sizeof(elem_t), DRAINED = WARPS * N * 17 * (int32_t)sizeof(float);
  if ((uintptr_t)a.values % 4) return "values must begin at a multiple of 4 bytes";
  return launch_split<N>(a, stream, &slabs<N>, (SLABS + WARPS - 1) / WARPS, TILES, 32 * WARPS, TILED > DRAINED ? TILED : DRAINED);
}

static const char *launch(const args_t &a, cudaStream_t stream) {
  if (a.batch <= 8) return launch_slabs<8>(a, stream);
  if (a.batch <= 16) return launch_slabs<16>(a, stream);
  if (a.batch <= 32) return launch_slabs<32>(a, stream);
  return launch_slabs<64>(a, stream);
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

extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_k_57c512c5d54c9c15(void *, const TVMFFIAny *args, int32_t count, TVMFFIAny *ret) {
  if (count != 6) return refuse("ValueError", "expected x, y, bias, residual, values, places");
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
  if (values_size != (int64_t)SLABS * 16 * STORED) return refuse("ValueError", "values has the wrong number of elements");
  a.values = data_of<const elem_t>(values);
  a.stored = values_size;
  const DLTensor *places = tensor_of(args + 5);
  const int64_t places_size = elements(places, x, kDLInt, 16);
  if (places_size < 0) return refuse("ValueError", "places must be a contiguous tensor of int16 on the device of x");
  if (places_size != values_size / 8) return refuse("ValueError", "places has the wrong number of elements");
  a.places = data_of<const uint16_t>(places);
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
