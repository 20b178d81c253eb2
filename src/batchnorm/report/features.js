const {columns, marks} = data, total = columns.name.length, ranges = "min" in columns;
const numbers = ["mean", "std", ...(ranges ? ["min", "max"] : [])];
const features = columns.name.map((name, k) => {
  const row = {k, marks: marks[k] || ""};
  for (const key of Object.keys(columns)) row[key] = columns[key][k];
  if (row.mean !== null) { row.low = row.mean - row.std; row.high = row.mean + row.std; }
  return row;
});

// Orders by their names: what a row is sorted by, the greatest first; null goes last.
const orders = {
  "as in the data": null,
  "hints first": row => Number(row.marks !== ""),
  "mean": row => row.mean,
  "standard deviation": row => row.mean === null ? null : row.std,
  "|mean| ÷ std": row => row.std > 0 ? Math.abs(row.mean) / row.std : null,
  "share missing": row => row.missing / (row.missing + row.count),
  "name": null,
};
if (!marks.length) delete orders["hints first"];
if (!columns.missing.some(n => n)) delete orders["share missing"];
if (ranges) orders["farthest value, in std"] = row => row.std > 0 ? Math.max(row.max - row.mean, row.mean - row.min) / row.std : null;

let sorted = features, start = 0;
function sort() {
  const order = $("order").value, by = orders[order], wanted = $("find").value.toLowerCase();
  sorted = features.filter(row => row.name.toLowerCase().includes(wanted));
  const key = row => by(row) ?? -Infinity;
  if (by) sorted.sort((a, b) => { const x = key(a), y = key(b); return x === y ? a.k - b.k : y - x; });
  if (order === "name") sorted.sort((a, b) => a.name.localeCompare(b.name, undefined, {numeric: true}));
  start = 0;
}
const narrow = () => innerWidth < 600, letters = () => narrow() ? 14 : 32;
const cut = name => name.length > letters() ? name.slice(0, letters() / 2) + "…" + name.slice(-letters() / 2) : name;
const shown = () => sorted.slice(start, start + data.page);

// A logarithmic axis, linear near zero, where sizes differ by more than a factor of 50.
function axis(rows) {
  const size = rows.filter(row => row.mean !== null).map(row => Math.max(Math.abs(row.low), Math.abs(row.high))).filter(v => v > 0).sort((a, b) => a - b);
  const most = rows.reduce((m, row) => Math.max(m, ...[row.low, row.high, row.min, row.max].map(v => Math.abs(v) || 0)), 0);
  const middle = size[size.length >> 1] || 1, little = size[Math.floor(size.length / 10)];
  const chosen = $("scale").value === "auto" ? (most > 50 * middle || middle > 50 * little ? "symlog" : "linear") : $("scale").value;
  const from = Math.max(Math.floor(Math.log10(little || 1)), Math.floor(Math.log10(most || 1)) - 12), to = Math.ceil(Math.log10(most || 1));
  const step = Math.max(1, Math.ceil((to - from + 1) / (narrow() ? 3 : 6)));
  const ticks = [0];
  for (let e = to; e >= from; e -= step) ticks.push(Number(`1e${e}`), -Number(`1e${e}`));
  return [chosen, {constant: 10 ** from, ticks}];
}

async function draw(name, rows, more = {}) {
  if (views[name]) { views[name].finalize(); delete views[name]; $(name).replaceChildren(); }
  if (!rows.some(row => row.mean !== null)) return;
  const [chosen, values] = axis(rows), spec = structuredClone(specs[chosen][name]);
  if (name === "rows") spec.height *= rows.length;
  Object.assign(values, {letters: letters(), usual: dark.matches ? "#56b4e9" : "#0072b2", noted: dark.matches ? "#e69f00" : "#d55e00"});
  for (const param of spec.params || []) if (param.name in values) param.value = values[param.name];
  views[name] = (await vegaEmbed("#" + name, {...spec, datasets: {rows, ...more}}, {actions: false, renderer: "svg", config: theme()})).view;
}

function text(value, key, row) {
  if (key === "missing") return value.toLocaleString("en") + (value ? ` (${Number((100 * value / (value + row.count)).toPrecision(2))} %)` : "");
  if (value === null) return "–";
  if (key === "name") return cut(value);
  if (key === "marks") return value;
  if (key === "count") return value.toLocaleString("en");
  return $("digits").checked ? String(value) : String(Number(value.toPrecision(6)));
}
function table() {
  const keys = ["name", ...(marks.length ? ["marks"] : []), ...numbers, "count", "missing"];
  const titles = {name: "feature", marks: "hints"};
  const row = (tag, textOf) => {
    const tr = document.createElement("tr");
    for (const key of keys) {
      const cell = tr.appendChild(document.createElement(tag));
      cell.textContent = textOf(key);
      if (key === "marks") cell.className = tag === "td" ? "sick" : "";
      else if (key !== "name") cell.className = "n";
    }
    return tr;
  };
  const head = document.createElement("thead"), body = document.createElement("tbody");
  head.append(row("th", key => titles[key] || key));
  for (const feature of shown()) {
    body.append(row("td", key => text(feature[key], key, feature)));
    body.lastChild.firstChild.title = feature.name;
  }
  $("table").replaceChildren(head, body);
}

async function show() {
  const rows = shown();
  $("at").textContent = rows.length ? `${start + 1}–${start + rows.length} of ${sorted.length.toLocaleString("en")}` : "none";
  $("back").disabled = start === 0;
  $("next").disabled = start + data.page >= sorted.length;
  table();
  await draw("rows", rows);
  if (views.overview) await views.overview.data("window", [part()]).runAsync();
}
const part = () => ({position: start + 1, end: start + shown().length});
// One drawing after another: a view that is replaced must be there.
let drawn = Promise.resolve();
const later = draws => (drawn = drawn.then(draws).catch(console.error));
async function all() {
  if (total > data.page) {
    await draw("overview", sorted.map((row, k) => ({...row, position: k + 1})), {window: [part()]});
    views.overview?.addEventListener("click", event => {
      const at = views.overview.scale("x").invert(event.offsetX - views.overview.origin()[0]);
      go(Math.floor((at - 1) / data.page) * data.page);
    });
  }
  await show();
}
function go(to) {
  start = Math.max(0, Math.min(to, Math.floor((sorted.length - 1) / data.page) * data.page));
  return later(show);
}

// Copied are all features, in the order of the data, with every digit.
function csv() {
  const keys = ["name", "count", "missing", ...numbers];
  const cell = value => value === null ? "" : /[",\n]/.test(value) ? `"${String(value).replace(/"/g, '""')}"` : String(value);
  return [keys, ...features.map(row => keys.map(key => row[key]))].map(row => row.map(cell).join(",")).join("\n") + "\n";
}
async function copy(button) {
  const what = button.dataset.copy === "csv" ? csv() : $(button.dataset.copy).textContent;
  try { await navigator.clipboard.writeText(what); } catch {  // no permission, or not a secure place
    const area = document.createElement("textarea");
    area.value = what;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}

$("order").replaceChildren(...Object.keys(orders).map(name => new Option(name)));
if (total <= data.page) document.querySelectorAll(".many").forEach(e => { e.hidden = true; });
$("legend").textContent = `A dot is the mean, a bar reaches one standard deviation to both sides${ranges ? ", a line from the least to the greatest value" : ""}`
  + `${marks.length ? "; features with hints are orange" : ""}. Standard deviations are biased (ddof = 0), as normalization takes them.`;
$("order").addEventListener("change", () => { sort(); later(all); });
$("find").addEventListener("input", () => { sort(); later(all); });
$("scale").addEventListener("change", () => later(all));
$("digits").addEventListener("change", table);
$("back").addEventListener("click", () => go(start - data.page));
$("next").addEventListener("click", () => go(start + data.page));
document.querySelectorAll("[data-copy]").forEach(button => button.addEventListener("click", () => copy(button)));
dark.addEventListener("change", () => later(all));
later(all).then(() => { document.body.dataset.ready = "true"; });
