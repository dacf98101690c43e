// vq_nearest, one source per instruction set: a few positions against the whole codebook at a time.
// Previous hop: cpu.cpp.
// Next hop: none.
//
// A product of matrices whose result is used up in registers: kRows positions x two vectors of
// codes, then the smallest score and the second of each lane. Per pair of vectors and channel: two
// loads of codes, kRows broadcasts of z, 2 * kRows multiply-adds.
#include "common/simd_math.h"
#include "vq_nearest/vq_nearest.h"

namespace magvit_fast {
namespace MF_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();
// Sums of kRows x 2 vectors stay in registers: 24 of 32, or 12 of 16.
constexpr int kRows = kLanes == 16 ? 12 : 6;
static_assert(kVqBlock % kRows == 0 && kVqPanel % (2 * kLanes) == 0, "tiles fit");

struct Leaders {
  vf best[kRows], second[kRows];
  vi code[kRows];
};

inline void compete(Leaders* leaders, int row, vf score, vi code) {
  const vf best = leaders->best[row];
  const vi better = score < best;
  leaders->second[row] = min(leaders->second[row], select(better, best, score));
  leaders->best[row] = select(better, score, best);
  leaders->code[row] = better ? code : leaders->code[row];
}

// rows [channels][kRows]: kRows positions against all codes.
void search(const VqNearestParams& p, const VqNearestTables& tables, const float* rows,
            Leaders* leaders) {
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int r = 0; r < kRows; ++r) {
    leaders->best[r] = leaders->second[r] = splat(kInfinity);
    leaders->code[r] = vi{};
  }
  for (index_t first = 0; first < p.codes; first += 2 * kLanes) {
    const index_t panel = first / kVqPanel, within = first % kVqPanel;
    const float* codes = tables.panels + panel * p.channels * kVqPanel + within;
    vf sum[kRows][2] = {};
    for (index_t d = 0; d < p.channels; ++d) {
      const vf left = load(codes + d * kVqPanel), right = load(codes + d * kVqPanel + kLanes);
      const float* z = rows + d * kRows;
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] += left * z[r];
        sum[r][1] += right * z[r];
      }
    }
    const vi code = lane + static_cast<std::int32_t>(first);
    const vf left = load(tables.norms + first), right = load(tables.norms + first + kLanes);
    for (int r = 0; r < kRows; ++r) {
      compete(leaders, r, left - 2.0f * sum[r][0], code);
      compete(leaders, r, right - 2.0f * sum[r][1], code + kLanes);
    }
  }
}

typedef double vd __attribute__((vector_size(kLanes * 8)));

// All codes in float64: the first of the nearest.
index_t search_exactly(const VqNearestParams& p, const VqNearestTables& tables, const float* z) {
  double best = __builtin_inf();
  index_t code = 0;
  for (index_t first = 0; first < p.codes; first += kLanes) {
    const float* codes =
        tables.panels + first / kVqPanel * p.channels * kVqPanel + first % kVqPanel;
    vd sum{};
    for (index_t d = 0; d < p.channels; ++d) {
      const vd away = __builtin_convertvector(load(codes + d * kVqPanel), vd) -
                      static_cast<double>(z[d * kRows]);
      sum += away * away;
    }
    for (int i = 0; i < kLanes && first + i < p.codes; ++i)
      if (sum[i] < best) {
        best = sum[i];
        code = first + i;
      }
  }
  return code;
}

index_t decide(const VqNearestParams& p, const VqNearestTables& tables, const Leaders& leaders,
               int row, const float* z, double z_norm) {
  const vf best = leaders.best[row];
  const float top = min_lanes(best);
  std::int32_t code = INT32_MAX;
  int winner = 0;
  for (int i = 0; i < kLanes; ++i)
    if (best[i] == top && leaders.code[row][i] < code) {
      code = leaders.code[row][i];
      winner = i;
    }
  float runner_up = min_lanes(leaders.second[row]);
  for (int i = 0; i < kLanes; ++i)
    if (i != winner && best[i] < runner_up) runner_up = best[i];
  const double margin = vq_nearest_margin(p.channels, z_norm, tables.largest_norm);
  const double gap = static_cast<double>(runner_up) - static_cast<double>(top);
  if (gap <= margin) return search_exactly(p, tables, z);
  return code < p.codes ? code : 0;  // no comparison held: not a number
}

template <class T>
void run(const VqNearestParams& p, const VqNearestTables& tables, float* scratch, index_t begin,
         index_t end) {
  Leaders leaders;
  for (index_t n = begin; n < end; n += kRows) {
    const int rows = end - n < kRows ? static_cast<int>(end - n) : kRows;
    double norm[kRows] = {};
    for (int r = 0; r < kRows; ++r) {
      const T* z = static_cast<const T*>(p.z) + p.first_element(r < rows ? n + r : n);
      for (index_t d = 0; d < p.channels; ++d) {
        const float value = to_float(z[d * p.channel_stride]);
        scratch[d * kRows + r] = value;
        norm[r] += static_cast<double>(value) * static_cast<double>(value);
      }
    }
    search(p, tables, scratch, &leaders);
    for (int r = 0; r < rows; ++r)
      p.indices[n + r] = decide(p, tables, leaders, r, scratch + r, __builtin_sqrt(norm[r]));
  }
}

}  // namespace

void vq_nearest_range(const VqNearestParams& params, const VqNearestTables& tables, float* scratch,
                      index_t begin, index_t end) {
  switch (params.dtype) {
    case DType::f32:
      return run<float>(params, tables, scratch, begin, end);
    case DType::bf16:
      return run<bf16_t>(params, tables, scratch, begin, end);
    case DType::f16:
      return run<f16_t>(params, tables, scratch, begin, end);
  }
}

}  // namespace MF_ISA
}  // namespace magvit_fast
