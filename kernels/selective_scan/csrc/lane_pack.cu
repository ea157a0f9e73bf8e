// dt_weight and dt_bias as the tensor cores and the lanes take them; see lane.cuh.
#include "lane.cuh"

namespace scan::route::lane {
namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ __forceinline__ unsigned two(float a, float b) {
  const Two<T> v = narrow<T>(make_float2(a, b));
  return *reinterpret_cast<const unsigned*>(&v);
}

// What rounding to T leaves of v.
template <typename T>
__device__ __forceinline__ float rest(float v) {
  return v - to_float(from_float<T>(v));
}

// One fragment or bias per thread. Lane (g, q) holds of b (16 x 8): rows 2q, 2q + 1, 2q + 8, 2q + 9 of column g.
template <typename T>
__global__ void pack_kernel(const float* weight, const float* bias, Params p, int width, int ranks, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  const int lane = index % kWarp, g = lane / 4, q = lane % 4;
  const int steps = (ranks + 1) / 2, tiles = width / 8, halves = width / 16;
  const int64_t expands = static_cast<int64_t>(p.k) * p.strips * tiles * steps * kWarp;
  const int64_t contracts = static_cast<int64_t>(p.k) * p.strips * halves * ranks * kWarp;
  const auto at = [&](int64_t route, int channel, int rank) {
    const bool inside = channel < p.d && rank < p.r;
    return inside ? weight[(route * p.d + channel) * p.r + rank] : 0.f;
  };
  if (index < expands) {
    int64_t rest_index = index / kWarp;
    const int step = rest_index % steps, tile = rest_index / steps % tiles;
    rest_index /= steps * tiles;
    const int64_t route = rest_index / p.strips;
    const int channel = rest_index % p.strips * width + 8 * tile + g, rank = 16 * step + 2 * q;
    const float v[4] = {kLog2E * at(route, channel, rank), kLog2E * at(route, channel, rank + 1),
                        kLog2E * at(route, channel, rank + 8), kLog2E * at(route, channel, rank + 9)};
    const_cast<uint4*>(p.expand)[index] = make_uint4(two<T>(v[0], v[1]), two<T>(v[2], v[3]),
                                                     two<T>(rest<T>(v[0]), rest<T>(v[1])),
                                                     two<T>(rest<T>(v[2]), rest<T>(v[3])));
  } else if (index < expands + contracts) {
    int64_t rest_index = (index - expands) / kWarp;
    const int tile = rest_index % ranks, half = rest_index / ranks % halves;
    rest_index /= ranks * halves;
    const int64_t route = rest_index / p.strips;
    const int channel = rest_index % p.strips * width + 16 * half + 2 * q, rank = 8 * tile + g;
    const float unit = ranks <= kSumTiles ? kLog2E : 1.f;  // as dz is in the backward pass
    const_cast<uint2*>(p.contract)[index - expands] =
        make_uint2(two<T>(unit * at(route, channel, rank), unit * at(route, channel + 1, rank)),
                   two<T>(unit * at(route, channel + 8, rank), unit * at(route, channel + 9, rank)));
  } else {
    const int64_t spot = index - expands - contracts, padded = static_cast<int64_t>(p.strips) * width;
    const int64_t route = spot / padded, channel = spot % padded;
    const_cast<float*>(p.bias)[spot] = channel < p.d ? bias[route * p.d + channel] * kLog2E : 0.f;
  }
}

}  // namespace

template <typename T>
void launch_pack(const float* weight, const float* bias, const Params& p, int channels, int ranks,
                 cudaStream_t stream) {
  const int width = 32 * channels;
  const int64_t strips = static_cast<int64_t>(p.k) * p.strips;
  const int64_t count = strips * (width / 8 * ((ranks + 1) / 2) * kWarp + width / 16 * ranks * kWarp + width);
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads));
  pack_kernel<T><<<blocks, kThreads, 0, stream>>>(weight, bias, p, width, ranks, count);
  check_launch(kOp);
}

template void launch_pack<__half>(const float*, const float*, const Params&, int, int, cudaStream_t);
template void launch_pack<__nv_bfloat16>(const float*, const float*, const Params&, int, int, cudaStream_t);

}  // namespace scan::route::lane
