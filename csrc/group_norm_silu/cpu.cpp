// group_norm_silu on the CPU: orders the passes so that a span stays in cache between them.
// Previous hop: bindings.cpp.
// Next hop: kernels.simd.cpp and backward.simd.cpp, or planes.simd.cpp, of the chosen instruction
// set.
//
// Whole spans go to threads one by one (moments, then result, of the same memory); the last few,
// fewer than there are threads, are shared out by slabs.
#include <cmath>

#include "common/check.h"
#include "common/parallel.h"
#include "group_norm_silu/group_norm_silu.h"

namespace magvit_fast::cpu {
namespace {

constexpr index_t kSlabBytes = 262144;
constexpr index_t kPlaneBytes = 16384;     // of a slab's part of one plane: two readings from L1
constexpr index_t kSerialElements = 8192;  // below, a parallel region costs more than the work

struct Workspace {
  double* moments;  // [slabs, groups, 2]
  float* sums;      // [slabs, 2, padded channels]
  double* totals;   // [spans, 2, channels]
  float* terms;     // [spans, groups, 2]
  float* scratch;   // [threads, kGroupNormSiluTables, padded channels]
  float* zeros;     // [padded channels], stands in for an absent scale or shift
  index_t bytes;

  Workspace(void* base, const GroupNormSiluInput& in, const GroupNormSiluPlan& plan, int threads) {
    char* at = static_cast<char*>(base);
    index_t used = 0;
    const auto take = [&](index_t count, index_t size) {
      char* here = at ? at + used : nullptr;
      used += round_up(count * size, index_t{64});
      return here;
    };
    moments = reinterpret_cast<double*>(take(plan.slabs * in.groups * 2, 8));
    sums = reinterpret_cast<float*>(take(plan.slabs * 2 * plan.padded_channels, 4));
    totals = reinterpret_cast<double*>(take(in.spans() * 2 * in.channels, 8));
    terms = reinterpret_cast<float*>(take(in.spans() * in.groups * 2, 4));
    scratch =
        reinterpret_cast<float*>(take(threads * kGroupNormSiluTables * plan.padded_channels, 4));
    zeros = reinterpret_cast<float*>(take(plan.padded_channels, 4));
    bytes = used;
  }
};

// pass(slab, thread) of each pass over the slabs of every span, `between` once a span after the
// first pass. The second pass goes backwards: what the first one read last is still in cache.
template <class First, class Between, class Second>
void in_two_passes(index_t spans, index_t slabs_per_span, int threads, const First& first,
                   const Between& between, const Second& second) {
  const auto forwards = [&](index_t begin, index_t end, int thread) {
    for (index_t s = begin; s < end; ++s) first(s, thread);
  };
  const auto backwards = [&](index_t begin, index_t end, int thread) {
    for (index_t s = end - 1; s >= begin; --s) second(s, thread);
  };
  const index_t whole = spans - spans % threads;
  parallel_ranges(whole, threads, [&](index_t begin, index_t end, int thread) {
    for (index_t span = begin; span < end; ++span) {
      forwards(span * slabs_per_span, (span + 1) * slabs_per_span, thread);
      between(span);
      backwards(span * slabs_per_span, (span + 1) * slabs_per_span, thread);
    }
  });
  const index_t start = whole * slabs_per_span, rest = (spans - whole) * slabs_per_span;
  const auto over_rest = [&](const auto& pass) {
    parallel_ranges(rest, threads, [&](index_t begin, index_t end, int thread) {
      pass(start + begin, start + end, thread);
    });
  };
  over_rest(forwards);
  for (index_t span = whole; span < spans; ++span) between(span);
  over_rest(backwards);
}

index_t slab_positions(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan, index_t slab) {
  const GroupNormSiluSlab s(in, plan, slab);
  return (s.last - s.first) * in.width;
}

// The moments of a span's slabs, merged in order (Chan), as statistics.
void span_stats(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan, index_t span,
                const double* moments, GroupStats* stats) {
  const auto size = static_cast<double>(in.channels / in.groups);
  for (index_t g = 0; g < in.groups; ++g) {
    double count = 0.0, mean = 0.0, squares = 0.0;
    for (index_t s = span * plan.slabs_per_span; s < (span + 1) * plan.slabs_per_span; ++s) {
      const double* m = moments + (s * in.groups + g) * 2;
      const double more = static_cast<double>(slab_positions(in, plan, s)) * size;
      const double delta = m[0] - mean, total = count + more;
      mean += delta * more / total;
      squares += m[1] + delta * delta * count * more / total;
      count = total;
    }
    const double variance = squares / count;
    const auto rounded = static_cast<float>(mean);
    stats[span * in.groups + g] = {
        rounded, static_cast<float>(mean - static_cast<double>(rounded)),
        static_cast<float>(1.0 / std::sqrt(variance + static_cast<double>(in.eps)))};
  }
}

// The slabs' sums of a span: totals of dn and dn * xhat by channel, and their means over groups.
void span_terms(const GroupNormSiluInput& in, const GroupNormSiluPlan& plan, index_t span,
                const GroupStats* stats, const Workspace& space) {
  const index_t size = in.channels / in.groups;
  double *dn = space.totals + span * 2 * in.channels, *dnx = dn + in.channels;
  for (index_t c = 0; c < 2 * in.channels; ++c) dn[c] = 0.0;
  for (index_t s = span * plan.slabs_per_span; s < (span + 1) * plan.slabs_per_span; ++s) {
    const float* sums = space.sums + s * 2 * plan.padded_channels;
    for (index_t c = 0; c < in.channels; ++c) {
      dn[c] += static_cast<double>(sums[c]);
      dnx[c] += static_cast<double>(sums[plan.padded_channels + c]);
    }
  }
  const index_t frames = in.per_frame ? 1 : in.frames;
  const auto count = static_cast<double>(frames * in.height * in.width * size);
  for (index_t g = 0; g < in.groups; ++g) {
    const GroupStats& s = stats[span * in.groups + g];
    double mean_dn = 0.0, mean_dnx = 0.0;
    for (index_t c = g * size; c < (g + 1) * size; ++c) {
      dnx[c] = (dnx[c] - static_cast<double>(s.mean_rest) * dn[c]) * static_cast<double>(s.rstd);
      const double weight = in.weight ? static_cast<double>(in.weight[c]) : 1.0;
      mean_dn += weight * dn[c];
      mean_dnx += weight * dnx[c];
    }
    float* terms = space.terms + (span * in.groups + g) * 2;
    terms[0] = static_cast<float>(mean_dn / count);
    terms[1] = static_cast<float>(mean_dnx / count);
  }
}

void check_input(const GroupNormSiluInput& in) {
  check(in.groups >= 1 && in.channels % in.groups == 0,
        "group_norm_silu: groups must divide the channels");
  check(in.cell[0] >= 1 && in.cell[1] >= 1 && in.cell[2] >= 1,
        "group_norm_silu: cells must have a size");
  check(!in.planes || group_norm_silu_takes_planes(in.adaptive()),
        "group_norm_silu: scale and shift need the channels-last layout");
}

GroupNormSiluPlan plan_of(const GroupNormSiluInput& in) {
  check_input(in);
  return {in, in.planes ? kPlaneBytes * in.channels : kSlabBytes};
}

// Absent maps of an adaptive norm become one zero for every cell.
void fill_absent(GroupNormSiluInput* in, const GroupNormSiluPlan& plan, const Workspace& space) {
  if (!in->adaptive()) return;
  for (index_t c = 0; c < plan.padded_channels; ++c) space.zeros[c] = 0.0f;
  for (int axis = 0; axis < 4; ++axis) {
    if (!in->scale) in->scale_stride[axis] = 0;
    if (!in->shift) in->shift_stride[axis] = 0;
  }
  if (!in->scale) in->scale = space.zeros;
  if (!in->shift) in->shift = space.zeros;
}

// What a direction needs before its first pass, and where its passes find their memory.
struct Run {
  GroupNormSiluPlan plan;
  Workspace space;
  int threads;

  // Completes the maps of `in`.
  Run(GroupNormSiluInput* in, void* workspace, const ExecContext& ctx)
      : plan(plan_of(*in)), space(workspace, *in, plan, ctx.num_threads) {
    fill_absent(in, plan, space);
    const index_t elements = in->batch * in->frames * in->frame_elements();
    threads = elements < kSerialElements ? 1 : ctx.num_threads;
  }
  float* scratch(int thread) const {
    return space.scratch + thread * kGroupNormSiluTables * plan.padded_channels;
  }
  index_t span_of(index_t slab) const { return slab / plan.slabs_per_span; }
};

}  // namespace

bool group_norm_silu_takes_planes(bool adaptive) { return !adaptive; }

index_t group_norm_silu_workspace_bytes(const GroupNormSiluInput& in, const ExecContext& ctx) {
  return Workspace(nullptr, in, plan_of(in), ctx.num_threads).bytes;
}

void group_norm_silu_forward(const GroupNormSiluForward& params, const ExecContext& ctx) {
  GroupNormSiluInput in = params.in;
  const Run run(&in, params.workspace, ctx);
  const auto moments = in.planes ? MF_PICK_SIMD(group_norm_silu_planes_moments, ctx.isa)
                                 : MF_PICK_SIMD(group_norm_silu_rows_moments, ctx.isa);
  const auto apply = in.planes ? MF_PICK_SIMD(group_norm_silu_planes_apply, ctx.isa)
                               : MF_PICK_SIMD(group_norm_silu_rows_apply, ctx.isa);
  in_two_passes(
      in.spans(), run.plan.slabs_per_span, run.threads,
      [&](index_t slab, int thread) {
        if (params.ready) return;
        double* to = run.space.moments + slab * in.groups * 2;
        moments(in, run.plan, slab, run.scratch(thread), to);
      },
      [&](index_t span) {
        if (!params.ready) span_stats(in, run.plan, span, run.space.moments, params.stats);
      },
      [&](index_t slab, int thread) {
        if (params.y == nullptr) return;
        const GroupStats* stats = params.stats + run.span_of(slab) * in.groups;
        apply(in, run.plan, slab, stats, run.scratch(thread), params.y);
      });
}

void group_norm_silu_backward(const GroupNormSiluBackward& params, const ExecContext& ctx) {
  GroupNormSiluBackward p = params;
  GroupNormSiluInput& in = p.in;
  const Run run(&in, p.workspace, ctx);
  const Workspace& space = run.space;
  const auto sums = in.planes ? MF_PICK_SIMD(group_norm_silu_planes_sums, ctx.isa)
                              : MF_PICK_SIMD(group_norm_silu_rows_sums, ctx.isa);
  const auto input_grad = in.planes ? MF_PICK_SIMD(group_norm_silu_planes_input_grad, ctx.isa)
                                    : MF_PICK_SIMD(group_norm_silu_rows_input_grad, ctx.isa);
  in_two_passes(
      in.spans(), run.plan.slabs_per_span, run.threads,
      [&](index_t slab, int thread) {
        float* to = space.sums + slab * 2 * run.plan.padded_channels;
        const GroupStats* stats = p.stats + run.span_of(slab) * in.groups;
        sums(p, run.plan, slab, stats, run.scratch(thread), to);
      },
      [&](index_t span) { span_terms(in, run.plan, span, p.stats, space); },
      [&](index_t slab, int thread) {
        const index_t first = run.span_of(slab) * in.groups;
        input_grad(p, run.plan, slab, p.stats + first, space.terms + first * 2,
                   run.scratch(thread));
      });
  for (index_t c = 0; c < in.channels; ++c) {
    double bias = 0.0, weight = 0.0;
    for (index_t span = 0; span < in.spans(); ++span) {
      bias += space.totals[span * 2 * in.channels + c];
      weight += space.totals[(span * 2 + 1) * in.channels + c];
    }
    p.dbias[c] = static_cast<float>(bias);
    p.dweight[c] = static_cast<float>(weight);
  }
}

}  // namespace magvit_fast::cpu
