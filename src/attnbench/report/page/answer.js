// --- who is the fastest, and whether that is certain

function showAnswer() {
  const group = RUN.groups[state.group];
  const told = RUN.answers.filter((one) => one.group === group && one.what === state.pass);
  const ranked = standings(told);
  $("headline").replaceChildren(...headline(told.length, ranked));
  $("wins").replaceChildren(...ranked.map((one) => standing(one, told.length)));
  $("fastest").replaceChildren(told.length ? matrix(told) : h("p.note", {}, "Nothing was timed."));
}

/** At how many shapes each backend is the fastest beyond doubt, and at how many noise cannot tell it from the fastest. */
function standings(told) {
  const found = new Map();
  const of = (name) => found.get(name) || found.set(name, { name, alone: 0, level: 0 }).get(name);
  for (const { backend, tied } of told) {
    if (tied) tied.forEach((name) => { of(name).level += 1; });
    else if (backend) of(backend).alone += 1;
  }
  return [...found.values()].sort((a, b) => b.alone + b.level - a.alone - a.level || b.alone - a.alone || BACKENDS.get(a.name) - BACKENDS.get(b.name));
}

function headline(shapes, ranked) {
  if (!ranked.length) return ["No cell of these cases is right and has a time of this pass."];
  const most = ranked[0].alone + ranked[0].level;
  const best = ranked.filter((one) => one.alone + one.level === most);
  const names = best.flatMap((one, i) => [i ? (i === best.length - 1 ? " and " : ", ") : "", h("strong", {}, one.name)]);
  const verb = best.length > 1 ? " are" : " is";
  const doubt = best[0].level ? ", or too close to it to call," : "";
  return [...names, `${verb} the fastest${doubt} at ${most} of ${shapes} shape${shapes === 1 ? "" : "s"}.`];
}

function standing({ name, alone, level }, shapes) {
  const part = (count, kind) => h(`span.${kind}`, { style: `width:${(100 * count) / shapes}%` });
  const said = [alone ? `${alone} alone` : "", level ? `${level} too close to call` : ""].filter(Boolean).join(", ");
  return h("div.win", {}, h("span.name", {}, swatch(name), name), h("span.track", { "aria-hidden": "true" }, part(alone, "alone"), part(level, "level")), h("span.count", {}, said));
}

function matrix(told) {
  const widths = ascending(told.map((one) => one.d_model));
  const shapes = new Map(told.map((one) => [`${one.seq_len} ${one.d_model}`, one]));
  const rows = ascending(told.map((one) => one.seq_len)).map((length) => [
    length.toLocaleString("en-US"), ...widths.map((width) => verdict(shapes.get(`${length} ${width}`))),
  ]);
  return table(["seq_len", ...widths.map((width) => `d_model ${width}`)], rows, { class: "matrix", style: `--columns: ${widths.length}` });
}

function verdict(one) {
  if (!one) return "";
  if (!one.backend) return h("span.muted", {}, "none was right");
  const noise = known(one.noise) ? ` ± ${percent(one.noise, 2)}` : "";
  const rest = one.tied
    ? h("span.tied", {}, "Too close: ", one.tied.slice(1).join(", "))
    : h("span.muted", {}, one.runner_up ? `${percent(one.margin)} ahead of ${one.runner_up}` : "the only one right");
  return h(`div.verdict${one.tied ? ".close" : ""}`, {},
    h("span.who", {}, swatch(one.backend, false), one.backend), h("span.ms", {}, `${number(one.ms)} ms${noise}`), rest);
}
