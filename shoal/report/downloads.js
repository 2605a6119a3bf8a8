// Files to save: the data as CSV and JSON, and each chart as a picture that needs nothing of this page.

function save(name, type, content) {
  const blob = content instanceof Blob ? content : new Blob([content], { type: `${type};charset=utf-8` });
  const address = URL.createObjectURL(blob);
  html("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

// Rows with the same keys as CSV with CRLF, as RFC 4180 has it; a missing figure is an empty cell.
function csv(rows) {
  const names = Object.keys(rows[0]);
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [names, ...rows.map((row) => names.map((name) => row[name]))].map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}

const LOOK = [
  "fill", "stroke", "stroke-width", "stroke-dasharray", "color", "font-size", "font-family", "text-anchor", "visibility",
];

// A picture has no style sheet, so every element gets what it looks like here as attributes.
function dress(original, copy) {
  const style = getComputedStyle(original);
  for (const name of LOOK) copy.setAttribute(name, style.getPropertyValue(name));
  for (const name of ["class", "tabindex", "role", "aria-selected", "data-key"]) copy.removeAttribute(name);
  [...original.children].forEach((child, i) => dress(child, copy.children[i]));
  return copy;
}

const MARGIN = 12, LINE = 18, LETTER = 7.2;

// A caption in lines that fit; a longer word, such as a path, is broken.
function wrapped(text, width) {
  const most = Math.max(8, Math.floor(width / LETTER)), lines = [""];
  for (const word of text.split(" ").flatMap((long) => long.match(new RegExp(`.{1,${most}}`, "gsu")) ?? [])) {
    const last = lines[lines.length - 1];
    if (!last || last.length + 1 + word.length <= most) lines[lines.length - 1] = last ? `${last} ${word}` : word;
    else lines.push(word);
  }
  return lines;
}

// The chart with its caption above and its legend below, laid out as on the page.
function picture(place, list, caption) {
  const original = place.querySelector("svg"), box = original.viewBox.baseVal, page = getComputedStyle(document.body);
  const under = list && list.children.length ? list.getBoundingClientRect().height + MARGIN : 0;
  const lines = wrapped(caption, box.width), title = MARGIN + LINE * lines.length;
  const width = Math.ceil(box.width + 2 * MARGIN), height = Math.ceil(title + box.height + under + 2 * MARGIN);
  const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "font-family": "sans-serif" });
  const text = { "font-size": 13, fill: page.color };
  image.append(svg("rect", { width, height, fill: page.backgroundColor }), svg("title", {}, caption));
  image.append(...lines.map((line, i) => svg("text", { x: MARGIN, y: MARGIN + 12 + i * LINE, ...text }, line)));
  const chart = dress(original, original.cloneNode(true));
  for (const [name, value] of Object.entries({ x: MARGIN, y: title + MARGIN, width: box.width, height: box.height })) chart.setAttribute(name, value);
  image.append(chart);
  if (under) image.append(...legendCopies(list, MARGIN, title + box.height + 2 * MARGIN, text));
  return image;
}

function legendCopies(list, left, top, text) {
  const area = list.getBoundingClientRect();
  return [...list.children].flatMap((entry) => {
    const original = entry.querySelector("svg"), box = original.getBoundingClientRect();
    const x = left + box.left - area.left, y = top + box.top - area.top;
    const copy = dress(original, original.cloneNode(true));
    for (const [name, value] of Object.entries({ x, y, width: box.width, height: box.height })) copy.setAttribute(name, value);
    return [copy, svg("text", { x: x + box.width + 6, y: y + box.height / 2 + 5, ...text }, entry.textContent)];
  });
}

function serialised(place, list, caption) {
  return new XMLSerializer().serializeToString(picture(place, list, caption));
}

function nameOf(place, ending) {
  return `shoal-${place.id.replace("-chart", "")}.${ending}`;
}

function saveSvg(place, list, caption) {
  if (place.querySelector("svg")) save(nameOf(place, "svg"), "image/svg+xml", serialised(place, list, caption));
}

// Twice the size on the page, for print and for slides.
function savePng(place, list, caption) {
  if (!place.querySelector("svg")) return;
  const image = new Image();
  image.addEventListener("load", () => {
    const canvas = html("canvas", { width: 2 * image.width, height: 2 * image.height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(nameOf(place, "png"), "image/png", blob));
  });
  image.setAttribute("src", `data:image/svg+xml;charset=utf-8,${encodeURIComponent(serialised(place, list, caption))}`);
}
