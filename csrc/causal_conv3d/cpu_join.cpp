// causal_conv3d on the CPU: source rows in which the taps of a row stand side by side.
// Previous hop: cpu.cpp.
// Next hop: none.
#include "causal_conv3d/cpu_join.h"

#include <cstring>
#include <type_traits>

#include "common/half.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kMostChannels = 8;  // of a tap; 16 took as long either way

template <class From, class To>
void copy(const From* from, index_t count, To* to) {
  index_t i = 0;
  if constexpr (std::is_same_v<From, To>) {  // a library call for some bytes would cost more
    constexpr index_t kStep = 8 / sizeof(To);
    for (; i + kStep <= count; i += kStep) std::memcpy(to + i, from + i, 8);
    for (; i < count; ++i) to[i] = from[i];
  } else {
    for (; i < count; ++i) to[i] = from_float<To>(to_float(from[i]));
  }
}

template <class From, class To>
void join_row(const RowJoin& j, const From* from, To* to) {
  const index_t channels = j.source.channels, part = channels / j.groups;
  const std::int32_t* column = j.columns;
  for (index_t w = 0; w < j.joined.width; ++w, column += j.kernel) {
    bool adjacent = column[0] >= 0;
    for (index_t k = 1; k < j.kernel; ++k) adjacent &= column[k] == column[0] + k;
    if (adjacent && j.groups == 1) {
      copy(from + column[0] * channels, j.kernel * channels, to);
      to += j.kernel * channels;
      continue;
    }
    for (index_t group = 0; group < j.groups; ++group)
      for (index_t k = 0; k < j.kernel; ++k, to += part) {
        if (column[k] >= 0)
          copy(from + column[k] * channels + group * part, part, to);
        else
          for (index_t c = 0; c < part; ++c) to[c] = To{};
      }
  }
}

template <class From, class To>
void join(const RowJoin& j, const void* source, void* joined, index_t frames, int num_threads) {
  const auto* from = static_cast<const From*>(source);
  auto* to = static_cast<To*>(joined);
  const index_t from_row = j.source.width * j.source.channels;
  const index_t to_row = j.joined.width * j.joined.channels;
  parallel_ranges(j.batch * frames * j.source.height, num_threads,
                  [&](index_t begin, index_t end, int) {
                    for (index_t row = begin; row < end; ++row)
                      join_row(j, from + row * from_row, to + row * to_row);
                  });
}

void join(const RowJoin& j, const void* source, void* joined, index_t frames, int num_threads) {
  if (j.joined_type == DType::bf16)
    return join<bf16_t, bf16_t>(j, source, joined, frames, num_threads);
  switch (j.source_type) {
    case DType::f32:
      return join<float, float>(j, source, joined, frames, num_threads);
    case DType::bf16:
      return join<bf16_t, float>(j, source, joined, frames, num_threads);
    case DType::f16:
      return join<f16_t, float>(j, source, joined, frames, num_threads);
  }
}

}  // namespace

bool joins_row_taps(const AxisMap& width, Direction direction, index_t reduce) {
  const bool one_source =
      direction == Direction::forward || (width.stride == 1 && width.mode == PadMode::zeros);
  return width.kernel > 1 && one_source && reduce <= kMostChannels;
}

void join_rows(const RowJoin& join_of, const AxisMap& width, Direction direction, int num_threads) {
  const bool forward = direction == Direction::forward;
  for (index_t i = 0; i < join_of.joined.width; ++i)
    for (index_t k = 0; k < join_of.kernel; ++k)
      join_of.columns[i * join_of.kernel + k] =
          static_cast<std::int32_t>(forward ? source_index(width, i, k) : output_at(width, i, k));
  const RowJoin& j = join_of;
  if (j.source.early_frames)
    join(j, j.source.early, j.joined.early, j.source.early_frames, num_threads);
  join(j, j.source.late, j.joined.late, j.source.late_frames, num_threads);
}

}  // namespace magvit_fast::cpu
