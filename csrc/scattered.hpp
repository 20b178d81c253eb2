// Moments of the columns of a matrix of which not every value is there: the entries of a sparse matrix,
// or a dense one with missing values.
#pragma once

#include "kernels.hpp"

namespace bn {

// The entries come in lines, which are either all the rows or all the columns of the matrix.
struct Entries {
  Array values;                 // (n,), contiguous; NaN is missing
  const index* starts;          // line k has the entries from starts[k] on, before starts[k + 1]
  index lines, rows, columns;   // numbers of them
  bool by_row;                  // lines are rows
  // Where in its line each entry is, (n,), as one of two types; or neither, and the i-th of a line is
  // at i.
  const std::int32_t* narrow_places;
  const std::int64_t* wide_places;
  const double* weights;        // of each row, or null; zero hides what it covers
};

// Of each column, all of length `columns`: of the entries that are not NaN, the sum of their weights, mean
// and m2, which are 0 where there are none; the weight of those that are NaN; and that of both, of which
// `stored_low` is what rounding has removed. Sums are float64, in one thread. Throws BadCall where a line or
// a place lies outside of the matrix.
struct EntryMoments {
  double *count, *mean, *m2, *missing, *stored, *stored_low;
};
void moments_of_entries(const Entries&, const EntryMoments&);

}  // namespace bn
