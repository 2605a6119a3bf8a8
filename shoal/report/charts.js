"use strict";
// Parts that the page's charts share: elements, scales, axes, markers, and a tooltip that focus and pointer show alike.
// Text goes in as text nodes only, never as markup.

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

function html(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

// The parser knows the namespace of SVG; asking it keeps every address out of the page.
const SVG = new DOMParser().parseFromString("<svg></svg>", "text/html").querySelector("svg").namespaceURI;

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

// Parts of a text that may be broken into lines after the separators of a path, and nowhere else if that fits.
function breakable(text) {
  return String(text).split(/(?<=[/_=-])(?=[^/_=-])/).flatMap((part, i) => (i ? [html("wbr"), part] : [part]));
}

const shown = new Intl.NumberFormat("en", { maximumFractionDigits: 4 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

// Value -> place between `from` and `to`.
function scale(low, high, from, to, log = false) {
  const f = log ? Math.log10 : (value) => value;
  const width = f(high) - f(low) || 1;
  return (value) => from + ((f(value) - f(low)) / width) * (to - from);
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high * (1 + 1e-9); i += 1) ticks.push(i * step);
  return ticks;
}

function ticks(low, high, count, log = false) {
  if (!log) return linearTicks(low, high, count);
  for (const digits of [[1], [1, 3], [1, 2, 5]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
      found.push(...digits.map((d) => d * 10 ** power).filter((v) => v >= low && v <= high));
    }
    if (found.length >= Math.min(3, count)) return found.length <= count ? found : found.filter((_, i) => i % 2 === 0);
  }
  return linearTicks(low, high, count);
}

// Width of a digit at most, in the size of the charts' text.
const DIGIT = 7.5;

// An empty chart as wide as its place, with axes; `x` and `y` map values to places in it.
function frame(place, options) {
  const { height, xs, ys, log, xLabel, yLabel } = options;
  const width = Math.max(260, place.clientWidth || 640);
  const left = 60, right = 14, top = 12, bottom = 46;
  const x = scale(xs[0], xs[1], left, width - right, log);
  const y = scale(ys[0], ys[1], height - bottom, top);
  const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: options.role, "aria-label": options.label });
  let free = 0;
  for (const value of ticks(xs[0], xs[1], Math.max(3, width / 90), log)) {
    image.append(svg("line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom }));
    const text = compact.format(value), half = (text.length * DIGIT) / 2;
    if (x(value) - half < free || x(value) + half > width) continue;  // it would overlap its neighbour
    image.append(svg("text", { class: "soft", x: x(value), y: height - bottom + 16, "text-anchor": "middle" }, text));
    free = x(value) + half + DIGIT;
  }
  for (const value of ticks(ys[0], ys[1], 6)) {
    image.append(
      svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      svg("text", { class: "soft", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, compact.format(value)),
    );
  }
  image.append(
    svg("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
    svg("text", { x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, xLabel),
    svg("text", { transform: `translate(12 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel),
  );
  return { image, x, y, width, height, left, right, top, bottom };
}

// Low and high of values with some air around; on a logarithmic axis the air is a factor.
function range(values, log = false, floor = -Infinity, ceiling = Infinity) {
  const low = Math.min(...values), high = Math.max(...values);
  if (log) return [low / 1.15, high * 1.15];
  const air = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  return [Math.max(floor, low - air), Math.min(ceiling, high + air)];
}

const SHAPES = {
  circle: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z",
  square: "M-4.5,-4.5H4.5V4.5H-4.5Z",
  diamond: "M0,-6L6,0L0,6L-6,0Z",
  up: "M0,-6L5.5,4.5H-5.5Z",
  down: "M0,6L5.5,-4.5H-5.5Z",
  plus: "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
  cross: "M-5.5,-3L-3,-5.5L0,-2.5L3,-5.5L5.5,-3L2.5,0L5.5,3L3,5.5L0,2.5L-3,5.5L-5.5,3L-2.5,0Z",
};
const PAPER_SHAPES = ["diamond", "up", "down", "plus", "cross"];

// Cuts the beginning of a text in a chart until it is at most `width` wide: the end of a name tells it apart.
function shorten(element, width) {
  let text = element.textContent;
  while (element.getComputedTextLength() > width && text.length > 1) {
    text = text.slice(1);
    element.textContent = `\u2026${text}`;
  }
}

function swatch(shape, colour, hollow = false) {
  const mark = svg("g", { class: `mark ${colour} ${hollow ? "hollow" : ""}` }, svg("path", { d: SHAPES[shape] }));
  return svg("svg", { viewBox: "-13 -8 26 16", "aria-hidden": "true" }, mark);
}

function lineSwatch(className, dashes = null) {
  const line = svg("line", { class: className, x1: -12, x2: 12, y1: 0, y2: 0, "stroke-dasharray": dashes });
  return svg("svg", { viewBox: "-13 -8 26 16", "aria-hidden": "true" }, line);
}

function legend(list, entries) {
  list.replaceChildren(...entries.map(([picture, text]) => html("li", {}, picture, text)));
}

// Lines of text beside a mark, kept inside the chart.
function showTip(place, mark, lines) {
  hideTip(place);
  const tip = html("div", { class: "tip", "aria-hidden": "true" }, ...lines.map((line) => html("div", {}, ...breakable(line))));
  place.append(tip);
  const area = place.getBoundingClientRect(), box = mark.getBoundingClientRect();
  const x = box.left + box.width / 2 - area.left, y = box.top - area.top;
  const left = Math.min(Math.max(0, x - tip.offsetWidth / 2), area.width - tip.offsetWidth);
  tip.style.left = `${left}px`;
  tip.style.top = `${y - tip.offsetHeight - 8 < 0 ? y + box.height + 8 : y - tip.offsetHeight - 8}px`;
}

function hideTip(place) {
  place.querySelectorAll(".tip").forEach((tip) => tip.remove());
}

function table(place, caption, headings, rows) {
  const head = html("tr", {}, ...headings.map((h, i) => html("th", { scope: "col", class: i ? "number" : null }, h)));
  const body = rows.map((row) =>
    html("tr", {}, ...row.map((cell, i) => (i ? html("td", { class: "number" }, cell) : html("th", { scope: "row" }, ...breakable(cell))))),
  );
  place.replaceChildren(html("caption", {}, ...breakable(caption)), html("thead", {}, head), html("tbody", {}, ...body));
}

// Headings' buttons sort the rows by their `data-sort`, numbers as numbers.
function sortable(element) {
  const headings = [...element.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = heading.classList.contains("number");
      const key = (row) => (numeric ? Number(row.cells[column].dataset.sort) : row.cells[column].dataset.sort);
      const order = (a, b) => (numeric ? key(a) - key(b) : key(a).localeCompare(key(b), "en", { numeric: true }));
      const body = element.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => (down ? order(b, a) : order(a, b))));
    });
  });
}
