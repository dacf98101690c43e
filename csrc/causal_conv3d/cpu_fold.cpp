// causal_conv3d on the CPU: the input gradient of planes padded with copies, where Winograd serves.
// Previous hop: cpu.cpp.
// Next hop: cpu_winograd.cpp for the plane, cpu.cpp again for the lines of its border.
//
// A pixel at the border of the plane is read at its own position and at those of its copies in the
// padding. The first kind of reading is that of zero padding: Winograd's algorithm. Of the second
// there is one line a side: only the outermost tap reaches the padding, and only from the outermost
// line of dy. So a side is the gradient of a convolution of lines, with the taps of one row (or
// column) of the kernel, and is added to the line whose copy it is. Rows come with the corners.
//
// Work of the four lines against the direct sum of the plane: 2 (H + W) * 9 of H * W * 27.
#include "causal_conv3d/cpu_fold.h"

#include <algorithm>
#include <cstring>

#include "causal_conv3d/cpu_sides.h"
#include "causal_conv3d/cpu_winograd.h"
#include "causal_conv3d/cpu_winograd_plan.h"
#include "causal_conv3d/workspace.h"
#include "common/half.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

struct Side {
  bool row;        // a row of the plane, else a column
  index_t tap;     // of the kernel's rows or columns, the one that reaches the padding
  index_t output;  // line of dy
  index_t target;  // line of dx
};

struct Sides {
  index_t count = 0;
  Side side[4];
};

void add_sides(const AxisMap& a, bool row, Sides& sides) {
  if (a.mode == PadMode::zeros) return;
  const index_t inward = a.mode == PadMode::reflect ? 1 : 0;
  if (a.front > 0) sides.side[sides.count++] = {row, 0, 0, inward};
  if (last_position(a) >= a.source)
    sides.side[sides.count++] = {row, a.kernel - 1, a.out - 1, a.source - 1 - inward};
}

Sides sides_of(const Conv3dShape& s) {
  Sides sides;
  add_sides(s.h, true, sides);
  add_sides(s.w, false, sides);
  return sides;
}

Conv3dShape with_zeros_around(Conv3dShape s) {
  s.h.mode = s.w.mode = PadMode::zeros;
  return s;
}

// The side as planes of one row.
Conv3dShape line_shape(Conv3dShape s, const Side& side) {
  if (!side.row) {
    s.w = s.h;
    s.w.mode = PadMode::zeros;  // the corners came with the rows
  }
  s.h = {1, 1, 1, 1, 1, 0, PadMode::zeros};
  return s;
}

// Lines of [frames][height][width][channels].
struct Planes {
  index_t frames, height, width, channels;
};

// body(offset of the line's part in the planes, offset in the lines, elements) for every frame.
template <class Body>
void each_part(const Planes& p, bool row, index_t line, int num_threads, const Body& body) {
  const index_t plane = p.height * p.width * p.channels;
  parallel_ranges(p.frames, num_threads, [&](index_t begin, index_t end, int) {
    for (index_t f = begin; f < end; ++f) {
      if (row) {
        const index_t length = p.width * p.channels;
        body(f * plane + line * length, f * length, length);
        continue;
      }
      for (index_t h = 0; h < p.height; ++h)
        body(f * plane + (h * p.width + line) * p.channels, (f * p.height + h) * p.channels,
             p.channels);
    }
  });
}

template <class T>
void add_line(const Planes& p, bool row, index_t line, const void* lines, void* planes,
              int num_threads) {
  const T* from = static_cast<const T*>(lines);
  T* to = static_cast<T*>(planes);
  each_part(p, row, line, num_threads, [&](index_t in_plane, index_t in_line, index_t count) {
    for (index_t i = 0; i < count; ++i)
      to[in_plane + i] = from_float<T>(to_float(to[in_plane + i]) + to_float(from[in_line + i]));
  });
}

void add_line(DType dtype, const Planes& p, const Side& side, const void* lines, void* planes,
              int num_threads) {
  switch (dtype) {
    case DType::f32:
      return add_line<float>(p, side.row, side.target, lines, planes, num_threads);
    case DType::bf16:
      return add_line<bf16_t>(p, side.row, side.target, lines, planes, num_threads);
    case DType::f16:
      return add_line<f16_t>(p, side.row, side.target, lines, planes, num_threads);
  }
}

// [pairs of channels][KT][KH][KW] to [pairs][KT][1][taps of the side].
template <class T>
void take_taps(const Conv3dShape& s, const Side& side, const void* weight, void* taken,
               int num_threads) {
  const index_t height = s.h.kernel, width = s.w.kernel, count = side.row ? width : height;
  const index_t first = side.row ? side.tap * width : side.tap, step = side.row ? 1 : width;
  const index_t pairs = s.in_channels / s.groups * s.out_channels;
  parallel_ranges(pairs * s.t.kernel, num_threads, [&](index_t begin, index_t end, int) {
    for (index_t i = begin; i < end; ++i) {
      const T* from = static_cast<const T*>(weight) + i * height * width + first;
      T* to = static_cast<T*>(taken) + i * count;
      for (index_t k = 0; k < count; ++k) to[k] = from[k * step];
    }
  });
}

// A side's gradient and what it is made of, in the workspace.
struct Lines {
  Conv3dShape shape;
  char *dy, *weight, *dx, *dhistory, *rest;

  Lines(const Conv3dShape& s, const Side& side, const ExecContext& ctx, Workspace& workspace)
      : shape(line_shape(s, side)) {
    const index_t bytes = dtype_bytes(s.dtype), width = shape.w.source;
    dy = workspace.take<char>(s.batch * s.t.out * shape.w.out * s.out_channels * bytes);
    weight = workspace.take<char>(s.out_channels * s.in_channels / s.groups * s.t.kernel *
                                  shape.w.kernel * bytes);
    dx = workspace.take<char>(s.batch * s.frames * width * s.in_channels * bytes);
    dhistory = workspace.take<char>(s.batch * s.history_frames * width * s.in_channels * bytes);
    rest =
        workspace.take<char>(static_cast<index_t>(causal_conv3d_input_grad_workspace(shape, ctx)));
  }
};

void add_side(const Conv3dInputGradParams& p, const Side& side, const ExecContext& ctx) {
  const Conv3dShape& s = p.shape;
  Workspace workspace(p.workspace);
  const Lines lines(s, side, ctx, workspace);
  const index_t bytes = dtype_bytes(s.dtype);
  const Planes outputs{s.batch * s.t.out, s.h.out, s.w.out, s.out_channels};
  each_part(outputs, side.row, side.output, ctx.num_threads,
            [&](index_t in_plane, index_t in_line, index_t count) {
              std::memcpy(lines.dy + in_line * bytes,
                          static_cast<const char*>(p.dy) + in_plane * bytes,
                          static_cast<std::size_t>(count * bytes));
            });
  if (bytes == 4)
    take_taps<float>(s, side, p.weight, lines.weight, ctx.num_threads);
  else
    take_taps<bf16_t>(s, side, p.weight, lines.weight, ctx.num_threads);
  void* dhistory = s.history_frames ? lines.dhistory : nullptr;
  causal_conv3d_input_grad({lines.shape, lines.dy, lines.weight, lines.dx, dhistory, lines.rest},
                           ctx);
  const Planes sources{s.batch * s.frames, s.h.source, s.w.source, s.in_channels};
  add_line(s.dtype, sources, side, lines.dx, p.dx, ctx.num_threads);
  if (!s.history_frames) return;
  const Planes earlier{s.batch * s.history_frames, s.h.source, s.w.source, s.in_channels};
  add_line(s.dtype, earlier, side, lines.dhistory, p.dhistory, ctx.num_threads);
}

}  // namespace

bool folds_border(const Conv3dShape& shape, const ExecContext& ctx) {
  return sides_of(shape).count > 0 && winograd_serves(shape, ConvOp::input_grad, ctx.isa);
}

std::size_t folded_input_grad_workspace(const Conv3dShape& shape, const ExecContext& ctx) {
  std::size_t most = winograd_workspace(with_zeros_around(shape), Direction::input_grad, ctx);
  const Sides sides = sides_of(shape);
  for (index_t i = 0; i < sides.count; ++i) {
    Workspace workspace(nullptr);
    const Lines lines(shape, sides.side[i], ctx, workspace);
    most = std::max(most, workspace.bytes());
  }
  return most;
}

void folded_input_grad(const Conv3dInputGradParams& p, const ExecContext& ctx) {
  winograd_run(with_zeros_around(p.shape), Direction::input_grad,
               {nullptr, p.dy, p.weight, nullptr, p.dhistory, p.dx}, p.workspace, ctx);
  const Sides sides = sides_of(p.shape);
  for (index_t i = 0; i < sides.count; ++i) add_side(p, sides.side[i], ctx);
}

}  // namespace magvit_fast::cpu
