// --- one cell in full

const PASSES = [["forward", "Forward"], ["backward", "Backward"], ["forward_backward", "Step"]];

function openCell(cell) {
  const title = h("h2", { id: "drawer-title" }, swatch(cell.backend), " ", cell.backend);
  const close = h("button.button", { type: "button", onclick: () => $("drawer").close() }, "Close");
  $("drawer").replaceChildren(
    h("div.drawer-head", {}, h("div", {}, title, h("p.muted", {}, RUN.groups[cell.group], `, seq_len ${cell.seq_len}, d_model ${cell.d_model}`)), close),
    h("div.drawer-body", { tabindex: 0, role: "region", "aria-label": "The cell's details" },
      h("p.states", {}, badge(cell), (cell.tags || []).map((tag) => h("span.tag", {}, tag))),
      (cell.tags || []).map((tag) => h("p.note", {}, h("b", {}, tag), `: ${RUN.tags[tag] || ""}`)),
      cell.reason ? h("p.reason", {}, cell.reason) : null,
      PARTS.map(([heading, make]) => {
        const made = make(cell);
        return made ? h("section", {}, h("h3", {}, heading), made) : null;
      })),
  );
  $("drawer").showModal();
  $("drawer").querySelector(".drawer-body").scrollTop = 0;
}

/** Rows of those measurements that are known; null where none is. */
function facts(rows) {
  const found = rows.filter(([, value]) => known(value) && value !== "");
  return found.length ? h("dl", {}, found.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])) : null;
}

const ms = (value) => (known(value) ? `${number(value)} ms` : "");

function times(cell) {
  if (cell.status !== "ok") return null;
  const rows = PASSES.filter(([name]) => known(cell[`${name}_ms`])).map(([name, title]) => [
    title, number(cell[`${name}_ms`]), number(cell[`${name}_iqr_ms`]), percent(cell[`${name}_noise`], 2),
    number(cell[`floor_${name}_ms`]), percent(cell[`limit_${name}`]), number(cell[`${name}_TFLOP_per_s`]),
    number(cell[`device_${name}_ms`]), number(cell[`call_${name}_ms`]), number(cell[`graph_${name}_ms`]),
  ]);
  const headers = ["ms", "median", "IQR", "uncertainty", "floor", "of the limit", "TFLOP/s", "kernels", "call", "in a graph"];
  const kept = headers.map((_, i) => !i || rows.some((row) => row[i]));
  return rows.length ? h("div.scroll", { tabindex: 0, role: "region", "aria-label": "Times" }, table(headers.filter((_, i) => kept[i]), rows.map((row) => row.filter((_, i) => kept[i])))) : null;
}

/** Each pass's samples on a line of its own, in the order they were taken from top to bottom. */
function samples(cell) {
  const strips = PASSES.map(([, title], i) => [title, ...cell.samples[i]]).filter(([, , taken]) => taken.length);
  if (cell.status !== "ok" || !strips.length) return null;
  return strips.map(([title, count, taken], i) => strip(title, count, taken, cell[`${PASSES[i][0]}_ms`]));
}

function strip(title, count, taken, median) {
  const [width, height] = [560, 44];
  const [low, high] = [Math.min(...taken), Math.max(...taken)];
  const x = (value) => 8 + (width - 16) * (high > low ? (value - low) / (high - low) : 0.5);
  const y = (index) => 5 + (height - 10) * (taken.length > 1 ? index / (taken.length - 1) : 0.5);
  const label = `${title}: ${count} samples from ${ms(low)} to ${ms(high)}, median ${ms(median)}`;
  const drawn = count > taken.length ? `, ${taken.length} drawn` : "";
  return h("div.strip", {},
    h("p", {}, h("b", {}, title), ` ${count} samples${drawn}`),
    h("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label },
      known(median) && median >= low && median <= high ? h("line.median", { x1: x(median), x2: x(median), y1: 0, y2: height }) : null,
      taken.map((value, index) => h("circle", { cx: x(value).toFixed(1), cy: y(index).toFixed(1), r: 2 }))),
    h("p.ends", {}, h("span", {}, ms(low)), h("span", {}, ms(high))));
}

function errors(cell) {
  const rows = ["out", "dq", "dk", "dv"].filter((name) => known(cell[`error_${name}`])).map((name) => {
    const error = cell[`error_${name}`];
    const share = error / cell.tolerance;
    return [name, error.toExponential(2), h(share > 1 ? "span.bad" : "span", {}, `${percent(share, 2)} of the tolerance`)];
  });
  return rows.length ? [table(["of", "error", "share"], rows), h("p.note", {}, `Relative to float64, of the worst row; the tolerance is ${cell.tolerance}.`)] : null;
}

function memory(cell) {
  const phases = [
    ["after the inputs", cell.mem_after_inputs_MiB], ["peak of the forward", cell.forward_peak_MiB],
    ["before the backward", cell.mem_before_backward_MiB], ["saved for the backward", cell.saved_activations_MiB],
    ["peak of the backward", cell.backward_peak_MiB],
  ].filter(([, value]) => known(value));
  const most = Math.max(...phases.map(([, value]) => value));
  return phases.length ? h("div.phases", {}, phases.map(([name, value]) =>
    h("div.win", {}, h("span.name", {}, name), h("span.track", { "aria-hidden": "true" }, h("span", { style: `width:${most ? (100 * value) / most : 0}%` })), h("span.count", {}, `${number(value)} MiB`)))) : null;
}

function kernels(cell) {
  const lists = ["Forward", "Backward"].map((title, i) => [title, cell.kernels[i]]).filter(([, own]) => own.length);
  return lists.length ? lists.map(([title, own]) => [h("h4", {}, title), h("ol.kernels", {}, own.map((index) => h("li", {}, h("code", {}, RUN.kernels[index]))))]) : null;
}

function machineState(cell) {
  const [round, taken, clock, power, temperature, events, discarded] = RUN.windowFields.map((_, i) => i);
  const windows = cell.windows.map((one) => [
    String(one[round] + 1), String(one[taken] ?? ""), number(one[clock]), number(one[power]), number(one[temperature]),
    one[discarded] ? `discarded: ${one[discarded]}` : (one[events] || []).join(", "),
  ]);
  const headers = ["round", "samples", "SM clock, MHz", "power, W", "temperature, °C", "remarks"];
  const kept = headers.map((_, i) => windows.some((row) => row[i]));
  const told = facts([
    ["SM clock", known(cell.sm_clock_MHz) ? `${number(cell.sm_clock_MHz)} MHz${cell.clock_regime ? `, ${cell.clock_regime}` : ""}` : ""],
    ["Power", known(cell.power_W) ? `${number(cell.power_W)} W` : ""],
    ["Temperature", known(cell.temperature_C) ? `${number(cell.temperature_C)} °C` : ""],
    ["Bound by", cell.bound_by], ["Backend version", cell.backend_version], ["Compiling", ms(cell.compile_ms)],
    ["Started", cell.started_at], ["Took", known(cell.seconds) ? `${number(cell.seconds)} s` : ""],
  ]);
  const shown = windows.length ? h("details", {}, h("summary", {}, `${windows.length} windows`), h("div.scroll", { tabindex: 0, role: "region", "aria-label": "Windows" }, table(headers.filter((_, i) => kept[i]), windows.map((row) => row.filter((_, i) => kept[i]))))) : null;
  return told || shown ? [told, shown] : null;
}

function again(cell) {
  const command = h("code", { id: "command" }, `${cell.command} ${RUN.command}`);
  const said = h("span", { role: "status" });
  const copy = h("button.button", { type: "button", onclick: async () => {
    try {
      await navigator.clipboard.writeText(command.textContent);
      said.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command);
      said.textContent = "Selected; copy it by Ctrl+C";
    }
  } }, "Copy");
  return [h("pre", { tabindex: 0, role: "region", "aria-label": "Command" }, command), h("p.line.start", {}, copy, said)];
}

const PARTS = [
  ["Times", times], ["Samples", samples], ["Errors", errors], ["Memory", memory], ["Kernels that ran", kernels],
  ["Machine", machineState], ["Measure it again", again],
];

function setUpDrawer() {
  $("drawer").addEventListener("click", (event) => { if (event.target === $("drawer")) $("drawer").close(); });
}
