// causal_conv3d on the CPU: the weight gradient of 1x1x1 kernels.
// Previous hop: cpu_weight_grad.cpp.
// Next hop: point_grad.simd.cpp.
//
// Items are blocks of channels by slices of the pixels, cut by the shape alone: results do not
// depend on threads.
#include "causal_conv3d/cpu_point_grad.h"

#include <algorithm>

#include "causal_conv3d/cpu_slices.h"
#include "causal_conv3d/point_grad.h"
#include "causal_conv3d/workspace.h"
#include "common/half.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kItems = 16;

struct Cut {
  bool vectors_over_output;
  index_t vectors, scalars, pixels;  // of the whole
  index_t vector_block, vector_blocks, scalar_block, scalar_blocks, slices, item_sums;

  Cut(const Conv3dShape& s, int isa) {
    const index_t in = s.in_channels, out = s.out_channels, lanes = gather_lanes(isa);
    vectors_over_output = round_up(out, lanes) * in < round_up(in, lanes) * out;
    vectors = vectors_over_output ? out : in;
    scalars = vectors_over_output ? in : out;
    pixels = s.batch * s.t.out * s.h.out * s.w.out;
    vector_block = std::min(vectors, kPointVectors);
    vector_blocks = ceil_div(vectors, vector_block);
    scalar_blocks = ceil_div(scalars, kMostPointScalars);
    scalar_block = ceil_div(scalars, scalar_blocks);
    slices = std::min(ceil_div(kItems, vector_blocks * scalar_blocks),
                      ceil_div(pixels, 2 * kPointLines));
    item_sums = point_sums(vector_block, scalar_block, isa);
  }
  index_t items() const { return vector_blocks * scalar_blocks * slices; }

  PointGradItem item(index_t i) const {
    const index_t slice = i % slices, v = i / slices % vector_blocks * vector_block;
    const index_t s = i / slices / vector_blocks * scalar_block;
    const auto pixel = [this](index_t k) { return pixels / 2 * k / slices * 2; };  // whole pairs
    return {v,
            std::min(v + vector_block, vectors),
            s,
            std::min(s + scalar_block, scalars),
            pixel(slice),
            slice + 1 == slices ? pixels : pixel(slice + 1)};
  }
};

struct Memory {
  SliceTree tree;
  float* sums;    // of each item
  float* packed;  // of each thread
  index_t packed_size;

  Memory(const Cut& cut, const ExecContext& ctx, Workspace& workspace)
      : tree(cut.items() / cut.slices, cut.slices, ctx.isa, workspace),
        sums(workspace.take<float>(cut.items() * cut.item_sums)),
        packed_size(point_packed(ctx.isa)) {
    packed = workspace.take<float>(packed_size * ctx.num_threads);
  }
};

// An item's sums into dweight [out][in].
template <class T>
void write(const Cut& c, const PointGradItem& item, int isa, const T* sums, T* dweight) {
  const index_t width = gather_columns(isa), lanes = gather_lanes(isa);
  const index_t scalars = item.scalar_end - item.scalar_begin;
  const index_t padded = round_up(item.vector_end - item.vector_begin, lanes);
  for (index_t v = item.vector_begin; v < item.vector_end; v += width) {
    const index_t first = v - item.vector_begin, columns = std::min(width, padded - first);
    const index_t end = std::min(columns, item.vector_end - v);
    const T* row = sums + first * scalars;
    for (index_t s = item.scalar_begin; s < item.scalar_end; ++s, row += columns)
      if (c.vectors_over_output)
        for (index_t k = 0; k < end; ++k) dweight[(v + k) * c.scalars + s] = row[k];
      else
        for (index_t k = 0; k < end; ++k) dweight[s * c.vectors + v + k] = row[k];
  }
}

void write(const Cut& c, const PointGradItem& item, int isa, float* sums, DType dtype,
           void* dweight) {
  MF_PICK_SIMD(conv3d_round_sums, isa)(sums, c.item_sums, dtype);
  const void* of = sums;
  switch (dtype) {
    case DType::f32:
      return write(c, item, isa, static_cast<const float*>(of), static_cast<float*>(dweight));
    case DType::bf16:
      return write(c, item, isa, static_cast<const bf16_t*>(of), static_cast<bf16_t*>(dweight));
    case DType::f16:
      return write(c, item, isa, static_cast<const f16_t*>(of), static_cast<f16_t*>(dweight));
  }
}

}  // namespace

bool point_grad_serves(const Conv3dShape& s) {
  const auto pointwise = [](const AxisMap& a) {
    return a.kernel == 1 && a.stride == 1 && a.front == 0 && a.out == a.source;
  };
  return s.groups == 1 && s.history_frames == 0 && pointwise(s.t) && pointwise(s.h) &&
         pointwise(s.w);
}

std::size_t point_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx) {
  Workspace workspace(nullptr);
  Memory(Cut(shape, ctx.isa), ctx, workspace);
  return workspace.bytes();
}

void point_grad(const Conv3dWeightGradParams& p, const ExecContext& ctx) {
  const Cut cut(p.shape, ctx.isa);
  Workspace workspace(p.workspace);
  const Memory memory(cut, ctx, workspace);
  const bool over_output = cut.vectors_over_output;
  const PointGradParams params{over_output ? p.dy : p.x, over_output ? p.x : p.dy, cut.vectors,
                               cut.scalars, p.shape.dtype};
  const auto kernel = MF_PICK_SIMD(conv3d_point_grad, ctx.isa);
  parallel_ranges(cut.items(), ctx.num_threads, [&](index_t begin, index_t end, int thread) {
    for (index_t i = begin; i < end; ++i) {
      const PointGradItem item = cut.item(i);
      float* sums = memory.sums + i / cut.slices * cut.slices * cut.item_sums;
      kernel(params, item, memory.sums + i * cut.item_sums,
             memory.packed + thread * memory.packed_size);
      if (memory.tree.add(i / cut.slices, i % cut.slices, sums, cut.item_sums))
        write(cut, item, ctx.isa, sums, p.shape.dtype, p.dweight);
    }
  });
}

}  // namespace magvit_fast::cpu
