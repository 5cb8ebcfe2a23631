// SPDX-License-Identifier: Apache-2.0
//
// Fibers: stacks that one operating-system thread switches between by hand. A CUDA thread of the
// emulated block is one fiber, so a kernel may stop in the middle of any call (a barrier, a
// shuffle) and another thread of the block goes on.
//
// A switch saves what the calling convention calls callee-saved, on the stack that is left, and
// keeps only the stack pointer. The caller's own registers are already spilled by the compiler,
// because to it the switch is an ordinary call.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

#ifdef MSDA_EMULATED_SANITIZE
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(MSDA_EMULATED_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define MSDA_EMULATED_UCONTEXT
#endif

#ifdef MSDA_EMULATED_UCONTEXT
#include <ucontext.h>
#else
extern "C" __attribute__((visibility("hidden"))) void emu_swap_stack(void** save, void* load);
#endif

namespace emu {

#ifdef MSDA_EMULATED_UCONTEXT

// Any other machine: correct, and slow for the system call in every swapcontext.
using Context = ucontext_t;

inline void prepare(Context& context, char* bottom, std::size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = bottom;
  context.uc_stack.ss_size = size;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

inline void swap(Context& from, Context& to) { swapcontext(&from, &to); }

#else

using Context = void*;  // the stack pointer; everything else lies on the stack

#define EMU_FUNCTION                  \
  ".text\n"                           \
  ".p2align 4\n"                      \
  ".globl emu_swap_stack\n"           \
  ".hidden emu_swap_stack\n"          \
  ".type emu_swap_stack, %function\n" \
  "emu_swap_stack:"

#if defined(__x86_64__)

// rbx, rbp, r12-r15 and the control words of SSE and x87 survive a call; no vector register does.
asm(EMU_FUNCTION R"(
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_swap_stack, . - emu_swap_stack
)");

// Lays out what the first swap to this stack pops: control words, six registers (rbp = 0 ends a
// backtrace), the entry as return address, and the null return address of the entry itself, which
// leaves the stack pointer 8 below a multiple of 16 as after a call.
inline void prepare(Context& context, char* bottom, std::size_t size, void (*entry)()) {
  auto* top = reinterpret_cast<std::uint64_t*>(bottom + size);
  for (int i = 1; i <= 9; ++i) top[-i] = 0;
  top[-2] = reinterpret_cast<std::uint64_t>(entry);
  std::uint32_t control[2] = {};
  asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(control[0]), "=m"(control[1]));
  top[-9] = control[0] | std::uint64_t{control[1]} << 32;
  context = top - 9;
}

#else  // aarch64

// x19-x30, d8-d15 and FPCR survive a call.
asm(EMU_FUNCTION R"(
  sub sp, sp, #176
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mrs x9, fpcr
  str x9, [sp, #160]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldr x9, [sp, #160]
  msr fpcr, x9
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
.size emu_swap_stack, . - emu_swap_stack
)");

// Frame of the first swap: x29 = 0 ends a backtrace, x30 is where `ret` goes.
inline void prepare(Context& context, char* bottom, std::size_t size, void (*entry)()) {
  auto* frame = reinterpret_cast<std::uint64_t*>(bottom + size) - 22;
  for (int i = 0; i < 22; ++i) frame[i] = 0;
  frame[11] = reinterpret_cast<std::uint64_t>(entry);
  asm volatile("mrs %0, fpcr" : "=r"(frame[20]));
  context = frame;
}

#endif

inline void swap(Context& from, Context& to) { emu_swap_stack(&from, to); }

#endif  // MSDA_EMULATED_UCONTEXT

struct Fiber {
  Context context{};
  const void* bottom = nullptr;  // of the stack; the sanitizer wants to know
  std::size_t size = 0;
  void* fake_stack = nullptr;  // the sanitizer's, while another fiber runs
};

#ifdef MSDA_EMULATED_SANITIZE

static Fiber* departed = nullptr;

// First act on a stack after a switch to it. Also learns the bounds of the stack just left, which
// is how the bounds of the main stack become known.
inline void announce_arrival(Fiber& self) {
  __sanitizer_finish_switch_fiber(self.fake_stack, &departed->bottom, &departed->size);
}

inline void switch_fiber(Fiber& from, Fiber& to) {
  departed = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
  swap(from.context, to.context);
  announce_arrival(from);
}

constexpr std::size_t stack_bytes = 256 << 10;  // redzones make frames larger

#else

inline void announce_arrival(Fiber&) {}
inline void switch_fiber(Fiber& from, Fiber& to) { swap(from.context, to.context); }
constexpr std::size_t stack_bytes = 64 << 10;

#endif

// Stacks of one launch, each above an inaccessible gap, so that an overflow faults at once.
class Stacks {
 public:
  explicit Stacks(std::size_t count) : bytes_(count * (gap + stack_bytes)) {
    void* area = mmap(nullptr, bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) return;
    base_ = static_cast<char*>(area);
    for (std::size_t i = 0; i < count && base_; ++i) {
      char* bottom = base_ + i * (gap + stack_bytes) + gap;
      if (mprotect(bottom, stack_bytes, PROT_READ | PROT_WRITE) != 0) release();
    }
  }
  ~Stacks() { release(); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  bool ok() const { return base_ != nullptr; }

  void start(std::size_t i, Fiber& fiber, void (*entry)()) const {
    char* bottom = base_ + i * (gap + stack_bytes) + gap;
    // Tops at one distance from each other would share a few cache sets: stagger them by lines.
    const std::size_t size = stack_bytes - i * 5 % 64 * 64;
    fiber.bottom = bottom;
    fiber.size = size;
    prepare(fiber.context, bottom, size, entry);
  }

 private:
  static constexpr std::size_t gap = 64 << 10;  // a multiple of every usual page size

  void release() {
    if (base_) munmap(base_, bytes_);
    base_ = nullptr;
  }

  std::size_t bytes_;
  char* base_ = nullptr;
};

}  // namespace emu
