// How an array is seen: (outer, channels, inner) with strides.
//
// Statistics do not care in which order the values of a channel come, so all axes but the channel
// axis may be permuted and merged. Sorted by stride and merged where neighbours touch, almost every
// array that people have (channel-first, channel-last, Fortran order, PyTorch's channels_last,
// slices of any of them along one axis) is left with at most two such axes, and is read in place.
// What is left over is copied to a contiguous array first (Packed).
#pragma once

#include <cstring>
#include <memory>

#include "kernels.hpp"

namespace bn {

struct Layout {
  bool rows = true;
  index outers = 1, channels = 1, inners = 1;
  index per_channel() const { return outers * inners; }
};

// Fit `count` arrays of one shape (absent ones are skipped; arrays[0] leads) to one Layout.
// Returns false where no common one exists.
inline bool fit(const Array* const* arrays, int count, int channel_axis, Layout* layout,
                Operand* operands) {
  const Array& lead = *arrays[0];
  int axes[max_rank];
  int n = 0;
  for (int a = 0; a < lead.rank; ++a)
    if (a != channel_axis && lead.shape[a] != 1) axes[n++] = a;
  auto magnitude = [&](int a) { return lead.stride[a] < 0 ? -lead.stride[a] : lead.stride[a]; };
  for (int i = 1; i < n; ++i)  // insertion sort: stable, and there are few axes
    for (int j = i; j > 0 && magnitude(axes[j - 1]) < magnitude(axes[j]); --j) {
      const int t = axes[j];
      axes[j] = axes[j - 1];
      axes[j - 1] = t;
    }

  index size[2] = {1, 1};
  int innermost[2] = {-1, -1};  // the axis whose stride a merged group has
  int groups = 0;
  for (int i = 0; i < n; ++i) {
    const int a = axes[i];
    bool merges = groups > 0;
    for (int k = 0; merges && k < count; ++k)
      if (*arrays[k] &&
          arrays[k]->stride[innermost[groups - 1]] != arrays[k]->stride[a] * lead.shape[a])
        merges = false;
    if (!merges) {
      if (groups == 2) return false;
      ++groups;
    }
    size[groups - 1] *= lead.shape[a];
    innermost[groups - 1] = a;
  }
  if (groups == 1) {  // a single group is the inner one
    size[1] = size[0];
    innermost[1] = innermost[0];
    size[0] = 1;
    innermost[0] = -1;
  }

  layout->outers = size[0];
  layout->inners = size[1];
  layout->channels = lead.shape[channel_axis];
  bool rows = true, columns = true;
  for (int k = 0; k < count; ++k) {
    Operand& o = operands[k];
    o = Operand{};
    if (!*arrays[k]) continue;
    o.data = arrays[k]->data;
    o.outer = innermost[0] < 0 ? 0 : arrays[k]->stride[innermost[0]];
    o.inner = innermost[1] < 0 ? 1 : arrays[k]->stride[innermost[1]];
    o.channel = layout->channels == 1 ? 0 : arrays[k]->stride[channel_axis];
    const bool shared_by_channels = k == count - 1;  // weights, by convention last
    rows = rows && o.inner == 1;
    columns = columns && (shared_by_channels || o.channel == 1 || layout->channels == 1);
  }
  layout->rows = rows;
  return rows || columns;
}

template <class Visit>
void each_run(const Array& a, Visit visit) {  // visit(offset) for every index but the last axis'
  index at[max_rank] = {};
  index offset = 0;
  for (;;) {
    visit(offset);
    int d = a.rank - 2;
    for (; d >= 0; --d) {
      offset += a.stride[d];
      if (++at[d] < a.shape[d]) break;
      offset -= a.stride[d] * a.shape[d];
      at[d] = 0;
    }
    if (d < 0) return;
  }
}

// A contiguous stand-in for an array that fits no layout.
class Packed {
 public:
  Packed(const Array& original, bool read) : original_(original), array_(original) {
    if (!original) return;
    index n = 1;
    for (int d = original.rank - 1; d >= 0; --d) {
      array_.stride[d] = n;
      n *= original.shape[d];
    }
    memory_.reset(new char[std::size_t(n * size_of(original.dtype))]);
    array_.data = memory_.get();
    if (read) transfer(true);
  }
  void write_back() {
    if (original_) transfer(false);
  }
  const Array& array() const { return array_; }

 private:
  void transfer(bool pack) {
    const index bytes = size_of(original_.dtype);
    const int last = original_.rank - 1;
    const index n = original_.shape[last], step = original_.stride[last] * bytes;
    char* flat = array_.data;
    each_run(original_, [&](index offset) {
      char* strided = original_.data + offset * bytes;
      for (index i = 0; i < n; ++i, strided += step, flat += bytes) {
        if (pack)
          std::memcpy(flat, strided, std::size_t(bytes));
        else
          std::memcpy(strided, flat, std::size_t(bytes));
      }
    });
  }

  Array original_, array_;
  std::unique_ptr<char[]> memory_;
};

}  // namespace bn
