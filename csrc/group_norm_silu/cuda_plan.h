// group_norm_silu on CUDA: how frames are cut among blocks. Host and device share it.
// Previous hop: cuda.cu, cuda_forward.cu, cuda_backward.cu.
// Next hop: group_norm_silu.h.
#pragma once

#include "common/check.h"
#include "group_norm_silu/group_norm_silu.h"

namespace magvit_fast::cuda {

// A slab is one block's work: neighboring positions of one frame. Sums run over a slab and then
// over slabs in order. Its size follows from the size of a frame alone, so that a clip gives the
// same bits in any batch.
//
// Scale and shift hold for a cell of positions. Where cells are narrower than a row (`by_cell`), a
// slab is whole rows of cells, and each line of threads takes whole cells: their scale and shift go
// to registers once a cell. Otherwise a slab stays inside one row of cells (`band`), and they go
// to registers once a slab.
struct NormPlan {
  bool by_cell;
  int positions;  // of a frame
  int band;       // positions that no slab crosses
  int slab;       // positions of a slab
  int slabs_per_band, slabs_per_frame;
  index_t slabs_per_span, slabs;
  int cells_down, cells_across;

  explicit NormPlan(const GroupNormSiluInput& in) {
    constexpr index_t kLeast = 4096, kMost = 65536, kSlabsPerFrame = 16;  // elements of a slab
    const index_t frame = in.height * in.width;
    check(frame < (index_t{1} << 31) && in.channels < (index_t{1} << 31),
          "group_norm_silu: a frame of 2^31 positions or more");
    check(in.height % in.cell[1] == 0 && in.width % in.cell[2] == 0,
          "group_norm_silu: cells must divide the frame");
    by_cell = in.adaptive() && in.cell[2] < in.width;
    positions = static_cast<int>(frame);
    cells_down = static_cast<int>(in.height / in.cell[1]);
    cells_across = static_cast<int>(in.width / in.cell[2]);
    const index_t unit = by_cell ? in.cell[1] * in.width : 1;
    band = static_cast<int>(in.adaptive() && !by_cell ? in.cell[1] * in.width : frame);
    index_t elements = frame * in.channels / kSlabsPerFrame;
    elements = elements < kLeast ? kLeast : elements > kMost ? kMost : elements;
    const index_t wanted = elements / in.channels < unit ? unit : elements / in.channels;
    const index_t pieces = ceil_div(index_t{band}, wanted);
    slab = static_cast<int>(round_up(ceil_div(index_t{band}, pieces), unit));
    slabs_per_band = ceil_div(band, slab);
    slabs_per_frame = slabs_per_band * (positions / band);
    slabs = in.batch * in.frames * slabs_per_frame;
    slabs_per_span = in.per_frame ? slabs_per_frame : in.frames * slabs_per_frame;
  }
};

struct NormSlab {
  index_t frame;
  int first, count;  // positions of the frame
  int cell_row;      // that the first position lies in

  MF_HOST_DEVICE NormSlab(const GroupNormSiluInput& in, const NormPlan& plan, unsigned slab) {
    const unsigned per_frame = static_cast<unsigned>(plan.slabs_per_frame);
    const unsigned per_band = static_cast<unsigned>(plan.slabs_per_band);
    frame = slab / per_frame;
    const int band = static_cast<int>(slab % per_frame / per_band);
    first = band * plan.band + static_cast<int>(slab % per_band) * plan.slab;
    const int left = (band + 1) * plan.band - first;
    count = left < plan.slab ? left : plan.slab;
    cell_row = plan.by_cell ? first / static_cast<int>(in.cell[1] * in.width) : band;
  }
};

}  // namespace magvit_fast::cuda
