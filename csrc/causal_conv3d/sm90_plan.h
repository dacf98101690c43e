// causal_conv3d for sm_90a: which tile reads which boxes, in which order. Host and device share it.
// Previous hop: sm90_gather.cu; sm90_schedule.h makes the plan.
// Next hop: gemm_rows.h and index_map.h.
//
// A target (y forward, dx in the input gradient) is cut into tiles of 128 channels x kPixels pixels
// of one frame number: box_w x box_h pixels of box_n clips. For every (tap, channels of the sum) a
// tile reads a box of weights and a box of a source, both moved by the copy engine:
//
//   time    any map of frames (zeros, replicate, reflect, strides, history), looked up per tile: a
//           tap that reads nothing is skipped, so frame 0 of a causal 3x3x3 kernel costs a third
//   plane   zeros outside, which the copy engine fills in. With strides the forward pass reads
//           `views` of its source, one for each pair of remainders modulo the strides, so that
//           boxes stay dense; the input gradient writes such views instead (classes of targets)
#pragma once

#include "causal_conv3d/gemm_rows.h"

namespace magvit_fast {

constexpr int kSm90Depth = 64;      // channels of the sum in a step: a row of 128 bytes
constexpr int kSm90Channels = 128;  // of the target in a tile
constexpr int kSm90Classes = 4, kSm90Taps = 64, kSm90Views = 4;

// A tap of the plane for one class of targets: target (h, w) of the class reads (h + dh, w + dw) of
// source view `view`.
struct Sm90Tap {
  std::int16_t dh, dw, view, tap;  // tap = kh * KW + kw
};

// Targets whose coordinates leave the same remainders: `height` x `width` of them in a frame.
struct Sm90Class {
  int height, width;  // of this class's targets
  int tiles_h, tiles_w;
  int first_tile, first_tap, taps;
};

struct Sm90Plan {
  bool forward;
  int batch, frames, history_frames;  // target frames; frames of history
  int reduce, produce;                // channels of the sum, of the target
  int plane_taps;                     // KH * KW
  AxisMap32 t;
  EntryAxis t_entries;
  int box_w, box_h, box_n;  // powers of two
  int tiles_c, tiles_n, tiles;
  int views, classes;  // of the source (forward: strides' product) and of the target
  bool frames_outermost, late_first;
  Sm90Class cls[kSm90Classes];
  Sm90Tap taps[kSm90Taps];

  MF_HOST_DEVICE int pixels() const { return box_w * box_h * box_n; }
};

// The first coordinates of a tile; h and w count within the class.
struct Sm90Tile {
  int cls, c, w, h, t, n;
};

// Blocks take tiles wave by wave, every other wave backwards: with the long tiles first, whoever
// got the longest of one wave gets the shortest of the next.
MF_HOST_DEVICE inline int sm90_tile_of_block(int wave, int block, int blocks) {
  return wave * blocks + (wave % 2 ? blocks - 1 - block : block);
}

MF_HOST_DEVICE inline Sm90Tile sm90_tile(const Sm90Plan& p, int index) {
  Sm90Tile tile{};
  while (tile.cls + 1 < p.classes && index >= p.cls[tile.cls + 1].first_tile) ++tile.cls;
  const Sm90Class& cls = p.cls[tile.cls];
  index -= cls.first_tile;
  tile.c = index % p.tiles_c * kSm90Channels;  // fastest: neighbors share the pixels
  index /= p.tiles_c;
  tile.w = index % cls.tiles_w * p.box_w;
  index /= cls.tiles_w;
  tile.h = index % cls.tiles_h * p.box_h;
  index /= cls.tiles_h;
  const int inner = p.frames_outermost ? p.tiles_n : p.frames;
  const int a = index % inner, b = index / inner;
  tile.n = (p.frames_outermost ? a : b) * p.box_n;
  tile.t = p.frames_outermost ? b : a;
  if (p.late_first) tile.t = p.frames - 1 - tile.t;
  return tile;
}

// The source frame that target frame t reads through entry e of the time axis, or -1.
MF_HOST_DEVICE inline int sm90_frame(const Sm90Plan& p, int t, int e) {
  const int tap = e / p.t_entries.copies, copy = e % p.t_entries.copies;
  return p.forward ? reach<true>(p.t, t, tap, copy) : reach<false>(p.t, t, tap, copy);
}

MF_HOST_DEVICE inline int sm90_frames_read(const Sm90Plan& p, int t) {
  int count = 0;
  for (int e = 0; e < p.t_entries.entries; ++e) count += sm90_frame(p, t, e) >= 0;
  return count;
}

MF_HOST_DEVICE inline int sm90_steps(const Sm90Plan& p, const Sm90Tile& tile) {
  return sm90_frames_read(p, tile.t) * p.cls[tile.cls].taps * ceil_div(p.reduce, kSm90Depth);
}

// A frame along the source's (else the target's) time axis, in the tensor that holds it.
struct Sm90Frame {
  bool in_history;
  int t;
};
MF_HOST_DEVICE inline Sm90Frame sm90_split(const Sm90Plan& p, int frame, bool source) {
  // Forward reads history and x, the input gradient writes them; y and dy are whole.
  if (source != p.forward) return {false, frame};
  const bool early = frame < p.history_frames;
  return {early, early ? frame : frame - p.history_frames};
}

// One step: 64 channels from `c` of a box of source view `view` at (w, h, t, n), times those of the
// weights of `tap`.
struct Sm90Step {
  int view, c, w, h, t, n, tap;
};

// visit(step) for every step of a tile, in the order of summation.
template <class Visit>
MF_HOST_DEVICE inline void sm90_walk(const Sm90Plan& p, const Sm90Tile& tile, const Visit& visit) {
  const Sm90Class& cls = p.cls[tile.cls];
  for (int e = 0; e < p.t_entries.entries; ++e) {
    const int frame = sm90_frame(p, tile.t, e);
    if (frame < 0) continue;
    const Sm90Frame at = sm90_split(p, frame, true);
    const int kt = e / p.t_entries.copies;
    for (int i = 0; i < cls.taps; ++i) {
      const Sm90Tap& tap = p.taps[cls.first_tap + i];
      for (int c = 0; c < p.reduce; c += kSm90Depth)
        visit(Sm90Step{tap.view + (at.in_history ? p.views : 0), c, tile.w + tap.dw,
                       tile.h + tap.dh, at.t, tile.n, kt * p.plane_taps + tap.tap});
    }
  }
}

// A tile leaves in pieces of 64 pixels: the size of a piece's box, and the place of piece i.
struct Sm90Piece {
  int w, h, n;
};
MF_HOST_DEVICE inline Sm90Piece sm90_piece_size(const Sm90Plan& p) {
  const int w = p.box_w < 64 ? p.box_w : 64, h = p.box_h < 64 / w ? p.box_h : 64 / w;
  return {w, h, 64 / (w * h)};
}
MF_HOST_DEVICE inline Sm90Piece sm90_piece_place(const Sm90Plan& p, int i) {
  const int pixel = i * 64;
  return {pixel % p.box_w, pixel / p.box_w % p.box_h, pixel / (p.box_w * p.box_h)};
}

// Which stage of the ring a step uses and which phase of its barriers: both sides count alike, over
// all tiles of a block.
template <int kStages>
struct Sm90Ring {
  int stage = 0, phase = 0;
  MF_HOST_DEVICE void advance() {
    if (++stage < kStages) return;
    stage = 0;
    phase ^= 1;
  }
};

}  // namespace magvit_fast
