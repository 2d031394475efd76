// A CUDA device that is not there, for a torch that was built without CUDA.
//
// Such a torch has CUDA's dispatch key and device type, but neither kernels nor allocator nor hooks.
// These are registered here and carried out by the CPU, so that everything above them takes its
// branches for CUDA. What is told apart as a real card would:
//
// * Tensors of different devices do not mix.
// * Memory: torch's caching allocator in small (rounding, splitting, release and retry) within a
//   limit, and torch.OutOfMemoryError beyond it.
// * What is allocated or freed holds NaN until something is written to it.
// * Copies from and to pinned memory that need not be waited for are as late as they may be: they
//   are made when their stream is used or waited for, so that who does not wait reads NaN.
//
// In skip mode operations on large tensors only find shapes and take memory, so that a FLUX of full
// size runs in seconds, on zeros. Nothing is shown of a GPU's kernels, numerics or speed.
#include <ATen/EmptyTensor.h>
#include <ATen/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using Stack = torch::jit::Stack;

constexpr int kMostDevices = 8;
int device_count = 1;
std::recursive_mutex mutex;
thread_local DeviceIndex current_device = 0;
thread_local int64_t current_streams[kMostDevices] = {0};
thread_local std::string current_op;
int64_t latest_stream = 0;

int64_t current_stream() { return current_streams[current_device]; }

// Skip mode; sizes in bytes. Attention and convolutions are slow on the CPU at sizes where others
// are not.
bool skipping = false;
constexpr size_t kLarge = size_t(8) << 20, kLargeAttention = kLarge / 4, kLargeConvolution = kLarge / 8;
// What a convolution's own scratch is, in per cent of what goes in and comes out.
size_t scratch_per_cent = 0;

// ------------------------------------------------------------------------------------------- streams

struct LateCopy {
  const void* on_device;
  std::function<void()> make;
};
std::map<std::pair<int, int64_t>, std::deque<LateCopy>> queues;
size_t late_copies = 0;

void catch_up(DeviceIndex device, int64_t stream) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto found = queues.find({device, stream});
  if (found == queues.end()) return;
  while (!found->second.empty()) {
    auto copy = std::move(found->second.front());
    found->second.pop_front();
    copy.make();
  }
}

void catch_up(DeviceIndex device) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  for (auto& queue : queues)
    if (queue.first.first == device) catch_up(device, queue.first.second);
}

// Whether a stream is still to copy from or to somewhere in this memory.
bool is_awaited(DeviceIndex device, int64_t stream, const char* address, size_t size) {
  for (const LateCopy& copy : queues[{device, stream}]) {
    auto* at = static_cast<const char*>(copy.on_device);
    if (address <= at && at < address + size) return true;
  }
  return false;
}

// ---------------------------------------------------------------------------------------- memory

constexpr size_t kMiB = size_t(1) << 20;
constexpr size_t kRounding = 512, kSmall = kMiB, kSmallSegment = 2 * kMiB, kLargeSegment = 20 * kMiB;
constexpr size_t kHuge = 10 * kMiB, kHugeRounding = 2 * kMiB;

// Part of a segment; neighbours of one segment are linked.
struct Block {
  char* address;
  size_t size;
  DeviceIndex device;
  int64_t stream;
  bool small;
  bool used = false;
  Block* before = nullptr;
  Block* after = nullptr;
};

struct BySize {
  bool operator()(const Block* a, const Block* b) const {
    if (a->stream != b->stream) return a->stream < b->stream;
    return a->size != b->size ? a->size < b->size : a->address < b->address;
  }
};

struct Memory {
  size_t limit = size_t(1) << 40;
  size_t reserved = 0, allocated = 0, taken = 0;  // taken: all that was ever allocated
  size_t peak_reserved = 0, peak_allocated = 0, refused = 0;
  std::set<Block*, BySize> large_blocks, small_blocks;

  std::set<Block*, BySize>& free_blocks(bool small) { return small ? small_blocks : large_blocks; }
} memories[kMostDevices];

size_t rounded(size_t size, size_t step) { return (size + step - 1) / step * step; }

void fill_with_nan(Block* block) {
  if (!skipping) std::memset(block->address, 0xff, block->size);
}

// Large tensors are pages that nobody has written to: they read as zeros and take no memory.
void fill_with_zeros(Block* block) {
  constexpr uintptr_t kPage = 4096;
  auto first = uintptr_t(block->address), last = first + block->size;
  uintptr_t from = rounded(first, kPage), to = last / kPage * kPage;
  if (block->size < kLarge) {
    std::memset(block->address, 0, block->size);
    return;
  }
  std::memset(block->address, 0, from - first);
  std::memset(reinterpret_cast<char*>(to), 0, last - to);
  madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);
}

void release_segments(Memory& memory) {
  catch_up(static_cast<DeviceIndex>(&memory - memories));  // as cudaFree does
  for (auto* blocks : {&memory.large_blocks, &memory.small_blocks})
    for (auto it = blocks->begin(); it != blocks->end();) {
      Block* block = *it;
      if (block->before || block->after) {
        ++it;
        continue;
      }
      it = blocks->erase(it);
      munmap(block->address, block->size);
      memory.reserved -= block->size;
      delete block;
    }
}

void* new_pages(size_t size) {
  return mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

Block* new_segment(DeviceIndex device, size_t size, bool small) {
  Memory& memory = memories[device];
  size_t segment = small ? kSmallSegment : size < kHuge ? kLargeSegment : rounded(size, kHugeRounding);
  if (memory.reserved + segment > memory.limit) release_segments(memory);
  bool fits = memory.reserved + segment <= memory.limit;
  memory.refused += !fits;
  size_t unused = memory.limit - std::min(memory.limit, memory.reserved);
  TORCH_CHECK_WITH(OutOfMemoryError, fits, "CUDA out of memory. Tried to allocate ", size / double(kMiB), " MiB in ",
      current_op, ". GPU ", int(device), " has a total capacity of ", memory.limit / double(kMiB),
      " MiB of which ", unused / double(kMiB), " MiB is free.");
  void* address = new_pages(segment);
  TORCH_CHECK(address != MAP_FAILED, "virtual GPU: the host has no memory for ", segment, " bytes");
  memory.reserved += segment;
  memory.peak_reserved = std::max(memory.peak_reserved, memory.reserved);
  return new Block{static_cast<char*>(address), segment, device, current_streams[device], small};
}

void split(Block* block, size_t size) {
  size_t rest = block->size - size;
  if (block->small ? rest < kRounding : rest <= kSmall) return;
  auto* other = new Block{block->address + size, rest, block->device, block->stream, block->small, false, block,
                          block->after};
  if (block->after) block->after->before = other;
  block->after = other;
  block->size = size;
  memories[block->device].free_blocks(block->small).insert(other);
}

Block* take(DeviceIndex device, size_t requested) {
  Memory& memory = memories[device];
  size_t size = rounded(std::max(requested, size_t(1)), kRounding);
  bool small = size <= kSmall;
  auto& blocks = memory.free_blocks(small);
  int64_t stream = current_streams[device];
  Block wanted{nullptr, size, device, stream, small};
  auto found = blocks.lower_bound(&wanted);
  bool any = found != blocks.end() && (*found)->stream == stream;
  Block* block = any ? *found : new_segment(device, size, small);
  blocks.erase(block);
  split(block, size);
  block->used = true;
  memory.allocated += block->size;
  memory.taken += block->size;
  memory.peak_allocated = std::max(memory.peak_allocated, memory.allocated);
  skipping ? fill_with_zeros(block) : fill_with_nan(block);
  return block;
}

// Join a free block with the one after it.
void join(Block* block) {
  Block* other = block->after;
  block->size += other->size;
  block->after = other->after;
  if (other->after) other->after->before = block;
  delete other;
}

void give_back_now(Block* block) {
  Memory& memory = memories[block->device];
  auto& blocks = memory.free_blocks(block->small);
  memory.allocated -= block->size;
  block->used = false;
  fill_with_nan(block);
  if (block->after && !block->after->used) {
    blocks.erase(block->after);
    join(block);
  }
  if (block->before && !block->before->used) {
    block = block->before;
    blocks.erase(block);
    join(block);
  }
  blocks.insert(block);
}

void give_back(void* context) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto* block = static_cast<Block*>(context);
  // What is free belongs to its stream, whose earlier work comes first; that of others does not.
  if (is_awaited(block->device, block->stream, block->address, block->size))
    queues[{block->device, block->stream}].push_back({nullptr, [block]() { give_back_now(block); }});
  else
    give_back_now(block);
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    Device device(c10::kCUDA, current_device);
    if (size == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, device};
    Block* block = take(current_device, size);
    return {block->address, block, &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
Allocator allocator;
REGISTER_ALLOCATOR(c10::DeviceType::CUDA, &allocator);

// Pinned memory of the host, rounded to powers of two as torch's own allocator does.
std::map<char*, size_t> pinned;

void unpin(void* address) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto found = pinned.find(static_cast<char*>(address));
  munmap(address, found->second);
  pinned.erase(found);
}

bool is_pinned(const void* address) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  auto* wanted = static_cast<char*>(const_cast<void*>(address));
  auto found = pinned.upper_bound(wanted);
  if (found == pinned.begin()) return false;
  --found;
  return wanted < found->first + found->second;
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t requested) override {
    std::lock_guard<std::recursive_mutex> lock(mutex);
    if (requested == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, Device(c10::kCPU)};
    size_t size = 4096;
    while (size < requested) size *= 2;
    void* address = new_pages(size);
    TORCH_CHECK(address != MAP_FAILED, "virtual GPU: the host has no memory for ", size, " bytes");
    pinned[static_cast<char*>(address)] = size;
    return {address, address, &unpin, Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
PinnedAllocator pinned_allocator;

// ------------------------------------------------------------------------------ what torch asks of CUDA

Device resolved(Device device) {
  if (!device.has_index()) device.set_index(current_device);
  TORCH_CHECK(device.index() < device_count, "CUDA error: invalid device ordinal");
  return device;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device getDevice() const override { return Device(c10::kCUDA, current_device); }
  void setDevice(Device device) const override { current_device = resolved(device).index(); }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.has_index()) current_device = device.index();
  }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  DeviceIndex deviceCount() const noexcept override { return device_count; }
  c10::Stream getStream(Device device) const override {
    Device found = resolved(device);
    return c10::Stream(c10::Stream::UNSAFE, found, current_streams[found.index()]);
  }
  c10::Stream getDefaultStream(Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, resolved(device));
  }
  c10::Stream getNewStream(Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, resolved(device), ++latest_stream);
  }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    c10::Stream before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    catch_up(stream.device_index(), stream.id());
  }
  void synchronizeDevice(const DeviceIndex device) const override { catch_up(device); }
  // An event is not told apart from its stream's end: `device.py` has events of its own.
  void record(void** event, const c10::Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count; }
  int getNumGPUs() const override { return device_count; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(DeviceIndex index) const override { ::current_device = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return std::exchange(::current_device, index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
  Device getDeviceFromPtr(void*) const override { return Device(c10::kCUDA, ::current_device); }
  void deviceSynchronize(DeviceIndex index) const override { catch_up(index); }
};

// ----------------------------------------------------------------------------------- operations

// The same memory as a tensor of the CPU's.
Tensor on_cpu(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  auto options = tensor.options().device(c10::kCPU).pinned_memory(false);
  if (tensor.numel() == 0) return at::empty_strided(tensor.sizes(), tensor.strides(), options);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}

Tensor make(c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::ScalarType type, Device device) {
  c10::DeviceGuard guard(device);
  return at::detail::empty_strided_generic(
      sizes, strides, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), type);
}

// The shape of a tensor without its values.
Tensor on_meta(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  auto options = tensor.options().device(c10::kMeta).pinned_memory(false);
  return at::empty_strided(tensor.sizes(), tensor.strides(), options);
}

Tensor brought(const Tensor& result, Device device) {
  Tensor tensor = make(result.sizes(), result.strides(), result.scalar_type(), device);
  if (!result.is_meta()) on_cpu(tensor).copy_(result);
  return tensor;
}

size_t bytes_of(const Tensor& tensor) { return tensor.defined() ? tensor.numel() * tensor.element_size() : 0; }

Tensor empty(c10::IntArrayRef sizes, std::optional<c10::ScalarType> type, std::optional<c10::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(resolved(device.value_or(Device(c10::kCUDA))));
  return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(type), format);
}

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<c10::ScalarType> type,
                     std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>) {
  return make(sizes, strides, c10::dtype_or_default(type), resolved(device.value_or(Device(c10::kCUDA))));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (self.is_same(source)) return self;
  Device device = self.is_cuda() ? self.device() : source.device();
  int64_t stream = current_streams[device.index()];
  Tensor from = source.sizes() == self.sizes() ? source : source.expand(self.sizes());
  const Tensor& host = self.is_cuda() ? source : self;
  bool crosses = self.is_cuda() != source.is_cuda();
  if (non_blocking && crosses && self.dtype() == source.dtype() && !skipping && host.is_pinned()) {
    // Of the device's side the bare address: memory that is freed too early is found out.
    ++late_copies;
    std::lock_guard<std::recursive_mutex> lock(mutex);
    const Tensor& there = self.is_cuda() ? self : from;
    queues[{device.index(), stream}].push_back(
        {there.data_ptr(), [to = on_cpu(self), from = on_cpu(from), kept = host]() { Tensor(to).copy_(from); }});
    return self;
  }
  catch_up(device.index(), stream);
  if (!(skipping && std::max(bytes_of(self), bytes_of(source)) >= kLarge)) on_cpu(self).copy_(on_cpu(from));
  return self;
}

Tensor copy_from(const Tensor& self, const Tensor& to, bool non_blocking) {
  Tensor target = to;
  return copy_(target, self, non_blocking);
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& to) {
  at::native::resize_output(to, self.sizes());
  return copy_from(self, to, false);
}

at::Scalar local_scalar(const Tensor& self) {
  catch_up(self.device().index(), current_streams[self.device().index()]);
  return on_cpu(self).item();
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef sizes,
                    c10::IntArrayRef strides) {
  auto dense = c10::contiguous_strides(sizes);
  auto* implementation = self.unsafeGetTensorImpl();
  implementation->set_storage_keep_dtype(storage);
  implementation->set_sizes_and_strides(
      sizes, strides.empty() ? c10::IntArrayRef(dense) : strides, offset);
  return self;
}

// Call `visit` with each tensor of a value, be it one or a list.
template <class Visit>
void each_tensor(const c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    visit(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& tensor : value.toTensorList()) visit(tensor);
  } else if (value.isOptionalTensorList()) {
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
      if (tensor) visit(*tensor);
  }
}

// Give a value with its tensors replaced.
template <class Replace>
c10::IValue with_tensors(const c10::IValue& value, Replace replace) {
  if (value.isTensor()) return replace(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorList()) list.push_back(replace(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
      list.push_back(tensor ? std::optional<Tensor>(replace(*tensor)) : std::nullopt);
    return list;
  }
  return value;
}

// The device of an operation's arguments, which have to be of one; numbers of the CPU may mix, and
// where indices lie is the operation's own business.
Device common_device(const std::vector<c10::IValue>& arguments) {
  static const std::set<std::string> mixing = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"};
  bool may_mix = mixing.count(current_op);
  std::optional<Device> common;
  for (const auto& value : arguments) {
    each_tensor(value, [&](const Tensor& tensor) {
      if (!tensor.defined() || (tensor.is_cpu() && (may_mix || tensor.dim() == 0))) return;
      if (!common) common = tensor.device();
      TORCH_CHECK(*common == tensor.device(),
          "Expected all tensors to be on the same device, but found at least two devices, ", *common,
          " and ", tensor.device(), "! (", current_op, ")");
    });
    if (value.isDevice() && !common) common = value.toDevice();
  }
  return resolved(common && common->is_cuda() ? *common : Device(c10::kCUDA));
}

// Every operation without one of its own: the CPU's, on the same memory; on shapes alone where
// large tensors are skipped.
void fallback(const c10::OperatorHandle& operation, Stack* stack) {
  current_op = operation.schema().operator_name().name;
  auto count = operation.schema().arguments().size();
  std::vector<c10::IValue> arguments(stack->end() - count, stack->end());
  Device device = common_device(arguments);
  c10::DeviceGuard guard(device);
  catch_up(device.index(), current_stream());
  size_t largest = 0;
  for (const auto& value : arguments)
    each_tensor(value, [&](const Tensor& tensor) { largest = std::max(largest, bytes_of(tensor)); });
  bool skipped = skipping && largest >= kLarge;

  std::unordered_map<const void*, Tensor> originals;
  Stack inner;
  for (const auto& value : arguments) {
    if (value.isDevice()) {
      inner.emplace_back(Device(skipped ? c10::kMeta : c10::kCPU));
      continue;
    }
    inner.push_back(with_tensors(value, [&](const Tensor& tensor) {
      Tensor converted = skipped ? on_meta(tensor) : on_cpu(tensor);
      if (converted.defined()) originals[converted.unsafeGetTensorImpl()] = tensor;
      return converted;
    }));
  }
  auto key = skipped ? c10::DispatchKey::Meta : c10::DispatchKey::CPU;
  operation.redispatchBoxed(c10::DispatchKeySet(key), &inner);
  torch::jit::drop(*stack, count);
  for (const auto& value : inner)
    stack->push_back(with_tensors(value, [&](const Tensor& result) {
      if (!result.defined()) return result;
      auto found = originals.find(result.unsafeGetTensorImpl());
      if (found == originals.end()) return brought(result, device);
      Tensor original = found->second;  // in place, or out=
      if (original.sizes() != result.sizes()) {
        at::native::resize_output(original, result.sizes());
        if (!skipped) on_cpu(original).copy_(result);
      }
      return original;
    }));
}

// These two choose among kernels by device before any fallback is asked.

Tensor attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                 double dropout, bool causal, std::optional<double> scale, bool grouped) {
  current_op = "aten::scaled_dot_product_attention";
  Device device = common_device({query, key, value, mask});
  catch_up(device.index(), current_streams[device.index()]);
  // As the flash kernels lay it out: [batch, tokens, heads, features] behind a transposed view.
  auto sizes = query.sizes();
  int64_t width = value.size(3), row = sizes[1] * width;
  Tensor result = make({sizes[0], sizes[2], sizes[1], width}, {sizes[2] * row, row, width, 1},
                       query.scalar_type(), device).transpose(1, 2);
  if (skipping && bytes_of(query) >= kLargeAttention) return result;
  auto cpu_mask = mask ? std::optional<Tensor>(on_cpu(*mask)) : std::nullopt;
  on_cpu(result).copy_(at::scaled_dot_product_attention(on_cpu(query), on_cpu(key), on_cpu(value), cpu_mask,
                                                        dropout, causal, scale, grouped));
  return result;
}

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                   bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  current_op = "aten::convolution";
  Device device = common_device({input, weight, bias});
  TORCH_CHECK(input.dtype() == weight.dtype(), "Input type (", input.dtype(), ") and weight type (",
              weight.dtype(), ") should be the same");
  catch_up(device.index(), current_streams[device.index()]);
  bool skipped = skipping && bytes_of(input) >= kLargeConvolution;
  auto converted = [&](const Tensor& tensor) { return skipped ? on_meta(tensor) : on_cpu(tensor); };
  auto its_bias = bias ? std::optional<Tensor>(converted(*bias)) : std::nullopt;
  Tensor result = at::convolution_symint(converted(input), converted(weight), its_bias, stride, padding, dilation,
                                         transposed, output_padding, groups);
  Tensor scratch;
  if (auto size = int64_t((bytes_of(input) + bytes_of(result)) * scratch_per_cent / 100))
    scratch = make({size}, {1}, at::kByte, device);
  return brought(result, device);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("scaled_dot_product_attention", attention);
  m.impl("convolution", convolution);
  // Else torch would take these apart before the fallback is asked.
  for (const char* name : {"native_group_norm", "native_layer_norm", "isfinite"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace

namespace at {
namespace {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", ::Hooks)
}
}  // namespace at

// What device.py asks; none of these may throw.
extern "C" {
void set_device_count(int count) { device_count = count; }
int get_device_count() { return device_count; }
void set_device(int index) { current_device = index; }
int get_device() { return current_device; }
void set_limit(int device, size_t bytes) { memories[device].limit = bytes; }
size_t get_limit(int device) { return memories[device].limit; }
size_t get_reserved(int device) { return memories[device].reserved; }
size_t get_allocated(int device) { return memories[device].allocated; }
size_t get_taken(int device) { return memories[device].taken; }
size_t get_peak_reserved(int device) { return memories[device].peak_reserved; }
size_t get_peak_allocated(int device) { return memories[device].peak_allocated; }
size_t get_refused(int device) { return memories[device].refused; }
void reset_peak(int device) {
  Memory& memory = memories[device];
  memory.peak_reserved = memory.reserved;
  memory.peak_allocated = memory.allocated;
}
void empty_cache() {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  for (auto& memory : memories) release_segments(memory);
}
void set_skipping(bool skip, size_t scratch) {
  skipping = skip;
  scratch_per_cent = scratch;
}
int64_t new_stream() { return ++latest_stream; }
int64_t get_stream(int device) { return current_streams[device]; }
void set_stream(int device, int64_t stream) { current_streams[device] = stream; }
void synchronize_stream(int device, int64_t stream) { catch_up(device, stream); }
void synchronize(int device) { catch_up(device); }
size_t get_late_copies() { return late_copies; }
size_t get_pending() {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  size_t count = 0;
  for (auto& queue : queues)
    for (auto& copy : queue.second) count += copy.on_device != nullptr;
  return count;
}
void drop_pending() {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  for (auto& queue : queues)
    for (auto& copy : std::exchange(queue.second, {}))
      if (!copy.on_device) copy.make();
}
}
