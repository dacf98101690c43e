// Fibers, barriers and warp collectives of the emulator.
// Previous hop: cuda_runtime.h and common/cuda/ptx.cuh of this folder.
// Next hop: none; x86-64 only (the switch between fibers is assembly).
#include "emulator.h"

#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr std::size_t kStackBytes = 96 * 1024;

enum class State { ready, at_block, at_warp, at_named, waiting, done };

// What the copy engine has yet to do; `leaving` counts it among the groups of its fiber.
struct Transfer {
  int fiber, group;
  bool leaving;
  std::function<void()> work;
};

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<unsigned char[]> stack;
  uint3 index{};
  int linear = 0;
  State state = State::ready;
  bool predicate = false;
  unsigned warp_mask = 0;
  unsigned collectives = 0;  // parity chooses the slot table
  CopyGroup open;
  std::deque<CopyGroup> groups;
  std::function<bool()> awaited;
  int named_id = 0, named_threads = 0;
  int bulk_group = 0;  // the one that is open
  bool unfenced = false;
  std::deque<std::vector<std::function<void()>>> products;  // groups; the last one is open
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> slots;   // [warps][2][32][kSlotBytes]
  std::vector<unsigned char> shared;  // dynamic shared memory
  int threads = 0, barrier_count = 0;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  const char* failure = nullptr;
  const std::function<void()>* body = nullptr;
  std::vector<Transfer> transfers;
  std::size_t shared_bytes = 0;
  unsigned long version = 0;         // of the last write
  unsigned long versions[256] = {};  // of every kilobyte
  std::mt19937 order{20261120};
};

Machine machine;

extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

void yield_to_scheduler() { emulator_switch(&machine.current->stack_pointer, machine.scheduler); }

void fiber_main() {
  (*machine.body)();
  machine.current->state = State::done;
  yield_to_scheduler();
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = std::make_unique<unsigned char[]>(kStackBytes);
  auto top = reinterpret_cast<std::uintptr_t>(fiber.stack.get()) + kStackBytes;
  top &= ~static_cast<std::uintptr_t>(15);
  auto* frame =
      reinterpret_cast<void**>(top) - 1;  // as after a call: 8 bytes off a 16-byte boundary
  *frame = nullptr;
  *--frame = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--frame = nullptr;
  fiber.stack_pointer = frame;
  fiber.state = State::ready;
  fiber.collectives = 0;
  fiber.open.count = 0;
  fiber.groups.clear();
  fiber.bulk_group = 0;
  fiber.unfenced = false;
  fiber.products.clear();
  fiber.products.emplace_back();
}

Fiber& fiber_at(int i) { return machine.fibers[static_cast<std::size_t>(i)]; }

// One of the copies that are under way, any of them.
bool transfer_one() {
  if (machine.transfers.empty()) return false;
  const std::size_t i = machine.order() % machine.transfers.size();
  const auto work = std::move(machine.transfers[i].work);
  machine.transfers.erase(machine.transfers.begin() + static_cast<std::ptrdiff_t>(i));
  work();
  return true;
}

bool release_waiting() {
  bool released = false;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& f = fiber_at(i);
    if (f.state == State::waiting && f.awaited()) f.state = State::ready, released = true;
    if (f.state != State::at_named) continue;
    int here = 0;
    for (int j = 0; j < machine.threads; ++j)
      here += fiber_at(j).state == State::at_named && fiber_at(j).named_id == f.named_id;
    if (here < f.named_threads) continue;
    const int id = f.named_id;
    for (int j = 0; j < machine.threads; ++j)
      if (fiber_at(j).state == State::at_named && fiber_at(j).named_id == id)
        fiber_at(j).state = State::ready;
    released = true;
  }
  return released;
}

void run_products(Fiber& fiber, std::size_t groups_left) {
  while (fiber.products.size() > groups_left) {
    const auto group = std::move(fiber.products.front());
    fiber.products.pop_front();
    for (const auto& work : group) work();
  }
}

bool release_block_barrier() {
  int waiting = 0, live = 0, count = 0;
  for (int i = 0; i < machine.threads; ++i) {
    const Fiber& f = machine.fibers[static_cast<std::size_t>(i)];
    if (f.state != State::done) ++live;
    if (f.state == State::at_block) ++waiting, count += f.predicate;
  }
  if (live == 0 || waiting != live) return false;
  machine.barrier_count = count;
  for (int i = 0; i < machine.threads; ++i) {
    Fiber& f = machine.fibers[static_cast<std::size_t>(i)];
    if (f.state == State::at_block) f.state = State::ready;
  }
  return true;
}

bool release_warp_collectives() {
  bool released = false;
  for (int base = 0; base < machine.threads; base += kWarp) {
    unsigned waiting = 0;
    for (int l = 0; l < kWarp && base + l < machine.threads; ++l)
      if (machine.fibers[static_cast<std::size_t>(base + l)].state == State::at_warp)
        waiting |= 1u << l;
    for (int l = 0; l < kWarp && base + l < machine.threads; ++l) {
      Fiber& f = machine.fibers[static_cast<std::size_t>(base + l)];
      if (f.state != State::at_warp || (waiting & f.warp_mask) != f.warp_mask) continue;
      for (int other = 0; other < kWarp && base + other < machine.threads; ++other) {
        if (!((f.warp_mask >> other) & 1u)) continue;
        Fiber& g = machine.fibers[static_cast<std::size_t>(base + other)];
        if (g.warp_mask != f.warp_mask)
          throw std::runtime_error("emulator: the lanes of a warp collective disagree on its mask");
        g.state = State::ready;
      }
      released = true;
    }
  }
  return released;
}

void run_block() {
  for (;;) {
    // From a random thread on, in a random direction.
    const int rotation = static_cast<int>(machine.order() % static_cast<unsigned>(machine.threads));
    const bool backwards = machine.order() & 1u;
    bool ran = false, live = false;
    for (int k = 0; k < machine.threads; ++k) {
      const int position = (k + rotation) % machine.threads;
      const int index = backwards ? machine.threads - 1 - position : position;
      Fiber& fiber = machine.fibers[static_cast<std::size_t>(index)];
      if (fiber.state == State::ready) {
        machine.current = &fiber;
        threadIdx = fiber.index;
        emulator_switch(&machine.scheduler, fiber.stack_pointer);
        machine.current = nullptr;
        if (machine.failure != nullptr) throw std::runtime_error(machine.failure);
        ran = true;
      }
      live = live || fiber.state != State::done;
    }
    if (!live) {
      if (!machine.transfers.empty())
        throw std::runtime_error("emulator: a block ended before its copies had left");
      return;
    }
    const bool moved = machine.order() & 1u ? transfer_one() : false;
    if (release_warp_collectives()) continue;
    if (release_block_barrier()) continue;
    if (release_waiting()) continue;
    if (!ran && !moved && transfer_one()) continue;
    if (!ran && !moved)
      throw std::runtime_error("emulator: deadlock, a barrier that some thread never reaches");
  }
}

}  // namespace

namespace {
constexpr std::uint32_t kFirstShared =
    128;  // a device promises no more than the declared alignment

unsigned char* shared_origin() {
  const auto address = reinterpret_cast<std::uintptr_t>(machine.shared.data());
  return machine.shared.data() + ((1024 - address % 1024) % 1024);
}
}  // namespace

unsigned char* dynamic_shared() { return shared_origin() + kFirstShared; }
std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(p) - shared_origin());
}
unsigned char* shared_pointer(std::uint32_t address, std::uint32_t bytes, std::uint32_t alignment) {
  if (address % alignment != 0) fail("emulator: a misaligned address in shared memory");
  if (address < kFirstShared || address + bytes > kFirstShared + machine.shared_bytes)
    fail("emulator: an address outside of the dynamic shared memory");
  return shared_origin() + address;
}
unsigned long shared_version(std::uint32_t address, std::uint32_t bytes) {
  unsigned long latest = 0;
  for (std::uint32_t i = address / 1024; i <= (address + bytes - 1) / 1024; ++i)
    if (machine.versions[i % 256] > latest) latest = machine.versions[i % 256];
  return latest;
}
void shared_changed(std::uint32_t address, std::uint32_t bytes) {
  ++machine.version;
  for (std::uint32_t i = address / 1024; i <= (address + bytes - 1) / 1024; ++i)
    machine.versions[i % 256] = machine.version;
}
int thread() { return machine.current->linear; }

void wait_until(const std::function<bool()>& ready) {
  machine.current->awaited = ready;
  machine.current->state = State::waiting;
  yield_to_scheduler();
}
void named_barrier(int id, int threads) {
  machine.current->named_id = id;
  machine.current->named_threads = threads;
  machine.current->state = State::at_named;
  yield_to_scheduler();
}
void later(bool leaving, const std::function<void()>& work) {
  machine.transfers.push_back(
      {machine.current->linear, machine.current->bulk_group, leaving, work});
}
void bulk_commit() { ++machine.current->bulk_group; }
void bulk_wait(int still_pending) {
  const int fiber = machine.current->linear;
  const int up_to = machine.current->bulk_group - still_pending;
  wait_until([=] {
    for (const Transfer& t : machine.transfers)
      if (t.leaving && t.fiber == fiber && t.group < up_to) return false;
    return true;
  });
}
void wrote_shared(std::uint32_t address, std::uint32_t bytes) {
  machine.current->unfenced = true;
  shared_changed(address, bytes);
}
void fence_shared() { machine.current->unfenced = false; }
void demand_fenced() {
  const int first = machine.current->linear / 128 * 128;
  for (int i = first; i < first + 128 && i < machine.threads; ++i)
    if (fiber_at(i).unfenced)
      fail("emulator: the copy engine reads what was written without a fence");
}
void product(const std::function<void()>& work) {
  Fiber& fiber = *machine.current;
  fiber.products.back().push_back(work);
  if ((machine.order() & 7u) != 0) return;
  run_products(fiber, 1);  // all that was asked for so far, now
  for (const auto& one : fiber.products.back()) one();
  fiber.products.back().clear();
}
void product_commit() { machine.current->products.emplace_back(); }
void product_wait(int still_pending) {
  run_products(*machine.current, static_cast<std::size_t>(still_pending) + 1);
}
[[noreturn]] void fail(const char* why) {
  machine.failure = why;
  if (machine.current == nullptr) throw std::runtime_error(why);
  machine.current->state = State::done;
  yield_to_scheduler();
  std::abort();  // a finished fiber is never resumed
}

int lane() { return machine.current->linear % kWarp; }

int block_barrier(bool predicate) {
  machine.current->predicate = predicate;
  machine.current->state = State::at_block;
  yield_to_scheduler();
  return machine.barrier_count;
}

const unsigned char* warp_exchange(unsigned mask, const void* operand, std::size_t bytes) {
  Fiber& fiber = *machine.current;
  const std::size_t warp = static_cast<std::size_t>(fiber.linear / kWarp);
  unsigned char* table =
      machine.slots.data() + (warp * 2 + (fiber.collectives++ & 1u)) * kWarp * kSlotBytes;
  std::memcpy(table + static_cast<std::size_t>(lane()) * kSlotBytes, operand, bytes);
  fiber.warp_mask = mask;
  fiber.state = State::at_warp;
  yield_to_scheduler();
  return table;
}

void copy_async(void* shared, const void* global, int bytes, bool valid) {
  CopyGroup& open = machine.current->open;
  if (open.count == 64) fail("emulator: more than 64 copies in one group");
  open.copies[open.count++] = {shared, global, bytes, valid};
}
void copy_commit() {
  Fiber& fiber = *machine.current;
  fiber.groups.push_back(fiber.open);
  fiber.open.count = 0;
}
void copy_wait(int still_pending) {
  auto& groups = machine.current->groups;
  while (static_cast<int>(groups.size()) > still_pending) {
    const CopyGroup& group = groups.front();
    for (int i = 0; i < group.count; ++i) {
      const auto& copy = group.copies[i];
      if (copy.valid)
        std::memcpy(copy.shared, copy.global, static_cast<std::size_t>(copy.bytes));
      else
        std::memset(copy.shared, 0, static_cast<std::size_t>(copy.bytes));
    }
    groups.pop_front();
  }
}

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
  machine.threads = static_cast<int>(block.x * block.y * block.z);
  blockDim = block;
  gridDim = grid;
  machine.body = &body;
  machine.failure = nullptr;
  machine.transfers.clear();
  machine.shared_bytes = shared_bytes;
  const auto threads = static_cast<std::size_t>(machine.threads);
  if (machine.fibers.size() < threads) machine.fibers.resize(threads);
  machine.slots.assign((threads + kWarp - 1) / kWarp * 2 * kWarp * kSlotBytes, 0);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        machine.shared.assign(shared_bytes + 1024 + kFirstShared, 0xff);
        shared_changed(0, 256 * 1024);
        for (std::size_t i = 0; i < threads; ++i) {
          Fiber& fiber = machine.fibers[i];
          const auto n = static_cast<unsigned>(i);
          fiber.linear = static_cast<int>(i);
          fiber.index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
          prepare(fiber);
        }
        run_block();
      }
}

}  // namespace emulator
