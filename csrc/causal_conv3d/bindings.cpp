// causal_conv3d: the Python door, addresses and numbers to the params structs.
// Previous hop: magvit_fast/ops/causal_conv3d.py, which lists the numbers in _shape_numbers.
// Next hop: causal_conv3d.h (cpu*.cpp or *.cu).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "causal_conv3d/causal_conv3d.h"
#include "causal_conv3d/sm90_weight_schedule.h"
#include "common/cuda/swizzle.h"

namespace magvit_fast {
namespace {

using Address = std::uintptr_t;
// batch, in_channels, out_channels, groups, history_frames, frames, dtype, then for each of time,
// height and width: source, out, kernel, stride, dilation, front, mode; last: strict, sm90a,
// packed.
using Numbers = std::array<index_t, 31>;

AxisMap make_axis(const index_t* n) {
  return {n[0], n[1], n[2], n[3], n[4], n[5], static_cast<PadMode>(n[6])};
}

Conv3dShape make_shape(const Numbers& n) {
  return {n[0],
          n[1],
          n[2],
          n[3],
          n[4],
          n[5],
          make_axis(&n[7]),
          make_axis(&n[14]),
          make_axis(&n[21]),
          static_cast<DType>(n[6]),
          n[28] != 0,
          n[29] != 0,
          n[30] != 0};
}

#ifdef MAGVIT_FAST_CUDA_MODULE
// groups, per_frame, factor (three), dropped
using Epilogue = std::array<index_t, 6>;

cuda::Conv3dEpilogue make_epilogue(const Epilogue& n, double eps, Address stats) {
  return {n[0],
          n[1] != 0,
          static_cast<float>(eps),
          reinterpret_cast<GroupStats*>(stats),
          {n[2], n[3], n[4]},
          n[5]};
}
#endif

const void* in(Address a) { return reinterpret_cast<const void*>(a); }
void* out(Address a) { return reinterpret_cast<void*>(a); }

}  // namespace

void bind_causal_conv3d(pybind11::module_& m) {
  using Where = long long;
  using How = unsigned long long;
  const pybind11::call_guard<pybind11::gil_scoped_release> no_gil;
  m.def(
      "causal_conv3d_forward_workspace",
      [](const Numbers& shape, Where where, How how) {
        return backend::causal_conv3d_forward_workspace(make_shape(shape),
                                                        make_context(where, how));
      },
      no_gil);
  m.def(
      "causal_conv3d_input_grad_workspace",
      [](const Numbers& shape, Where where, How how) {
        return backend::causal_conv3d_input_grad_workspace(make_shape(shape),
                                                           make_context(where, how));
      },
      no_gil);
  m.def(
      "causal_conv3d_weight_grad_workspace",
      [](const Numbers& shape, Where where, How how) {
        return backend::causal_conv3d_weight_grad_workspace(make_shape(shape),
                                                            make_context(where, how));
      },
      no_gil);
  m.def(
      "causal_conv3d_forward",
      [](Address x, Address history, Address weight, Address bias, Address residual, Address y,
         Address workspace, const Numbers& shape, Where where, How how) {
        backend::causal_conv3d_forward({make_shape(shape), in(x), in(history), in(weight), in(bias),
                                        in(residual), out(y), out(workspace)},
                                       make_context(where, how));
      },
      no_gil);
  m.def(
      "causal_conv3d_input_grad",
      [](Address dy, Address weight, Address dx, Address dhistory, Address workspace,
         const Numbers& shape, Where where, How how) {
        backend::causal_conv3d_input_grad(
            {make_shape(shape), in(dy), in(weight), out(dx), out(dhistory), out(workspace)},
            make_context(where, how));
      },
      no_gil);
  m.def(
      "causal_conv3d_weight_grad",
      [](Address x, Address history, Address dy, Address dweight, Address workspace,
         const Numbers& shape, Where where, How how) {
        backend::causal_conv3d_weight_grad(
            {make_shape(shape), in(x), in(history), in(dy), out(dweight), out(workspace)},
            make_context(where, how));
      },
      no_gil);
  m.def(
      "causal_conv3d_packing",
      [](const Numbers& shape, bool forward, Where where, How how) {
        const Conv3dPacking packing =
            backend::causal_conv3d_packing(make_shape(shape), forward, make_context(where, how));
        return std::make_tuple(packing.bytes, packing.kind);
      },
      no_gil);
  m.def(
      "causal_conv3d_pack",
      [](Address weight, Address packed, const Numbers& shape, bool forward, Where where, How how) {
        backend::causal_conv3d_pack(make_shape(shape), forward, in(weight), out(packed),
                                    make_context(where, how));
      },
      no_gil);
#ifdef MAGVIT_FAST_CUDA_MODULE
  m.def(
      "causal_conv3d_engine",
      [](const Numbers& shape, bool forward, Where where, How how) {
        return cuda::causal_conv3d_engine(make_shape(shape), forward, make_context(where, how));
      },
      no_gil);
  m.def(
      "causal_conv3d_weight_grad_engine",
      [](const Numbers& shape, Where where, How how) {
        return cuda::causal_conv3d_weight_grad_engine(make_shape(shape), make_context(where, how));
      },
      no_gil);
  m.def(
      "causal_conv3d_fuses",
      [](const Numbers& shape, const Epilogue& epilogue, Where where, How how) {
        return cuda::causal_conv3d_fuses(make_shape(shape), make_epilogue(epilogue, 0.0, 0),
                                         make_context(where, how));
      },
      no_gil);
  m.def(
      "causal_conv3d_forward_fused_workspace",
      [](const Numbers& shape, const Epilogue& epilogue, Where where, How how) {
        return cuda::causal_conv3d_forward_fused_workspace(
            make_shape(shape), make_epilogue(epilogue, 0.0, 0), make_context(where, how));
      },
      no_gil);
  m.def(
      "causal_conv3d_forward_fused",
      [](Address x, Address history, Address weight, Address bias, Address residual, Address y,
         Address stats, Address workspace, double eps, const Numbers& shape,
         const Epilogue& epilogue, Where where, How how) {
        cuda::causal_conv3d_forward_fused({make_shape(shape), in(x), in(history), in(weight),
                                           in(bias), in(residual), out(y), out(workspace)},
                                          make_epilogue(epilogue, eps, stats),
                                          make_context(where, how));
      },
      no_gil);
#else
  m.def(
      "causal_conv3d_weight_mark",
      [](Address weight, std::size_t bytes, Where where, How how) {
        return cpu::causal_conv3d_weight_mark(in(weight), bytes, make_context(where, how));
      },
      no_gil);
  // The geometry itself, for the tests of index_map.h: axis is the seven numbers of one axis.
  using Axis = std::array<index_t, 7>;
  m.def("causal_conv3d_source_index", [](const Axis& axis, index_t o, index_t k) {
    return source_index(make_axis(axis.data()), o, k);
  });
  m.def("causal_conv3d_readers", [](const Axis& axis, index_t s, index_t k) {
    const AxisMap a = make_axis(axis.data());
    pybind11::list outputs;  // every output that reads source s through tap k
    for (index_t j = 0; j < copies(a, s); ++j) {
      const index_t o = output_at(a, copy_position(a, s, j), k);
      if (o >= 0) outputs.append(o);
    }
    return outputs;
  });
  // What the sm_90a kernel would do, for the tests of sm90_plan.h: tile by tile in the order of the
  // blocks, (block, class, c, w, h, t, n, steps) and for each step (view, c, w, h, t, n, tap);
  // before them the box (w, h, n) and the number of views. Empty where that kernel does not serve.
  m.def("causal_conv3d_sm90_walk", [](const Numbers& numbers, bool forward, int multiprocessors) {
    std::vector<int> out;
    const GemmShape shape = gemm_shape(make_shape(numbers));
    if (!can_run_sm90(shape)) return out;
    const Sm90Plan plan = sm90_plan(shape, forward, multiprocessors);
    out = {plan.box_w, plan.box_h, plan.box_n, plan.views};
    for (int wave = 0; wave * multiprocessors < plan.tiles; ++wave)
      for (int block = 0; block < multiprocessors; ++block) {
        const int index = sm90_tile_of_block(wave, block, multiprocessors);
        if (index >= plan.tiles) continue;
        const Sm90Tile t = sm90_tile(plan, index);
        out.insert(out.end(), {block, t.cls, t.c, t.w, t.h, t.t, t.n, sm90_steps(plan, t)});
        sm90_walk(plan, t, [&](const Sm90Step& s) {
          out.insert(out.end(), {s.view, s.c, s.w, s.h, s.t, s.n, s.tap});
        });
      }
    return out;
  });
  // The same for the weight gradient, for the tests of sm90_weight_plan.h. First (views, slots,
  // rows of a box of x, taps of the longest run) and (taps, first tap, step) of every run; then the
  // pieces in the order of the blocks, (block, run, out, in, kt, slot) and for each step (w, h, t,
  // n, view, x_w, x_h, x_t); last the slots of every tile in the order of summation.
  m.def("causal_conv3d_sm90_weight_walk", [](const Numbers& numbers) {
    std::vector<std::vector<index_t> > head, pieces, sums;
    const GemmShape shape = gemm_shape(make_shape(numbers));
    if (!can_run_sm90_weight(shape)) return std::make_tuple(head, pieces, sums);
    const Sm90WeightPlan plan = sm90_weight_plan(shape);
    head.push_back({plan.views, sm90_weight_slots(plan), plan.box_rows(), plan.longest_run});
    for (int i = 0; i < plan.runs; ++i) {
      const Sm90Run& run = plan.run[i];
      head.push_back({run.taps, run.tap, run.tap_step});
    }
    for (int block = 0; block < plan.blocks; ++block)
      sm90_weight_pieces(plan, block, [&](int index, int first, int last) {
        const Sm90WeightTile tile = sm90_weight_tile(plan, index);
        std::vector<index_t> piece = {block,   tile.run, tile.out,
                                      tile.in, tile.kt,  sm90_weight_slot(block, index)};
        Sm90WeightStep step;
        step.set(plan, tile.kt, first);
        for (int i = first; i < last; ++i, step.advance(plan, tile.kt)) {
          const Sm90WeightBoxes b = sm90_weight_boxes(plan, tile, step);
          piece.insert(piece.end(), {b.w, b.h, b.t, b.n, b.view, b.x_w, b.x_h, b.x_t});
        }
        pieces.push_back(piece);
      });
    for (int index = 0; index < plan.tiles; ++index) {
      const Sm90Slots slots = sm90_slots_of_tile(plan, index);
      sums.emplace_back();
      for (int i = 0; i < slots.count; ++i) sums.back().push_back(slots.first + i);
    }
    return std::make_tuple(head, pieces, sums);
  });
  m.def("causal_conv3d_wgmma_descriptor_mn", [](std::uint32_t address, std::uint32_t leading) {
    return cuda::wgmma_descriptor_mn(address, leading);
  });
  m.def("causal_conv3d_wgmma_descriptor",
        [](std::uint32_t address) { return cuda::wgmma_descriptor(address); });
  m.def("causal_conv3d_swizzle", [](std::uint32_t offset) { return cuda::swizzle_128(offset); });
#endif
}

}  // namespace magvit_fast
