// Makes the widgets under Learn live. Their HTML, with the numbers of the beginning, is in the page.
"use strict";

(() => {
  const show = (value, digits = 3) => {
    if (!Number.isFinite(value)) return "–";
    if (Math.abs(value) >= 1e6) return value.toExponential(2).replace("e+", "e").replaceAll("-", "−");
    const text = value.toFixed(digits);
    return (Number(text) === 0 ? (0).toFixed(digits) : text).replace("-", "−");
  };
  const several = (values) => [].concat(values).map((v) => show(v, 2)).join("\u00a0\u00a0");

  // The inputs and outputs of a widget by name.
  const parts = (root) => {
    const of = (kind) =>
      Object.fromEntries(
        [...root.querySelectorAll(`[data-${kind}]`)].map((e) => [e.dataset[kind], e]),
      );
    const inputs = of("in");
    const outputs = of("out");
    // What is no number is marked, and nothing is computed from it.
    const read = (name) => {
      const value = inputs[name].value === "" ? NaN : Number(inputs[name].value);
      const low = inputs[name].min === "" ? -Infinity : Number(inputs[name].min);
      const high = inputs[name].max === "" ? Infinity : Number(inputs[name].max);
      const good = Number.isFinite(value) && value >= low && value <= high;
      inputs[name].setAttribute("aria-invalid", String(!good));
      return good ? value : NaN;
    };
    const write = (name, text) => {
      outputs[name].textContent = text;
    };
    return { inputs, read, write };
  };

  const layer = (root) => {
    const { inputs, read, write } = parts(root);
    const count = (prefix) => Object.keys(inputs).filter((k) => k.startsWith(prefix)).length;
    const columns = count("gamma");
    const rows = count("x") / columns;
    return () => {
      const each = [...Array(columns).keys()];
      const x = [...Array(rows).keys()].map((i) => each.map((j) => read(`x${i}${j}`)));
      const gamma = each.map((j) => read(`gamma${j}`));
      const beta = each.map((j) => read(`beta${j}`));
      const { moments, y } = BatchNorm.forward(x, gamma, beta, read("eps"));
      const after = BatchNorm.moments(y);
      each.forEach((j) => {
        write(`mean${j}`, show(moments[j].mean));
        write(`var${j}`, show(moments[j].variance));
        write(`ymean${j}`, show(after[j].mean));
        write(`yvar${j}`, show(after[j].variance));
        y.forEach((row, i) => write(`y${i}${j}`, show(row[j])));
      });
    };
  };

  const graph = (root) => {
    const { inputs, read, write } = parts(root);
    const n = Object.keys(inputs).filter((k) => /^x\d/.test(k)).length;
    return () => {
      const each = [...Array(n).keys()];
      const x = each.map((i) => read(`x${i}`));
      const g = each.map((i) => read(`g${i}`));
      const [gamma, beta, eps] = ["gamma", "beta", "eps"].map(read);
      const { value, grad, collapsed } = BatchNorm.graph(x, g, gamma, beta, eps);
      const edges = {
        "x-mean": [x, x.map(() => grad.mean / n)],
        "x-centered": [x, grad.centered],
        "mean-centered": [value.mean, grad.mean],
        "centered-squared": [value.centered, value.centered.map((c, i) => 2 * c * grad.squared[i])],
        "squared-variance": [value.squared, grad.squared],
        "variance-std": [value.variance, grad.variance],
        "std-invStd": [value.std, grad.std],
        "centered-xHat": [value.centered, grad.xHat.map((v) => v * value.invStd)],
        "invStd-xHat": [value.invStd, grad.invStd],
        "xHat-scaled": [value.xHat, grad.xHat],
        "scaled-y": [value.scaled, grad.scaled],
        "gamma-scaled": [gamma, grad.gamma],
        "beta-y": [beta, grad.beta],
        x: [x, grad.x],
        y: [value.y, g],
      };
      Object.entries(edges).forEach(([name, [forward, backward]]) => {
        root.querySelector(`[data-value="${name}"]`).textContent = several(forward);
        root.querySelector(`[data-grad="${name}"]`).textContent = several(backward);
      });
      const differences = BatchNorm.differences(x, g, gamma, beta, eps);
      each.forEach((i) => {
        write(`steps${i}`, show(grad.x[i], 6));
        write(`line${i}`, show(collapsed[i], 6));
        write(`differences${i}`, show(differences[i], 6));
      });
    };
  };

  const running = (root) => {
    const { read, write } = parts(root);
    const stream = JSON.parse(root.dataset.stream);
    const most = Number(root.dataset.most);
    const top = Number(root.dataset.top);
    const line = root.querySelector("[data-chart]");
    const { width, height } = line.ownerSVGElement.viewBox.baseVal;
    return () => {
      const [momentum, size, steps] = ["momentum", "size", "steps"].map(read);
      const found = BatchNorm.running(stream, momentum, size, steps);
      const last = found[found.length - 1];
      write("momentum-shown", momentum.toFixed(2));
      write("size-shown", String(size));
      write("steps-shown", String(steps));
      write("mean", show(last.mean));
      write("std", show(Math.sqrt(last.variance)));
      write("z", show((50 - last.mean) / Math.sqrt(last.variance + 1e-5)));
      const points = found.map(({ mean }, k) => [
        40 + ((width - 60) * k) / most,
        height - 24 - ((height - 40) * Math.min(mean, top)) / top,
      ]);
      line.setAttribute("points", points.map((p) => p.map((v) => v.toFixed(1)).join()).join(" "));
    };
  };

  const converter = (root) => {
    const { inputs, read, write } = parts(root);
    const frameworks = JSON.parse(root.dataset.frameworks);
    return () => {
      const [momentum, eps, variance, n] = ["momentum", "eps", "variance", "n"].map(read);
      const [weightOf, stored] = frameworks[inputs.from.value];
      const unbiased = stored === "biased" ? (variance * n) / (n - 1) : variance;
      const text = (v) => (Number.isFinite(v) ? String(Number(v.toPrecision(6))) : "–");
      Object.entries(frameworks).forEach(([to, [of, kind]]) => {
        write(`momentum-${to}`, text(of === weightOf ? momentum : 1 - momentum));
        write(`eps-${to}`, text(eps));
        write(`var-${to}`, text(kind === "biased" ? (unbiased * (n - 1)) / n : unbiased));
      });
    };
  };

  const kinds = { layer, graph, running, converter };
  const start = () => {
    document.querySelectorAll("[data-widget]").forEach((root) => {
      const update = kinds[root.dataset.widget](root);
      root.addEventListener("input", update);
      const reset = root.querySelector("[data-reset]");
      if (reset) {
        reset.addEventListener("click", () => {
          root.querySelectorAll("input").forEach((input) => {
            input.value = input.defaultValue;
          });
          update();
        });
      }
      update();
    });
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
