// factorized_embedding, one source per instruction set: sums of rows, and of gradients per row.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// Bound by memory. Forward writes the result once, by plain stores: stores past the caches were 1.2
// times slower on a fresh 42 MB result, whose pages the system has just zeroed in the cache.
// Backward reads the gradient once for all sub-tables together: sorting the positions by row would
// keep the sums in registers, but read the gradient once a sub-table, and it is the gradient that
// comes from memory while the sums stay in L2.
#include "common/simd.h"
#include "factorized_embedding/factorized_embedding.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr index_t kPrefetchRows = 6;

template <class T>
inline void sum_rows(T* out, const T* const* rows, int count, index_t dim) {
  index_t c = 0;
  for (; c + kLanes <= dim; c += kLanes) {
    vf sum = load(rows[0] + c);
    for (int g = 1; g < count; ++g) sum += load(rows[g] + c);
    store(out + c, sum);
  }
  if (c < dim) {
    const int rest = static_cast<int>(dim - c);
    vf sum = load_some(rows[0] + c, rest);
    for (int g = 1; g < count; ++g) sum += load_some(rows[g] + c, rest);
    store_some(out + c, sum, rest);
  }
}

template <class T>
index_t forward(const FactorizedEmbeddingForwardParams& p, index_t begin, index_t end) {
  const index_t dim = p.in.dim, table = dim << p.in.bits;
  T* out = static_cast<T*>(p.out);
  index_t first_bad = -1;
  for (index_t n = begin; n < end; ++n) {
    const T* rows[kFactorizedEmbeddingMaxGroups];
    int count = p.in.groups;
    T* to = out + n * dim;
    if (p.in.mask && p.in.mask[n]) {
      rows[0] = static_cast<const T*>(p.mask_embedding);
      count = 1;
    } else if (token_id_out_of_range(p.in.ids[n], p.in.groups, p.in.bits)) {
      if (first_bad < 0) first_bad = n;
      for (index_t c = 0; c < dim; ++c) to[c] = from_float<T>(__builtin_nanf(""));
      continue;
    } else {
      for (int g = 0; g < count; ++g)
        rows[g] = static_cast<const T*>(p.weight) + g * table +
                  sub_token(p.in.ids[n], g, p.in.bits) * dim;
    }
    sum_rows(to, rows, count, dim);
  }
  return first_bad;
}

// sums[c] += grad[c] for each of the `count` rows of sums.
template <class T, int kCount>
inline void add_to_rows(float* const* sums, int count, const T* grad, index_t width) {
  const int rows = kCount > 0 ? kCount : count;
  index_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    const vf g = load(grad + c);
    for (int r = 0; r < rows; ++r) store(sums[r] + c, load(sums[r] + c) + g);
  }
  for (; c < width; ++c)
    for (int r = 0; r < rows; ++r) sums[r][c] += to_float(grad[c]);
}

template <class T>
void store_row(T* out, const float* sums, index_t width) {
  index_t c = 0;
  for (; c + kLanes <= width; c += kLanes) store(out + c, load(sums + c));
  for (; c < width; ++c) out[c] = from_float<T>(sums[c]);
}

// The masked positions are many and all add to one row: sums of a chunk, added up with their
// rounding errors carried along (Kahan), keep the error small.
struct MaskSums {
  static constexpr int kChunk = 64;
  float* rows[1] = {chunk};
  float chunk[kFactorizedEmbeddingColumns] = {};
  float total[kFactorizedEmbeddingColumns] = {};
  float lost[kFactorizedEmbeddingColumns] = {};
  int filled = 0;

  void flush() {
    for (index_t c = 0; c < kFactorizedEmbeddingColumns; ++c) {
      const float term = chunk[c] - lost[c];
      const float sum = total[c] + term;
      lost[c] = (sum - total[c]) - term;
      total[c] = sum;
      chunk[c] = 0.0f;
    }
    filled = 0;
  }
};

template <class T>
void backward(const FactorizedEmbeddingBackwardParams& p, index_t begin, index_t end) {
  const index_t dim = p.in.dim, width = end - begin;
  const index_t rows = index_t{p.in.groups} << p.in.bits;
  float* sums = static_cast<float*>(p.in.dtype == DType::f32 ? p.grad_weight : p.workspace);
  for (index_t r = 0; r < rows; ++r)
    std::memset(sums + r * dim + begin, 0, sizeof(float) * static_cast<std::size_t>(width));
  const T* grad = static_cast<const T*>(p.grad) + begin;
  MaskSums masked;
  for (index_t n = 0; n < p.in.positions; ++n) {
    const T* row = grad + n * dim;
    if (n + kPrefetchRows < p.in.positions) {
      const char* ahead = reinterpret_cast<const char*>(row + kPrefetchRows * dim);
      for (index_t b = 0; b < width * static_cast<index_t>(sizeof(T)); b += 64)
        __builtin_prefetch(ahead + b);
    }
    if (p.in.mask && p.in.mask[n]) {
      add_to_rows<T, 1>(masked.rows, 1, row, width);
      if (++masked.filled == MaskSums::kChunk) masked.flush();
      continue;
    }
    if (token_id_out_of_range(p.in.ids[n], p.in.groups, p.in.bits)) continue;
    float* into[kFactorizedEmbeddingMaxGroups];
    for (int g = 0; g < p.in.groups; ++g)
      into[g] =
          sums + ((index_t{g} << p.in.bits) + sub_token(p.in.ids[n], g, p.in.bits)) * dim + begin;
    if (p.in.groups == 2)
      add_to_rows<T, 2>(into, 2, row, width);
    else
      add_to_rows<T, 0>(into, p.in.groups, row, width);
  }
  if (p.in.dtype != DType::f32)
    for (index_t r = 0; r < rows; ++r)
      store_row(static_cast<T*>(p.grad_weight) + r * dim + begin, sums + r * dim + begin, width);
  if (p.grad_mask_embedding) {
    masked.flush();
    store_row(static_cast<T*>(p.grad_mask_embedding) + begin, masked.total, width);
  }
}

}  // namespace

index_t factorized_embedding_forward_range(const FactorizedEmbeddingForwardParams& params,
                                           index_t begin, index_t end) {
  switch (params.in.dtype) {
    case DType::f32:
      return forward<float>(params, begin, end);
    case DType::bf16:
      return forward<bf16_t>(params, begin, end);
    case DType::f16:
      return forward<f16_t>(params, begin, end);
  }
  return -1;
}

void factorized_embedding_backward_columns(const FactorizedEmbeddingBackwardParams& params,
                                           index_t begin, index_t end) {
  switch (params.in.dtype) {
    case DType::f32:
      return backward<float>(params, begin, end);
    case DType::bf16:
      return backward<bf16_t>(params, begin, end);
    case DType::f16:
      return backward<f16_t>(params, begin, end);
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
