// --- the page

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

let printing = false;

/** What charts are drawn for; paper is light. */
const theme = () => (printing ? "light" : chosenTheme());

const chosenTheme = () => document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light");

function setUpTheme() {
  const kept = { get: () => { try { return localStorage.getItem("theme"); } catch { return null; } }, set: (name) => { try { localStorage.setItem("theme", name); } catch { /* not kept */ } } };
  if (["light", "dark"].includes(kept.get())) document.documentElement.dataset.theme = kept.get();
  const show = () => $("theme").setAttribute("aria-pressed", String(chosenTheme() === "dark"));
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = chosenTheme() === "dark" ? "light" : "dark";
    kept.set(chosenTheme());
    show();
    redraw();
  });
  prefersDark.addEventListener("change", () => { show(); redraw(); });
  show();
}

function setUpChoices() {
  const names = { forward: "Forward", backward: "Backward", step: "Step" };
  $("pass").append(...RUN.passes.map((pass) => h("label", {},
    h("input", { type: "radio", name: "pass", value: pass, checked: pass === state.pass, onchange: () => change({ pass }) }), h("span", {}, names[pass]))));
  $("pass").hidden = !RUN.passes.length;
  $("group-choice").hidden = RUN.groups.length < 2;
  options($("group"), RUN.groups.map((name, index) => [String(index), name]), "0");
  $("group").addEventListener("change", () => change({ group: Number($("group").value) }));
  watch((changed) => { if (!changed || "group" in changed || "pass" in changed) showAnswer(); });
}

setUpTheme();
setUpTable();
setUpChoices();
setUpDrawer();
setUpPivots();
setUpCharts();
