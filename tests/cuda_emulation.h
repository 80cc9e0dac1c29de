// A CUDA device for tests, on one host thread: generated .cu sources compile against this header with a C++ compiler.
//
// Every CUDA thread is a fiber; a block runs until all of its fibers have ended, blocks run one after another. A fiber
// stops at __syncthreads and at every warp-wide operation until the others it waits for have come. Shared memory is
// poisoned before each block and ends at an unmapped page; cp.async delivers only when it is waited for; ldmatrix counts
// bank conflicts. What real hardware leaves undefined is an error here: an exited thread at a barrier, lanes of a warp at
// different operations, misaligned copies. Fragment layouts are those of the PTX ISA (mma.m16n8k16, mma.sp.m16n8k32).
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SPARSEC_DEVICE kDLCPU
#define SPARSEC_COPIES
#define SPARSEC_MMA
#define SPARSEC_MMA_SP
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  (emulation::queued(stream), emulation::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); }))
#define DYNAMIC_SHARED(name) unsigned char *name = emulation::shared

struct dim3 {
  uint32_t x, y, z;
  dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {}
};
struct uint4 { uint32_t x, y, z, w; };
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
typedef struct CUstream_st *cudaStream_t;
typedef int cudaError_t;
enum { cudaSuccess = 0, cudaErrorEmulation = 1, cudaDevAttrMultiProcessorCount = 16, cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

// A place to come back to. swapcontext would do, but enters the kernel at every switch, and warps switch all the time.
#ifdef __x86_64__
extern "C" __attribute__((visibility("hidden"))) void emulation_switch(void **from, void *to);
asm(".text\n.hidden emulation_switch\n.globl emulation_switch\nemulation_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\nmovq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
struct Context {
  void *top;
  void begin(std::vector<char> &stack, Context &, void (*entry)()) {
    void **at = (void **)((uintptr_t)(stack.data() + stack.size()) / 16 * 16) - 8;
    memset(at, 0, 64);
    at[6] = (void *)entry;  // above six saved registers; the stack is then aligned as after a call
    top = at;
  }
  void leave_for(Context &other) { emulation_switch(&top, other.top); }
};
#else
struct Context {
  ucontext_t saved;
  void begin(std::vector<char> &stack, Context &end, void (*entry)()) {
    getcontext(&saved);
    saved.uc_stack.ss_sp = stack.data();
    saved.uc_stack.ss_size = stack.size();
    saved.uc_link = &end.saved;
    makecontext(&saved, entry, 0);
  }
  void leave_for(Context &other) { swapcontext(&saved, &other.saved); }
};
#endif

struct Copy { void *to; const void *from; bool real; };
enum State { READY, AT_BLOCK, AT_WARP, ENDED };
struct Fiber {
  Context context;
  std::vector<char> stack;
  dim3 thread;
  State state;
  int operation;  // what a lane waits for at AT_WARP
  int phase;      // alternates, so that a lane may begin the next operation before others have read this one
  std::vector<Copy> copies;
  std::vector<std::vector<Copy>> groups;
};
struct Slot { uint32_t words[12]; const void *row; float sums[4]; };

static unsigned char *shared;
static size_t shared_bytes;
static long conflicts, launches, blocks;
static const char *failure;
static int device;  // the current one; tensors are on device 0
static cudaStream_t stream;  // of the last launch
static long misplaced;  // launches while another device than the tensors' was current
static bool memory = true;  // whether scratch memory can be had
static std::vector<Fiber> fibers;
static std::vector<Slot> slots;  // [fiber][phase]
static size_t running;
static Context scheduler;
static const std::function<void()> *body;

static void fail(const char *why) {
  if (failure == nullptr) failure = why;
}

static void enter() {
  (*body)();
  fibers[running].state = ENDED;
  fibers[running].context.leave_for(scheduler);
}

static void wait(State state, int operation) {
  Fiber &me = fibers[running];
  me.state = state;
  me.operation = operation;
  me.context.leave_for(scheduler);
}

// Puts this lane's operands where the warp sees them, meets the other lanes, and returns the slots of the warp.
static Slot *meet(int operation, const Slot &mine) {
  Fiber &me = fibers[running];
  const size_t warp = running / 32 * 32, phase = me.phase;
  slots[(phase * fibers.size()) + running] = mine;
  me.phase ^= 1;
  wait(AT_WARP, operation);
  return &slots[phase * fibers.size() + warp];
}

static int lane() { return (int)(running % 32); }

// Lets every warp go whose lanes have all come, and the block when it has; false when nothing moves any more.
static bool release() {
  bool moved = false;
  size_t at_block = 0, ended = 0;
  for (size_t w = 0; w < fibers.size(); w += 32) {
    size_t waiting = 0;
    bool same = true;
    for (size_t i = w; i < w + 32; i++) {
      waiting += fibers[i].state == AT_WARP;
      same &= fibers[i].operation == fibers[w].operation;
      at_block += fibers[i].state == AT_BLOCK;
      ended += fibers[i].state == ENDED;
    }
    if (waiting == 32) {
      if (!same) return fail("lanes of a warp wait at different operations"), false;
      for (size_t i = w; i < w + 32; i++) fibers[i].state = READY;
      moved = true;
    }
  }
  if (at_block == fibers.size()) {
    for (Fiber &f : fibers) f.state = READY;
    moved = true;
  }
  if (!moved && ended < fibers.size()) fail("a barrier that not all of its threads reach");
  return moved;
}

static void run_block() {
  memset(shared, 0xff, shared_bytes);
  for (size_t i = 0; i < fibers.size(); i++) {
    Fiber &f = fibers[i];
    f.state = READY;
    f.phase = 0;
    f.copies.clear();
    f.groups.clear();
    f.context.begin(f.stack, scheduler, enter);
  }
  const bool reverse = getenv("SPARSEC_EMULATION_REVERSE") != nullptr;
  do {
    for (size_t n = 0; n < fibers.size(); n++) {
      running = reverse ? fibers.size() - 1 - n : n;
      if (fibers[running].state != READY) continue;
      threadIdx = fibers[running].thread;
      scheduler.leave_for(fibers[running].context);
    }
  } while (release());
}

static void queued(cudaStream_t on) {
  stream = on;
  misplaced += device != 0;
}

static void launch(dim3 grid, dim3 block, size_t bytes, const std::function<void()> &kernel) {
  launches++;
  const size_t threads = (size_t)block.x * block.y * block.z, page = (size_t)sysconf(_SC_PAGESIZE);
  if (threads == 0 || threads > 1024 || threads % 32) return fail("blocks must be whole warps, 1024 threads at most");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) return fail("invalid grid");
  if (bytes > 227 * 1024) return fail("more shared memory than a block can have");
  shared_bytes = (bytes + 127) / 128 * 128;
  const size_t mapped = (shared_bytes + page - 1) / page * page + page;
  unsigned char *base = (unsigned char *)mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(base + mapped - page, page, PROT_NONE);
  shared = base + mapped - page - shared_bytes;
  fibers.resize(threads);
  slots.resize(2 * threads);
  for (size_t i = 0; i < threads; i++) {
    fibers[i].stack.resize(64 << 10);
    fibers[i].thread = dim3((uint32_t)(i % block.x), (uint32_t)(i / block.x % block.y), (uint32_t)(i / block.x / block.y));
  }
  blocks += (long)grid.x * grid.y * grid.z;
  blockDim = block;
  gridDim = grid;
  body = &kernel;
  for (uint32_t z = 0; z < grid.z && failure == nullptr; z++)
    for (uint32_t y = 0; y < grid.y && failure == nullptr; y++)
      for (uint32_t x = 0; x < grid.x && failure == nullptr; x++) {
        blockIdx = dim3(x, y, z);
        run_block();
      }
  munmap(base, mapped);
}

static void deliver(std::vector<Copy> &copies) {
  for (const Copy &c : copies) {
    if (c.real) memcpy(c.to, c.from, 16);
    else memset(c.to, 0, 16);
  }
  copies.clear();
}

}  // namespace emulation

static inline void __syncthreads() { emulation::wait(emulation::AT_BLOCK, 0); }
static inline cudaError_t cudaGetLastError() { return emulation::failure == nullptr ? cudaSuccess : cudaErrorEmulation; }
static inline const char *cudaGetErrorString(cudaError_t) {
  const char *why = emulation::failure;
  emulation::failure = nullptr;
  return why;
}
static inline cudaError_t cudaGetDevice(int *device) { return *device = emulation::device, cudaSuccess; }
static inline cudaError_t cudaSetDevice(int device) { return emulation::device = device, cudaSuccess; }
static inline cudaError_t cudaDeviceGetAttribute(int *value, int, int) { return *value = 4, cudaSuccess; }
template <class T> static inline cudaError_t cudaFuncSetAttribute(T *, int, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorEmulation;
}

// ---- conversions -----------------------------------------------------------------------------------------------------
static inline uint32_t float_bits(float s) { uint32_t b; memcpy(&b, &s, 4); return b; }
static inline float bits_float(uint32_t b) { float s; memcpy(&s, &b, 4); return s; }
static inline float half_float(uint16_t e) {
  const uint32_t sign = (uint32_t)(e & 0x8000) << 16, exponent = (e >> 10) & 31, digits = e & 1023;
  if (exponent == 31) return bits_float(sign | 0x7f800000 | digits << 13);
  const float size = exponent ? bits_float((exponent + 112) << 23 | digits << 13) : (float)digits * 0x1p-24f;
  return sign ? -size : size;
}
static inline uint16_t float_half(float s) {
  const uint16_t sign = (uint16_t)(float_bits(s) >> 16 & 0x8000);
  const float size = s < 0 ? -s : s;
  if (s != s) return (uint16_t)(sign | 0x7e00);
  if (size >= 65520.0f) return (uint16_t)(sign | 0x7c00);
  if (size < 0x1p-14f) return (uint16_t)(sign | (uint16_t)(float_bits(size + 0.5f) - float_bits(0.5f)));  // rounds at 2^-24
  const uint32_t bits = float_bits(size), odd = bits >> 13 & 1;
  return (uint16_t)(sign | ((bits + 0xfff + odd - (112u << 23)) >> 13));
}
static inline float bf16_float(uint16_t e) { return bits_float((uint32_t)e << 16); }
static inline uint16_t float_bf16(float s) {
  const uint32_t bits = float_bits(s);
  return (uint16_t)(s != s ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- warps -----------------------------------------------------------------------------------------------------------
static inline uint32_t bits_from_lane(uint32_t s, int lane) { return emulation::meet(1, {{s}})[lane & 31].words[0]; }
static inline float from_lane(float s, int lane) { return bits_float(bits_from_lane(float_bits(s), lane)); }
static inline float lane_xor(float s, int mask) {
  return bits_float(emulation::meet(2, {{float_bits(s)}})[emulation::lane() ^ mask].words[0]);
}
static inline bool any_lane(bool s) {
  const emulation::Slot *all = emulation::meet(3, {{s}});
  for (int i = 0; i < 32; i++)
    if (all[i].words[0]) return true;
  return false;
}
static inline int count_bits(uint32_t s) { return __builtin_popcount(s); }
static inline void warp_sync() { emulation::meet(4, {}); }

// ---- cp.async --------------------------------------------------------------------------------------------------------
static inline void copy_async(void *to, const void *from, bool real) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) emulation::fail("cp.async of 16 bytes at a misaligned address");
  emulation::fibers[emulation::running].copies.push_back({to, from, real});
}
static inline void copy_commit() {
  emulation::Fiber &me = emulation::fibers[emulation::running];
  me.groups.push_back(me.copies);
  me.copies.clear();
}
template <int pending> static inline void copy_wait() {
  emulation::Fiber &me = emulation::fibers[emulation::running];
  while (me.groups.size() > (size_t)pending) {
    emulation::deliver(me.groups.front());
    me.groups.erase(me.groups.begin());
  }
}

// ---- ldmatrix, mma ---------------------------------------------------------------------------------------------------
static inline void load_matrices(uint32_t *r, int count, const void *row) {
  emulation::Slot mine = {};
  mine.row = row;
  const int lane = emulation::lane();
  const emulation::Slot *all = emulation::meet(4 + count, mine);
  const unsigned char *begin = emulation::shared, *end = begin + emulation::shared_bytes;
  for (int m = 0; m < count; m++) {
    int used[8] = {};
    for (int i = 0; i < 8; i++) {
      const unsigned char *p = (const unsigned char *)all[8 * m + i].row;
      if ((uintptr_t)p % 16 || p < begin || p + 16 > end) return emulation::fail("ldmatrix of a misaligned or foreign row");
      used[(p - begin) / 16 % 8]++;
    }
    if (lane == 0)
      for (int bank : used) emulation::conflicts += bank > 1 ? bank - 1 : 0;
    memcpy(&r[m], (const char *)all[8 * m + lane / 4].row + 4 * (lane % 4), 4);
  }
}
static inline void load_matrix_4(uint32_t (&r)[4], const void *row) { load_matrices(r, 4, row); }
static inline void load_matrix_2(uint32_t (&r)[2], const void *row) { load_matrices(r, 2, row); }

namespace emulation {

typedef float (*Convert)(uint16_t);
static float half_of(const uint32_t *words, int i, Convert convert) { return convert((uint16_t)(words[i / 2] >> 16 * (i % 2))); }

// Entry (row, k) of the 16 x 16 stored operand a; entry (k, n) of b, 8 columns of 16 or 32.
static float a_at(const Slot *all, int row, int k, Convert convert) {
  const int reg = (row >= 8) + 2 * (k >= 8);
  return half_of(all[row % 8 * 4 + k % 8 / 2].words, 2 * reg + k % 2, convert);
}
static float b_at(const Slot *all, int k, int n, Convert convert) {
  return half_of(all[n * 4 + k % 8 / 2].words + 4, 2 * (k / 8) + k % 2, convert);
}

static void mma(float (&d)[4], const uint32_t *a, const uint32_t *b, int b_words, int operation, uint32_t places, Convert convert) {
  Slot mine = {};
  memcpy(mine.words, a, 16);
  memcpy(mine.words + 4, b, 4 * (size_t)b_words);
  mine.words[8] = places;
  const int lane = emulation::lane();
  const Slot *all = meet(operation, mine);
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), n = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      int column = k;
      if (b_words == 4) {  // stored entry k is number k % 2 of the group of four columns k / 2
        const uint32_t word = all[row % 8 * 4 + k / 8].words[8] >> (row >= 8 ? 16 : 0);
        const int group = k / 2 % 4, place = word >> (4 * group + 2 * (k % 2)) & 3;
        if (k % 2 && place <= (int)(word >> (4 * group) & 3)) fail("mma.sp: places of a group must rise");
        column = k / 2 * 4 + place;
      }
      sum += a_at(all, row, k, convert) * b_at(all, column, n, convert);
    }
    d[i] += sum;
  }
}

}  // namespace emulation

static inline void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulation::mma(d, a, b, 2, 16, 0, half_float); }
static inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulation::mma(d, a, b, 2, 17, 0, bf16_float); }
static inline void mma_sp_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) {
  emulation::mma(d, a, b, 4, 18, places, half_float);
}
static inline void mma_sp_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) {
  emulation::mma(d, a, b, 4, 19, places, bf16_float);
}

// Bank conflicts of ldmatrix since the last call, blocks and launches: for tests that count.
extern "C" __attribute__((visibility("default"))) long emulation_conflicts() {
  const long seen = emulation::conflicts;
  emulation::conflicts = 0;
  return seen;
}
extern "C" __attribute__((visibility("default"))) long emulation_blocks() {
  const long seen = emulation::blocks;
  emulation::blocks = 0;
  return seen;
}
extern "C" __attribute__((visibility("default"))) long emulation_launches() {
  const long seen = emulation::launches;
  emulation::launches = 0;
  return seen;
}

// What was current when kernels were queued: for tests of the launch code.
extern "C" __attribute__((visibility("default"))) int emulation_set_device(int device) {
  const int before = emulation::device;
  emulation::device = device;
  return before;
}
extern "C" __attribute__((visibility("default"))) void *emulation_stream() { return emulation::stream; }
extern "C" __attribute__((visibility("default"))) long emulation_misplaced() {
  const long seen = emulation::misplaced;
  emulation::misplaced = 0;
  return seen;
}
extern "C" __attribute__((visibility("default"))) void emulation_set_memory(int there) { emulation::memory = there; }
#include <tvm/ffi/extra/c_env_api.h>
#define TVMFFIEnvTensorAlloc(like, owner) (emulation::memory ? TVMFFIEnvTensorAlloc(like, owner) : -1)
