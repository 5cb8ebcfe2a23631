// SPDX-License-Identifier: Apache-2.0
//
// One block of emulated CUDA threads: who may run, what a barrier or a warp operation waits for,
// and what to say when nothing can go on.
//
// A thread runs alone until it reaches a barrier, a warp operation or its end. There it either
// blocks, or as the last to arrive completes the operation for all and makes every participant
// ready; in both cases a random ready thread runs next. Every fault of synchronisation thus ends
// in one of two ways: an operation that is wrong in itself fails at once, any other leaves threads
// waiting when none is ready, and `explain_stall` names the reason.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "fiber.hpp"

#ifdef MSDA_EMULATED_SANITIZE
#include <sanitizer/asan_interface.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

static uint3 blockIdx;
static dim3 blockDim;
static dim3 gridDim;
constexpr int warpSize = 32;

namespace emu {

// Where the kernel called an operation. As a default argument, `here` sees its caller's line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& o) const { return line == o.line && (file == o.file || std::strcmp(file, o.file) == 0); }
};

enum class Op : unsigned char {
  syncwarp,
  shfl,
  shfl_up,
  shfl_down,
  shfl_xor,
  all,
  any,
  ballot,
  match_any,
  syncthreads,
  syncthreads_count,
  syncthreads_and,
  syncthreads_or,
};

constexpr const char* op_names[] = {"__syncwarp",       "__shfl_sync",   "__shfl_up_sync",      "__shfl_down_sync",
                                    "__shfl_xor_sync",  "__all_sync",    "__any_sync",          "__ballot_sync",
                                    "__match_any_sync", "__syncthreads", "__syncthreads_count", "__syncthreads_and",
                                    "__syncthreads_or"};

// What a thread waits for, and what it brings to it.
struct Wait {
  Op op;
  unsigned bytes;   // size of the exchanged type, 0 if none
  unsigned mask;    // lanes of a warp operation
  unsigned source;  // lane that a shuffle reads
  std::uint64_t value;
  Site site;
};

struct Warp;

struct Thread {
  Fiber fiber;
  uint3 index;
  unsigned lane;
  Warp* warp;
  Wait wait;
  std::uint64_t result;
};

// Sets of lanes as bits. A lane that is in none of the last three runs or waits at a barrier.
struct Warp {
  Thread* threads;
  unsigned number;
  unsigned exists;
  unsigned ready;
  unsigned waiting;  // at a warp operation
  unsigned exited;
};

struct Random {
  std::uint64_t state;
  std::uint64_t operator()() {  // splitmix64
    std::uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
};

// The blocks of a grid that run; all, if `first` is null.
struct Blocks {
  const uint3* first;
  std::uint64_t count;

  uint3 operator[](std::uint64_t i) const {
    if (first) return first[i];
    return {static_cast<unsigned>(i % gridDim.x), static_cast<unsigned>(i / gridDim.x % gridDim.y),
            static_cast<unsigned>(i / gridDim.x / gridDim.y)};
  }
};

struct Machine {
  Fiber main;
  Warp warps[32];
  unsigned warp_count;
  unsigned thread_count;
  unsigned ready;                          // warps with a ready lane
  unsigned turn;                           // the warp that runs
  unsigned focus;                          // lanes that run first
  unsigned warp_patience, focus_patience;  // random bits that must all be zero for a change
  unsigned arrived;                        // threads at the barrier
  unsigned votes;                          // of them, with a true predicate
  std::uint64_t block;                     // number of the block over all launches, from 1
  std::size_t shared_bytes;
  Blocks blocks;
  Random random;
  void (*body)(void*);
  void* argument;
  std::string error;
};

static Machine machine;
static Thread* current = nullptr;  // null while the main stack runs

inline unsigned first_lane(unsigned lanes) { return static_cast<unsigned>(__builtin_ctz(lanes)); }

// A bit of the non-empty set: the first one from a random place on.
inline unsigned random_bit(unsigned set, std::uint64_t random) {
  const unsigned start = random & 31;
  const unsigned turned = set >> start | set << (-start & 31);
  return (first_lane(turned) + start) & 31;
}

// The next thread, null if none is ready. A fair choice would keep all warps within one operation
// of each other and so hide most missing barriers. Instead one warp, and in it one aligned group
// of lanes, runs for as long as it can, up to a random change; each block has its own patience.
inline Thread* pick() {
  if (!machine.ready) return nullptr;
  const std::uint64_t random = machine.random();
  if (!machine.warps[machine.turn].ready || !(random & machine.warp_patience)) {
    machine.turn = random_bit(machine.ready, random >> 16);
  }
  Warp& warp = machine.warps[machine.turn];
  if (!(random >> 24 & machine.focus_patience)) {
    const unsigned width = 2u << (random >> 40 & 3);  // 2, 4, 8 or 16 lanes
    const unsigned place = (random >> 48 & 31) & -width;
    machine.focus = ((1u << width) - 1) << place;
  }
  const unsigned preferred = warp.ready & machine.focus;
  const unsigned lane = random_bit(preferred ? preferred : warp.ready, random >> 56);
  warp.ready &= ~(1u << lane);
  if (!warp.ready) machine.ready &= ~(1u << machine.turn);
  return warp.threads + lane;
}

// Leaves the running thread for any ready one, or for the main stack if there is none.
inline void reschedule() {
  Thread* const self = current;
  Thread* const next = pick();
  if (next == self) return;
  current = next;
  switch_fiber(self->fiber, next ? next->fiber : machine.main);
}

inline void append(std::string& text, const char* format, ...) {
  char line[512];
  va_list list;
  va_start(list, format);
  std::vsnprintf(line, sizeof line, format, list);
  va_end(list);
  text += line;
}

inline std::string whereabouts(const uint3& block, const Thread* thread) {
  std::string text;
  append(text, "block (%u, %u, %u)", block.x, block.y, block.z);
  if (!thread) return text;
  append(text, ", thread (%u, %u, %u), warp %u, lane %u", thread->index.x, thread->index.y, thread->index.z,
         thread->warp->number, thread->lane);
  return text;
}

// Gives up the launch from a thread; its stack and those of all others are abandoned.
[[noreturn]] inline void fail(const Site& site, const std::string& what) {
  machine.error = what + "\n  " + whereabouts(blockIdx, current);
  if (site.file) append(machine.error, ", at %s:%d", site.file, site.line);
  switch_fiber(current->fiber, machine.main);
  __builtin_unreachable();
}

// What the race detector (races.hpp) has to know; in other modes nothing.
inline void track(const std::string& name, const void* data, std::size_t bytes, std::size_t grain, bool shared);
inline void track_block();
inline void track_barrier(const Site& site);
inline void track_warp_barrier(const Warp& warp, unsigned mask, const Site& site);

inline bool same_operation(const Wait& a, const Wait& b) {
  return a.mask == b.mask && a.op == b.op && a.bytes == b.bytes;
}

// Hands every lane of the mask its result, and makes it ready.
inline void complete(Warp& warp, const Wait& wait) {
  unsigned ballot = 0;
  for (unsigned left = wait.mask; left; left &= left - 1) {
    const unsigned lane = first_lane(left);
    ballot |= unsigned{warp.threads[lane].wait.value != 0} << lane;
  }
  for (unsigned left = wait.mask; left; left &= left - 1) {
    Thread& thread = warp.threads[first_lane(left)];
    switch (wait.op) {
      case Op::shfl:
      case Op::shfl_up:
      case Op::shfl_down:
      case Op::shfl_xor:
        thread.result = warp.threads[thread.wait.source].wait.value;
        break;
      case Op::all:
        thread.result = ballot == wait.mask;
        break;
      case Op::any:
        thread.result = ballot != 0;
        break;
      case Op::match_any:
        thread.result = 0;
        for (unsigned others = wait.mask; others; others &= others - 1) {
          const unsigned lane = first_lane(others);
          const bool equal = warp.threads[lane].wait.value == thread.wait.value;
          thread.result |= std::uint64_t{equal} << lane;
        }
        break;
      default:
        thread.result = ballot;
    }
  }
  if (wait.op == Op::syncwarp) track_warp_barrier(warp, wait.mask, wait.site);
  warp.waiting &= ~wait.mask;
  warp.ready |= wait.mask;
  machine.ready |= 1u << warp.number;
}

// Waits until every lane of the mask has come to the same operation with the same mask.
__attribute__((noinline)) inline std::uint64_t warp_operation(const Wait& wait) {
  Thread& self = *current;
  Warp& warp = *self.warp;
  self.wait = wait;
  if (!(wait.mask >> self.lane & 1)) {
    std::string text;
    append(text, "%s by a lane outside its own mask 0x%08x", op_names[int(wait.op)], wait.mask);
    fail(wait.site, text);
  }
  warp.waiting |= 1u << self.lane;
  if ((warp.waiting & wait.mask) == wait.mask) {
    bool together = true;
    for (unsigned left = wait.mask; left; left &= left - 1) {
      together &= same_operation(warp.threads[first_lane(left)].wait, wait);
    }
    if (together) complete(warp, wait);
  }
  reschedule();
  return self.result;
}

// Waits until every thread of the block has come to the same barrier in the source.
__attribute__((noinline)) inline unsigned barrier(Op op, bool predicate, const Site& site) {
  Thread& self = *current;
  self.wait = {op, 0, 0, 0, predicate, site};
  machine.votes += predicate;
  if (++machine.arrived == machine.thread_count) {
    for (unsigned i = 0; i < machine.warp_count; ++i) {
      Warp& warp = machine.warps[i];
      for (unsigned left = warp.exists; left; left &= left - 1) {
        Thread& thread = warp.threads[first_lane(left)];
        const Wait& other = thread.wait;
        if (other.op != op || !(other.site == site)) {
          std::string text;
          append(text, "barrier divergence: %s meets %s at %s:%d", op_names[int(op)], op_names[int(other.op)],
                 other.site.file, other.site.line);
          fail(site, text);
        }
        thread.result = machine.votes;
      }
      warp.ready = warp.exists;
      machine.ready |= 1u << i;
    }
    machine.arrived = machine.votes = 0;
    track_barrier(site);
  }
  reschedule();
  return static_cast<unsigned>(self.result);
}

// Why no thread of the block is ready although some have not exited.
inline const char* stall_reason() {
  const char* reason = nullptr;
  unsigned any_exited = 0;
  for (unsigned i = 0; i < machine.warp_count; ++i) {
    const Warp& warp = machine.warps[i];
    any_exited |= warp.exited;
    for (unsigned left = warp.waiting; left; left &= left - 1) {
      const Wait& wait = warp.threads[first_lane(left)].wait;
      if (wait.mask & ~warp.exists) return "the mask names lanes that do not exist";
      if (wait.mask & warp.exited) return "the mask names lanes that have exited";
      if (wait.mask & ~warp.waiting) {
        reason = "barrier divergence: some lanes wait at a barrier, others of their warp for them";
        continue;
      }
      for (unsigned others = wait.mask; others; others &= others - 1) {
        const Wait& other = warp.threads[first_lane(others)].wait;
        if (other.mask == wait.mask && !same_operation(other, wait)) {
          return "lanes of one mask are at different warp operations";
        }
      }
      if (!reason) reason = "deadlock: lanes wait for each other with different masks";
    }
  }
  if (reason) return reason;
  return any_exited ? "barrier divergence: some threads wait at a barrier, others have exited" : "deadlock";
}

// The reason, and one line for each set of lanes that share a state.
inline std::string explain_stall() {
  std::string text = stall_reason();
  text += "\n  " + whereabouts(blockIdx, nullptr);
  int lines = 0;
  for (unsigned i = 0; i < machine.warp_count; ++i) {
    const Warp& warp = machine.warps[i];
    if (warp.exited) {
      append(text, "\n  warp %u, lanes 0x%08x: exited", i, warp.exited);
      ++lines;
    }
    for (unsigned left = warp.exists & ~warp.exited; left;) {
      if (++lines > 24) return text + "\n  ...";
      const unsigned first = first_lane(left);
      const Wait& wait = warp.threads[first].wait;
      unsigned lanes = 0;
      for (unsigned others = left; others; others &= others - 1) {
        const Wait& other = warp.threads[first_lane(others)].wait;
        if (same_operation(other, wait) && other.site == wait.site) lanes |= others & -others;
      }
      append(text, "\n  warp %u, lanes 0x%08x: wait in %s", i, lanes, op_names[int(wait.op)]);
      if (warp.waiting >> first & 1) append(text, " with mask 0x%08x", wait.mask);
      append(text, ", at %s:%d", wait.site.file, wait.site.line);
      left &= ~lanes;
    }
  }
  return text;
}

// Code that the race detector does not see: its own, and the emulator's accesses to what it watches.
#define EMU_UNSEEN __attribute__((no_sanitize("thread")))

// A __shared__ variable: storage on the heap, of exactly its size, so that AddressSanitizer knows
// both ends. It is aligned to what the declaration asks for and no better, so that a vector access
// to a plain float array shows. The first thread of a block to pass the declaration poisons it:
// the pattern is a NaN as half, bfloat16, float and double, and far out of range as an integer.
template <class T, std::size_t declared = alignof(T)>
class Shared {
  static_assert(__is_trivially_constructible(T), "CUDA does not construct __shared__ variables");

 public:
  constexpr explicit Shared(const char* name) : name_(name) {}

  T& get(Site site = Site::here()) {
    if (block_ != machine.block) claim(site);
    return *reinterpret_cast<T*>(data_);
  }

 private:
  static constexpr std::size_t align = declared < 8 ? 8 : declared;

  EMU_UNSEEN void claim(const Site& site) {
    block_ = machine.block;
    machine.shared_bytes += sizeof(T);
    if (machine.shared_bytes > 48 << 10) fail(site, "more than 48 KiB of __shared__ variables");
    if (!data_) {
      void* area = nullptr;
      if (posix_memalign(&area, 2 * align, align + sizeof(T)) != 0) fail(site, "out of memory");
      data_ = static_cast<unsigned char*>(area) + align;
#ifdef MSDA_EMULATED_SANITIZE
      __asan_poison_memory_region(area, align);
#endif
    }
    for (std::size_t i = 0; i < sizeof(T); ++i) data_[i] = i % 2 ? 0xff : 0xfb;
    track(name_, data_, sizeof(T), 2, true);
  }

  const char* name_;
  std::uint64_t block_ = 0;
  unsigned char* data_ = nullptr;
};

inline void thread_main() {
  announce_arrival(current->fiber);
  for (;;) {  // once for each block
    machine.body(machine.argument);
    current->warp->exited |= 1u << current->lane;
    reschedule();
  }
}

inline void run_block() {
  ++machine.block;
  track_block();
  machine.shared_bytes = 0;
  machine.arrived = machine.votes = 0;
  machine.ready = 0;
  for (unsigned i = 0; i < machine.warp_count; ++i) {
    Warp& warp = machine.warps[i];
    warp.ready = warp.exists;
    warp.waiting = warp.exited = 0;
    machine.ready |= 1u << i;
  }
  machine.warp_patience = (1u << (3 + machine.random() % 8)) - 1;
  machine.focus_patience = (1u << (1 + machine.random() % 8)) - 1;
  current = pick();
  switch_fiber(machine.main, current->fiber);
  if (!machine.error.empty()) return;
  for (unsigned i = 0; i < machine.warp_count; ++i) {
    if (machine.warps[i].exited != machine.warps[i].exists) {
      machine.error = explain_stall();
      return;
    }
  }
}

// Runs the blocks, in an order that the seed decides.
inline void run_grid() {
  const std::uint64_t blocks = machine.blocks.count;
  const std::uint64_t start = machine.random() % blocks;
  std::uint64_t stride = machine.random() % blocks + 1;
  while (std::gcd(stride, blocks) != 1) ++stride;
  for (std::uint64_t i = 0, at = start; i < blocks && machine.error.empty(); ++i) {
    blockIdx = machine.blocks[at];
    run_block();
    at = (at + stride) % blocks;
  }
}

#ifdef MSDA_EMULATED_SANITIZE

inline void run_grid_guarded() { run_grid(); }  // the sanitizer reports faults better

#else

static sigjmp_buf fault_exit;

inline void on_fault(int signal) { siglongjmp(fault_exit, signal); }

// Turns a wild access into an error of the launch, as far as that can be had without a sanitizer.
inline void run_grid_guarded() {
  constexpr int signals[] = {SIGSEGV, SIGBUS, SIGFPE};
  static char handler_stack[64 << 10];
  struct sigaction action = {}, old_actions[3];
  action.sa_handler = on_fault;
  action.sa_flags = SA_ONSTACK;
  stack_t stack = {}, old_stack;
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &old_stack);
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &action, &old_actions[i]);
  if (const int signal = sigsetjmp(fault_exit, 1)) {
    append(machine.error, "%s; a sanitized run may name the line\n  %s",
           signal == SIGFPE ? "integer division by zero" : "memory fault", whereabouts(blockIdx, current).c_str());
  } else {
    run_grid();
  }
  for (int i = 0; i < 3; ++i) sigaction(signals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);
}

#endif

// Runs body(argument) in every thread of these blocks of the grid. Returns the error text, empty if all went well.
inline const std::string& run(dim3 grid, dim3 block, Blocks blocks, std::uint64_t seed, void (*body)(void*),
                              void* argument) {
  machine.error.clear();
  const std::uint64_t count = std::uint64_t{block.x} * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    append(machine.error, "no such grid: (%u, %u, %u)", grid.x, grid.y, grid.z);
    return machine.error;
  }
  if (count < 1 || count > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) {
    append(machine.error, "no such block: (%u, %u, %u)", block.x, block.y, block.z);
    return machine.error;
  }
  const Stacks stacks(count);
  if (!stacks.ok()) return machine.error = "cannot map the stacks of the threads";

  if (!blocks.first) blocks.count = std::uint64_t{grid.x} * grid.y * grid.z;
  gridDim = grid;
  blockDim = block;
  machine.blocks = blocks;
  machine.thread_count = static_cast<unsigned>(count);
  machine.warp_count = (machine.thread_count + 31) / 32;
  machine.turn = 0;
  machine.focus = ~0u;
  machine.random.state = seed;
  machine.body = body;
  machine.argument = argument;
  std::vector<Thread> threads(count);
  for (unsigned i = 0; i < machine.thread_count; ++i) {
    Warp& warp = machine.warps[i / 32];
    if (i % 32 == 0) warp = {&threads[i], i / 32, 0, 0, 0, 0};
    warp.exists |= 1u << i % 32;
    threads[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    threads[i].lane = i % 32;
    threads[i].warp = &warp;
    stacks.start(i, threads[i].fiber, thread_main);
  }
  run_grid_guarded();
  current = nullptr;
  return machine.error;
}

}  // namespace emu
