// Columns made of something else. Included by bodies.hpp only, after simd.hpp and inside its
// namespace; as there, nothing here may have external linkage.
//
// Rows of columns that follow one another without a gap are one long row in which the channels come
// again and again, and it may be cut elsewhere: to full vectors where there are few channels, and
// where cache lines begin. Short rows of channels, too, are columns: each value of a row is one,
// and the rows that have the same outer index make one long row.

constexpr index short_row = 2 * F;  // values of one channel

// The coefficients that a loop needs.
struct Used {
  PerChannel list[5];
  index n;
  template <class K>
  explicit Used(K k) : n(K::kinds) {
    k.take([&](PerChannel which, int kind) {
      list[kind] = which;
      return k.shift;
    });
  }
  const PerChannel* begin() const { return list; }
  const PerChannel* end() const { return list + n; }
};

// Room for the coefficients of a job over columns, of which there are five kinds.
struct Storage {
  alignas(64) double values[5 * widest];
};

static inline index smaller(index a, index b) { return a < b ? a : b; }

static inline index values_to_line(const char* p, index size) {
  return index((64 - offset_in_line(p)) & 63) / size;
}

// A job over columns of which number v belongs to channel
// channel_begin + (phase + v) / each % channels.
struct Columns {
  Job job;
  Block block;
  index channel_begin, channels, each, phase;

  // Rows that hold all `channels` of a block side by side, cut `phase` values after its first.
  static Columns cut(const Job& j, const Block& b, index phase, index width, index rows,
                     const Used& used, double* storage) {
    Columns k(j, b, 1, phase, width, rows);
    k.each_operand([&](Operand& a) {
      k.begin(a, b.outer_begin * a.outer + b.inner_begin * a.inner + b.channel_begin + phase, width);
    });
    k.spread(used, storage);
    return k;
  }

  // Values [phase, phase + width) of the rows of a block's channels, these taken one after the other.
  static Columns of_rows(const Job& j, const Block& b, index phase, index width, const Used& used,
                         double* storage) {
    Columns k(j, b, b.inner_end, phase, width, b.outer_end - b.outer_begin);
    k.each_operand([&](Operand& a) {
      k.begin(a, b.outer_begin * a.outer + b.channel_begin * a.channel + phase, a.outer);
    });
    k.spread(used, storage);
    return k;
  }

  template <class Visit>
  void each_column(Visit visit) const {  // visit(number, channel)
    index c = phase / each % channels, e = phase % each;
    for (index v = 0; v < block.channel_end; ++v) {
      visit(v, channel_begin + c);
      if (++e < each) continue;
      e = 0;
      if (++c == channels) c = 0;
    }
  }

 private:
  Columns(const Job& j, const Block& b, index each_, index phase_, index width, index rows)
      : job(j), block{0, 1, 0, rows, 0, width}, channel_begin(b.channel_begin),
        channels(b.channel_end - b.channel_begin), each(each_), phase(phase_) {
    job.rows = false;
  }
  void begin(Operand& a, index at, index row) const {
    a.data += at * size_of(job.dtype);
    a.outer = 0;
    a.channel = 1;
    a.inner = row;
  }
  template <class Visit>
  void each_operand(Visit visit) {
    for (Operand* a : {&job.x, &job.grad, &job.residual, &job.out, &job.out_residual})
      if (a->data) visit(*a);
  }
  void spread(const Used& used, double* to) {
    const index width = block.channel_end;
    for (PerChannel m : used) {
      const double* from = job.*m + channel_begin;
      index c = phase / each % channels;
      for (index v = 0, e = phase % each; v < width; e = 0) {
        index n;
        if (each == 1) {  // up to the last channel, and then from the first
          n = smaller(channels - c, width - v);
          std::memcpy(to + v, from + c, std::size_t(n) * sizeof(double));
          c = 0;
        } else {
          n = smaller(each - e, width - v);
          for (index k = 0; k < n; ++k) to[v + k] = from[c];
          c = c + 1 == channels ? 0 : c + 1;
        }
        v += n;
      }
      job.*m = to;
      to += width;
    }
  }
};

// A callable, by address: what visits a block is one function rather than one per kind of visitor.
template <class Argument>
class Visitor {
 public:
  template <class F>
  Visitor(F& f)
      : f_(&f), call_([](void* to, const Argument& a) { (*static_cast<F*>(to))(a); }) {}
  void operator()(const Argument& a) const { call_(f_, a); }

 private:
  void* f_;
  void (*call_)(void*, const Argument&);
};

// Visit a block of short rows as columns, cut where lines of `a` begin; false if it is none.
static bool each_of_short_rows(const Job& job, const Block& b, const Operand& a,
                               const Used& used, Visitor<Columns> visit) {
  if (!job.dense || b.inner_end > short_row || b.outer_end - b.outer_begin < 8) return false;
  const index size = size_of(job.dtype);
  const index all = (b.channel_end - b.channel_begin) * b.inner_end;
  index width = values_to_line(
      a.data + (b.outer_begin * a.outer + b.channel_begin * a.channel) * size, size);
  Storage storage;
  for (index v = 0; v < all; v += width, width = widest / 2) {
    if (width > all - v) width = all - v;
    if (width > 0) visit(Columns::of_rows(job, b, v, width, used, storage.values));
  }
  return true;
}

// Visit what of a block of columns can be cut anew, into rows of full lines `narrowest` values long
// at the least; and the blocks that are left over. `a`: where lines should begin, or null.
static void each_of_columns(const Job& job, const Block& b, const Operand* a, index narrowest,
                            const Used& used, Visitor<Columns> visit, Visitor<Block> rest) {
  const index size = size_of(job.dtype), channels = b.channel_end - b.channel_begin;
  index width = channels;
  while (width * size % 64 || width < narrowest) width *= 2;
  const bool cuts = job.dense && job.x.inner == channels && b.outer_end - b.outer_begin == 1 &&
                    width <= widest;
  const index all = cuts ? (b.inner_end - b.inner_begin) * channels : 0;
  const index phase = !cuts || !a ? 0 : values_to_line(
      a->data + (b.outer_begin * a->outer + b.inner_begin * a->inner + b.channel_begin) * size,
      size);
  const index rows = (all - phase) / width;
  if (rows < 32 || (phase == 0 && width == channels)) return rest(b);
  Storage storage;
  visit(Columns::cut(job, b, phase, width, rows, used, storage.values));
  auto leftover = [&](index from, index to) {
    while (from < to) {
      Block part = b;
      part.inner_begin += from / channels;
      part.channel_begin += from % channels;
      index n = (to - from) / channels;  // whole rows
      if (from % channels || n == 0) {
        n = smaller(channels - from % channels, to - from);
        part.inner_end = part.inner_begin + 1;
        part.channel_end = part.channel_begin + n;
        from += n;
      } else {
        part.inner_end = part.inner_begin + n;
        from += n * channels;
      }
      rest(part);
    }
  };
  leftover(0, phase);
  leftover(phase + rows * width, all);
}
