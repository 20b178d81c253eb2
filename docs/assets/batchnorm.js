// Batch normalization of a few numbers, as the pages under Learn compute it. No page is needed:
// tests run these functions and compare them with the library's.
"use strict";

const BatchNorm = {
  // Mean and variance of each column of `x`, an array of rows.
  moments(x) {
    const n = x.length;
    return x[0].map((_, j) => {
      const mean = x.reduce((sum, row) => sum + row[j], 0) / n;
      const variance = x.reduce((sum, row) => sum + (row[j] - mean) ** 2, 0) / n;
      return { mean, variance };
    });
  },

  // y = γ·x̂ + β; `gamma` and `beta` have a number for each column.
  forward(x, gamma, beta, eps) {
    const moments = this.moments(x);
    const xHat = x.map((row) =>
      row.map((v, j) => (v - moments[j].mean) / Math.sqrt(moments[j].variance + eps)),
    );
    const y = xHat.map((row) => row.map((v, j) => gamma[j] * v + beta[j]));
    return { moments, xHat, y };
  },

  // Every node of the graph of one column, forward, and the gradient that arrives at it, backward.
  // `x` and `gradY` have a number for each example.
  graph(x, gradY, gamma, beta, eps) {
    const n = x.length;
    const sum = (values) => values.reduce((a, b) => a + b, 0);
    const mean = sum(x) / n;
    const centered = x.map((v) => v - mean);
    const squared = centered.map((v) => v * v);
    const variance = sum(squared) / n;
    const std = Math.sqrt(variance + eps);
    const invStd = 1 / std;
    const xHat = centered.map((v) => v * invStd);
    const scaled = xHat.map((v) => gamma * v);
    const y = scaled.map((v) => v + beta);

    const gradBeta = sum(gradY);
    const gradScaled = gradY;
    const gradGamma = sum(gradScaled.map((g, i) => g * xHat[i]));
    const gradXHat = gradScaled.map((g) => g * gamma);
    const gradInvStd = sum(gradXHat.map((g, i) => g * centered[i]));
    const gradStd = (-gradInvStd) / (std * std);
    const gradVariance = (0.5 * gradStd) / std;
    const gradSquared = x.map(() => gradVariance / n);
    const gradCentered = x.map((_, i) => gradXHat[i] * invStd + 2 * centered[i] * gradSquared[i]);
    const gradMean = -sum(gradCentered);
    const gradX = gradCentered.map((g) => g + gradMean / n);

    // The formula in one line, of which the ten steps are the proof.
    const collapsed = x.map(
      (_, i) => (gamma / std) * (gradY[i] - gradBeta / n - (xHat[i] * gradGamma) / n),
    );
    return {
      value: { mean, centered, squared, variance, std, invStd, xHat, scaled, y },
      grad: {
        beta: gradBeta,
        scaled: gradScaled,
        gamma: gradGamma,
        xHat: gradXHat,
        invStd: gradInvStd,
        std: gradStd,
        variance: gradVariance,
        squared: gradSquared,
        centered: gradCentered,
        mean: gradMean,
        x: gradX,
      },
      collapsed,
    };
  },

  // Central differences of Σ gradY·y with respect to each x.
  differences(x, gradY, gamma, beta, eps, step = 1e-4) {
    const loss = (values) => {
      const { y } = this.forward(values.map((v) => [v]), [gamma], [beta], eps);
      return y.reduce((total, row, i) => total + gradY[i] * row[0], 0);
    };
    return x.map((_, i) => {
      const moved = (by) => x.map((v, k) => (k === i ? v + by : v));
      return (loss(moved(step)) - loss(moved(-step))) / (2 * step);
    });
  },

  // Running statistics after `steps` batches of `size` values, taken from `stream` in turn.
  // Returns {mean, variance} after each step; the first are 0 and 1, where every layer starts.
  running(stream, momentum, size, steps) {
    let mean = 0;
    let variance = 1;
    const found = [{ mean, variance }];
    for (let step = 0; step < steps; step++) {
      const batch = [];
      for (let k = 0; k < size; k++) batch.push([stream[(step * size + k) % stream.length]]);
      const of = this.moments(batch)[0];
      const unbiased = size > 1 ? (of.variance * size) / (size - 1) : of.variance;
      mean += momentum * (of.mean - mean);
      variance += momentum * (unbiased - variance);
      found.push({ mean, variance });
    }
    return found;
  },
};

if (typeof module !== "undefined") module.exports = BatchNorm;
