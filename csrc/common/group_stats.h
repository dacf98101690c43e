// The statistics of group norm, as whoever makes them hands them to whoever applies them.
// Previous hop: group_norm_silu.h; causal_conv3d's CUDA epilogue.
// Next hop: none.
#pragma once

namespace magvit_fast {

// Mean (as a sum of two floats: the digits below float32 matter where the mean is large) and
// 1 / sqrt(var + eps) of one group of one span.
struct GroupStats {
  float mean, mean_rest, rstd;
};

}  // namespace magvit_fast
