// What runs around the two walks: the weights as tensor-core fragments before, the sums over slabs and groups after.
#include "route_tile.cuh"

namespace scan::route {
namespace {

constexpr int kThreads = 256;

// High and low tf32 halves of a weight; together they hold it to about 2^-22.
__device__ __forceinline__ void split(float v, float& high, float& low) {
  high = ptx::round_tf32(v);
  low = ptx::round_tf32(v - high);
}

// One fragment per thread. A lane (g, q) of tile t holds of the strip's matrix log2(e) dt_weight (8 channels x r):
// expand: (channel g, ranks 8t+2q, 8t+2q+1); contract: (channels 2q, 2q+1, rank 8t+g); zero outside.
__global__ void pack_kernel(const float* weight, const float* bias, const float* D, Params p, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int d = p.d, r = p.r, kt = p.kt;
  const int lane = index % kWarp, t = index / kWarp % kt, strip = index / (kWarp * kt) % p.strips;
  const int64_t route = index / (static_cast<int64_t>(kWarp) * kt * p.strips);
  const int g = lane / 4, q = lane % 4;
  const auto at = [&](int channel, int rank) {
    const bool inside = channel < d && rank < r;
    return inside ? weight[(route * d + channel) * r + rank] * kLog2E : 0.f;
  };
  float4 v;
  split(at(strip * kStrip + g, 8 * t + 2 * q), v.x, v.z);
  split(at(strip * kStrip + g, 8 * t + 2 * q + 1), v.y, v.w);
  const_cast<float4*>(p.expand)[index] = v;
  split(at(strip * kStrip + 2 * q, 8 * t + g), v.x, v.z);
  split(at(strip * kStrip + 2 * q + 1, 8 * t + g), v.y, v.w);
  const_cast<float4*>(p.contract)[index] = v;
  if (t == 0 && lane < kStrip) {
    const int channel = strip * kStrip + lane;
    const bool inside = channel < d;
    const int64_t at_bias = (route * p.strips + strip) * kStrip + lane;
    const_cast<float*>(p.bias)[at_bias] = inside ? bias[route * d + channel] * kLog2E : 0.f;
    float sum = 0.f;
    for (int i = 0; inside && i < p.k; ++i) sum += D[static_cast<int64_t>(i) * d + channel];
    if (route == 0) const_cast<float*>(p.D)[channel] = sum;
  }
}

template <typename T>
__global__ void sum_slabs_kernel(const float* from, T* to, int64_t count, int slabs) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  float sum = 0.f;
  for (int s = 0; s < slabs; ++s) sum += from[s * count + index];
  to[index] = from_float<T>(sum);
}

// 32 columns by 8 rows of threads: each row sums every eighth group, then the rows are joined in order.
// D's sum is the same for every route and only the first holds it.
__global__ void sum_groups_kernel(const float* from, Gradients to, int64_t count, int groups, int k, int r, int n) {
  __shared__ float part[8][kWarp];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0.f;
  if (index < count) {
    for (int g = threadIdx.y; g < groups; g += 8) sum += from[g * count + index];
  }
  part[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y || index >= count) return;
  for (int i = 1; i < 8; ++i) sum += part[i][threadIdx.x];
  const int width = r + 2 + n, column = index % width;
  const int64_t channel = index / width;
  if (column < r) {
    to.weight[channel * r + column] = sum;
  } else if (column == r) {
    to.bias[channel] = sum;
  } else if (column == r + 1) {
    const int64_t d = count / (int64_t{k} * width);
    for (int i = 0; channel < d && i < k; ++i) to.D[i * d + channel] = sum;
  } else {
    to.A[channel * n + column - r - 2] = sum;
  }
}

unsigned blocks(int64_t count, int per_block) { return static_cast<unsigned>(ceil_div(count, per_block)); }

}  // namespace

void launch_pack(const float* weight, const float* bias, const float* D, const Params& p, cudaStream_t stream) {
  const int64_t count = int64_t{p.k} * p.strips * p.kt * kWarp;
  pack_kernel<<<blocks(count, kThreads), kThreads, 0, stream>>>(weight, bias, D, p, count);
  check_launch(kOp);
}

template <typename T>
void launch_sums(const Params& p, const Gradients& to, int groups, cudaStream_t stream) {
  const int64_t count = int64_t{p.b} * p.l * p.k * p.m, sums = int64_t{p.k} * p.d * (p.r + 2 + p.n);
  if (p.slabs > 1) {
    sum_slabs_kernel<T><<<blocks(count, kThreads), kThreads, 0, stream>>>(
        static_cast<const float*>(p.dproj), static_cast<T*>(to.dproj), count, p.slabs);
    check_launch(kOp);
  }
  sum_groups_kernel<<<blocks(sums, kWarp), dim3(kWarp, 8), 0, stream>>>(p.dweights, to, sums, groups, p.k, p.r, p.n);
  check_launch(kOp);
}

template void launch_sums<float>(const Params&, const Gradients&, int, cudaStream_t);
template void launch_sums<__half>(const Params&, const Gradients&, int, cudaStream_t);
template void launch_sums<__nv_bfloat16>(const Params&, const Gradients&, int, cudaStream_t);

}  // namespace scan::route
