// causal_conv3d on the CPU: plans the products along time (winograd_time.h says what they are).
// Previous hop: cpu_winograd.cpp.
// Next hop: index_map.h.
//
// F(4,3) uses the points 0, +-1/sqrt(2), +-sqrt(2), infinity: a third of the error of 0, +-1, +-2.
#include "causal_conv3d/cpu_winograd_time.h"

namespace magvit_fast::cpu {
namespace {

constexpr double kSmall = 0.70710678118654752440, kLarge = 1.41421356237309504880;

// One-dimensional F(r, 3): r + 2 points; sources @ (r + 2 frames), weights @ (3 taps).
struct Points2 {
  static constexpr double sources[4][4] = {
      {-1, 0, 1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, -1, 0, 1}};
  static constexpr double weights[4][3] = {{1, 0, 0}, {1, 1, 1}, {1, -1, 1}, {0, 0, 1}};
  static constexpr double results[2][4] = {{-1, .5, .5, 0}, {0, .5, -.5, 1}};
};
struct Points4 {
  static constexpr double a = kSmall, b = kLarge, p = -2.0 / 3.0, q = 1.0 / 6.0;
  static constexpr double sources[6][6] = {
      {1, 0, -2.5, 0, 1, 0},        {0, -2 * a, -2, a, 1, 0},     {0, 2 * a, -2, -a, 1, 0},
      {0, -0.5 * b, -0.5, b, 1, 0}, {0, 0.5 * b, -0.5, -b, 1, 0}, {0, 1, 0, -2.5, 0, 1}};
  static constexpr double weights[6][3] = {{1, 0, 0}, {1, a, .5}, {1, -a, .5},
                                           {1, b, 2}, {1, -b, 2}, {0, 0, 1}};
  static constexpr double results[4][6] = {{1, p, p, q, q, 0},
                                           {0, p * a, -p * a, q * b, -q * b, 0},
                                           {0, p * .5, p * .5, q * 2, q * 2, 0},
                                           {0, p * a * .5, -p * a * .5, q * b * 2, -q * b * 2, 1}};
};

double source_factor(index_t order, index_t point, index_t offset) {
  return order == 2 ? Points2::sources[point][offset] : Points4::sources[point][offset];
}
double weight_factor(index_t order, index_t point, index_t tap) {
  return order == 2 ? Points2::weights[point][tap] : Points4::weights[point][tap];
}
double result_factor(index_t order, index_t target, index_t point) {
  return order == 2 ? Points2::results[target][point] : Points4::results[target][point];
}

}  // namespace

TimePlanner::TimePlanner(const AxisMap& axis, Direction direction, index_t most)
    : axis_(axis), direction_(direction), most_(axis.kernel == 3 ? most : 1) {
  targets_ = direction == Direction::forward ? axis.out : axis.source;
  // A first frame that sees only itself stands alone, before whole segments.
  first_length_ = kSegmentTargets + (seen(0).count <= 1 ? 1 : 0);
  const index_t rest = targets_ > first_length_ ? targets_ - first_length_ : 0;
  segments_ = 1 + rest / kSegmentTargets;
  if (rest % kSegmentTargets > kMaxSegmentTargets - kSegmentTargets - 1) ++segments_;
  for (index_t t = 0; t < targets_; ++t) products_apart_ += seen(t).count;
  TimeSegment segment;  // only to collect the sets
  for (index_t s = 0; s < segments_; ++s) {
    plan(s, segment);
    products_ += segment.products;
    if (segment.products > most_products_) most_products_ = segment.products;
    if (segment.sums > most_sums_) most_sums_ = segment.sums;
  }
}

// The source frame that the target sees at tap `offset` of its window, or -1.
index_t TimePlanner::frame_at(index_t target, index_t offset) const {
  if (direction_ == Direction::forward) return source_index(axis_, target, offset);
  return output_at(axis_, target, axis_.kernel - 1 - offset);
}

// Whether the target sees its window and nothing else.
bool TimePlanner::regular(index_t target) const {
  return direction_ == Direction::forward || copies(axis_, target) == 1;
}

TimePlanner::Seen TimePlanner::seen(index_t target) const {
  Seen s{};
  const auto add = [&s](index_t frame, index_t tap) {
    if (frame < 0) return;
    index_t i = 0;
    while (i < s.count && s.frame[i] != frame) ++i;
    if (i == s.count) s.frame[s.count++] = static_cast<std::int32_t>(frame);
    s.taps[i][tap] += 1.0f;
  };
  for (index_t k = 0; k < axis_.kernel; ++k) {
    if (direction_ == Direction::forward)
      add(source_index(axis_, target, k), k);
    else
      for (index_t j = 0; j < copies(axis_, target); ++j)
        add(output_at(axis_, copy_position(axis_, target, j), k), k);
  }
  return s;
}

std::int32_t TimePlanner::find_set(const float* taps) {
  index_t s = 0;
  for (; s < sets_.count; ++s) {
    bool same = true;
    for (index_t k = 0; k < kMaxTimeTaps; ++k) same = same && sets_.taps[s][k] == taps[k];
    if (same) return static_cast<std::int32_t>(s);
  }
  for (index_t k = 0; k < kMaxTimeTaps; ++k) sets_.taps[s][k] = taps[k];
  ++sets_.count;
  return static_cast<std::int32_t>(s);
}

// The frames of one point of F(order, 3) for the targets from `first` on; false: all of them zero.
bool TimePlanner::shared_product(index_t first, index_t order, index_t point,
                                 TimeProduct& product) {
  double factors[6] = {};
  index_t frames[6], count = 0;
  for (index_t i = 0; i < order + 2; ++i) {
    const double factor = source_factor(order, point, i);
    // The i-th frame of the window is the last tap of target first + i - 2, or a tap of `first`.
    const index_t frame = factor == 0.0 ? -1
                          : i < 3       ? frame_at(first, i)
                                        : frame_at(first + i - 2, 2);
    if (frame < 0) continue;
    index_t j = 0;
    while (j < count && frames[j] != frame) ++j;
    if (j == count) frames[count++] = frame;
    factors[j] += factor;
  }
  product.terms = 0;
  for (index_t j = 0; j < count; ++j) {
    if (factors[j] == 0.0) continue;
    product.frame[product.terms] = static_cast<std::int32_t>(frames[j]);
    product.factor[product.terms++] = static_cast<float>(factors[j]);
  }
  return product.terms > 0;
}

// Products of `count` targets that share them; F(4,3) without its last point makes three targets.
index_t TimePlanner::shared_cost(index_t first, index_t count) {
  const index_t order = count == 2 ? 2 : 4;
  index_t cost = 0;
  TimeProduct product;
  for (index_t point = 0; point < (count == 3 ? 5 : order + 2); ++point)
    cost += shared_product(first, order, point, product);
  return cost;
}

void TimePlanner::add_group(index_t first, index_t count, TimeSegment& out) {
  TimeGroup& g = out.group[out.groups++];
  g = {};
  g.first_target = first;
  g.targets = count;
  if (count == 1) {  // one sum of all its products
    const Seen s = seen(first);
    for (index_t i = 0; i < s.count; ++i) {
      TimeProduct& p = g.product[g.products++];
      p.set = find_set(s.taps[i]);
      p.sum = 0;
      p.terms = 1;
      p.frame[0] = s.frame[i];
      p.factor[0] = 1.0f;
    }
    g.sums = s.count > 0;
    g.target[0][0] = 1.0f;
    return;
  }
  const index_t order = count == 2 ? 2 : 4;
  for (index_t point = 0; point < (count == 3 ? 5 : order + 2); ++point) {
    TimeProduct& p = g.product[g.products];
    if (!shared_product(first, order, point, p)) continue;
    float taps[kMaxTimeTaps] = {};
    for (index_t k = 0; k < 3; ++k)
      taps[direction_ == Direction::forward ? k : 2 - k] =
          static_cast<float>(weight_factor(order, point, k));
    p.set = find_set(taps);
    p.sum = static_cast<std::int32_t>(g.sums);
    for (index_t t = 0; t < count; ++t)
      g.target[t][g.sums] = static_cast<float>(result_factor(order, t, point));
    ++g.products;
    ++g.sums;
  }
}

// Rows in the order of the sets, so that each set of weights meets all its rows at once.
void TimePlanner::arrange(TimeSegment& out) const {
  out.products = out.sums = out.runs = 0;
  for (index_t g = 0; g < out.groups; ++g)
    for (std::int32_t& row : out.group[g].sum_row) row = -1;
  for (index_t set = 0; set < sets_.count; ++set)
    for (index_t g = 0; g < out.groups; ++g)
      for (index_t i = 0; i < out.group[g].products; ++i) {
        TimeProduct& p = out.group[g].product[i];
        if (p.set != set) continue;
        std::int32_t& sum = out.group[g].sum_row[p.sum];
        const bool add = sum >= 0;
        if (!add) sum = static_cast<std::int32_t>(out.sums++);
        p.row = static_cast<std::int32_t>(out.products++);
        TimeRun* last = out.runs ? &out.run[out.runs - 1] : nullptr;
        if (last && last->set == set && last->add == add && last->sum + last->count == sum)
          ++last->count;
        else
          out.run[out.runs++] = {static_cast<std::int32_t>(set), p.row, sum, 1, add};
      }
}

void TimePlanner::plan(index_t segment, TimeSegment& out) {
  out.first_target = segment ? first_length_ + (segment - 1) * kSegmentTargets : 0;
  const index_t end =
      segment + 1 < segments_ ? first_length_ + segment * kSegmentTargets : targets_;
  out.targets = end - out.first_target;
  // The least number of products of the targets from i on, and how many share the next ones.
  index_t least[kMaxSegmentTargets + 1], share[kMaxSegmentTargets + 1];
  least[out.targets] = 0;
  for (index_t i = out.targets - 1; i >= 0; --i) {
    const index_t first = out.first_target + i;
    least[i] = seen(first).count + least[i + 1];
    share[i] = 1;
    bool together = regular(first);
    for (index_t count = 2; count <= most_ && i + count <= out.targets; ++count) {
      together = together && regular(first + count - 1);
      if (!together) break;
      const index_t cost = shared_cost(first, count) + least[i + count];
      if (cost < least[i]) {
        least[i] = cost;
        share[i] = count;
      }
    }
  }
  out.groups = 0;
  for (index_t i = 0; i < out.targets; i += share[i])
    add_group(out.first_target + i, share[i], out);
  arrange(out);
}

}  // namespace magvit_fast::cpu
