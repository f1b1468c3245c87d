// The page: of one run all there is, of several what compares them.

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const button = make("button", { title: "light or dark", onclick: () => ((chosen = current() === "dark" ? "light" : "dark"), apply()) });
  const current = () => chosen ?? (dark.matches ? "dark" : "light");
  const apply = () => {
    document.documentElement.dataset.theme = current();
    button.textContent = current() === "dark" ? "☀ light" : "☾ dark";
  };
  dark.addEventListener("change", apply);
  apply();
  return button;
}

// While a run goes on the page may load itself again; "#live" in its address says so.
function reloading(runs) {
  if (runs.every((run) => run.steps !== null && run.step >= run.steps)) return null;
  let timer = null;
  const box = make("input", { type: "checkbox", checked: location.hash === "#live", onchange: apply });
  function apply() {
    clearTimeout(timer);
    if (box.checked) {
      history.replaceState(null, "", "#live");
      timer = setTimeout(() => location.reload(), 30000);
    } else if (location.hash === "#live") history.replaceState(null, "", location.pathname);
  }
  apply();
  return make("label", { title: "the run writes its page about once a minute" }, box, "reload");
}

const progress = (run) => `step ${run.step.toLocaleString("en")}${run.steps === null ? "" : ` of ${run.steps.toLocaleString("en")}`}`;

function tiles(run) {
  const said = run.curves.reward ? ["loss"] : []; // on-policy it is about 0, whatever is learnt
  const found = FIRST.filter((name) => run.curves[name]?.mean.length && !said.includes(name)).slice(0, 8);
  return make("div", { class: "tiles" }, found.map((name) => {
    const { first, last, mean } = run.curves[name];
    const few = mean.length <= 30;
    const tail = mean.slice(-Math.ceil(mean.length / 10));
    const value = few ? last : tail.reduce((total, one) => total + one, 0) / tail.length;
    return make("div", { class: "card tile", title: few ? "last value; first value below" : "mean over the last tenth; first value below" },
      make("span", { class: "pale small" }, name), make("b", {}, short(value)), make("span", { class: "pale small" }, `from ${short(first)}`));
  }));
}

function labels(runs) {
  // what tells runs apart: their names, or else the ends of their folders' paths
  const names = runs.map((run) => run.name);
  const ends = runs.map((run) => run.folder.split("/").filter(Boolean).pop() ?? run.name);
  const paths = runs.map((run) => run.folder);
  const all = [names, ends, paths].find((some) => new Set(some).size === some.length) ?? paths.map((path, index) => `${path} (${index + 1})`);
  runs.forEach((run, index) => (run.label = all[index]));
}

function showPage({ runs, written: when }) {
  labels(runs);
  const hidden = new Set();
  const several = runs.length > 1;
  const curves = showCurves(runs, hidden);
  const [run] = runs;
  const sections = several ? [showFinal(runs), curves.element, showDifferences(runs)]
    : [curves.element, showSamples(run), showHeldOut(run), showLengths(run), showPrompts(run), showSettings(run)];
  const shown = sections.filter(Boolean);
  const title = several ? `${runs.length} runs` : run.name;
  const about = several ? `written ${when}` : `${progress(run)} · written ${when}`;
  const keys = several ? make("div", { class: "controls" }, runs.map((one, index) => {
    const entry = make("span", { class: "key", title: one.folder, onclick: () => {
      hidden.has(index) ? hidden.delete(index) : hidden.add(index);
      entry.classList.toggle("off");
      curves.redraw();
    } }, make("i", { style: `background:${color(index)}` }), one.label, make("span", { class: "pale small" }, progress(one)));
    return entry;
  })) : tiles(run);
  document.getElementById("head").append(
    make("div", { class: "top" }, make("h1", {}, title), make("span", { class: "pale" }, about), make("span", { class: "space" }), reloading(runs), theme()));
  document.getElementById("main").append(
    make("nav", {}, shown.map((part) => make("a", { href: `#${part.id}` }, part.querySelector("h2").textContent))),
    keys, ...shown, make("footer", {}, several ? "" : `${run.folder} · `, "made by jaxrl-llm report, from metrics.jsonl and completions.jsonl"));
  curves.redraw();
}
