// CUDA kernels on a CPU: a block's threads are fibers of one thread, in an order that a random generator chooses.
//
// What a GPU leaves open is drawn at random, so that a kernel that counts on more than CUDA promises gives wrong
// numbers in some runs: which thread goes on, also within a warp; whether an asynchronous copy happens when it is asked
// for or when it is waited for; the order of the blocks. Shared memory of dynamic size begins as NaN. Lanes of a warp
// that meet in instructions of different names or operands, and threads that wait for ever, end the launch with an
// error.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <ucontext.h>

namespace emulator {

constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

// A meeting of the lanes of a warp: each brings its operands, the last to come computes for all.
struct Meeting {
  const char* name = nullptr;
  size_t bytes = 0;  // of the operands
  int count = 0;
  void* operands[kWarp] = {};
};

struct Barrier {
  int count = 0;
  std::vector<int> waiting;
};

struct Fiber {
  ucontext_t context;
  jmp_buf place;
  std::vector<char> stack;
  dim3 index;
  bool started = false, ended = false;
  std::vector<std::vector<Copy>> groups;  // closed ones, then the open one
};

// The block that runs.
class Block {
 public:
  Block(dim3 grid, dim3 block, size_t shared_bytes, unsigned seed);

  // Runs all threads of the block `index` to their ends. Throws std::runtime_error where they cannot go on.
  void run(dim3 index, const std::function<void()>& body);

  // Called in a fiber.
  Fiber& fiber() { return *fibers_[current_]; }
  int lane() const { return current_ % kWarp; }
  void meet(const char* name, void* operands, size_t bytes, const std::function<void(void* (&)[kWarp])>& compute);
  void wait(int barrier, int threads);
  bool toss() { return random_() & 1; }
  [[noreturn]] void fail(const std::string& what);

  dim3 grid, size, index;
  std::vector<char> shared;

 private:
  static void enter();
  void resume(int thread);
  void pause();
  void leave();
  void dismiss(int warp);
  void release(Barrier& barrier);
  int alive_in_warp(int warp) const;

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> ready_;
  std::vector<Meeting> meetings_;             // of the warps
  std::vector<std::vector<int>> in_meeting_;  // the threads that wait in it
  std::map<int, Barrier> barriers_;
  const std::function<void()>* body_ = nullptr;
  int current_ = -1, alive_ = 0;
  jmp_buf scheduler_;
  std::string error_;
  std::mt19937 random_;
};

Block& block();

struct Launch {
  dim3 grid, size;
  size_t bytes;
  Launch(dim3 grid, dim3 size, size_t bytes, cudaStream_t) : grid(grid), size(size), bytes(bytes) {}

  template <typename... P, typename... A>
  void operator()(void (*kernel)(P...), A... args) const {
    run([&] { kernel(static_cast<P>(args)...); });
  }
  void run(const std::function<void()>& body) const;
};

// Numbers of all lanes of the warp, computed when all have come.
template <typename Operands, typename Compute>
void meet(const char* name, Operands& operands, Compute&& compute) {
  block().meet(name, &operands, sizeof(Operands), [&](void* (&all)[kWarp]) {
    Operands* lanes[kWarp];
    for (int i = 0; i < kWarp; ++i) lanes[i] = static_cast<Operands*>(all[i]);
    compute(lanes);
  });
}

template <typename T>
struct Exchange {
  T give, take;
  int from;
};

template <typename T>
T exchange(const char* name, T value, int from) {
  Exchange<T> operands{value, value, from};
  meet(name, operands, [](Exchange<T>* (&lanes)[kWarp]) {
    for (Exchange<T>* lane : lanes) {
      if (!lane || lane->from < 0 || lane->from >= kWarp) continue;
      if (!lanes[lane->from]) block().fail("a lane asks for the number of one that has ended");
      lane->take = lanes[lane->from]->give;
    }
  });
  return operands.take;
}

inline char* shared() { return block().shared.data(); }

}  // namespace emulator

#define threadIdx (emulator::block().fiber().index)
#define blockIdx (emulator::block().index)
#define blockDim (emulator::block().size)
#define gridDim (emulator::block().grid)
#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

// ---- what the device's compiler knows by itself ----

template <typename... P>
cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute, int) {
  return cudaSuccess;
}

using std::max;
using std::min;

inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<uint64_t>(a) * b >> 32; }
template <typename T>
T __ldg(const T* at) {
  return *at;
}
template <typename T>
T __ldcs(const T* at) {
  return *at;
}
template <typename T>
void __stcs(T* at, T value) {
  *at = value;
}

inline void __syncthreads() { emulator::block().wait(0, 0); }
inline void __syncwarp() {
  int nothing = 0;
  emulator::meet("__syncwarp", nothing, [](int* (&)[emulator::kWarp]) {});
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::exchange("__shfl_sync", value, lane % emulator::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::exchange("__shfl_xor_sync", value, emulator::block().lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int span) {
  return emulator::exchange("__shfl_up_sync", value, emulator::block().lane() - span);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int span) {
  return emulator::exchange("__shfl_down_sync", value, emulator::block().lane() + span);
}
