// All metrics, in groups by what their names begin with.

const FIRST = ["reward", "eval/accuracy", "eval/reward", "loss", "eval/loss", "rewards/accuracies", "rewards/margins",
  "accuracy", "entropy", "kl", "completions/mean_length", "grad_norm"];

const color = (run) => `var(--run-${run % 8})`;

function curvesOf(runs, name) {
  return runs.flatMap((run, index) => {
    const curve = run.curves[name];
    if (!curve) return [];
    return [{ ...curve, run: index, color: color(index), steps: run.axes[curve.axis] }];
  });
}

function isFlat(curves) {
  const values = curves.flatMap((curve) => [...curve.mean, ...(curve.least ?? []), ...(curve.greatest ?? [])]);
  return new Set(values).size <= 1 && curves.every((curve) => !curve.not_finite);
}

function groupsOfMetrics(names) {
  const groups = new Map([["Main", FIRST.filter((name) => names.includes(name))]]);
  for (const name of names.filter((name) => !FIRST.includes(name))) {
    const prefix = name.includes("/") ? name.split("/")[0] : name === "step_time" ? "perf" : "more of the step";
    if (!groups.has(prefix)) groups.set(prefix, []);
    groups.get(prefix).push(name);
  }
  const rank = (prefix) => ["Main", "eval", "rewards", "more of the step", "completions"].indexOf(prefix);
  const last = (prefix) => (prefix === "perf" ? 99 : rank(prefix) < 0 ? 9 : rank(prefix));
  return [...groups].filter(([, members]) => members.length).sort((a, b) => last(a[0]) - last(b[0]));
}

function showCurves(runs, hidden) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].sort();
  const charts = [];
  const settings = { smoothing: 0.6, log: false, hidden, hover: (step) => charts.forEach((chart) => chart.point(step)) };
  const redraw = () => charts.forEach((chart) => (chart.draw(), chart.point(null)));
  const body = make("div");
  for (const [prefix, members] of groupsOfMetrics(names)) {
    const found = members.map((name) => [name, curvesOf(runs, name)]);
    const flat = found.filter(([, curves]) => isFlat(curves));
    const drawn = found.filter(([, curves]) => !isFlat(curves)).map(([name, curves]) => new Chart(name, curves, settings));
    charts.push(...drawn);
    const constants = flat.map(([name, curves]) => `${name} = ${short(curves[0].last)}`).join(", ");
    const open = drawn.length > 0 && prefix !== "perf";
    const count = make("span", { class: "pale" }, ` ${drawn.length + flat.length}`);
    body.append(make("details", { open, ontoggle: redraw }, make("summary", {}, prefix, count),
      make("div", { class: "charts" }, drawn.map((chart) => chart.element)),
      constants ? make("p", { class: "pale small" }, `constant: ${constants}`) : null));
  }
  const bad = names.flatMap((name) => curvesOf(runs, name).filter((curve) => curve.not_finite)
    .map((curve) => `${name} (${curve.not_finite}×${runs.length > 1 ? `, ${runs[curve.run].name}` : ""})`));
  const search = make("input", { type: "search", placeholder: "find a metric", oninput: () => {
    const wanted = search.value.toLowerCase();
    for (const chart of charts) chart.element.hidden = !chart.name.toLowerCase().includes(wanted);
    for (const group of body.children) group.hidden = wanted && !group.querySelector(".chart:not([hidden])");
    redraw();
  } });
  const smooth = make("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0.6, oninput: () => {
    settings.smoothing = Number(smooth.value);
    redraw();
  } });
  const log = make("input", { type: "checkbox", onchange: () => ((settings.log = log.checked), redraw()) });
  onWidth(body, redraw);
  const element = section("curves", "Curves",
    make("div", { class: "controls" }, search, make("label", {}, "smoothing", smooth), make("label", {}, log, "log scale")),
    bad.length ? make("p", { class: "small" }, `Not finite at some steps, which the curves leave out: ${bad.join(", ")}.`) : null,
    body);
  return { element, redraw };
}
