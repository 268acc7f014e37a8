// --- the run, and what is chosen of it

const RUN = JSON.parse($("data").textContent);

const CELLS = RUN.cells.map((row, index) => {
  const cell = { index };
  RUN.fields.forEach((name, i) => { cell[name] = row[i]; });
  return cell;
});

const BACKENDS = new Map(RUN.backends.map((name, index) => [name, index]));

const state = {
  group: RUN.groups.length ? 0 : null,
  pass: RUN.passes[0] || "forward",
  baseline: RUN.baseline,
  hidden: new Set(),
};

const watchers = [];

/** Calls `react(changed)` after every change of the state, and once now. */
function watch(react) {
  watchers.push(react);
  react(null);
}

function change(changes) {
  Object.assign(state, changes);
  for (const react of watchers) react(changes);
}

const ofGroup = () => CELLS.filter((cell) => cell.group === state.group);
const ascending = (values) => [...new Set(values)].sort((a, b) => a - b);

/** Colour, dash and shape of a backend: those of the charts. */
function look(backend) {
  const index = BACKENDS.get(backend) ?? 0;
  const rounds = Math.floor(index / RUN.colours.length);
  return {
    colour: RUN.colours[index % RUN.colours.length],
    dash: RUN.dashes[rounds % RUN.dashes.length],
    shape: RUN.shapes[index % RUN.shapes.length],
  };
}

const OUTLINES = {
  circle: "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
  square: "M-3.5,-3.5H3.5V3.5H-3.5Z",
  "triangle-up": "M0,-4L4.2,3.4H-4.2Z",
  "triangle-down": "M0,4L4.2,-3.4H-4.2Z",
  "triangle-left": "M-4,0L3.4,-4.2V4.2Z",
  diamond: "M0,-4.6L4,0L0,4.6L-4,0Z",
  cross: "M-1.4,-4H1.4V-1.4H4V1.4H1.4V4H-1.4V1.4H-4V-1.4H-1.4Z",
};

/** A backend's line and point, as a legend shows them. */
function swatch(backend, line = true) {
  const { colour, dash, shape } = look(backend);
  const width = line ? 30 : 12;
  return h("svg.swatch", { width, height: 12, viewBox: `${-width / 2} -6 ${width} 12`, "aria-hidden": "true" },
    line && dash ? h("line", { x1: -14, x2: 14, y1: 0, y2: 0, stroke: colour, "stroke-width": 2, "stroke-dasharray": dash.join(" ") }) : null,
    h("path", { d: OUTLINES[shape], fill: colour }));
}
