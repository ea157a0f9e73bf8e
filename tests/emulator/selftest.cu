// Kernels with known faults, to see that the emulator finds them.
#include "ptx.cuh"

namespace {

constexpr int kThreads = 64;

// Each thread adds up what all wrote; without the barrier some have not written yet.
__global__ void sum_kernel(int* out, bool wait) {
  extern __shared__ int numbers[];
  numbers[threadIdx.x] = 1;
  if (wait) __syncthreads();
  int sum = 0;
  for (int i = 0; i < kThreads; ++i) sum += numbers[i];
  out[threadIdx.x] = sum;
}

// Each thread reads its copy; without waiting it may not be there.
__global__ void copy_kernel(int* out, const int* from, bool wait) {
  extern __shared__ int copies[];
  scan::ptx::copy_async<4>(&copies[threadIdx.x], from + threadIdx.x);
  scan::ptx::commit_async();
  if (wait) scan::ptx::wait_async<0>();
  out[threadIdx.x] = copies[threadIdx.x];
}

// Half of the lanes meet in another instruction than the others.
__global__ void parting_kernel(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __shfl_xor_sync(~0u, 1, 2) : __shfl_sync(~0u, 1, 0);
}

// A barrier for more threads than there are.
__global__ void waiting_kernel() { scan::ptx::barrier(1, 2 * kThreads); }

char message[256];

template <typename Function>
const char* message_of(Function&& launch) {
  try {
    launch();
  } catch (const std::exception& error) {
    return std::strncpy(message, error.what(), sizeof(message) - 1);
  }
  return "";
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT const char* sum(int* out, bool wait) {
  return message_of([&] { sum_kernel<<<1, kThreads, kThreads * sizeof(int), nullptr>>>(out, wait); });
}
EXPORT const char* copy(int* out, const int* from, bool wait) {
  return message_of([&] { copy_kernel<<<1, kThreads, kThreads * sizeof(int), nullptr>>>(out, from, wait); });
}
EXPORT const char* part(int* out) {
  return message_of([&] { parting_kernel<<<1, kThreads, 0, nullptr>>>(out); });
}
EXPORT const char* wait_for_ever() {
  return message_of([&] { waiting_kernel<<<1, kThreads, 0, nullptr>>>(); });
}
