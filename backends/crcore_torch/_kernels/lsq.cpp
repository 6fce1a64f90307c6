// LSQ, forward and gradient, in one pass over the tensor each. The formulas are those of crcore.LSQ, where they are
// explained; the conformance kit holds this file to them.
//
// The tensor is seen as [outer, channels, inner] in memory order, with one scale per channel. Sums run over blocks of a
// fixed size, and over blocks in order, so that they do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t BLOCK = 16384;  // elements that one thread takes at a time
constexpr int64_t RUN = 1024;     // elements that are summed in T before the sum joins a double
constexpr int64_t LANES = 64;     // sums side by side, for the compiler to vectorize

struct Grid {
  double lo, hi, lowest_scale, highest_scale;
};

struct Shape {
  int64_t outer, channels, inner;
  int threads;

  int64_t blocks_per_row() const { return (inner + BLOCK - 1) / BLOCK; }

  // work(block, channel, first element, number of elements) for each block
  template <typename Work>
  void for_each_block(Work work) const {
    const int64_t per_row = blocks_per_row(), blocks = outer * channels * per_row;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = block / per_row, begin = block % per_row * BLOCK;
      work(block, row % channels, row * inner + begin, std::min(BLOCK, inner - begin));
    }
  }
};

// Comparisons are written so that NaN passes through, as it does in torch.clamp.
template <typename T>
inline T clip(T v, T lo, T hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

template <typename T>
inline T used(T scale, const Grid& grid) {
  return clip(scale, T(grid.lowest_scale), T(grid.highest_scale));
}

template <typename T>
inline T gradient(T x, T g, T& dx, T scale, T lo, T hi) {
  const T v = x / scale, q = std::nearbyint(clip(v, lo, hi));
  const bool inside = v >= lo && v <= hi;
  dx = inside ? g : T(0);
  return g * (inside ? q - v : q);
}

template <typename T>
void forward(const T* x, const T* scale, T* y, const Shape& shape, const Grid& grid) {
  const T lo = T(grid.lo), hi = T(grid.hi);
  shape.for_each_block([&](int64_t, int64_t channel, int64_t first, int64_t count) {
    const T step = used(scale[channel], grid);
    const T* __restrict from = x + first;
    T* __restrict to = y + first;
    for (int64_t i = 0; i < count; ++i) to[i] = std::nearbyint(clip(from[i] / step, lo, hi)) * step;
  });
}

template <typename T>
void backward(const T* x, const T* g, const T* scale, T* dx, T* dscale, const Shape& shape, const Grid& grid,
              double grad_scale) {
  const T lo = T(grid.lo), hi = T(grid.hi);
  const int64_t per_row = shape.blocks_per_row();
  std::vector<double> sums(shape.outer * shape.channels * per_row);
  shape.for_each_block([&](int64_t block, int64_t channel, int64_t first, int64_t count) {
    const T step = used(scale[channel], grid);
    const T* __restrict from = x + first;
    const T* __restrict upstream = g + first;
    T* __restrict to = dx + first;
    double total = 0;
    for (int64_t begin = 0; begin < count; begin += RUN) {
      const int64_t end = std::min(count, begin + RUN);
      T sum = 0;
      int64_t i = begin;
      if (end - begin >= LANES) {
        T lanes[LANES] = {};
        for (; i + LANES <= end; i += LANES)
          for (int64_t l = 0; l < LANES; ++l)
            lanes[l] += gradient(from[i + l], upstream[i + l], to[i + l], step, lo, hi);
        for (int64_t l = 0; l < LANES; ++l) sum += lanes[l];
      }
      for (; i < end; ++i) sum += gradient(from[i], upstream[i], to[i], step, lo, hi);
      total += sum;
    }
    sums[block] = total;
  });
  for (int64_t channel = 0; channel < shape.channels; ++channel) {
    double total = 0;
    for (int64_t row = channel; row < shape.outer * shape.channels; row += shape.channels)
      for (int64_t block = 0; block < per_row; ++block) total += sums[row * per_row + block];
    dscale[channel] = T(total * grad_scale);
  }
}

}  // namespace

#define SHAPE_AND_GRID                                                                                \
  int64_t outer, int64_t channels, int64_t inner, int threads, double lo, double hi, double lowest_scale, \
      double highest_scale
#define SHAPE {outer, channels, inner, threads}
#define GRID {lo, hi, lowest_scale, highest_scale}
#define FOR_TYPE(T, NAME)                                                                              \
  extern "C" void forward_##NAME(const T* x, const T* scale, T* y, SHAPE_AND_GRID) {                   \
    forward<T>(x, scale, y, SHAPE, GRID);                                                              \
  }                                                                                                    \
  extern "C" void backward_##NAME(const T* x, const T* g, const T* scale, T* dx, T* dscale,            \
                                  SHAPE_AND_GRID, double grad_scale) {                                 \
    backward<T>(x, g, scale, dx, dscale, SHAPE, GRID, grad_scale);                                     \
  }

FOR_TYPE(float, float32)
FOR_TYPE(double, float64)
