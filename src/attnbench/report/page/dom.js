// --- elements and numbers. Text is only ever set as text: nothing that a user named becomes markup.

const $ = (id) => document.getElementById(id);

/** An element with attributes (those that are null or false left out) and children (text or elements). */
function h(tag, attributes = {}, ...children) {
  const [name, ...classes] = tag.split(".");
  const made = SVG_TAGS.has(name)
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  if (classes.length) made.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

const SVG_TAGS = new Set(["svg", "path", "line", "circle", "g", "text"]);

const known = (value) => value !== null && value !== undefined;

/** Four significant digits, without a power of ten where that can be avoided. */
function number(value, digits = 4) {
  if (!known(value)) return "";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 10 ** digits) return Math.round(value).toLocaleString("en-US");
  return size < 1e-4 ? value.toExponential(digits - 2) : String(Number(value.toPrecision(digits)));
}

function percent(share, digits = 3) {
  return known(share) ? `${Number((100 * share).toPrecision(digits)).toLocaleString("en-US")} %` : "";
}

function badge(cell) {
  return h(`span.badge.${cell.status}`, {}, cell.outcome);
}

function options(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => h("option", { value, selected: value === chosen }, text)));
}

/** A table of rows whose first column names them. */
function table(headers, rows, attributes = {}) {
  const line = (row) =>
    h("tr", {}, row.map((cell, i) => h(i ? "td" : "th", i ? {} : { scope: "row" }, cell)));
  const head = headers && h("thead", {}, h("tr", {}, headers.map((text) => h("th", { scope: "col" }, text))));
  return h("table", attributes, head, h("tbody", {}, rows.map(line)));
}
