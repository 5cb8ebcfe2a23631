// SPDX-License-Identifier: Apache-2.0
//
// From `emulator.py` to a kernel: arguments arrive as bytes, are checked against the parameter
// types of the kernel and become a tuple. `emulator.py` appends to the source one
// `EMU_KERNELS(...)` with the instantiations wanted, after which stands either a library with
// `emu_launch` or, with the sanitizers, a program that reads one launch from a file.
#pragma once

#include <tuple>
#include <utility>

#include "shim.hpp"

namespace emu {

enum Passing : std::uint32_t { by_value, by_pointer, null_pointer };

// One argument; `emulator.py` mirrors the layout. `item` and `kind` are the itemsize and the kind
// of the NumPy dtype.
struct Argument {
  void* data;
  std::uint64_t bytes;
  std::uint32_t item;
  std::uint32_t passing;
  std::uint64_t kind;
};

struct Launch {
  std::uint32_t kernel;
  std::uint32_t grid[3];
  std::uint32_t block[3];
  std::uint32_t count;
  std::uint64_t seed;
  const uint3* blocks;  // that run; null: all
  std::uint64_t block_count;
  const char* blind;  // for the race detector
};

// Whether items of a NumPy dtype may be read as T. Structs stand for a whole number of items
// (float4, half types made of bits), characters for raw bytes.
template <class T>
constexpr bool holds(const Argument& argument) {
  if constexpr (std::is_void_v<T>) {
    return true;
  } else {
    const char kind = static_cast<char>(argument.kind);
    if (std::is_integral_v<T> && sizeof(T) == 1) return true;
    if (!std::is_arithmetic_v<T>) return argument.item != 0 && sizeof(T) % argument.item == 0;
    if (argument.item != sizeof(T)) return false;
    if (kind == 'V' || sizeof(T) == 2) return true;
    return std::is_floating_point_v<T> == (kind == 'f');
  }
}

// The spelling of T by the compiler.
template <class T>
std::string type_name() {
  const std::string text = __PRETTY_FUNCTION__;
  const auto start = text.find("T = ") + 4;
  return text.substr(start, text.find_first_of(";]", start) - start);
}

template <class T>
void unpack(T& parameter, const Argument& argument, std::size_t position, std::string& error) {
  using Pointee = std::remove_cv_t<std::remove_pointer_t<T>>;
  static_assert(std::is_trivially_copyable_v<T>, "CUDA copies kernel arguments bytewise");
  const char kind = static_cast<char>(argument.kind);
  bool fits;
  if constexpr (std::is_pointer_v<T>) {
    fits = argument.passing == null_pointer || (argument.passing == by_pointer && holds<Pointee>(argument));
    if (fits) parameter = static_cast<T>(argument.data);
  } else {
    fits = argument.passing == by_value && argument.bytes == sizeof(T) &&
           (!std::is_arithmetic_v<T> || kind == 'V' || std::is_floating_point_v<T> == (kind == 'f'));
    if (fits) std::memcpy(&parameter, argument.data, sizeof(T));
  }
  if (fits || !error.empty()) return;
  append(error, "argument %zu: the parameter is %s", position, type_name<T>().c_str());
  if constexpr (!std::is_pointer_v<T>) append(error, " of %zu bytes", sizeof(T));
  if (argument.passing == null_pointer) {
    append(error, ", got None");
  } else {
    append(error, ", got %s of dtype kind '%c' with %u-byte items",
           argument.passing == by_value ? "a value" : "an array", kind, argument.item);
  }
}

template <class... P>
std::string run_with(void (*kernel)(P...), const Launch& launch, const std::tuple<P...>& values) {
  auto body = [&] { std::apply(kernel, values); };
  return run(
      {launch.grid[0], launch.grid[1], launch.grid[2]}, {launch.block[0], launch.block[1], launch.block[2]},
      {launch.blocks, launch.block_count}, launch.seed,
      [](void* closure) { (*static_cast<decltype(body)*>(closure))(); }, &body);
}

template <class... P, std::size_t... i>
std::string launch_with(void (*kernel)(P...), const Launch& launch, const Argument* arguments,
                        std::index_sequence<i...>) {
  std::string error;
  if (launch.count != sizeof...(P)) {
    append(error, "the kernel takes %zu arguments, got %u", sizeof...(P), launch.count);
    return error;
  }
  std::tuple<P...> values{};
  (unpack(std::get<i>(values), arguments[i], i, error), ...);
  if (!error.empty()) return error;
  for (std::size_t n = 0; n < launch.count; ++n) {
    const Argument& argument = arguments[n];
    if (argument.passing != by_pointer) continue;
    const std::size_t grain = argument.item < 4 ? argument.item : 4;
    track("argument " + std::to_string(n), argument.data, argument.bytes, grain, false);
  }
  return run_with(kernel, launch, values);
}

// Launch as cuLaunchKernel does: one pointer to the bytes of each parameter, of which nothing is known.
template <class... P, std::size_t... i>
std::string launch_bytes(void (*kernel)(P...), const Launch& launch, const void* const* parameters,
                         std::index_sequence<i...>) {
  std::tuple<P...> values{};
  (std::memcpy(&std::get<i>(values), parameters[i], sizeof(P)), ...);
  return run_with(kernel, launch, values);
}

// Of described arguments or, where there are none, of parameters.
using Launcher = std::string (*)(const Launch&, const Argument*, const void* const*);

template <class... P>
std::string launch(void (*kernel)(P...), const Launch& launch, const Argument* arguments,
                   const void* const* parameters) {
  constexpr auto indices = std::index_sequence_for<P...>{};
  track_launch(launch.blind);
  if (arguments == nullptr) return launch_bytes(kernel, launch, parameters, indices);
  return launch_with(kernel, launch, arguments, indices);
}

}  // namespace emu

// A launcher for one instantiation, as an element of EMU_KERNELS.
#define EMU_KERNEL(...)                                                                          \
  [](const emu::Launch& launch, const emu::Argument* arguments, const void* const* parameters) { \
    return emu::launch(&__VA_ARGS__, launch, arguments, parameters);                             \
  }

#ifndef MSDA_EMULATED_SANITIZE

// Null after a successful launch, else what went wrong, valid until the next launch.
#define EMU_KERNELS(...)                                                                          \
  extern "C" __attribute__((visibility("default"))) const char* emu_launch(                       \
      const emu::Launch* launch, const emu::Argument* arguments, const void* const* parameters) { \
    static const emu::Launcher launchers[] = {__VA_ARGS__};                                       \
    static std::string error;                                                                     \
    error = launchers[launch->kernel](*launch, arguments, parameters);                            \
    return error.empty() ? nullptr : error.c_str();                                               \
  }

#else

namespace emu {

inline void must(bool done, const char* what) {
  if (done) return;
  std::fprintf(stderr, "emulator: cannot %s\n", what);
  std::exit(2);
}

// Runs the launch in one file and writes the arrays as they then are to another. The first holds
// the launch, its arguments and the payloads in order; the data pointer of an argument is there
// the number of its payload, which two arguments may share. Every payload becomes a heap block of
// exactly its size.
inline int run_file(const Launcher* launchers, const char* input, const char* output) {
  std::FILE* file = std::fopen(input, "rb");
  must(file, "open the launch");
  Launch launch;
  must(std::fread(&launch, sizeof launch, 1, file) == 1, "read the launch");
  std::vector<Argument> arguments(launch.count);
  std::vector<Argument> payloads;
  for (Argument& argument : arguments) {
    must(std::fread(&argument, sizeof argument, 1, file) == 1, "read the arguments");
  }
  for (Argument& argument : arguments) {
    if (argument.passing == null_pointer) continue;
    const auto number = reinterpret_cast<std::uintptr_t>(argument.data);
    if (number == payloads.size()) {
      payloads.push_back(argument);
      payloads[number].data = std::malloc(argument.bytes);
      must(std::fread(payloads[number].data, 1, argument.bytes, file) == argument.bytes, "read an array");
    }
    argument.data = payloads[number].data;
  }
  std::fclose(file);
  const std::string error = launchers[launch.kernel](launch, arguments.data(), nullptr);
  if (!error.empty()) {
    std::fprintf(stderr, "%s\n", error.c_str());
    return 1;
  }
  file = std::fopen(output, "wb");
  must(file, "open the result");
  for (const Argument& payload : payloads) {
    must(std::fwrite(payload.data, 1, payload.bytes, file) == payload.bytes, "write an array");
  }
  must(std::fclose(file) == 0, "write the result");
  return 0;
}

}  // namespace emu

#define EMU_KERNELS(...)                                         \
  int main(int, char** arguments) {                              \
    static const emu::Launcher launchers[] = {__VA_ARGS__};      \
    return emu::run_file(launchers, arguments[1], arguments[2]); \
  }

#endif
