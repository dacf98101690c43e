// causal_conv3d: the strip engine, for sums or results of few channels and for single pixels.
// Previous hop: cpu_strip.cpp.
// Next hop: strip.simd.cpp.
//
// Target pixels that are neighbors read their sources at equal distances, so a register tile needs
// one address and a step where the gather engine needs a pointer a pixel and tap. For that, source
// rows stand with their padding in strips of memory; without padding they are read in place.
#pragma once

#include <cstdint>

#include "causal_conv3d/gather.h"
#include "common/dtype.h"
#include "common/isa.h"
#include "common/shape.h"

namespace magvit_fast {

struct StripAxis {
  const std::int32_t* source;  // of every padded position, or -1
  index_t kernel, stride, dilation;
};

// Padded positions that `targets` neighbors meet.
constexpr index_t strip_span(const StripAxis& a, index_t targets) {
  return (targets - 1) * a.stride + (a.kernel - 1) * a.dilation + 1;
}

// What of a source stands side by side in memory and is one run of the sum.
enum class StripRun {
  channels,  // of one tap
  row,       // of the taps of a row
  frame,     // of the taps of a frame, of which each pixel gets a copy of its own ("folded")
  pixels     // no sum: strips are turned to have neighboring pixels side by side, of two channels
};

struct StripParams {
  SplitTensor source, target;
  SplitTensor residual;  // like target; added to the results, or late is null
  // [block of columns][KT][KH unless frame][KW unless row or frame][run][columns of the block];
  // of turned strips [KT][KH][KW][channels][result channels]
  const void* packed;
  const void* bias;         // [target channels], of type `target_type`, or null
  index_t reduce, produce;  // channels
  StripAxis t, h, w;
  StripRun run;
  bool mirrored;  // packed taps run backwards along the axes
  bool copied;    // rows are copied into strips (else: read in place)
  DType source_type, target_type;
  DType work_type;        // of the products: bfloat16 in pairs, or float32
  index_t rows, columns;  // targets of an item, at most
  // Elements of work_type: a run of the sum, a strip, a folded pixel with what copies reach beyond.
  index_t run_length, strip_length, fold_length;
  index_t strip_columns;  // of a turned strip: a pair's pixels
};

// Frames in turn: what is copied of a source frame serves all of them.
struct StripItem {
  index_t n, t_begin, t_end, row_begin, row_end, column_begin, column_end;
};

constexpr index_t kMostStripRuns = 64;
constexpr index_t kStripSlack = 64;  // elements behind a strip that copies may touch

// Elements of the thread's memory: strips of kernel_t frames or, folded, strips of one frame, one
// of zeros, and folded pixels of kernel_t frames.
constexpr index_t strip_memory(const StripParams& p) {
  const index_t frame = strip_span(p.h, p.rows) * p.strip_length;
  if (!p.copied) return 0;
  if (p.run != StripRun::frame) return p.t.kernel * frame;
  return frame + p.strip_length + p.t.kernel * p.rows * p.columns * p.fold_length;
}

MF_DECLARE_SIMD(void, conv3d_strip,
                (const StripParams& params, const StripItem& item, void* memory))

// StripRun::pixels; of bfloat16 where it is multiplied in pairs, at stride_w 1.
constexpr index_t kTurnedColumns = 64;  // targets of a row that an item has at most
MF_DECLARE_SIMD(void, conv3d_strip_turned,
                (const StripParams& params, const StripItem& item, void* memory))

}  // namespace magvit_fast
