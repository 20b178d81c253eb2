const many = data.recordings.length > 1;

// What the charts of one layer show, by the id of the chart.
function bands(layer, wanted) {
  return data.recordings.flatMap((recording, r) => {
    const found = recording.layers[layer];
    if (!found) return [];
    return wanted.flatMap(([key, what]) => (found.bands[key] || []).map(([low, mid, high], k) =>
      ({recording: data.names[r], what, step: found.steps[k], low, mid, high})).filter(row => row.mid !== null));
  });
}
function lines(layer, wanted) {
  return data.recordings.flatMap((recording, r) => {
    const found = recording.layers[layer];
    if (!found) return [];
    return wanted.flatMap(([key, what]) => found.lines[key].map((mid, k) =>
      ({recording: data.names[r], what, step: found.steps[k], mid})).filter(row => row.mid !== null && (key === "moved_relative" || row.mid > 0)));
  });
}

// Bars of one channel at one step, and the extent of both sides over all steps.
const SIDES = ["before", "after"];
function bars(layer, channel, position) {
  const rows = [];
  let low = Infinity, high = -Infinity;
  data.recordings.forEach((recording, r) => {
    const found = recording.layers[layer];
    if (!found) return;
    const step = nearest(recording, position);
    for (const [at, histograms] of Object.entries(found.histograms)) SIDES.forEach((side, s) => {
      const [a, b, ...counts] = histograms[2 * channel + s] || [];
      if (a === undefined || a === null || b === null) return;
      low = Math.min(low, a); high = Math.max(high, b);
      if (Number(at) !== step) return;
      const total = counts.reduce((x, y) => x + y, 0), from = a === b ? a - .5 : a, width = ((a === b ? b + .5 : b) - from) / counts.length;
      counts.forEach((count, k) => rows.push({recording: data.names[r], side, low: from + k * width, high: from + (k + 1) * width,
        share: count / total, density: count / total / width}));
    });
  });
  return [rows, low < high ? [low, high] : [low - 1, low + 1]];
}
const longest = data.recordings.reduce((a, b) => b.shown[b.shown.length - 1] > a.shown[a.shown.length - 1] ? b : a);
const shown = () => longest.shown;
function nearest(recording, position) {
  const step = shown()[position];
  return recording.shown.reduce((best, s) => Math.abs(s - step) < Math.abs(best - step) ? s : best, recording.shown[0]);
}

// The rows of each chart as things stand.
const layerNow = () => $("layer").value;
const rowsOf = {
  glance() {
    const recording = data.recordings[Number($("which").value || 0)], measure = $("measure").value;
    const order = new Map(recording.shown.map((s, k) => [s, k]));
    return Object.entries(recording.layers).flatMap(([layer, found]) => found.steps.map((step, k) =>
      ({layer, step, order: order.get(step), value: found.measures[measure][k]})).filter(row => row.order !== undefined && row.value !== null));
  },
  histogram: () => bars(layerNow(), Number($("channel").value || 0), Number($("step").value))[0],
  means: () => bands(layerNow(), [["batch mean", "batch"], ["running mean", "running"]]),
  stds: () => bands(layerNow(), [["batch std", "batch"], ["running std", "running"]]),
  affine: () => bands(layerNow(), [["γ", "γ"], ["β", "β"]]),
  gradients: () => lines(layerNow(), [["gradient", "output"], ["gradient_weight", "γ"], ["gradient_bias", "β"]]),
  moved: () => lines(layerNow(), [["moved_relative", "input"]]),
};
const signalsOf = {
  glance: () => ({steps: data.recordings[Number($("which").value || 0)].shown}),
  histogram: () => ({extent: bars(layerNow(), Number($("channel").value || 0), Number($("step").value))[1]}),
};

// Draw a chart, or draw it anew; without rows there is none.
async function show(name) {
  const rows = rowsOf[name](), signals = (signalsOf[name] || (() => ({})))();
  $(name).parentElement.classList.toggle("empty", rows.length === 0);
  if (rows.length === 0) return;
  if (views[name]) {
    for (const [key, value] of Object.entries(signals)) views[name].signal(key, value);
    await views[name].data("rows", rows).runAsync();
    return;
  }
  const spec = structuredClone(specs[name]);
  for (const param of spec.params || []) if (param.name in signals) param.value = signals[param.name];
  views[name] = (await vegaEmbed("#" + name, {...spec, datasets: {rows}}, {actions: false, renderer: "svg", config: theme()})).view;
  if (name === "glance") views.glance.addSignalListener("picked", (_, picked) => { if (picked.layer) choose(picked.layer[0], picked.step[0]); });
}

function drawHistogram() {
  const step = shown()[Number($("step").value)];
  $("at").textContent = step.toLocaleString("en");
  $("step").setAttribute("aria-valuetext", "step " + step);
  return show("histogram");
}
function drawLayer() {
  const layer = layerNow();
  $("name").textContent = layer;
  const found = data.recordings.find(r => r.layers[layer]).layers[layer];
  const kept = $("channel").value;
  $("channel").replaceChildren(...found.channels.map((c, k) => new Option(c, k)));
  if (kept && kept < found.channels.length) $("channel").value = kept;
  document.querySelectorAll("tr.current").forEach(row => row.classList.remove("current"));
  const row = document.getElementById("layer-" + layer);
  if (row) row.classList.add("current");
  return Promise.all([drawHistogram(), ...["means", "stds", "affine", "gradients", "moved"].map(show)]);
}
function choose(layer, step) {
  if (!data.layers.includes(layer)) return false;
  $("layer").value = layer;
  if (step !== undefined) {
    const steps = shown();
    $("step").value = steps.reduce((best, s, k) => Math.abs(s - step) < Math.abs(steps[best] - step) ? k : best, 0);
  }
  drawLayer();
  return true;
}
function fromAddress() {
  let address = location.hash;
  try { address = decodeURIComponent(address); } catch { return; }
  const found = address.match(/^#layer-(.*)$/s);
  if (found && choose(found[1])) $("detail").scrollIntoView();
}

async function draw() {
  for (const name of Object.keys(views)) { views[name].finalize(); delete views[name]; }
  await Promise.all([show("glance"), drawLayer()]);
  document.body.dataset.ready = "true";
}

$("layer").value = data.first;
$("step").max = shown().length - 1;
$("step").value = shown().length - 1;
if (many) {
  $("which").replaceChildren(...data.names.map((name, k) => new Option(name, k)));
  document.querySelectorAll(".second").forEach(e => { e.hidden = false; });
}
$("layer").addEventListener("change", drawLayer);
$("channel").addEventListener("change", drawHistogram);
$("step").addEventListener("input", drawHistogram);
for (const id of ["measure", "which"]) $(id).addEventListener("change", () => show("glance"));
addEventListener("hashchange", fromAddress);
dark.addEventListener("change", draw);
draw().then(fromAddress).catch(console.error);
