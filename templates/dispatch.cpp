// sparsec::linear, sparsec::conv and sparsec::stream without Python: the same ops for kernels that this process has loaded.
//
// Registered for the CPU key through torch's stable C shim; whatever is not the plain case (a gradient that may be
// wanted, a kernel that is not loaded yet, operands that the kernel refuses, a batch whose faster product is the dense
// one) goes to the op `<name>_careful`, which Python implements and which words the errors. That op gets the number of a
// kernel text, not the text: torch 2.13 leaks a string argument of torch_call_dispatcher.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/c/shim.h>
#include <tvm/ffi/c_api.h>

extern "C" {  // of the OpenMP runtime that torch has loaded
void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
int omp_get_max_threads(void);
void omp_set_num_threads(int);
}

namespace {

constexpr int kMaxDims = 8;
constexpr int kMaxBuffers = 24;

struct Plan;

struct Entry {
  std::string text;
  uint64_t hash;
  int64_t number;
  std::atomic<TVMFFIObjectHandle> function;  // null: not loaded, and the sizes mean nothing
  int rank;                   // dimensions of one input: 1 for linear, 1 + spatial ones for a convolution
  int64_t in[kMaxDims];       // of one input
  int64_t out[kMaxDims];      // of one output
  std::atomic<const Plan *> plan{nullptr};  // of a stream
};

// Open addressing; entries are never removed, and a full table is replaced, so that readers take no lock.
struct Table {
  explicit Table(size_t size) : slots(size) {}
  std::vector<std::atomic<Entry *>> slots;
  size_t count = 0;
};

std::atomic<Table *> table{new Table(256)};
std::mutex growing;
std::vector<Entry *> numbered;

uint64_t hash_of(const char *text, size_t size) {
  uint64_t h = size * 0x9e3779b97f4a7c15u;
  for (; size >= 8; text += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, text, 8);
    h = (h ^ word) * 0xff51afd7ed558ccdu;
    h ^= h >> 32;
  }
  for (; size; ++text, --size) h = (h ^ static_cast<unsigned char>(*text)) * 0xff51afd7ed558ccdu;
  return h ^ (h >> 29);
}

Entry *find(const Table &in, uint64_t hash, const char *text, size_t size) {
  for (size_t i = hash;; ++i) {
    Entry *entry = in.slots[i & (in.slots.size() - 1)].load(std::memory_order_acquire);
    if (!entry) return nullptr;
    if (entry->hash == hash && entry->text.size() == size && !std::memcmp(entry->text.data(), text, size)) return entry;
  }
}

void put(Table &into, Entry *entry) {
  size_t i = entry->hash;
  while (into.slots[i & (into.slots.size() - 1)].load(std::memory_order_relaxed)) ++i;
  into.slots[i & (into.slots.size() - 1)].store(entry, std::memory_order_release);
  ++into.count;
}

// The entry of a text, made when there is none; `growing` is held.
Entry *intern(const char *text, size_t size) {
  Table *present = table.load(std::memory_order_relaxed);
  const uint64_t hash = hash_of(text, size);
  if (Entry *entry = find(*present, hash, text, size)) return entry;
  if (2 * present->count >= present->slots.size()) {  // a reader may still be in the old one: it is left to it
    Table *larger = new Table(4 * present->slots.size());
    for (Entry *entry : numbered) put(*larger, entry);
    table.store(present = larger, std::memory_order_release);
  }
  Entry *entry = new Entry{std::string(text, size), hash, static_cast<int64_t>(numbered.size()), {nullptr}, 0, {}, {}, {nullptr}};
  numbered.push_back(entry);
  put(*present, entry);
  return entry;
}

Entry *entry_of(StringHandle kernel) {
  const char *text;
  size_t size;
  if (torch_string_c_str(kernel, &text) || torch_string_length(kernel, &size)) return nullptr;
  if (Entry *entry = find(*table.load(std::memory_order_acquire), hash_of(text, size), text, size)) return entry;
  std::lock_guard<std::mutex> guard(growing);
  return intern(text, size);
}

// ATen's number of a dtype -> DLPack's; code 255 for those that no kernel takes.
struct Types {
  DLDataType of[64];
  Types() {
    for (DLDataType &type : of) type = {255, 0, 1};
    set(aoti_torch_dtype_float32(), kDLFloat, 32);
    set(aoti_torch_dtype_float16(), kDLFloat, 16);
    set(aoti_torch_dtype_bfloat16(), kDLBfloat, 16);
    set(aoti_torch_dtype_uint8(), kDLUInt, 8);
    set(aoti_torch_dtype_int8(), kDLInt, 8);
    set(aoti_torch_dtype_int16(), kDLInt, 16);
    set(aoti_torch_dtype_int32(), kDLInt, 32);
    set(aoti_torch_dtype_int64(), kDLInt, 64);
    set(aoti_torch_dtype_uint16(), kDLUInt, 16);
    set(aoti_torch_dtype_uint32(), kDLUInt, 32);
    set(aoti_torch_dtype_uint64(), kDLUInt, 64);
  }
  void set(int32_t number, uint8_t code, uint8_t bits) {
    if (number >= 0 && number < 64) of[number] = {code, bits, 1};
  }
};

bool view(AtenTensorHandle tensor, DLTensor *into) {
  static const Types types;
  int32_t dtype, device;
  int64_t dims, *shape, *strides;
  void *data;
  if (aoti_torch_get_device_type(tensor, &device) || device != aoti_torch_device_type_cpu()) return false;
  if (aoti_torch_get_dtype(tensor, &dtype) || dtype < 0 || dtype >= 64 || types.of[dtype].code == 255) return false;
  if (aoti_torch_get_dim(tensor, &dims) || aoti_torch_get_sizes(tensor, &shape)) return false;
  if (aoti_torch_get_strides(tensor, &strides) || aoti_torch_get_data_ptr(tensor, &data)) return false;
  *into = {data, {kDLCPU, 0}, static_cast<int32_t>(dims), types.of[dtype], shape, strides, 0};
  return true;
}

template <typename Handle>
Handle handle(StableIValue value) {
  Handle found;
  std::memcpy(&found, &value, sizeof found);
  return found;
}

// An optional tensor is null or points to a stack slot that holds the tensor.
AtenTensorHandle optional(StableIValue value) {
  return value ? handle<AtenTensorHandle>(*reinterpret_cast<const StableIValue *>(value)) : nullptr;
}

TVMFFIAny argument(DLTensor *tensor) {
  TVMFFIAny any;
  std::memset(&any, 0, sizeof any);
  any.type_index = tensor ? kTVMFFIDLTensorPtr : kTVMFFINone;
  any.v_ptr = tensor;
  return any;
}

bool dense_wins(StableListHandle ranges, int64_t batch) {
  size_t size = 0;
  torch_list_size(ranges, &size);
  for (size_t i = 0; i + 1 < size; i += 2) {
    StableIValue low, high;
    if (torch_list_get_item(ranges, i, &low) || torch_list_get_item(ranges, i + 1, &high)) return true;
    const int64_t from = static_cast<int64_t>(low), to = static_cast<int64_t>(high);
    if (from <= batch && (to == 0 || batch <= to)) return true;
  }
  return false;
}

// The output, or null when this is not the plain case.
AtenTensorHandle fast(AtenTensorHandle x, StableListHandle list, AtenTensorHandle bias, AtenTensorHandle residual,
                      const Entry *entry, StableListHandle ranges) {
  const TVMFFIObjectHandle function = entry->function.load(std::memory_order_acquire);
  size_t buffers;
  if (!function || torch_list_size(list, &buffers) || buffers > kMaxBuffers) return nullptr;

  DLTensor views[4 + kMaxBuffers];
  DLTensor *const vx = views, *const vy = views + 1, *vbias = nullptr, *vresidual = nullptr;
  if (!view(x, vx) || vx->ndim > kMaxDims || vx->ndim < entry->rank) return nullptr;
  const int lead = vx->ndim - entry->rank;
  if (entry->rank > 1 && lead > 1) return nullptr;
  for (int i = 0; i < entry->rank; ++i)
    if (vx->shape[lead + i] != entry->in[i]) return nullptr;
  int64_t batch = 1, shape[kMaxDims], strides[kMaxDims], stride = 1;
  for (int i = 0; i < vx->ndim; ++i) shape[i] = i < lead ? vx->shape[i] : entry->out[i - lead];
  for (int i = 0; i < lead; ++i) batch *= vx->shape[i];
  if (ranges && dense_wins(ranges, batch)) return nullptr;
  for (int i = vx->ndim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }

  if (bias && !view(bias, vbias = views + 2)) return nullptr;
  if (residual) {
    if (!view(residual, vresidual = views + 3) || vresidual->ndim != vx->ndim) return nullptr;
    if (std::memcmp(vresidual->shape, shape, vx->ndim * sizeof *shape)) return nullptr;
  }
  for (size_t i = 0; i < buffers; ++i) {
    StableIValue item;  // borrowed: the list still owns its tensors
    if (torch_list_get_item(list, i, &item) || !view(handle<AtenTensorHandle>(item), views + 4 + i)) return nullptr;
  }

  int32_t dtype;
  AtenTensorHandle y;
  if (aoti_torch_get_dtype(x, &dtype)) return nullptr;
  if (aoti_torch_empty_strided(vx->ndim, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, &y)) return nullptr;
  if (view(y, vy)) {
    TVMFFIAny arguments[4 + kMaxBuffers], result;
    arguments[0] = argument(vx);
    arguments[1] = argument(vy);
    arguments[2] = argument(vbias);
    arguments[3] = argument(vresidual);
    for (size_t i = 0; i < buffers; ++i) arguments[4 + i] = argument(views + 4 + i);
    std::memset(&result, 0, sizeof result);
    if (!TVMFFIFunctionCall(function, arguments, static_cast<int32_t>(4 + buffers), &result)) return y;
    TVMFFIObjectHandle refusal = nullptr;  // Python asks again and words it
    TVMFFIErrorMoveFromRaised(&refusal);
    if (refusal) TVMFFIObjectDecRef(refusal);
  }
  aoti_torch_delete_tensor_object(y);
  return nullptr;
}

void release_list(StableListHandle list) {
  size_t size = 0;
  torch_list_size(list, &size);
  for (size_t i = 0; i < size; ++i) {
    StableIValue item;
    if (!torch_list_get_item(list, i, &item)) aoti_torch_delete_tensor_object(handle<AtenTensorHandle>(item));
  }
  torch_delete_list(list);
}

void release_optional(StableIValue value) {
  if (!value) return;
  aoti_torch_delete_tensor_object(optional(value));
  torch_delete_stable_ivalue(reinterpret_cast<StableIValue *>(value));
}

// stack: x, weight, [dense,] bias, residual, kernel[, ranges]; the arguments are ours, the output goes into stack[0].
void call(StableIValue *stack, bool buckets, const char *careful) {
  const int at = buckets ? 3 : 2;
  const auto x = handle<AtenTensorHandle>(stack[0]);
  const auto weight = handle<StableListHandle>(stack[1]);
  const auto kernel = handle<StringHandle>(stack[at + 2]);
  const auto ranges = buckets ? handle<StableListHandle>(stack[at + 3]) : nullptr;
  const Entry *entry = entry_of(kernel);
  torch_delete_string(kernel);
  AtenTensorHandle y = nullptr;
  if (entry && !aoti_torch_grad_mode_is_enabled())  // who may want a gradient is asked in Python
    y = fast(x, weight, optional(stack[at]), optional(stack[at + 1]), entry, ranges);
  if (!y) {  // the dispatcher takes the other arguments over
    const int64_t number = entry ? entry->number : -1;
    std::memcpy(&stack[at + 2], &number, sizeof number);
    if (torch_call_dispatcher(careful, "", stack, TORCH_ABI_VERSION)) {
      const std::string what = torch_exception_get_what_without_backtrace();
      throw std::invalid_argument(what.substr(0, what.find("\n\nAt:")));
    }
    return;
  }
  aoti_torch_delete_tensor_object(x);
  release_list(weight);
  if (buckets) {
    aoti_torch_delete_tensor_object(handle<AtenTensorHandle>(stack[2]));
    torch_delete_list(ranges);
  }
  release_optional(stack[at]);
  release_optional(stack[at + 1]);
  std::memcpy(&stack[0], &y, sizeof y);
}

// -- streams ---------------------------------------------------------------------------------------------------------

enum Kind : int64_t { kInput, kOutput, kArena };

struct Value {
  int64_t kind, at, elements;  // of one image; at: which tensor, or a byte of the arena
  int64_t window;              // nonzero: only the channels that are under way are kept
};

struct Call {
  TVMFFIObjectHandle function;
  int64_t x, residual, y;  // values; residual -1: none
  int64_t operand, bias, buffers;
  int64_t rows, pixels;  // output channels, and elements of each
  int64_t own;           // elements of x that an output channel reads, where that is its own channels alone; else 0
  int64_t chunk;         // output channels after which the next call goes on with them; 0: all
};

struct Plan {
  std::vector<std::vector<int64_t>> in, out;  // sizes of one image
  std::vector<Value> values;
  std::vector<Call> calls;
  DLDataType type;
  int64_t item, arena, operands;  // bytes of an element and of an arena, number of tensors
};

// Blocks of memory that calls of streams borrow: as many as have ever run at once, each as large as the largest of them.
class Arenas {
 public:
  struct Block {
    char *bytes = nullptr;
    size_t size = 0;
    ~Block() { std::free(bytes); }
  };
  std::unique_ptr<Block> take(size_t size) {
    std::unique_ptr<Block> block;
    {
      std::lock_guard<std::mutex> guard(lock_);
      if (!free_.empty()) {
        block = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (!block) block.reset(new Block);
    if (block->size < size) {
      std::free(block->bytes);
      block->size = 0;
      block->bytes = static_cast<char *>(std::aligned_alloc(64, (size + 63) / 64 * 64));
      if (block->bytes) block->size = size;
    }
    return block;
  }
  void give(std::unique_ptr<Block> block) {
    std::lock_guard<std::mutex> guard(lock_);
    free_.push_back(std::move(block));
  }

 private:
  std::mutex lock_;
  std::vector<std::unique_ptr<Block>> free_;
};

Arenas &arenas() {
  static Arenas *all = new Arenas;  // threads may still run when statics are destroyed
  return *all;
}

struct Run {
  const Plan *plan;
  const DLTensor *inputs, *outputs;
  DLTensor *operands;
  char *arena;
  int64_t images;  // that are dealt whole
  std::atomic<int> failed{0};
};

char *place(const Run &run, const Value &value, int64_t image, char *arena) {
  if (value.kind == kArena) return arena + value.at;
  const DLTensor &tensor = (value.kind == kInput ? run.inputs : run.outputs)[value.at];
  return static_cast<char *>(tensor.data) + image * value.elements * run.plan->item;
}

// Output channels [low, high) of a layer; false when the kernel refuses, whose words are dropped: Python asks again.
bool layer(const Run &run, const Call &call, int64_t image, char *arena, int64_t low, int64_t high) {
  const Plan &plan = *run.plan;
  const bool part = low || high != call.rows;
  const int64_t read[3] = {call.x, call.y, call.residual};
  DLTensor views[3];
  int64_t sizes[3];
  for (int i = 0; i < 3; ++i) {
    if (read[i] < 0) continue;
    const Value &value = plan.values[read[i]];
    const int64_t channel = i ? call.pixels : call.own;
    char *bytes = place(run, value, image, arena);
    if (!value.window) bytes += low * channel * plan.item;
    sizes[i] = channel ? (high - low) * channel : value.elements;
    views[i] = {bytes, {kDLCPU, 0}, 1, plan.type, &sizes[i], nullptr, 0};
  }
  TVMFFIAny arguments[6 + kMaxBuffers], result;
  arguments[0] = argument(&views[0]);
  arguments[1] = argument(&views[1]);
  arguments[2] = argument(call.bias ? run.operands + call.operand : nullptr);
  arguments[3] = argument(call.residual < 0 ? nullptr : &views[2]);
  int count = 4;
  for (int64_t i = 0; i < call.buffers; ++i) arguments[count++] = argument(run.operands + call.operand + call.bias + i);
  for (int64_t bound : {low, high}) {
    if (!part) break;
    arguments[count] = argument(nullptr);
    arguments[count].type_index = kTVMFFIInt;
    arguments[count++].v_int64 = bound;
  }
  std::memset(&result, 0, sizeof result);
  if (!TVMFFIFunctionCall(call.function, arguments, count, &result)) return true;
  TVMFFIObjectHandle refusal = nullptr;
  TVMFFIErrorMoveFromRaised(&refusal);
  if (refusal) TVMFFIObjectDecRef(refusal);
  return false;
}

// All layers of one image. Where a layer hands its channels on a few at a time, the next one follows at once.
bool layers(const Run &run, int64_t image, char *arena) {
  const std::vector<Call> &calls = run.plan->calls;
  for (size_t i = 0; i < calls.size(); ++i) {
    const Call &call = calls[i];
    if (!call.chunk) {
      if (!layer(run, call, image, arena, 0, call.rows)) return false;
      continue;
    }
    const Call &next = calls[++i];
    const int64_t times = next.rows / call.rows;
    for (int64_t low = 0; low < call.rows; low += call.chunk) {
      const int64_t high = std::min(low + call.chunk, call.rows);
      if (!layer(run, call, image, arena, low, high)) return false;
      if (!layer(run, next, image, arena, low * times, high * times)) return false;
    }
  }
  return true;
}

// The images of one thread, which computes their layers alone.
void share(void *data) {
  Run &run = *static_cast<Run *>(data);
  const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
  omp_set_num_threads(1);  // holds for this thread until the region ends
  char *arena = run.arena + t * run.plan->arena;
  for (int64_t i = run.images * t / threads; i < run.images * (t + 1) / threads && !run.failed.load(); ++i)
    if (!layers(run, i, arena)) run.failed.store(1);
}

bool dense_view(AtenTensorHandle tensor, DLTensor *into, const Plan &plan, const std::vector<int64_t> &sizes) {
  if (!view(tensor, into) || into->ndim != static_cast<int>(sizes.size()) + 1) return false;
  if (into->dtype.code != plan.type.code || into->dtype.bits != plan.type.bits) return false;
  int64_t stride = 1;
  for (int i = into->ndim - 1; i >= 0; --i) {
    if (i && into->shape[i] != sizes[i - 1]) return false;
    if (into->shape[i] != 1 && into->strides[i] != stride) return false;
    stride *= into->shape[i];
  }
  return true;
}

// Runs the stream into `made`, one new tensor for each output; false, with none left, when this is not the plain case.
bool run_stream(StableListHandle inputs, StableListHandle operands, const Plan &plan, std::vector<AtenTensorHandle> *made) {
  std::vector<DLTensor> views(plan.in.size() + plan.out.size() + plan.operands);
  DLTensor *const in = views.data(), *const out = in + plan.in.size(), *const rest = out + plan.out.size();
  size_t count;
  StableIValue item;  // borrowed: the list still owns its tensors
  if (torch_list_size(inputs, &count) || count != plan.in.size()) return false;
  for (size_t i = 0; i < count; ++i) {
    if (torch_list_get_item(inputs, i, &item)) return false;
    if (!dense_view(handle<AtenTensorHandle>(item), in + i, plan, plan.in[i]) || in[i].shape[0] != in[0].shape[0]) return false;
  }
  if (torch_list_size(operands, &count) || count != static_cast<size_t>(plan.operands)) return false;
  for (size_t i = 0; i < count; ++i)
    if (torch_list_get_item(operands, i, &item) || !view(handle<AtenTensorHandle>(item), rest + i)) return false;

  int32_t dtype;
  if (torch_list_get_item(inputs, 0, &item) || aoti_torch_get_dtype(handle<AtenTensorHandle>(item), &dtype)) return false;
  const int64_t images = in[0].shape[0];
  for (size_t i = 0; i < plan.out.size(); ++i) {
    int64_t shape[kMaxDims], strides[kMaxDims], stride = 1;
    const int dims = static_cast<int>(plan.out[i].size()) + 1;
    shape[0] = images;
    std::copy(plan.out[i].begin(), plan.out[i].end(), shape + 1);
    for (int j = dims - 1; j >= 0; --j) {
      strides[j] = stride;
      stride *= std::max<int64_t>(shape[j], 1);
    }
    AtenTensorHandle y;
    if (aoti_torch_empty_strided(dims, shape, strides, dtype, aoti_torch_device_type_cpu(), 0, &y)) return false;
    made->push_back(y);
    if (!view(y, out + i)) return false;
  }

  const int64_t threads = std::max(1, omp_get_max_threads());
  std::unique_ptr<Arenas::Block> block = arenas().take(static_cast<size_t>(threads * plan.arena + 64));
  if (!block->bytes) return false;
  Run run{&plan, in, out, rest, block->bytes, images / threads * threads};
  if (run.images && threads > 1) GOMP_parallel(share, &run, 0, 0);
  else run.images = 0;
  for (int64_t i = run.images; i < images && !run.failed.load(); ++i)
    if (!layers(run, i, run.arena)) run.failed.store(1);
  arenas().give(std::move(block));
  return !run.failed.load();
}

// stack: inputs, operands, stream; the arguments are ours, the list of outputs goes into stack[0].
void stream(StableIValue *stack, uint64_t, uint64_t) {
  const auto inputs = handle<StableListHandle>(stack[0]), operands = handle<StableListHandle>(stack[1]);
  const auto text = handle<StringHandle>(stack[2]);
  const Entry *entry = entry_of(text);
  torch_delete_string(text);
  const Plan *plan = entry ? entry->plan.load(std::memory_order_acquire) : nullptr;
  std::vector<AtenTensorHandle> made;
  if (!plan || aoti_torch_grad_mode_is_enabled() || !run_stream(inputs, operands, *plan, &made)) {
    for (AtenTensorHandle y : made) aoti_torch_delete_tensor_object(y);
    const int64_t number = entry ? entry->number : -1;
    std::memcpy(&stack[2], &number, sizeof number);
    if (torch_call_dispatcher("sparsec::stream_careful", "", stack, TORCH_ABI_VERSION)) {
      const std::string what = torch_exception_get_what_without_backtrace();
      throw std::invalid_argument(what.substr(0, what.find("\n\nAt:")));
    }
    return;
  }
  release_list(inputs);
  release_list(operands);
  StableListHandle outputs;
  torch_new_list_reserve_size(made.size(), &outputs);
  for (AtenTensorHandle y : made) {
    StableIValue item;
    std::memset(&item, 0, sizeof item);
    std::memcpy(&item, &y, sizeof y);
    torch_list_push_back(outputs, item);
  }
  std::memcpy(&stack[0], &outputs, sizeof outputs);
}

void linear(StableIValue *stack, uint64_t, uint64_t) { call(stack, false, "sparsec::linear_careful"); }
void linear_buckets(StableIValue *stack, uint64_t, uint64_t) { call(stack, true, "sparsec::linear_buckets_careful"); }
void conv(StableIValue *stack, uint64_t, uint64_t) { call(stack, false, "sparsec::conv_careful"); }
void conv_buckets(StableIValue *stack, uint64_t, uint64_t) { call(stack, true, "sparsec::conv_buckets_careful"); }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Register the ops; 0, or what the shim answers. Called once per process, after Python has defined them.
EXPORT int sparsec_dispatch_install() {
  TorchLibraryHandle library;  // lives as long as the process
  if (int error = aoti_torch_library_init_impl("sparsec", "CPU", "dispatch.cpp", 0, &library)) return error;
  if (int error = torch_library_impl(library, "linear", linear, TORCH_ABI_VERSION)) return error;
  if (int error = torch_library_impl(library, "linear_buckets", linear_buckets, TORCH_ABI_VERSION)) return error;
  if (int error = torch_library_impl(library, "conv", conv, TORCH_ABI_VERSION)) return error;
  if (int error = torch_library_impl(library, "conv_buckets", conv_buckets, TORCH_ABI_VERSION)) return error;
  return torch_library_impl(library, "stream", stream, TORCH_ABI_VERSION);
}

// Let calls with this kernel text run `function`, a tvm-ffi function that the caller keeps alive. `in` and `out` are the
// `rank` last sizes of an input and of an output. The first function of a text stays. Nonzero: it cannot be taken.
EXPORT int sparsec_dispatch_admit(const char *text, uint64_t size, void *function, int32_t rank, const int64_t *in,
                                  const int64_t *out) {
  if (rank < 1 || rank >= kMaxDims) return 1;
  std::lock_guard<std::mutex> guard(growing);
  Entry *entry = intern(text, size);
  if (entry->function.load(std::memory_order_relaxed)) return 0;
  entry->rank = rank;
  std::memcpy(entry->in, in, rank * sizeof *in);
  std::memcpy(entry->out, out, rank * sizeof *out);
  entry->function.store(function, std::memory_order_release);
  return 0;
}

// Let calls with this text run a stream. `numbers`: inputs, outputs, values, calls, type code, bits, arena bytes; for each
// input and output its dimensions and sizes; kind, at, elements, window of every value; and of every call its function,
// which the caller keeps alive, and the other members of Call in their order. The first plan of a text stays.
EXPORT int sparsec_dispatch_admit_stream(const char *text, uint64_t size, const int64_t *numbers) {
  std::unique_ptr<Plan> plan(new Plan);
  const int64_t inputs = *numbers++, outputs = *numbers++, values = *numbers++, calls = *numbers++;
  plan->type.code = static_cast<uint8_t>(*numbers++);
  plan->type.bits = static_cast<uint8_t>(*numbers++);
  plan->type.lanes = 1;
  plan->item = plan->type.bits / 8;
  plan->arena = *numbers++;
  for (int64_t i = 0; i < inputs + outputs; ++i) {
    const int64_t dims = *numbers++;
    if (dims < 1 || dims >= kMaxDims) return 1;
    (i < inputs ? plan->in : plan->out).emplace_back(numbers, numbers + dims);
    numbers += dims;
  }
  for (int64_t i = 0; i < values; ++i, numbers += 4)
    plan->values.push_back({numbers[0], numbers[1], numbers[2], numbers[3]});
  plan->operands = 0;
  for (int64_t i = 0; i < calls; ++i, numbers += 11) {
    const auto function = reinterpret_cast<TVMFFIObjectHandle>(numbers[0]);
    if (numbers[6] > kMaxBuffers || (numbers[10] && i + 1 == calls)) return 1;
    plan->calls.push_back({function, numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7],
                           numbers[8], numbers[9], numbers[10]});
    plan->operands = std::max(plan->operands, numbers[4] + numbers[5] + numbers[6]);
  }
  std::lock_guard<std::mutex> guard(growing);
  Entry *entry = intern(text, size);
  if (!entry->plan.load(std::memory_order_relaxed)) entry->plan.store(plan.release(), std::memory_order_release);
  return 0;
}

// The text with this number, with its size; null for a number that was never given.
EXPORT const char *sparsec_dispatch_text(int64_t number, uint64_t *size) {
  std::lock_guard<std::mutex> guard(growing);
  if (number < 0 || number >= static_cast<int64_t>(numbered.size())) return nullptr;
  *size = numbered[number]->text.size();
  return numbered[number]->text.data();
}
