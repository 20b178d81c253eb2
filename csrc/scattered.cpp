// A pass over the entries sums each column about the first of its values. As in driver.cpp, columns for
// which that was a bad center are summed again about their mean.
#include "scattered.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "half.hpp"

namespace bn {
namespace {

constexpr index run = 1 << 12;  // entries whose sums are kept apart: errors grow with the length of a sum
constexpr double unknown = std::numeric_limits<double>::quiet_NaN();

// A sum of weights, and what rounding has removed from it (TwoSum, Knuth).
struct Weight {
  double sum = 0, low = 0;

  void add(double w) {
    const double next = sum + w, added = next - sum;
    low += (sum - (next - added)) + (w - added);
    sum = next;
  }
};

// Of one column; a cache line.
struct alignas(64) Sums {
  Weight stored;  // NaN included
  double center = unknown;
  double first = 0, second = 0;          // of this run
  double all_first = 0, all_second = 0;  // of those before
  index wanted = 1;

  template <bool Weighted>
  void add_weight(double weight) {
    Weighted ? stored.add(weight) : void(stored.sum += 1);
  }
  template <bool Weighted>
  void add(double value, double weight) {
    add_weight<Weighted>(weight);
    if (center != center) center = value;
    const double d = value - center, wd = weight * d;
    first += wd;
    second += wd * d;
  }
  void end_run() {
    all_first += first, all_second += second;
    first = second = 0;
  }
};

void check(bool good, const char* what) {
  if (!good) throw BadCall(what);
}

template <bool Weighted, class T, class Place>
void add_rows(const Entries& e, const T* x, Place place, std::vector<Sums>& sums,
              std::vector<Weight>& missing) {
  const auto end_run = [&] {
    for (Sums& s : sums) s.end_run();
  };
  const index most = std::max(run, 8 * e.columns);  // so that ending runs costs little
  index left = most;
  for (index r = 0; r < e.lines; ++r) {
    const double w = Weighted ? e.weights[r] : 1;
    if (w == 0) continue;
    const index begin = e.starts[r], end = e.starts[r + 1];
    for (index i = begin; i < end; ++i) {
      const auto c = std::size_t(place(i, begin));
      check(c < sums.size(), "places: outside of the matrix");
      const double v = widen(x[i]);
      if (!sums[c].wanted) continue;
      if (v == v)
        sums[c].template add<Weighted>(v, w);
      else
        sums[c].template add_weight<Weighted>(w), missing[c].add(w);
    }
    if ((left -= end - begin) <= 0) end_run(), left = most;
  }
  end_run();
}

template <bool Weighted, class T, class Place>
void add_columns(const Entries& e, const T* x, Place place, std::vector<Sums>& sums,
                 std::vector<Weight>& missing) {
  for (index c = 0; c < e.lines; ++c) {
    Sums s = sums[std::size_t(c)];
    if (!s.wanted) continue;
    const index begin = e.starts[c], end = e.starts[c + 1];
    for (index i = begin; i < end; ++i) {
      double w = 1;
      if (Weighted) {
        const auto r = std::size_t(place(i, begin));
        check(r < std::size_t(e.rows), "places: outside of the matrix");
        w = e.weights[r];
      }
      const double v = widen(x[i]);
      if (v != v)
        s.template add_weight<Weighted>(w), missing[std::size_t(c)].add(w);
      else if (w != 0)
        s.template add<Weighted>(v, w);
      if ((i - begin) % run == run - 1) s.end_run();
    }
    s.end_run();
    sums[std::size_t(c)] = s;
  }
}

template <class Visit>
void each_type(const Array& a, Visit visit) {
  switch (a.dtype) {
    case DType::f32: return visit(reinterpret_cast<const float*>(a.data));
    case DType::f64: return visit(reinterpret_cast<const double*>(a.data));
    case DType::f16: return visit(reinterpret_cast<const float16*>(a.data));
    case DType::bf16: return visit(reinterpret_cast<const bfloat16*>(a.data));
  }
}

void add_all(const Entries& e, std::vector<Sums>& sums, std::vector<Weight>& missing) {
  each_type(e.values, [&](const auto* x) {
    const auto with = [&](auto place) {
      if (e.by_row)
        e.weights ? add_rows<true>(e, x, place, sums, missing)
                  : add_rows<false>(e, x, place, sums, missing);
      else
        e.weights ? add_columns<true>(e, x, place, sums, missing)
                  : add_columns<false>(e, x, place, sums, missing);
    };
    if (e.narrow_places)
      with([&](index i, index) { return e.narrow_places[i]; });
    else if (e.wide_places)
      with([&](index i, index) { return e.wide_places[i]; });
    else
      with([](index i, index begin) { return i - begin; });
  });
}

}  // namespace

void moments_of_entries(const Entries& e, const EntryMoments& to) {
  check(e.lines == (e.by_row ? e.rows : e.columns), "starts: not one for each line, and one more");
  for (index k = 0; k < e.lines; ++k)
    check(0 <= e.starts[k] && e.starts[k] <= e.starts[k + 1], "starts: not ascending");
  check(e.lines == 0 || e.starts[e.lines] <= e.values.shape[0], "starts: beyond the values");
  std::vector<Sums> sums(std::size_t(e.columns));
  std::vector<Weight> missing(std::size_t(e.columns)), again(std::size_t(e.columns));
  add_all(e, sums, missing);
  bool any = false;
  for (index c = 0; c < e.columns; ++c) {
    Sums& s = sums[std::size_t(c)];
    const Weight& gaps = missing[std::size_t(c)];
    const double count = (s.stored.sum - gaps.sum) + (s.stored.low - gaps.low);
    const double shift = count > 0 ? s.all_first / count : 0;
    to.count[c] = count;
    to.missing[c] = gaps.sum;
    to.stored[c] = s.stored.sum;
    to.stored_low[c] = s.stored.low;
    to.mean[c] = count > 0 ? s.center + shift : 0;
    to.m2[c] = s.all_second - s.all_first * shift;
    const bool bad_center = to.m2[c] < s.all_second / 256;
    s = Sums();
    s.center = to.mean[c];
    s.wanted = bad_center;
    any |= bad_center;
  }
  if (!any) return;
  add_all(e, sums, again);
  for (index c = 0; c < e.columns; ++c) {
    const Sums& s = sums[std::size_t(c)];
    if (!s.wanted) continue;
    const double shift = s.all_first / to.count[c];
    to.mean[c] = s.center + shift;
    to.m2[c] = std::max(0.0, s.all_second - s.all_first * shift);
  }
}

}  // namespace bn
