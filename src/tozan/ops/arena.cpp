// An allocator of tensors: one long stretch of addresses, of which memory is taken only as far as it has been used.
//
// Blocks of a training step come again in every step, in the same sizes. glibc's heap does not put them back where they
// were: what is aligned to 64 bytes does not fit into the hole that a block of its own size leaves (glibc before 2.38),
// and small objects of other libraries settle in between. Here every block takes the smallest hole that holds it, holes
// side by side are one, and nothing but tensors is in between, so the stretch is hardly longer than the tensors that
// live at the fullest moment. Nothing is given back to the kernel, and huge pages are asked for.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>

namespace {

constexpr size_t LEAST = 1 << 16;  // smaller blocks are left to PyTorch's own allocator
constexpr size_t ALIGNMENT = c10::gAlignment;

// Addresses from `begin` to `top` are blocks and holes; no hole touches another, or `top`.
class Stretch {
 public:
  Stretch(char* begin, size_t bytes) : begin_(begin), top_(begin), touched_(begin), end_(begin + bytes) {}

  bool has(const void* p) const { return p >= begin_ && p < end_; }

  // A block, or null if none is left.
  void* take(size_t bytes) {
    if (bytes > static_cast<size_t>(end_ - begin_)) return nullptr;
    bytes = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    std::lock_guard<std::mutex> guard(mutex_);
    char* start = top_;
    const auto fit = sizes_.lower_bound({bytes, nullptr});
    if (fit != sizes_.end()) {
      const auto [size, hole] = *fit;
      fill(holes_.find(hole));
      if (size > bytes) leave(hole + bytes, size - bytes);
      start = hole;
    } else if (bytes > static_cast<size_t>(end_ - top_)) {
      return nullptr;
    } else {
      top_ += bytes;
      if (top_ > touched_) touched_ = top_;
    }
    blocks_[start] = bytes;
    live_ += bytes;
    if (live_ > peak_) peak_ = live_;
    return start;
  }

  void give(void* p) {
    std::lock_guard<std::mutex> guard(mutex_);
    const auto block = blocks_.find(static_cast<char*>(p));
    char* start = block->first;
    size_t bytes = block->second;
    blocks_.erase(block);
    live_ -= bytes;
    auto next = holes_.lower_bound(start);
    if (next != holes_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == start) {
        start = before->first;
        bytes += before->second;
        fill(before);
      }
    }
    if (next != holes_.end() && start + bytes == next->first) {
      bytes += next->second;
      fill(next);
    }
    if (start + bytes == top_) {
      top_ = start;
    } else {
      leave(start, bytes);
    }
  }

  // Bytes in blocks now, at most since the last call with `again`, and of memory ever touched.
  void count(size_t found[3], bool again) {
    std::lock_guard<std::mutex> guard(mutex_);
    found[0] = live_;
    found[1] = peak_;
    found[2] = touched_ - begin_;
    if (again) peak_ = live_;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  void leave(char* start, size_t bytes) {
    holes_[start] = bytes;
    sizes_.insert({bytes, start});
  }

  void fill(std::map<char*, size_t>::iterator hole) {
    sizes_.erase({hole->second, hole->first});
    holes_.erase(hole);
  }

  std::mutex mutex_;
  char *begin_, *top_, *touched_, *end_;
  size_t live_ = 0, peak_ = 0;
  std::map<char*, size_t> holes_;                // where, bytes
  std::set<std::pair<size_t, char*>> sizes_;     // the same by size, the lowest first among equals
  std::unordered_map<char*, size_t> blocks_;
};

Stretch* stretch = nullptr;
c10::Allocator* usual = nullptr;

struct Arena final : c10::Allocator {
  static void release(void* p) {
    if (stretch->has(p)) {
      c10::profiledCPUMemoryReporter().Delete(p);
      stretch->give(p);
    } else if (p) {
      usual->raw_deallocate(p);
    }
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* p = bytes < LEAST ? nullptr : stretch->take(bytes);
    if (!p) return usual->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(p, bytes);
    return {p, p, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
};

}  // namespace

extern "C" {

// Have PyTorch's tensors on CPUs made in a stretch of `bytes` from now on; 0 if these addresses cannot be had.
int arena_install(size_t bytes) {
  if (stretch) return 1;
  void* begin = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (begin == MAP_FAILED) return 0;
#ifdef MADV_HUGEPAGE
  madvise(begin, bytes, MADV_HUGEPAGE);
#endif
  usual = c10::GetCPUAllocator();
  stretch = new Stretch(static_cast<char*>(begin), bytes);  // for good: tensors may outlive everything else
  // A child of fork must not find the lock held by a thread that it does not have.
  pthread_atfork([] { stretch->lock(); }, [] { stretch->unlock(); }, [] { stretch->unlock(); });
  c10::SetCPUAllocator(new Arena);
  return 1;
}

void arena_count(size_t found[3], int again) { stretch->count(found, again != 0); }

}  // extern "C"
