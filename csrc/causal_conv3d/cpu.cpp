// causal_conv3d on the CPU: the plain loops of the definition, one thread a share of the results.
// Previous hop: bindings.cpp.
// Next hop: none.
#include "causal_conv3d/causal_conv3d.h"
#include "common/half.h"
#include "common/parallel.h"

namespace magvit_fast::cpu {
namespace {

template <class Run>
void by_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::f32:
      return run(float{});
    case DType::bf16:
      return run(bf16_t{});
    case DType::f16:
      return run(f16_t{});
  }
}

// Row (n, t, h) of the source axis: in history or in x.
template <class T>
T* source_row(const Conv3dShape& s, T* history, T* x, index_t n, index_t t, index_t h) {
  const index_t row = s.w.source * s.in_channels, frame = s.h.source * row;
  if (t < s.history_frames) return history + (n * s.history_frames + t) * frame + h * row;
  return x + (n * s.frames + t - s.history_frames) * frame + h * row;
}

}  // namespace

std::size_t causal_conv3d_forward_workspace(const Conv3dShape&, const ExecContext&) { return 0; }
std::size_t causal_conv3d_input_grad_workspace(const Conv3dShape&, const ExecContext&) { return 0; }
std::size_t causal_conv3d_weight_grad_workspace(const Conv3dShape&, const ExecContext&) {
  return 0;
}

void causal_conv3d_forward(const Conv3dForwardParams& p, const ExecContext& ctx) {
  const Conv3dShape& s = p.shape;
  const index_t in_group = s.in_channels / s.groups, out_group = s.out_channels / s.groups;
  const index_t taps = s.t.kernel * s.h.kernel * s.w.kernel;
  by_dtype(s.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* w = static_cast<const T*>(p.weight);
    const T* bias = static_cast<const T*>(p.bias);
    parallel_ranges(s.batch * s.t.out * s.h.out, ctx.num_threads, [&](index_t b, index_t e, int) {
      for (index_t row = b; row < e; ++row) {
        const index_t oh = row % s.h.out, ot = row / s.h.out % s.t.out, n = row / s.h.out / s.t.out;
        for (index_t ow = 0; ow < s.w.out; ++ow)
          for (index_t co = 0; co < s.out_channels; ++co) {
            const index_t c0 = co / out_group * in_group;
            float sum = bias ? to_float(bias[co]) : 0.0f;
            for (index_t kt = 0; kt < s.t.kernel; ++kt)
              for (index_t kh = 0; kh < s.h.kernel; ++kh)
                for (index_t kw = 0; kw < s.w.kernel; ++kw) {
                  const index_t it = source_index(s.t, ot, kt), ih = source_index(s.h, oh, kh);
                  const index_t iw = source_index(s.w, ow, kw);
                  if (it < 0 || ih < 0 || iw < 0) continue;
                  const T* x = source_row(s, static_cast<const T*>(p.history),
                                          static_cast<const T*>(p.x), n, it, ih) +
                               iw * s.in_channels + c0;
                  const T* tap =
                      w + co * in_group * taps + (kt * s.h.kernel + kh) * s.w.kernel + kw;
                  for (index_t ci = 0; ci < in_group; ++ci)
                    sum += to_float(x[ci]) * to_float(tap[ci * taps]);
                }
            static_cast<T*>(p.y)[(row * s.w.out + ow) * s.out_channels + co] = from_float<T>(sum);
          }
      }
    });
  });
}

void causal_conv3d_input_grad(const Conv3dInputGradParams& p, const ExecContext& ctx) {
  const Conv3dShape& s = p.shape;
  const index_t in_group = s.in_channels / s.groups, out_group = s.out_channels / s.groups;
  const index_t taps = s.t.kernel * s.h.kernel * s.w.kernel;
  by_dtype(s.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* w = static_cast<const T*>(p.weight);
    const T* dy = static_cast<const T*>(p.dy);
    const auto each_reader = [](const AxisMap& a, index_t source, const auto& body) {
      for (index_t j = 0; j < copies(a, source); ++j)
        for (index_t k = 0; k < a.kernel; ++k) {
          const index_t o = output_at(a, copy_position(a, source, j), k);
          if (o >= 0) body(o, k);
        }
    };
    parallel_ranges(
        s.batch * s.t.source * s.h.source, ctx.num_threads, [&](index_t b, index_t e, int) {
          for (index_t row = b; row < e; ++row) {
            const index_t ih = row % s.h.source, it = row / s.h.source % s.t.source;
            const index_t n = row / s.h.source / s.t.source;
            T* dx = source_row(s, static_cast<T*>(p.dhistory), static_cast<T*>(p.dx), n, it, ih);
            for (index_t iw = 0; iw < s.w.source; ++iw)
              for (index_t ci = 0; ci < s.in_channels; ++ci) {
                const index_t group = ci / in_group;
                float sum = 0.0f;
                each_reader(s.t, it, [&](index_t ot, index_t kt) {
                  each_reader(s.h, ih, [&](index_t oh, index_t kh) {
                    each_reader(s.w, iw, [&](index_t ow, index_t kw) {
                      const T* g = dy + (((n * s.t.out + ot) * s.h.out + oh) * s.w.out + ow) *
                                            s.out_channels;
                      for (index_t co = group * out_group; co < (group + 1) * out_group; ++co)
                        sum +=
                            to_float(g[co]) * to_float(w[(co * in_group + ci % in_group) * taps +
                                                         (kt * s.h.kernel + kh) * s.w.kernel + kw]);
                    });
                  });
                });
                dx[iw * s.in_channels + ci] = from_float<T>(sum);
              }
          }
        });
  });
}

void causal_conv3d_weight_grad(const Conv3dWeightGradParams& p, const ExecContext& ctx) {
  const Conv3dShape& s = p.shape;
  const index_t in_group = s.in_channels / s.groups, out_group = s.out_channels / s.groups;
  const index_t taps = s.t.kernel * s.h.kernel * s.w.kernel;
  by_dtype(s.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* dy = static_cast<const T*>(p.dy);
    parallel_ranges(
        s.out_channels * in_group * taps, ctx.num_threads, [&](index_t b, index_t e, int) {
          for (index_t item = b; item < e; ++item) {
            const index_t kw = item % s.w.kernel, kh = item / s.w.kernel % s.h.kernel;
            const index_t kt = item / s.w.kernel / s.h.kernel % s.t.kernel;
            const index_t co = item / taps / in_group;
            const index_t ci = co / out_group * in_group + item / taps % in_group;
            float sum = 0.0f;
            for (index_t n = 0; n < s.batch; ++n)
              for (index_t ot = 0; ot < s.t.out; ++ot)
                for (index_t oh = 0; oh < s.h.out; ++oh) {
                  const index_t it = source_index(s.t, ot, kt), ih = source_index(s.h, oh, kh);
                  if (it < 0 || ih < 0) continue;
                  const T* x = source_row(s, static_cast<const T*>(p.history),
                                          static_cast<const T*>(p.x), n, it, ih);
                  const T* g = dy + ((n * s.t.out + ot) * s.h.out + oh) * s.w.out * s.out_channels;
                  for (index_t ow = 0; ow < s.w.out; ++ow) {
                    const index_t iw = source_index(s.w, ow, kw);
                    if (iw >= 0)
                      sum += to_float(x[iw * s.in_channels + ci]) *
                             to_float(g[ow * s.out_channels + co]);
                  }
                }
            static_cast<T*>(p.dweight)[item] = from_float<T>(sum);
          }
        });
  });
}

}  // namespace magvit_fast::cpu
