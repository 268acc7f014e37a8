// --- charts: drawn when they come into view, and again when what they show has changed

const CHARTED = ["forward", "backward", "step"];

/** What charts read of a cell, as attnbench.report.charts.rows makes it. */
function charted(cell) {
  const row = { backend: cell.backend, seq_len: cell.seq_len, d_model: cell.d_model, status: cell.status, outcome: cell.outcome };
  const floors = [cell.floor_forward_ms, cell.floor_backward_ms];
  const floorOf = { forward: floors[0], backward: floors[1], step: floors.every(known) ? floors[0] + floors[1] : null };
  for (const pass of CHARTED) {
    const time = pass === "step" ? "forward_backward" : pass;
    for (const what of ["ms", "iqr_ms", "noise"]) row[`${pass}_${what}`] = cell[`${time}_${what}`] ?? null;
    row[`${pass}_peak_MiB`] = (pass === "forward" ? cell.forward_peak_MiB : cell.peak_MiB) ?? null;
    row[`floor_${pass}_ms`] = floorOf[pass] ?? null;
    row[`limit_${pass}`] = pass !== "step" ? cell[`limit_${pass}`] ?? null
      : known(floorOf.step) && cell.forward_backward_ms ? floorOf.step / cell.forward_backward_ms : null;
  }
  return row;
}

/** Vega-Embed, from the page itself; not before a chart is wanted. */
function vegaEmbed() {
  if (!window.vegaEmbed) new Function(JSON.parse($("bundle").textContent))();
  return window.vegaEmbed;
}

/** So many columns of panels that all rows are about as long, and none has more than `most`. */
function columns(most) {
  const rows = Math.ceil(panelsOf() / Math.max(1, most));
  return Math.ceil(panelsOf() / rows);
}

const panelsOf = () => new Set(ofGroup().map((cell) => cell.d_model)).size || 1;

/** The specification, for so many pixels of width, without legends: the page has one for all charts. */
function fitted(name, width) {
  const cells = ofGroup().filter((cell) => !state.hidden.has(cell.backend));
  const spec = adapted(structuredClone(RUN.charts[name]), RUN.backends.filter((one) => cells.some((cell) => cell.backend === one)));
  const lengths = new Set(ofGroup().map((cell) => cell.seq_len)).size || 1;
  if (name === "frontier") {
    spec.width = { step: Math.max(110, Math.min(300, (width - 130) / panelsOf())) };
  } else if (name === "limit") {
    spec.columns = columns(Math.floor((width - 120) / (lengths * 40 + 20)));
    spec.spec.width = { step: Math.max(36, Math.min(64, (width - 125 - 20 * spec.columns) / (spec.columns * lengths))) };
  } else {
    spec.columns = columns(Math.min(4, Math.floor(width / 300)));
    spec.spec.width = Math.max(160, Math.floor(width / spec.columns) - (name === "memory" ? 108 : 88));
    spec.spec.height = Math.round(Math.max(190, Math.min(280, spec.spec.width * 0.75)));
  }
  for (const param of spec.params) param.value = param.name === "timed" ? state.pass : state.baseline;
  spec.config = { ...RUN.themes[theme()], aria: false };
  spec.datasets = { cells: cells.map(charted) };
  return spec;
}

/** Without legends, and with rows for those backends alone that are shown. */
function adapted(spec, shown) {
  for (const channel of ["color", "shape", "strokeDash"]) if (spec.encoding?.[channel]?.field) spec.encoding[channel].legend = null;
  if (spec.encoding?.y?.field === "backend") spec.encoding.y.scale.domain = shown;
  for (const inner of [...(spec.layer || []), ...(spec.spec ? [spec.spec] : [])]) adapted(inner, shown);
  return spec;
}

function tooltip(handler, event, item, value) {
  const tip = $("tip");
  if (!value || typeof value !== "object") { tip.hidden = true; return; }
  tip.replaceChildren(...Object.entries(value).map(([name, text]) => h("div", {}, h("span.muted", {}, name), h("b", {}, String(text)))));
  tip.hidden = false;
  const right = event.clientX + 16 + tip.offsetWidth > innerWidth;
  tip.style.left = `${right ? event.clientX - tip.offsetWidth - 12 : event.clientX + 16}px`;
  tip.style.top = `${Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 8)}px`;
}

const DRAWN_FROM = { time: "_ms", speedup: "_ms", memory: "_peak_MiB", limit: "limit_" };

function nothingIn(name, rows) {
  if (!rows.length) return "Nothing to draw: no backend is chosen.";
  const field = name === "limit" ? `limit_${state.pass}` : `${state.pass}${DRAWN_FROM[name]}`;
  const right = rows.filter((row) => row.status === "ok" && known(row[field]));
  if (name === "frontier") return null;
  if (!right.length) return `Nothing to draw: no cell that is ok has ${field}.`;
  if (name !== "speedup") return null;
  if (!right.some((row) => row.backend === state.baseline)) return `${state.baseline} is ok in none of these cells; choose another baseline.`;
  if (!right.some((row) => row.backend !== state.baseline)) return `Nothing to draw: no other backend than ${state.baseline} is ok in these cells.`;
  return null;
}

/** Keeps about as much room as a chart will take, so that what lies below stays where it is when the chart is drawn. */
function reserve(figure) {
  const place = figure.querySelector(".chart");
  const spec = fitted(figure.dataset.chart, place.clientWidth);
  const rows = Math.ceil(panelsOf() / (spec.columns || panelsOf()));
  const backends = new Set(spec.datasets.cells.map((row) => row.backend)).size;
  const row = spec.spec?.height > 0 ? spec.spec.height + 70 : 24 * backends + 36;
  place.style.minHeight = `${rows * row + 24}px`;
}

async function draw(figure) {
  const name = figure.dataset.chart;
  const place = figure.querySelector(".chart");
  figure.dataset.drawn = "busy";
  const turn = (figure.turn || 0) + 1;
  figure.turn = turn;
  figure.view?.finalize();
  figure.view = null;
  const spec = fitted(name, place.clientWidth);
  const empty = nothingIn(name, spec.datasets.cells);
  if (empty) {
    place.replaceChildren(h("p.note", {}, empty));
  } else {
    const inside = h("div", { "aria-hidden": "true" });
    const label = `${figure.querySelector("h3").textContent}: ${RUN.groups[state.group]}, ${state.pass}. The table of cells holds the numbers.`;
    place.replaceChildren(h("div", { role: "img", "aria-label": label }, inside));
    const { view } = await vegaEmbed()(inside, spec, { renderer: "svg", actions: false, defaultStyle: false, tooltip, logLevel: 1 });
    if (figure.turn !== turn) { view.finalize(); return; } // something else was chosen meanwhile
    figure.view = view;
  }
  const scrolls = place.scrollWidth > place.clientWidth;
  for (const [attribute, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", figure.querySelector("h3").textContent]]) {
    if (scrolls) place.setAttribute(attribute, value); else place.removeAttribute(attribute);
  }
  place.style.minHeight = "";
  figure.dataset.drawn = "yes";
}

const figures = [...document.querySelectorAll("figure[data-chart]")];
const inView = new Set();

/** Marks charts to be drawn anew: those in view now, others when they come into view. */
function redraw(which = figures) {
  for (const figure of which) {
    delete figure.dataset.drawn;
    reserve(figure);
    if (inView.has(figure)) draw(figure);
  }
}

function setUpCharts() {
  document.body.append(h("div.tip", { id: "tip", hidden: true }));
  options($("baseline"), RUN.backends.map((name) => [name, name]), state.baseline);
  $("baseline").addEventListener("change", () => change({ baseline: $("baseline").value }));
  $("legend").append(
    ...RUN.backends.map((name) => h("label.chip", {}, h("input", { type: "checkbox", checked: true, value: name, onchange: pick }), swatch(name), h("span", {}, name))),
    h("button.button.quiet", { type: "button", onclick: pickAll }, "All or none"));
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) inView.add(target); else inView.delete(target);
      if (isIntersecting && !target.dataset.drawn) draw(target);
    }
  }, { rootMargin: "200px" });
  figures.forEach(reserve);
  figures.forEach((figure) => observer.observe(figure));
  let width = innerWidth;
  let waiting;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 150);
  });
  addEventListener("beforeprint", () => { printing = true; figures.forEach(draw); });
  addEventListener("afterprint", () => { printing = false; redraw(); });
  watch((changed) => {
    if (!changed) return;
    redraw("baseline" in changed ? figures.filter((figure) => figure.dataset.chart === "speedup") : figures);
  });
}

const boxes = () => [...$("legend").querySelectorAll("input")];
const pick = () => change({ hidden: new Set(boxes().filter((box) => !box.checked).map((box) => box.value)) });

function pickAll() {
  const all = boxes().every((box) => box.checked);
  boxes().forEach((box) => { box.checked = !all; });
  pick();
}
