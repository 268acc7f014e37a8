// --- the table of cells: filters, order, pages

const PAGE = 20;

const DIMENSIONS = ["dtype", "precision", "causal", "batch", "heads", "kv_heads", "kv_len"]
  .filter((name) => name === "kv_len"
    ? CELLS.some((cell) => cell.kv_len !== cell.seq_len)
    : new Set(CELLS.map((cell) => cell[name])).size > 1);

const said = (name, value) => (name === "causal" ? (value ? "causal" : "no mask") : String(value));

const MEASURED = [
  ["forward_ms", "forward ms", number],
  ["backward_ms", "backward ms", number],
  ["forward_backward_ms", "step ms", number],
  ["limit_forward", "limit fwd", percent],
  ["limit_backward", "limit bwd", percent],
  ["peak_MiB", "peak MiB", number],
].filter(([name]) => CELLS.some((cell) => known(cell[name])));

const COLUMNS = [
  { name: "backend", title: "backend" },
  ...DIMENSIONS.map((name) => ({ name, title: name === "causal" ? "mask" : name, show: (cell) => said(name, cell[name]) })),
  { name: "d_model", title: "d_model", numeric: true },
  { name: "seq_len", title: "seq_len", numeric: true },
  { name: "outcome", title: "status", show: badge },
  ...MEASURED.map(([name, title, write]) => ({
    name, title, numeric: true, measured: true, show: (cell) => (cell.status === "ok" ? write(cell[name]) : ""),
  })),
  { name: "tags", title: "tags", show: (cell) => (cell.tags || []).map((tag) => h("span.tag", { title: RUN.tags[tag] }, tag)) },
];

const FILTERS = [
  ["backend", "Backend", RUN.backends.map((name) => [name, name])],
  ...["dtype", "precision", "causal", "batch", "heads", "kv_heads", "d_model", "seq_len"].map((name) => [
    name, name === "causal" ? "Mask" : name,
    [...new Set(CELLS.map((cell) => cell[name]))].sort((a, b) => (a > b) - (a < b)).map((value) => [String(value), said(name, value)]),
  ]),
  ["status", "Status", RUN.statuses.filter((one) => CELLS.some((cell) => cell.status === one)).map((one) => [one, one])],
  ["tags", "Tag", Object.keys(RUN.tags).filter((tag) => CELLS.some((cell) => (cell.tags || []).includes(tag))).map((tag) => [tag, tag])],
].filter(([name, , values]) => values.length > (name === "tags" ? 0 : 1));

const SEARCHED = CELLS.map((cell) => [
  cell.cell_id, cell.backend, cell.outcome, cell.reason, ...(cell.tags || []), cell.backend_version, cell.bound_by,
  ...cell.kernels.flat().map((index) => RUN.kernels[index]),
].filter(known).join("\n").toLowerCase());

const view = { sort: null, descending: false, page: 0, rows: CELLS };

function matches(cell, wanted, words) {
  return words.every((word) => SEARCHED[cell.index].includes(word)) && wanted.every(([name, value]) =>
    name === "tags" ? (cell.tags || []).includes(value) : String(cell[name]) === value);
}

/** The rows in order; what has no value stands last either way. */
function order(rows) {
  if (!view.sort) return rows;
  const { name, measured } = view.sort;
  const sign = view.descending ? -1 : 1;
  const key = (cell) => (measured && cell.status !== "ok" ? null : name === "backend" ? BACKENDS.get(cell.backend) : Array.isArray(cell[name]) ? cell[name].join() : cell[name]);
  return rows.map((cell) => [key(cell), cell]).sort(([a, x], [b, y]) =>
    known(a) && known(b) ? sign * ((a > b) - (a < b)) || x.index - y.index : known(b) - known(a) || x.index - y.index,
  ).map(([, cell]) => cell);
}

function refilter() {
  const wanted = FILTERS.map(([name]) => [name, $(`filter-${name}`).value]).filter(([, value]) => value);
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  view.rows = order(CELLS.filter((cell) => matches(cell, wanted, words)));
  view.page = 0;
  $("reset").hidden = !wanted.length && !words.length;
  showPage();
}

function showPage() {
  const { rows, page } = view;
  const shown = rows.slice(page * PAGE, (page + 1) * PAGE);
  $("table").tBodies[0].replaceChildren(...shown.map((cell) => h("tr", {}, COLUMNS.map((column, i) => {
    if (!i) return h("th", { scope: "row" }, h("button.open", { type: "button", "data-cell": cell.index, "aria-haspopup": "dialog", onclick: () => openCell(cell) }, swatch(cell.backend, false), cell.backend));
    return h(column.numeric ? "td.number" : "td", {}, column.show ? column.show(cell) : String(cell[column.name]));
  }))));
  $("found").textContent = rows.length === CELLS.length ? `${rows.length} cells` : `${rows.length} of ${CELLS.length} cells`;
  const last = Math.max(0, Math.ceil(rows.length / PAGE) - 1);
  $("page").textContent = rows.length ? `${page * PAGE + 1}–${page * PAGE + shown.length} of ${rows.length}` : "none match";
  $("previous").disabled = page === 0;
  $("next").disabled = page >= last;
}

function sortBy(column) {
  view.descending = view.sort === column && !view.descending;
  view.sort = column;
  [...$("table").tHead.rows[0].cells].forEach((head, i) => {
    if (COLUMNS[i] === column) head.setAttribute("aria-sort", view.descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
  view.rows = order(view.rows);
  view.page = 0;
  showPage();
}

function setUpTable() {
  $("table").tHead.append(h("tr", {}, COLUMNS.map((column) => h(column.numeric ? "th.number" : "th", { scope: "col" },
    h("button.sort", { type: "button", onclick: () => sortBy(column) }, column.title)))));
  $("filters").append(...FILTERS.map(([name, title, values]) => h("label", {}, h("span", {}, title),
    h("select", { id: `filter-${name}`, onchange: refilter }, h("option", { value: "" }, "all"), values.map(([value, text]) => h("option", { value }, text))))));
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("search").addEventListener("input", refilter);
  $("reset").addEventListener("click", () => { $("filters").reset(); refilter(); $("search").focus(); });
  for (const [id, step] of [["previous", -1], ["next", 1]]) $(id).addEventListener("click", () => { view.page += step; showPage(); });
  refilter();
}
