// causal_conv3d on the CPU: the index maps written out as lists for the gather engine.
// Previous hop: cpu.cpp.
// Next hop: index_map.h.
#include "causal_conv3d/cpu_tables.h"

#include "causal_conv3d/cpu_sides.h"

namespace magvit_fast::cpu {
namespace {

// body(source) for every source that target `i` gathers through tap k.
template <class Body>
void each_source(const AxisMap& a, Direction direction, index_t i, index_t k, const Body& body) {
  if (direction == Direction::forward) {
    const index_t s = source_index(a, i, k);
    if (s >= 0) body(s);
    return;
  }
  for (index_t j = 0; j < copies(a, i); ++j) {
    const index_t o = output_at(a, copy_position(a, i, j), k);
    if (o >= 0) body(o);
  }
}

index_t targets(const AxisMap& a, Direction direction) {
  return direction == Direction::forward ? a.out : a.source;
}

// The most sources that any target gathers through tap k: the slots that tap needs.
index_t slots_of_tap(const AxisMap& a, Direction direction, index_t k) {
  index_t most = 0;
  for (index_t i = 0; i < targets(a, direction); ++i) {
    index_t count = 0;
    each_source(a, direction, i, k, [&](index_t) { ++count; });
    if (count > most) most = count;
  }
  return most;
}

void fill_axis(const AxisMap& axis, std::int32_t* table) {
  for (index_t k = 0; k < axis.kernel; ++k)
    for (index_t o = 0; o < axis.out; ++o)
      *table++ = static_cast<std::int32_t>(source_index(axis, o, k));
}

}  // namespace

index_t most_sources(const AxisMap& a, Direction direction) {
  index_t count = 0;
  for (index_t k = 0; k < a.kernel; ++k) count += slots_of_tap(a, direction, k);
  return count;
}

AxisGather gather_axis(const AxisMap& a, Direction direction, Workspace& workspace) {
  const index_t count = targets(a, direction);
  auto* begin = workspace.take<std::int32_t>(count + 1);
  auto* taps = workspace.take<TapSource>(a.out * a.kernel);  // each (output, tap) has one source
  if (workspace.measuring()) return {};
  std::int32_t used = 0;
  for (index_t i = 0; i < count; ++i) {
    begin[i] = used;
    for (index_t k = 0; k < a.kernel; ++k)
      each_source(a, direction, i, k, [&](index_t s) {
        taps[used++] = {static_cast<std::int32_t>(k), static_cast<std::int32_t>(s)};
      });
  }
  begin[count] = used;
  return {begin, taps};
}

WidthGather gather_width(const AxisMap& a, Direction direction, index_t source_channels,
                         Workspace& workspace, bool by_dilation) {
  WidthGather g{};
  g.width = targets(a, direction);
  g.slots = most_sources(a, direction);
  auto* target = workspace.take<std::int32_t>(g.width);
  auto* offset = workspace.take<std::int32_t>(g.slots * g.width);
  auto* slot_tap = workspace.take<std::int32_t>(g.slots);
  auto* tile_first = workspace.take<std::int32_t>(g.width + 1);
  if (workspace.measuring()) return g;

  // Columns of one residue class meet the same taps; each class is cut into tiles of nearly equal
  // size.
  const bool forward = direction == Direction::forward;
  index_t classes = forward ? 1 : a.stride;
  if (by_dilation && a.dilation % a.stride == 0)
    classes = forward ? a.dilation / a.stride : a.dilation;
  index_t ordered = 0;
  for (index_t c = 0; c < classes; ++c) {
    const index_t first = ordered;
    for (index_t i = 0; i < g.width; ++i)
      if ((i + a.front) % classes == c) target[ordered++] = static_cast<std::int32_t>(i);
    const index_t count = ordered - first, tiles = ceil_div(count, kTilePixels);
    for (index_t t = 0; t < tiles; ++t)
      tile_first[g.tiles++] = static_cast<std::int32_t>(first + count * t / tiles);
  }
  tile_first[g.tiles] = static_cast<std::int32_t>(g.width);

  for (index_t i = 0; i < g.slots * g.width; ++i) offset[i] = -1;
  index_t slot = 0;
  for (index_t k = 0; k < a.kernel; ++k) {
    const index_t slots = slots_of_tap(a, direction, k);
    for (index_t s = 0; s < slots; ++s) slot_tap[slot + s] = static_cast<std::int32_t>(k);
    for (index_t i = 0; i < g.width; ++i) {
      index_t next = slot;
      each_source(a, direction, target[i], k, [&](index_t source) {
        offset[next++ * g.width + i] = static_cast<std::int32_t>(source * source_channels);
      });
    }
    slot += slots;
  }
  g.target = target;
  g.offset = offset;
  g.slot_tap = slot_tap;
  g.tile_first = tile_first;
  return g;
}

void SourceTables::fill(const AxisMap& of_t, const AxisMap& of_h, const AxisMap& of_w) const {
  fill_axis(of_t, t);
  fill_axis(of_h, h);
  const index_t count = padded_positions(of_w);
  for (index_t q = 0; q < count; ++q)
    w[q] = static_cast<std::int32_t>(source_at(of_w, q - of_w.front));
  for (index_t q = count - 1; q >= 0; --q) {
    const bool more = q + 1 < count && w[q + 1] == (w[q] >= 0 ? w[q] + 1 : -1);
    w_run[q] = more ? w_run[q + 1] + 1 : 1;
  }
}

SourceTables source_tables(const AxisMap& t, const AxisMap& h, const AxisMap& w,
                           Workspace& workspace) {
  return {workspace.take<std::int32_t>(t.kernel * t.out),
          workspace.take<std::int32_t>(h.kernel * h.out),
          workspace.take<std::int32_t>(padded_positions(w)),
          workspace.take<std::int32_t>(padded_positions(w))};
}

}  // namespace magvit_fast::cpu
