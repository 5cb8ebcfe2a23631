// SPDX-License-Identifier: Apache-2.0
//
// The race detector: sees every access to global and shared memory, and fails a launch in which two threads access the
// same bytes, at least one of them writes, not both are atomic, and no barrier orders the two.
//
// The compiler's instrumentation for ThreadSanitizer calls the functions at the end of this file before each access; its
// own runtime library is not linked. What orders: __syncthreads the threads of a block, __syncwarp the lanes of its mask.
// Shuffles and votes order nothing, as in CUDA, and nothing orders two blocks. A race so shows in any order of threads
// that passes both places, also where the result is right.
#pragma once

#include <dlfcn.h>

#include "block.hpp"

#ifdef MSDA_EMULATED_RACES

namespace emu {

enum class Kind : unsigned char { none, read, write, atomic };

struct Access {
  Kind kind;
  unsigned thread;    // of the block
  unsigned interval;  // block barriers before it
  unsigned clock;     // warp barriers of its lane before it
  uint3 block;
  const void* where;  // in the code
};

// What one cell, the `grain` bytes that are tracked as one, has seen. Of accesses that may be concurrent two are enough,
// as far apart as any were: whatever is ordered after both is ordered after all.
struct Cell {
  Access write;
  Access atomics[2], reads[2];
};

struct Buffer {
  std::string name;
  const char* data;
  std::size_t bytes, grain;
  bool shared;
  Cell* cells;
};

struct Detector {
  Buffer buffers[64];
  unsigned count;  // of buffers
  unsigned interval;
  unsigned clocks[32][32]
                 [32];  // of warp, lane, other lane: the last of its clocks that comes before what the lane does
  const char* blind;    // "file:line" of a barrier that orders nothing here, or of an atomic that is none
};

static Detector detector;

inline bool is_blind(const Site& site) {
  if (!detector.blind) return false;
  const std::string place = std::string(site.file) + ":" + std::to_string(site.line);
  return place == detector.blind;
}

inline void track(const std::string& name, const void* data, std::size_t bytes, std::size_t grain, bool shared) {
  for (unsigned i = 0; i < detector.count; ++i) {
    if (detector.buffers[i].data == data) return;
  }
  if (detector.count == std::size(detector.buffers)) std::abort();
  auto* cells = static_cast<Cell*>(std::calloc(bytes / grain + 1, sizeof(Cell)));
  detector.buffers[detector.count++] = {name, static_cast<const char*>(data), bytes, grain, shared, cells};
}

inline void track_launch(const char* blind) {
  while (detector.count) std::free(detector.buffers[--detector.count].cells);
  detector.blind = blind;
}

inline void track_block() {
  detector.interval = 0;
  for (auto& warp : detector.clocks) {
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned other = 0; other < 32; ++other) warp[lane][other] = lane == other;
    }
  }
}

inline void track_barrier(const Site& site) { detector.interval += !is_blind(site); }

inline void track_warp_barrier(const Warp& warp, unsigned mask, const Site& site) {
  if (is_blind(site)) return;
  auto& clocks = detector.clocks[warp.number];
  unsigned latest[32] = {};
  for (unsigned left = mask; left; left &= left - 1) {
    const auto& of_lane = clocks[first_lane(left)];
    for (unsigned other = 0; other < 32; ++other) latest[other] = std::max(latest[other], of_lane[other]);
  }
  for (unsigned left = mask; left; left &= left - 1) {
    const unsigned lane = first_lane(left);
    std::copy(latest, latest + 32, clocks[lane]);
    ++clocks[lane][lane];
  }
}

EMU_UNSEEN inline bool same_block(const Access& a, const Access& b) {
  return a.block.x == b.block.x && a.block.y == b.block.y && a.block.z == b.block.z;
}

// How far apart two threads are: 0 for one thread, then lanes of a warp, warps of a block, blocks.
EMU_UNSEEN inline int distance(const Access& a, const Access& b) {
  if (!same_block(a, b)) return 3;
  return a.thread == b.thread ? 0 : a.thread / 32 == b.thread / 32 ? 1 : 2;
}

// Whether an earlier access comes before `now`. Shared memory is another in every block.
EMU_UNSEEN inline bool is_ordered(const Access& earlier, const Access& now, bool shared) {
  const int apart = distance(earlier, now);
  if (apart == 3) return shared;
  if (apart == 0 || earlier.interval < now.interval) return true;
  return apart == 1 && earlier.clock <= detector.clocks[now.thread / 32][now.thread % 32][earlier.thread % 32];
}

// Keeps an access among those that may be concurrent.
EMU_UNSEEN inline void keep(Access (&kept)[2], const Access& now, bool shared) {
  for (Access& access : kept) {
    if (access.kind == Kind::none || is_ordered(access, now, shared)) {
      access = now;
      return;
    }
  }
  if (distance(kept[0], now) > distance(kept[0], kept[1])) kept[1] = now;
}

inline std::string describe(const Access& access) {
  constexpr const char* names[] = {"", "read", "write", "atomic"};
  Dl_info object;
  dladdr(access.where, &object);
  std::string text;
  append(text, "%s by block (%u, %u, %u), thread %u, at <0x%zx>", names[int(access.kind)], access.block.x,
         access.block.y, access.block.z, access.thread,
         static_cast<const char*>(access.where) - static_cast<const char*>(object.dli_fbase) - 1);
  return text;
}

[[noreturn]] inline void fail_of_race(const Buffer& buffer, std::size_t cell, const Access& one, const Access& other) {
  std::string text;
  append(text, "race on %s, byte %zu: no barrier orders\n  %s\n  %s", buffer.name.c_str(), cell * buffer.grain,
         describe(one).c_str(), describe(other).c_str());
  fail({nullptr, 0}, text);
}

EMU_UNSEEN inline void track_cell(Buffer& buffer, std::size_t number, const Access& now) {
  Cell& cell = buffer.cells[number];
  const auto check = [&](const Access& earlier) EMU_UNSEEN {
    if (earlier.kind != Kind::none && !is_ordered(earlier, now, buffer.shared)) {
      fail_of_race(buffer, number, earlier, now);
    }
  };
  check(cell.write);
  if (now.kind != Kind::atomic) {
    check(cell.atomics[0]);
    check(cell.atomics[1]);
  }
  if (now.kind != Kind::read) {
    check(cell.reads[0]);
    check(cell.reads[1]);
  }
  if (now.kind == Kind::write)
    cell.write = now;
  else
    keep(now.kind == Kind::read ? cell.reads : cell.atomics, now, buffer.shared);
}

EMU_UNSEEN inline void track_access(const void* pointer, std::size_t bytes, Kind kind, const void* where) {
  if (!current) return;
  const char* from = static_cast<const char*>(pointer);
  for (unsigned i = 0; i < detector.count; ++i) {
    Buffer& buffer = detector.buffers[i];
    if (from < buffer.data || from >= buffer.data + buffer.bytes) continue;
    const unsigned thread = current->warp->number * 32 + current->lane;
    const unsigned clock = detector.clocks[thread / 32][thread % 32][thread % 32];
    const Access now = {kind, thread, detector.interval, clock, blockIdx, where};
    const std::size_t first = (from - buffer.data) / buffer.grain;
    const std::size_t last = (from - buffer.data + bytes - 1) / buffer.grain;
    for (std::size_t cell = first; cell <= last; ++cell) track_cell(buffer, cell, now);
    return;
  }
}

EMU_UNSEEN inline void track_atomic(const void* pointer, std::size_t bytes, const Site& site, const void* where) {
  track_access(pointer, bytes, is_blind(site) ? Kind::write : Kind::atomic, where);
}

}  // namespace emu

#define EMU_SEEN(name, kind, bytes)                                            \
  extern "C" EMU_UNSEEN void __tsan_##name(void* p) {                          \
    emu::track_access(p, bytes, emu::Kind::kind, __builtin_return_address(0)); \
  }
EMU_SEEN(read1, read, 1)
EMU_SEEN(read2, read, 2)
EMU_SEEN(read4, read, 4)
EMU_SEEN(read8, read, 8)
EMU_SEEN(read16, read, 16)
EMU_SEEN(write1, write, 1)
EMU_SEEN(write2, write, 2)
EMU_SEEN(write4, write, 4)
EMU_SEEN(write8, write, 8)
EMU_SEEN(write16, write, 16)
#undef EMU_SEEN
extern "C" EMU_UNSEEN void __tsan_read_range(void* p, std::size_t bytes) {
  emu::track_access(p, bytes, emu::Kind::read, __builtin_return_address(0));
}
extern "C" EMU_UNSEEN void __tsan_write_range(void* p, std::size_t bytes) {
  emu::track_access(p, bytes, emu::Kind::write, __builtin_return_address(0));
}
extern "C" EMU_UNSEEN void __tsan_init() {}
extern "C" EMU_UNSEEN void __tsan_func_entry(void*) {}
extern "C" EMU_UNSEEN void __tsan_func_exit() {}

#else

namespace emu {

inline void track(const std::string&, const void*, std::size_t, std::size_t, bool) {}
inline void track_launch(const char*) {}
inline void track_block() {}
inline void track_barrier(const Site&) {}
inline void track_warp_barrier(const Warp&, unsigned, const Site&) {}
inline void track_atomic(const void*, std::size_t, const Site&, const void*) {}

}  // namespace emu

#endif
