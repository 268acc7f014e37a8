// --- one backend's times by seq_len and d_model, as in the table this project began with

function pivot(backend, pass, title) {
  const cells = ofGroup().filter((cell) => cell.backend === backend);
  if (!cells.some((cell) => known(cell[`${pass}_ms`])) && pass === "backward" && !RUN.passes.includes("backward")) return null;
  const widths = ascending(cells.map((cell) => cell.d_model));
  const shapes = new Map(cells.map((cell) => [`${cell.seq_len} ${cell.d_model}`, cell]));
  const rows = ascending(cells.map((cell) => cell.seq_len)).map((length) => [
    length.toLocaleString("en-US"), ...widths.map((width) => {
      const cell = shapes.get(`${length} ${width}`);
      return !cell ? "" : cell.status === "ok" ? number(cell[`${pass}_ms`], 6) : badge(cell);
    }),
  ]);
  return h("div", {}, h("h3", {}, `${title} of ${backend}, ms`),
    h("div.scroll.card", { tabindex: 0, role: "region", "aria-label": `${title} of ${backend}` },
      table(["seq_len", ...widths.map((width) => `d_model ${width}`)], rows, { class: "pivot", "data-pass": pass })));
}

function setUpPivots() {
  options($("pivot-backend"), RUN.backends.map((name) => [name, name]), RUN.backends[0]);
  const show = () => {
    const backend = $("pivot-backend").value;
    $("pivot-tables").replaceChildren(...["Forward", "Backward"].map((title) => pivot(backend, title.toLowerCase(), title)).filter(Boolean));
  };
  $("pivot-backend").addEventListener("change", show);
  watch((changed) => { if (!changed || "group" in changed) show(); });
}
