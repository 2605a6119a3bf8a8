// The page: what is chosen (`state`), and one function that draws each part from it.

const report = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const datasets = [...new Set(report.points.map((point) => point.data))].sort();
const systems = [...new Set(report.papers.map((row) => row.system))];
const state = { data: datasets[0], axis: "relus", log: true, papers: new Set(datasets), run: 0, best: null, budget: null };
const PAPER_AXIS = { relus: "relus", macs: "macs", online_s: "latency_s" };

// ---------------------------------------------------------------- accuracy against cost

function describe(point) {
  const costs = point.costs;
  const spread = point.spread === null ? "" : ` \u00b1 ${point.spread.toFixed(2)} over ${point.seeds.length} seeds`;
  const images = point.images === null ? "" : `, n = ${shown.format(point.images)} images`;
  const lines = [point.label, `test accuracy ${point.accuracy.toFixed(2)} %${spread}${images}`];
  lines.push(`${shown.format(costs.relus)} ReLUs, ${compact.format(costs.macs)} MACs`);
  if (costs.waits !== null) lines.push(`${shown.format(costs.waits)} one-way latencies`);
  if (costs.online_s !== null) lines.push(`${shown.format(costs.online_s)} s online, ${point.measured ? "measured" : "forecast"}`);
  return lines;
}

function describePaper(row) {
  const lines = [`${row.system}, ${row.network}`, `${row.dataset}: test accuracy ${row.accuracy} %`];
  if (row.relus !== null) lines[1] += `, ${shown.format(row.relus)} ReLUs`;
  if (row.macs !== null) lines[1] += `, ${compact.format(row.macs)} MACs`;
  if (row.latency_s !== null) lines.push(`${row.latency_s} s online with DELPHI, on the authors' machine`);
  return [...lines, `${row.source} (${row.certainty})`, ...(row.note ? [row.note] : [])];
}

function ownMarks() {
  const own = report.points.map((point, index) => ({ point, index })).filter((p) => p.point.data === state.data);
  return own.map(({ point, index }) => ({
    x: point.costs[state.axis], y: point.accuracy, spread: point.spread, lines: describe(point), index,
    shape: point.side === "baseline" ? "square" : "circle", colour: point.side === "baseline" ? "base" : "own",
    hollow: state.axis === "online_s" && !point.measured, name: point.label,
  }));
}

function paperMarks() {
  const key = PAPER_AXIS[state.axis];
  const rows = key ? report.papers.filter((row) => state.papers.has(row.dataset) && row[key] !== null) : [];
  return rows.map((row) => {
    const i = systems.indexOf(row.system);
    const look = { shape: PAPER_SHAPES[i % PAPER_SHAPES.length], colour: `c${i % 6}`, hollow: i >= 6 };
    return { x: row[key], y: row.accuracy, lines: describePaper(row), system: row.system, name: row.system, ...look };
  });
}

function drawFront() {
  const place = at("front-chart");
  const all = [...ownMarks(), ...paperMarks()];
  const marks = all.filter((m) => m.x !== null && (m.x > 0 || !state.log)).sort((a, b) => a.x - b.x || a.y - b.y);
  const axis = report.axes.find((a) => a.key === state.axis);
  noteFront(all, marks);
  drawFrontTable(marks, axis);
  if (!marks.length) return place.replaceChildren("No network has a figure for this cost.");
  const heights = marks.flatMap((m) => [m.y - (m.spread || 0), m.y + (m.spread || 0)]);
  const chart = frame(place, {
    height: 420, xs: range(marks.map((m) => m.x), state.log, 0), ys: range(heights, false, 0, 100), log: state.log,
    xLabel: axis.label + (state.log ? ", log scale" : ""), yLabel: "test accuracy, %",
    role: "listbox", label: `Networks on ${state.data}: accuracy against ${axis.label}`,
  });
  drawStep(chart, marks);
  drawBudgetLine(chart, marks);
  const drawn = marks.map((mark) => drawMark(chart, mark));
  chart.image.append(...drawn);
  const held = place.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  place.replaceChildren(chart.image);
  roving(place, marks, drawn, held);
}

// How the cost of a front's networks is known -> the name of the front.
const FRONTS = { counted: "front", measured: "front of measured seconds", forecast: "front of forecast seconds" };

function kindOf(mark) {
  const found = Object.entries(report.fronts[state.data][state.axis]).find(([, members]) => members.includes(mark.index));
  return found ? found[0] : null;
}

// Horizontal to the next network of the front, then up: what a cost buys at most. Each kind of cost has its own front.
function drawStep(chart, marks) {
  for (const [kind, members] of Object.entries(report.fronts[state.data][state.axis])) {
    const best = members.map((i) => marks.find((m) => m.index === i)).filter(Boolean);
    if (!best.length) continue;
    const steps = best.map((m, i) => (i ? `H${chart.x(m.x)}V${chart.y(m.y)}` : `M${chart.x(m.x)},${chart.y(m.y)}`));
    chart.image.append(svg("path", { class: `step ${kind}`, d: `${steps.join("")}H${chart.width - chart.right}` }));
  }
}

function drawBudgetLine(chart, marks) {
  const inside = state.budget >= marks[0].x && state.budget <= marks[marks.length - 1].x;
  if (state.axis !== "relus" || state.budget === null || !inside) return;
  const x = chart.x(state.budget);
  chart.image.append(svg("line", { class: "budget-line", x1: x, x2: x, y1: chart.top, y2: chart.height - chart.bottom }));
}

function drawMark(chart, mark) {
  const x = chart.x(mark.x), y = chart.y(mark.y);
  const key = mark.index === undefined ? mark.lines.join() : `own ${mark.index}`;
  const group = svg("g", {
    class: `mark ${mark.colour} ${mark.hollow ? "hollow" : ""}`, transform: `translate(${x} ${y})`, role: "option",
    tabindex: -1, "aria-label": mark.lines.join(", "), "aria-selected": mark.index === state.best && mark.index !== undefined,
    "data-key": key,
  });
  group.append(svg("circle", { class: mark.index !== undefined && mark.index === state.best ? "ring best" : "ring", r: 10 }));
  if (mark.spread) {
    const up = y - chart.y(mark.y + mark.spread);
    group.append(svg("path", { class: "spread", d: `M0,${up}V${up * -1}M-4,${up}H4M-4,${up * -1}H4` }));
  }
  group.append(svg("path", { d: SHAPES[mark.shape] }));
  return group;
}

// One tab stop; arrow keys go on from there.
function roving(place, marks, drawn, held) {
  const focus = (i) => drawn[Math.min(Math.max(0, i), drawn.length - 1)].focus();
  const moves = { ArrowRight: (i) => i + 1, ArrowUp: (i) => i + 1, ArrowLeft: (i) => i - 1, ArrowDown: (i) => i - 1 };
  drawn.forEach((group, i) => {
    const show = () => showTip(place, group, marks[i].lines);
    group.addEventListener("pointerenter", show);
    group.addEventListener("pointerleave", () => hideTip(place));
    group.addEventListener("focus", () => {
      drawn.forEach((other) => other.setAttribute("tabindex", other === group ? 0 : -1));
      show();
    });
    group.addEventListener("blur", () => hideTip(place));
    group.addEventListener("click", () => pick(marks[i]));
    group.addEventListener("keydown", (event) => {
      if (event.key in moves) focus(moves[event.key](i));
      else if (event.key === "Home") focus(0);
      else if (event.key === "End") focus(drawn.length - 1);
      else if (event.key === "Enter" || event.key === " ") pick(marks[i]);
      else if (event.key === "Escape") hideTip(place);
      else return;
      event.preventDefault();
    });
  });
  const start = Math.max(0, drawn.findIndex((group) => group.dataset.key === held));
  drawn[start].setAttribute("tabindex", 0);
  if (held !== null) drawn[start].focus();
}

function pick(mark) {
  if (mark.index === undefined) return;
  state.best = mark.index;
  showRun(report.points[mark.index].records[0]);
  drawFront();
}

function noteFront(all, marks) {
  const own = all.filter((m) => m.index !== undefined);
  const unknown = own.filter((m) => m.x === null).length, zero = own.length - unknown - own.filter((m) => marks.includes(m)).length;
  const notes = [];
  if (unknown) notes.push(`${unknown} of ${own.length} networks have no figure for this cost.`);
  if (zero) notes.push(`${zero} of ${own.length} networks have a cost of 0, which a logarithmic scale cannot show.`);
  if (!PAPER_AXIS[state.axis]) notes.push("The papers do not give this cost.");
  const foreign = [...state.papers].filter((name) => name !== state.data);
  if (foreign.length && PAPER_AXIS[state.axis]) notes.push(`Published networks on ${foreign.join(", ")} were tested on other data than ours.`);
  const papers = marks.filter((m) => m.system);
  if (papers.length) notes.push("Published networks were trained differently from ours.");
  if (papers.length && state.axis === "online_s") notes.push("Published seconds are those of DELPHI on the authors' machines and networks.");
  at("front-note").textContent = notes.join(" ");
  const entries = [[swatch("circle", "own"), "reduced"], [swatch("square", "base"), "all ReLUs"]];
  if (own.some((m) => m.hollow)) entries.push([swatch("circle", "own", true), "hollow: forecast, not measured"]);
  for (const kind of Object.keys(report.fronts[state.data][state.axis])) entries.push([lineSwatch(`step ${kind}`), FRONTS[kind]]);
  const seen = new Map(papers.map((m) => [m.system, m]));
  legend(at("legend"), [...entries, ...[...seen].map(([name, m]) => [swatch(m.shape, m.colour, m.hollow), name])]);
}

function drawFrontTable(marks, axis) {
  const rows = marks.map((m) => [m.name, shown.format(m.x), m.y.toFixed(2), FRONTS[kindOf(m)] ?? ""]);
  table(at("front-table"), `Networks on ${state.data}`, ["network", axis.label, "test accuracy, %", "part of"], rows);
}

// ---------------------------------------------------------------- the budget

// The reduced networks on the data set; all networks if none was reduced.
function reduced() {
  const points = report.points.map((point, index) => ({ ...point, index })).filter((p) => p.data === state.data);
  const found = points.filter((p) => p.side === "reduced");
  return found.length ? found : points;
}

function limits() {
  const counts = reduced().map((p) => Math.max(1, p.costs.relus));
  return [Math.min(...counts), Math.max(...counts)];
}

// The most accurate reduced network within the budget; of equal ones that with the fewest ReLUs.
function bestWithin(budget) {
  const within = reduced().filter((p) => p.costs.relus <= budget);
  return within.sort((a, b) => b.accuracy - a.accuracy || a.costs.relus - b.costs.relus)[0];
}

function setBudget(value, slider = null) {
  const [low, high] = limits(), point = bestWithin(value);
  state.budget = value;
  state.best = point ? point.index : null;
  at("budget").value = slider ?? Math.round(scale(low, high, 0, 200, true)(Math.min(Math.max(value, low), high)));
  at("budget").setAttribute("aria-valuetext", `${shown.format(value)} ReLUs`);
  at("budget-number").value = value;
  const text = point
    ? `${point.label}: ${point.accuracy.toFixed(2)} % with ${shown.format(point.costs.relus)} ReLUs`
    : "No run has so few ReLUs.";
  at("budget-best").replaceChildren(...breakable(`At most ${shown.format(value)} ReLUs. ${text}`));
  if (point) showRun(point.records[0]);
  drawFront();
}

function slide() {
  const [low, high] = limits(), step = Number(at("budget").value);
  // Both ends are exact: rounding must not shut out the smallest and the largest network.
  setBudget(step === 0 ? Math.ceil(low) : step === 200 ? Math.ceil(high) : Math.round(low * (high / low) ** (step / 200)), step);
}

// ---------------------------------------------------------------- one run

function showRun(index) {
  state.run = index;
  const run = report.runs[index];
  at("run").value = String(index);
  at("run-note").textContent = run.missing.map((why) => `No forecast: ${why}.`).join(" ");
  drawSites(run);
  drawCurves(run);
  at("facts").replaceChildren(...run.facts.flatMap(([label, text]) => [html("dt", {}, label), html("dd", {}, text)]));
  at("comparison-title").textContent = run.alone ? "Figures" : "Baseline beside reduced";
  const head = ["", "baseline", "reduced", "reduced beside baseline"], kept = run.alone ? 2 : head.length;
  table(at("comparison"), run.name, run.alone ? ["", "network"] : head, run.comparison.map((row) => row.slice(0, kept)));
}

function drawSites(run) {
  const place = at("sites-chart");
  table(at("sites-table"), run.name, ["layer", "ReLUs", "ReLUs kept", "fraction kept"], run.sites.map((s) => [
    s.name, shown.format(s.relus), s.replaced ? "block replaced" : shown.format(s.kept), `${((100 * s.kept) / s.relus).toFixed(1)} %`,
  ]));
  if (!run.sites.length) return place.replaceChildren("This run has no ReLU budget for each layer.");
  const log = at("sites-log").checked, row = 34, width = Math.max(260, place.clientWidth || 520);
  const most = Math.max(...run.sites.map((s) => s.relus));
  const length = log ? (v) => (v ? scale(1, most, 2, width, true)(v) : 0) : scale(0, most, 0, width);
  const kept = run.sites.reduce((sum, s) => sum + s.kept, 0), all = run.sites.reduce((sum, s) => sum + s.relus, 0);
  const label = `${shown.format(kept)} of ${shown.format(all)} ReLUs kept; the table below has every layer`;
  const image = svg("svg", { viewBox: `0 0 ${width} ${row * run.sites.length}`, role: "img", "aria-label": label });
  run.sites.forEach((site, i) => {
    const text = site.replaced ? "block replaced" : `${shown.format(site.kept)} of ${shown.format(site.relus)}`;
    image.append(
      svg("text", { class: "name", x: 0, y: i * row + 14 }, site.name),
      svg("text", { class: "soft", x: width, y: i * row + 14, "text-anchor": "end" }, text),
      svg("rect", { class: "track", x: 0, y: i * row + 19, width: length(site.relus), height: 9, rx: 2 }),
      svg("rect", { class: "kept", x: 0, y: i * row + 19, width: length(site.kept), height: 9, rx: 2 }),
    );
  });
  place.replaceChildren(image);
  for (const name of image.querySelectorAll(".name")) shorten(name, width - name.nextSibling.getComputedTextLength() - 12);
}

const DASHES = [null, "7 4", "2 3", "9 3 2 3"];

function drawCurves(run) {
  const place = at("curves-chart"), stages = run.curves, all = stages.flatMap(([, points]) => points);
  const rows = stages.flatMap(([stage, points]) => points.map(([epoch, accuracy]) => [stage, epoch, accuracy.toFixed(2)]));
  table(at("curves-table"), run.name, ["stage", "epoch of all stages", "validation accuracy, %"], rows);
  legend(at("curves-legend"), stages.map(([stage], i) => [lineSwatch(`curve c${i % 6}`, DASHES[i % 4]), stage]));
  if (!all.length) return place.replaceChildren("This run logged no epochs.");
  const chart = frame(place, {
    height: 300, xs: [0, Math.max(...all.map((p) => p[0])) + 1], ys: range(all.map((p) => p[1]), false, 0, 100), log: false,
    xLabel: "epochs of all stages, one after the other", yLabel: "validation accuracy, %", role: "img",
    label: `Validation accuracy of ${stages.map(([stage]) => stage).join(", ")}; the table below has every epoch`,
  });
  stages.forEach(([, points], i) => {
    const d = points.map(([epoch, accuracy], k) => `${k ? "L" : "M"}${chart.x(epoch)},${chart.y(accuracy)}`).join("");
    const dots = points.map(([epoch, accuracy]) => svg("circle", { class: "curve-dot", cx: chart.x(epoch), cy: chart.y(accuracy), r: 2.5 }));
    chart.image.append(svg("g", { class: `c${i % 6}` }, svg("path", { class: "curve", d, "stroke-dasharray": DASHES[i % 4] }), ...dots));
  });
  place.replaceChildren(chart.image);
}

// ---------------------------------------------------------------- controls

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => html("option", { value }, text)));
}

// Ours and the papers' of one data set belong together; other data sets' points are there, switched off.
function choosePapers() {
  const sets = [...new Set(report.papers.map((row) => row.dataset))].sort((a, b) => (b === state.data) - (a === state.data));
  state.papers = new Set([state.data]);
  at("papers-choice").replaceChildren(...sets.map((name) => {
    const box = html("input", { type: "checkbox", value: name });
    box.checked = state.papers.has(name);
    box.addEventListener("change", () => {
      state.papers[box.checked ? "add" : "delete"](name);
      drawFront();
    });
    return html("label", {}, box, name === state.data ? `${name} (same as ours)` : name);
  }));
}

function chooseData(name) {
  state.data = name;
  choosePapers();
  setBudget(Math.ceil(limits()[1]));
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function nameTheme() {
  at("theme").setAttribute("aria-pressed", String(isDark()));
}

function offerDownloads() {
  at("data-csv").addEventListener("click", () => save("shoal-report.csv", "text/csv", csv(report.rows)));
  at("data-json").addEventListener("click", () => save("shoal-report.json", "application/json", JSON.stringify(report, null, 1)));
  const captions = {
    front: () => at("front-chart").querySelector("svg")?.getAttribute("aria-label"),
    sites: () => `ReLUs kept in each layer: ${report.runs[state.run].name}`,
    curves: () => `Validation accuracy during training: ${report.runs[state.run].name}`,
  };
  const legends = { front: at("legend"), sites: null, curves: at("curves-legend") };
  for (const name of Object.keys(captions)) {
    at(`${name}-svg`).addEventListener("click", () => saveSvg(at(`${name}-chart`), legends[name], captions[name]()));
    at(`${name}-png`).addEventListener("click", () => savePng(at(`${name}-chart`), legends[name], captions[name]()));
  }
}

function start() {
  options(at("dataset"), datasets.map((name) => [name, name]));
  options(at("axis"), report.axes.map((axis) => [axis.key, axis.label]));
  options(at("run"), report.runs.map((run, i) => [i, run.name]));
  at("dataset").addEventListener("change", (event) => chooseData(event.target.value));
  at("axis").addEventListener("change", (event) => { state.axis = event.target.value; drawFront(); });
  at("log").addEventListener("change", (event) => { state.log = event.target.checked; drawFront(); });
  at("budget").addEventListener("input", slide);
  at("budget-number").addEventListener("change", (event) => setBudget(Math.max(1, Math.round(Number(event.target.value) || 1))));
  at("run").addEventListener("change", (event) => showRun(Number(event.target.value)));
  at("sites-log").addEventListener("change", () => drawSites(report.runs[state.run]));
  at("theme").addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
  document.querySelectorAll("table.sortable").forEach(sortable);
  offerDownloads();
  nameTheme();
  chooseData(state.data);
  let width = document.body.clientWidth;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    drawFront();
    showRun(state.run);
  }).observe(document.body);
}

start();
