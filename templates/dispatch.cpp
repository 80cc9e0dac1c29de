// sparsec::linear and sparsec::conv without Python: the same ops for kernels that this process has loaded.
//
// Registered for the CPU key through torch's stable C shim; whatever is not the plain case (a gradient that may be
// wanted, a kernel that is not loaded yet, operands that the kernel refuses, a batch whose faster product is the dense
// one) goes to the op `<name>_careful`, which Python implements and which words the errors. That op gets the number of a
// kernel text, not the text: torch 2.13 leaks a string argument of torch_call_dispatcher.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/c/shim.h>
#include <tvm/ffi/c_api.h>

namespace {

constexpr int kMaxDims = 8;
constexpr int kMaxBuffers = 24;

struct Entry {
  std::string text;
  uint64_t hash;
  int64_t number;
  std::atomic<TVMFFIObjectHandle> function;  // null: not loaded, and the sizes mean nothing
  int rank;                   // dimensions of one input: 1 for linear, 1 + spatial ones for a convolution
  int64_t in[kMaxDims];       // of one input
  int64_t out[kMaxDims];      // of one output
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
  Entry *entry = new Entry{std::string(text, size), hash, static_cast<int64_t>(numbered.size()), {nullptr}, 0, {}, {}};
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

void linear(StableIValue *stack, uint64_t, uint64_t) { call(stack, false, "sparsec::linear_careful"); }
void linear_buckets(StableIValue *stack, uint64_t, uint64_t) { call(stack, true, "sparsec::linear_buckets_careful"); }
void conv(StableIValue *stack, uint64_t, uint64_t) { call(stack, false, "sparsec::conv_careful"); }
void conv_buckets(StableIValue *stack, uint64_t, uint64_t) { call(stack, true, "sparsec::conv_buckets_careful"); }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Register the four ops; 0, or what the shim answers. Called once per process, after Python has defined them.
EXPORT int sparsec_dispatch_install() {
  TorchLibraryHandle library;  // lives as long as the process
  if (int error = aoti_torch_library_init_impl("sparsec", "CPU", "dispatch.cpp", 0, &library)) return error;
  if (int error = torch_library_impl(library, "linear", linear, TORCH_ABI_VERSION)) return error;
  if (int error = torch_library_impl(library, "linear_buckets", linear_buckets, TORCH_ABI_VERSION)) return error;
  if (int error = torch_library_impl(library, "conv", conv, TORCH_ABI_VERSION)) return error;
  return torch_library_impl(library, "conv_buckets", conv_buckets, TORCH_ABI_VERSION);
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

// The text with this number, with its size; null for a number that was never given.
EXPORT const char *sparsec_dispatch_text(int64_t number, uint64_t *size) {
  std::lock_guard<std::mutex> guard(growing);
  if (number < 0 || number >= static_cast<int64_t>(numbered.size())) return nullptr;
  *size = numbered[number]->text.size();
  return numbered[number]->text.data();
}
