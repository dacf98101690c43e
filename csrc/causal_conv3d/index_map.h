// causal_conv3d: which source element each output reads through each tap, and the way back.
// Previous hop: causal_conv3d.h (an AxisMap for each of time, height and width).
// Next hop: none; host and device share it, tests/ops/test_causal_conv3d_index_map.py holds it.
//
// The three axes are independent. Along one axis the output o reads through tap k the padded
// position o * stride + k * dilation - front; position 0 is the first source element. On the time
// axis the source is the history frames followed by the frames of x, so streaming needs no other
// rule.
#pragma once

#include "common/shape.h"

namespace magvit_fast {

enum class PadMode : int { zeros = 0, replicate = 1, reflect = 2 };

// Int is the integer of coordinates: index_t on the host, int where registers are dear (CUDA).
template <class Int>
struct AxisMapOf {
  Int source;  // elements along the axis (time: history_frames + frames)
  Int out;     // outputs along the axis
  Int kernel, stride, dilation;
  Int front;  // padding before the first source element
  PadMode mode;
};
using AxisMap = AxisMapOf<index_t>;

// An argument that takes its integer from the map, so that a literal may stand for it.
template <class Int>
struct GivenInt {
  using type = Int;
};
template <class Int>
using Given = typename GivenInt<Int>::type;

template <class Int>
MF_HOST_DEVICE inline Int padded_position(const AxisMapOf<Int>& a, Given<Int> o, Given<Int> k) {
  return o * a.stride + k * a.dilation - a.front;
}

// The source element at a padded position, or -1 for a zero. Reflection needs pads smaller than the
// source (checked by the caller), so that one mirror is enough.
template <class Int>
MF_HOST_DEVICE inline Int source_at(const AxisMapOf<Int>& a, Given<Int> position) {
  const auto last = a.source - 1;
  if (position >= 0 && position <= last) return position;
  if (a.mode == PadMode::zeros) return -1;
  if (a.mode == PadMode::replicate) return position < 0 ? 0 : last;
  return position < 0 ? -position : 2 * last - position;
}

template <class Int>
MF_HOST_DEVICE inline Int source_index(const AxisMapOf<Int>& a, Given<Int> o, Given<Int> k) {
  return source_at(a, padded_position(a, o, k));
}

// --- the way back, for gradients with respect to the source
// --------------------------------------- A source element s is seen at several padded positions:
// itself first (j = 0), then its copies in the padding. copies(a, s) counts them, copy_position(a,
// s, j) lists them.

template <class Int>
MF_HOST_DEVICE inline Int last_position(
    const AxisMapOf<Int>& a) {  // the last one that a tap touches
  return padded_position(a, a.out - 1, a.kernel - 1);
}

template <class Int>
MF_HOST_DEVICE inline Int copies_before(const AxisMapOf<Int>& a, Given<Int> s) {
  if (a.mode == PadMode::replicate) return s == 0 ? a.front : 0;
  if (a.mode == PadMode::reflect) return s >= 1 && s <= a.front ? 1 : 0;
  return 0;
}

template <class Int>
MF_HOST_DEVICE inline Int copies_after(const AxisMapOf<Int>& a, Given<Int> s) {
  const auto last = a.source - 1;
  const auto back = last_position(a) - last;  // may be negative: the tail is never read
  if (back <= 0) return 0;
  if (a.mode == PadMode::replicate) return s == last ? back : 0;
  if (a.mode == PadMode::reflect) return s < last && last - s <= back ? 1 : 0;
  return 0;
}

template <class Int>
MF_HOST_DEVICE inline Int copies(const AxisMapOf<Int>& a, Given<Int> s) {
  return 1 + copies_before(a, s) + copies_after(a, s);
}

template <class Int>
MF_HOST_DEVICE inline Int copy_position(const AxisMapOf<Int>& a, Given<Int> s, Given<Int> j) {
  if (j == 0) return s;
  const auto before = copies_before(a, s);
  if (j <= before) return a.mode == PadMode::replicate ? -j : -s;
  return a.mode == PadMode::replicate ? a.source - 1 + (j - before) : 2 * (a.source - 1) - s;
}

// The output that reads this padded position through tap k, or -1: with strides only every
// stride-th position is read through a given tap.
template <class Int>
MF_HOST_DEVICE inline Int output_at(const AxisMapOf<Int>& a, Given<Int> position, Given<Int> k) {
  const auto offset = position + a.front - k * a.dilation;
  if (offset < 0 || offset % a.stride != 0) return -1;
  const auto o = offset / a.stride;
  return o < a.out ? o : -1;
}

}  // namespace magvit_fast
