// vq_nearest on the CPU: packs the codebook and splits the positions over threads.
// Previous hop: bindings.cpp.
// Next hop: kernels.simd.cpp of the chosen instruction set.
#include <cmath>
#include <limits>

#include "common/check.h"
#include "common/parallel.h"
#include "vq_nearest/vq_nearest.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kSerialProducts = 65536;  // below, a parallel region costs more than the work

void pack(const VqNearestParams& p, const VqNearestTables& tables, index_t panel) {
  float* to = tables.panels + panel * p.channels * kVqPanel;
  for (index_t i = 0; i < kVqPanel; ++i) {
    const index_t code = panel * kVqPanel + i;
    const float* row = code < p.codes ? p.codebook + code * p.channels : nullptr;
    double norm = row ? 0.0 : std::numeric_limits<double>::infinity();
    for (index_t d = 0; d < p.channels; ++d) {
      to[d * kVqPanel + i] = row ? row[d] : 0.0f;
      if (row) norm += static_cast<double>(row[d]) * static_cast<double>(row[d]);
    }
    tables.norms[panel * kVqPanel + i] = static_cast<float>(norm);
  }
}

}  // namespace

index_t vq_nearest_workspace_bytes(index_t codes, index_t channels, const ExecContext& ctx) {
  const index_t padded = round_up(codes, kVqPanel);
  return (padded * (channels + 1) + ctx.num_threads * kVqBlock * channels) * index_t{sizeof(float)};
}

void vq_nearest_search(const VqNearestParams& params, const ExecContext& ctx) {
  check(params.codes >= 1, "vq_nearest: the codebook is empty");
  const auto kernel = MF_PICK_SIMD(vq_nearest_range, ctx.isa);
  const index_t panels = ceil_div(params.codes, kVqPanel), positions = params.positions();
  VqNearestTables tables{};
  tables.panels = static_cast<float*>(params.workspace);
  tables.norms = tables.panels + panels * kVqPanel * params.channels;
  float* scratch = tables.norms + panels * kVqPanel;
  const bool serial = positions * params.codes * params.channels < kSerialProducts;
  const int threads = serial ? 1 : ctx.num_threads;
  parallel_ranges(panels, threads, [&](index_t begin, index_t end, int) {
    for (index_t panel = begin; panel < end; ++panel) pack(params, tables, panel);
  });
  double largest = 0.0;
  for (index_t k = 0; k < params.codes; ++k) {
    const auto norm = static_cast<double>(tables.norms[k]);
    if (norm > largest) largest = norm;
  }
  tables.largest_norm = std::sqrt(largest);
  const index_t blocks = ceil_div(positions, kVqBlock);
  parallel_ranges(blocks, threads, [&](index_t begin, index_t end, int thread) {
    const index_t last = end * kVqBlock < positions ? end * kVqBlock : positions;
    kernel(params, tables, scratch + thread * kVqBlock * params.channels, begin * kVqBlock, last);
  });
}

}  // namespace magvit_fast::cpu
