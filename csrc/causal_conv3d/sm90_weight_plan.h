// causal_conv3d for sm_90a: which block sums which boxes into the weight gradient, and where its
// sums wait to be added up. Host and device share it.
// Previous hop: sm90_weight.cu; sm90_weight_schedule.h makes the plan.
// Next hop: index_map.h.
//
// A tile of dweight is 128 channels of dy x 128 channels of x x a run: up to three taps below each
// other that read one view of x. A step adds what 8 x 8 pixels of one frame of dy give to it. Its
// box of x is two rows higher than that of dy: all taps of the run read it, each a row further
// down, so dy and x are moved once for three taps. (A run shorter than the longest is multiplied as
// if it were one of those, and what it has too many is not read again.)
//
//   tile   ((run, 128 channels of dy, 128 of x), tap of time); taps of time read different frames
//   steps  of a tile: the frames of dy that read a frame there (causal: the first ones read none),
//          over clips; boxes of a frame innermost
//   blocks share all steps, tile after tile, in equal stretches. A stretch meets one tile or more:
//   a
//          piece each, whose sums go to a slot of their own; the pieces of a tile are added up in
//          the order of the blocks
//
// The number of blocks is a constant, not the device's: results are the same bits on all of them.
#pragma once

#include "causal_conv3d/sm90_plan.h"

namespace magvit_fast {

constexpr int kGradBlocks = 132;  // multiprocessors of an H100 or H200
constexpr int kGradBox = 8;       // pixels of dy a side of a step
constexpr int kGradTile = 128;    // channels a side of a tile
constexpr int kGradRun = 3;       // taps of a run
constexpr int kGradTimeTaps = 16;

// Tap tap + i * tap_step of the plane reads for pixel (h, w) of dy the pixel (h + dh + i, w + dw)
// of view `view` of x.
struct Sm90Run {
  std::int16_t dh, dw, view, taps, tap, tap_step;
};

struct Sm90WeightPlan {
  int batch, in_channels, out_channels, history_frames;
  int plane_taps;  // KH * KW
  AxisMap32 t;
  int boxes_w, boxes_h;                                   // of a frame of dy
  int tiles_in, tiles_out;                                // of channels
  int runs, longest_run;                                  // longest_run: in taps
  int views;                                              // of x, by remainders modulo the strides
  int tiles, steps, blocks;                               // steps: of all tiles
  int first_frame[kGradTimeTaps], frames[kGradTimeTaps];  // of dy, that a tap of time takes in
  int steps_before[kGradTimeTaps + 1];                    // of the tiles of one run and channels
  Sm90Run run[kSm90Taps];
  std::int8_t run_of[kSm90Taps], place_of[kSm90Taps];  // of a tap of the plane

  MF_HOST_DEVICE int box_rows() const { return kGradBox + longest_run - 1; }  // of x
  MF_HOST_DEVICE int slot_floats() const { return longest_run * kGradTile * kGradTile; }
  // The first step of a block. There are at least as many steps as blocks.
  MF_HOST_DEVICE int cut(int block) const {
    return static_cast<int>(index_t{steps} * block / blocks);
  }
  MF_HOST_DEVICE int block_of(int step) const {
    return static_cast<int>(((index_t{step} + 1) * blocks - 1) / steps);
  }
};

// Channels count in tiles.
struct Sm90WeightTile {
  int run, out, in, kt;
};

MF_HOST_DEVICE inline Sm90WeightTile sm90_weight_tile(const Sm90WeightPlan& p, int index) {
  const int group = index / p.t.kernel;
  return {group / p.tiles_in / p.tiles_out, group / p.tiles_in % p.tiles_out, group % p.tiles_in,
          index % p.t.kernel};
}

MF_HOST_DEVICE inline int sm90_weight_tile_index(const Sm90WeightPlan& p,
                                                 const Sm90WeightTile& tile) {
  return ((tile.run * p.tiles_out + tile.out) * p.tiles_in + tile.in) * p.t.kernel + tile.kt;
}

// The steps of a tile are [first, last) of all.
struct Sm90Steps {
  int first, last;
};
MF_HOST_DEVICE inline Sm90Steps sm90_steps_of_tile(const Sm90WeightPlan& p, int index) {
  const int kt = index % p.t.kernel;
  const int before = index / p.t.kernel * p.steps_before[p.t.kernel];
  return {before + p.steps_before[kt], before + p.steps_before[kt + 1]};
}

MF_HOST_DEVICE inline int sm90_tile_of_step(const Sm90WeightPlan& p, int step) {
  const int each = p.steps_before[p.t.kernel], rest = step % each;
  int kt = 0;
  while (rest >= p.steps_before[kt + 1]) ++kt;
  return step / each * p.t.kernel + kt;
}

// visit(tile's index, first and last of the tile's own steps) for every piece of a block.
template <class Visit>
MF_HOST_DEVICE inline void sm90_weight_pieces(const Sm90WeightPlan& p, int block,
                                              const Visit& visit) {
  const int end = p.cut(block + 1);
  for (int step = p.cut(block); step < end;) {
    const int tile = sm90_tile_of_step(p, step);
    const Sm90Steps all = sm90_steps_of_tile(p, tile);
    const int until = all.last < end ? all.last : end;
    visit(tile, step - all.first, until - all.first);
    step = until;
  }
}

// Slots are numbered along the steps: from a piece to the next the block, the tile or both go up by
// one. A slot is [taps of the run][128 channels of dy][128 of x] of float32.
MF_HOST_DEVICE inline index_t sm90_weight_slot(int block, int tile) {
  return index_t{block} + tile;
}
MF_HOST_DEVICE inline index_t sm90_weight_slots(const Sm90WeightPlan& p) {
  return index_t{p.blocks} + p.tiles - 1;
}

// The slots of a tile, one after the other in the order of summation; none where it has no steps.
struct Sm90Slots {
  index_t first;
  int count;
};
MF_HOST_DEVICE inline Sm90Slots sm90_slots_of_tile(const Sm90WeightPlan& p, int tile) {
  const Sm90Steps all = sm90_steps_of_tile(p, tile);
  if (all.first == all.last) return {0, 0};
  const int first = p.block_of(all.first), last = p.block_of(all.last - 1);
  return {sm90_weight_slot(first, tile), last - first + 1};
}

// A step of a tile: box (h, w) of frame t of clip n of dy; goes through memory order.
struct Sm90WeightStep {
  int n, t, h, w;

  MF_HOST_DEVICE void set(const Sm90WeightPlan& p, int kt, int step) {
    const int frame = step / p.boxes_w / p.boxes_h;
    w = step % p.boxes_w;
    h = step / p.boxes_w % p.boxes_h;
    t = p.first_frame[kt] + frame % p.frames[kt];
    n = frame / p.frames[kt];
  }
  MF_HOST_DEVICE void advance(const Sm90WeightPlan& p, int kt) {
    if (++w < p.boxes_w) return;
    w = 0;
    if (++h < p.boxes_h) return;
    h = 0;
    if (++t < p.first_frame[kt] + p.frames[kt]) return;
    t = p.first_frame[kt];
    ++n;
  }
};

// The corners of a step's boxes: of dy at (w, h, t, n), of view `view` of x (of the history's views
// after those of x) at (x_w, x_h, x_t, n).
struct Sm90WeightBoxes {
  int w, h, t, n, view, x_w, x_h, x_t;
};
MF_HOST_DEVICE inline Sm90WeightBoxes sm90_weight_boxes(const Sm90WeightPlan& p,
                                                        const Sm90WeightTile& tile,
                                                        const Sm90WeightStep& step) {
  const Sm90Run& run = p.run[tile.run];
  const int frame = source_index(p.t, step.t, tile.kt);
  const bool early = frame < p.history_frames;
  const int w = step.w * kGradBox, h = step.h * kGradBox;
  return {w,
          h,
          step.t,
          step.n,
          run.view + (early ? p.views : 0),
          w + run.dw,
          h + run.dh,
          early ? frame : frame - p.history_frames};
}

}  // namespace magvit_fast
