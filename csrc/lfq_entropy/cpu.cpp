// lfq_entropy on the CPU: cuts the workspace, orders the positions and spreads the work over
// threads. Previous hop: bindings.cpp. Next hop: forward.simd.cpp and backward.simd.cpp of the
// chosen instruction set (plan.h).
//
// Every sum has a fixed order, so that results do not depend on the number of threads.
#include <cstring>

#include "common/check.h"
#include "common/parallel.h"
#include "lfq_entropy/plan.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kCodebookChunk = 4096;  // codes of one partial sum
constexpr index_t kAlign = 64;

// Hands out the workspace; with a null base it only counts.
struct Arena {
  char* base;
  index_t used = 0;

  template <class T>
  T* take(index_t count) {
    T* at = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * static_cast<index_t>(sizeof(T)), kAlign);
    return at;
  }
};

struct Workspace {
  index_t* order;  // dense positions, padded with -1 to whole groups, then sparse ones, likewise
  std::uint8_t* classes;  // [positions]
  double* partial;        // a group's or a chunk's sum
  float* bits;            // [groups] probabilities
  float* scratch;         // [threads]
  index_t scratch_floats;
  float *high, *low;          // forward: tables of a block
  float *by_row, *by_column;  // backward: slopes; in the memory of the tables

  Workspace(Arena& arena, index_t positions, const LfqHalves& h, int threads) {
    const index_t groups = ceil_div(positions, kLfqGroup) + 2;
    const index_t codes = index_t{1} << h.channels;
    const index_t chunks = ceil_div(codes, kCodebookChunk);
    order = arena.take<index_t>(groups * kLfqGroup);
    classes = arena.take<std::uint8_t>(positions);
    partial = arena.take<double>(groups > chunks ? groups : chunks);
    bits = arena.take<float>(groups * lfq_group_floats(h));
    scratch_floats = lfq_backward_scratch_floats(h);
    scratch = arena.take<float>(threads * scratch_floats);
    const Arena shared = arena;
    high = arena.take<float>(h.padded_rows * kLfqBlock);
    low = arena.take<float>(h.padded_columns * kLfqBlock);
    const index_t after_tables = arena.used;
    arena = shared;
    by_row = arena.take<float>(h.padded_rows * h.padded_columns);
    by_column = arena.take<float>(h.padded_rows * h.padded_columns);
    if (after_tables > arena.used) arena.used = after_tables;
  }
};

// What both passes begin with: the ordered positions and their probabilities.
struct Groups {
  index_t counted = 0, dense = 0, sparse = 0;
  index_t dense_groups = 0, sparse_groups = 0;
  double sample_sum = 0.0;

  Groups(const LfqEntropyInput& in, const LfqHalves& h, const Workspace& w,
         const ExecContext& ctx) {
    const index_t positions = in.outer * in.inner;
    const auto classify = MF_PICK_SIMD(lfq_entropy_classify, ctx.isa);
    parallel_ranges(positions, ctx.num_threads, [&](index_t begin, index_t end, int) {
      classify(in, h.sparse_bits(), begin, end, w.classes);
    });
    dense = append(w, positions, kLfqDense, 0);
    dense_groups = ceil_div(dense, kLfqGroup);
    sparse = append(w, positions, kLfqSparse, dense_groups);
    sparse_groups = ceil_div(sparse, kLfqGroup);
    counted = dense + sparse;
    const auto group_bits = MF_PICK_SIMD(lfq_entropy_group_bits, ctx.isa);
    parallel_ranges(
        dense_groups + sparse_groups, ctx.num_threads, [&](index_t begin, index_t end, int) {
          for (index_t g = begin; g < end; ++g)
            w.partial[g] =
                group_bits(in, w.order + g * kLfqGroup, w.bits + g * lfq_group_floats(h));
        });
    for (index_t g = 0; g < dense_groups + sparse_groups; ++g) sample_sum += w.partial[g];
  }

  // Positions of one class to the groups from `first_group` on; how many they are.
  static index_t append(const Workspace& w, index_t positions, std::uint8_t wanted,
                        index_t first_group) {
    index_t* to = w.order + first_group * kLfqGroup;
    index_t count = 0;
    for (index_t n = 0; n < positions; ++n)
      if (w.classes[n] == wanted) to[count++] = n;
    for (index_t pad = count; pad % kLfqGroup; ++pad) to[pad] = -1;
    return count;
  }
};

void check_input(const LfqEntropyInput& in) {
  check(in.channels >= 1 && in.channels <= kLfqEntropyMaxChannels,
        "lfq_entropy: channels must be in 1..24");
}

void add_dense(const LfqEntropySumsParams& params, const LfqHalves& h, const Groups& groups,
               const Workspace& w, const ExecContext& ctx) {
  const auto tables = MF_PICK_SIMD(lfq_entropy_tables, ctx.isa);
  const auto tiles = MF_PICK_SIMD(lfq_entropy_tiles, ctx.isa);
  const index_t members = groups.dense_groups * kLfqGroup;
  const index_t tile_count = (h.padded_rows / kLfqTileRows) * (h.padded_columns / kLfqTileColumns);
  for (index_t first = 0; first < members; first += kLfqBlock) {
    const index_t count = members - first < kLfqBlock ? members - first : kLfqBlock;
    const float* bits = w.bits + first / kLfqGroup * lfq_group_floats(h);
    parallel_ranges(count, ctx.num_threads, [&](index_t begin, index_t end, int thread) {
      tables(h, bits, begin, end, w.high, w.low, w.scratch + thread * w.scratch_floats);
    });
    parallel_ranges(tile_count, ctx.num_threads, [&](index_t begin, index_t end, int) {
      tiles(h, w.high, w.low, count, first > 0, begin, end, params.probs);
    });
  }
}

}  // namespace

index_t lfq_entropy_workspace_bytes(index_t positions, index_t channels, const ExecContext& ctx) {
  Arena arena{nullptr};
  Workspace(arena, positions, LfqHalves(channels), ctx.num_threads);
  return arena.used;
}

void lfq_entropy_sums(const LfqEntropySumsParams& params, const ExecContext& ctx) {
  check_input(params.in);
  const LfqHalves h(params.in.channels);
  Arena arena{static_cast<char*>(params.workspace)};
  const Workspace w(arena, params.in.outer * params.in.inner, h, ctx.num_threads);
  const Groups groups(params.in, h, w, ctx);
  params.stats[0] = groups.sample_sum;
  params.stats[1] = static_cast<double>(groups.counted);
  if (groups.dense_groups > 0)
    add_dense(params, h, groups, w, ctx);
  else
    std::memset(params.probs, 0, sizeof(float) << h.channels);
  if (groups.sparse == 0) return;
  const auto list = MF_PICK_SIMD(lfq_entropy_list, ctx.isa);
  const float* bits = w.bits + groups.dense_groups * lfq_group_floats(h);
  // A thread owns rows, not positions: each code is then summed by one thread, in order.
  parallel_ranges(h.rows, ctx.num_threads, [&](index_t begin, index_t end, int thread) {
    list(h, bits, groups.sparse, begin, end, params.probs, w.scratch + thread * w.scratch_floats);
  });
}

void lfq_entropy_codebook(const LfqEntropyCodebookParams& params, const ExecContext& ctx) {
  const auto kernel = MF_PICK_SIMD(lfq_entropy_codebook_range, ctx.isa);
  auto* partial = static_cast<double*>(params.workspace);
  const index_t chunks = ceil_div(params.codes, kCodebookChunk);
  *params.per_sample = lfq_entropy_per_sample(params.stats);
  *params.entropy = 0.0f;
  if (params.stats[1] <= 0.0) return;
  parallel_ranges(chunks, ctx.num_threads, [&](index_t begin, index_t end, int) {
    for (index_t c = begin; c < end; ++c) {
      const index_t last = (c + 1) * kCodebookChunk;
      partial[c] = kernel(params, c * kCodebookChunk, last < params.codes ? last : params.codes);
    }
  });
  double total = 0.0;
  for (index_t c = 0; c < chunks; ++c) total += partial[c];
  *params.entropy = static_cast<float>(total);
}

void lfq_entropy_backward(const LfqEntropyBackwardParams& params, const ExecContext& ctx) {
  check_input(params.in);
  const LfqEntropyInput& in = params.in;
  const LfqHalves h(in.channels);
  Arena arena{static_cast<char*>(params.workspace)};
  const Workspace w(arena, in.outer * in.inner, h, ctx.num_threads);
  const Groups groups(in, h, w, ctx);
  if (groups.counted < in.outer * in.inner) {
    // Positions that are not counted: the caller's memory is fresh, zero is written here.
    const index_t bytes = dtype_bytes(in.dtype);
    char* out = static_cast<char*>(params.grad_z);
    for (index_t n = 0; n < in.outer * in.inner; ++n) {
      if (w.classes[n] != kLfqMasked) continue;
      const index_t at = n / in.inner * in.outer_stride + n % in.inner * in.inner_stride;
      for (index_t c = 0; c < in.channels; ++c)
        std::memset(out + (at + c * in.channel_stride) * bytes, 0, static_cast<std::size_t>(bytes));
    }
  }
  const auto slopes = MF_PICK_SIMD(lfq_entropy_slopes, ctx.isa);
  const auto backward = MF_PICK_SIMD(lfq_entropy_group_backward, ctx.isa);
  if (groups.dense_groups > 0)
    parallel_ranges(h.padded_rows / kLfqTileRows, ctx.num_threads,
                    [&](index_t begin, index_t end, int) {
                      slopes(params, h, begin, end, w.by_row, w.by_column);
                    });
  parallel_items(groups.dense_groups + groups.sparse_groups, ctx.num_threads,
                 [&](index_t g, int thread) {
                   const bool dense = g < groups.dense_groups;
                   backward(params, h, w.order + g * kLfqGroup, w.bits + g * lfq_group_floats(h),
                            dense ? w.by_row : nullptr, dense ? w.by_column : nullptr,
                            w.scratch + thread * w.scratch_floats);
                 });
}

}  // namespace magvit_fast::cpu
