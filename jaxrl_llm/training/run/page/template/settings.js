// Settings: what was changed first, then all; of several runs, those that differ.

const written = (value) => (value === undefined ? "–" : typeof value === "string" ? value || '""' : JSON.stringify(value));
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
const OF_THE_PLACE = ["name", "run_dir", "resume"];

function showSettings(run) {
  const names = Object.keys(run.settings);
  if (!names.length) return null;
  const changed = names.filter((name) => !OF_THE_PLACE.includes(name) && !same(run.settings[name], run.defaults[name]));
  const groups = new Map();
  for (const name of names) {
    const prefix = name.includes(".") ? name.split(".")[0] : "the run";
    if (!groups.has(prefix)) groups.set(prefix, []);
    groups.get(prefix).push(name);
  }
  const row = (name) => make("tr", { class: changed.includes(name) ? "changed" : "" }, make("td", { class: "mono" }, name),
    make("td", { class: "mono value" }, written(run.settings[name])));
  return section("settings", "Settings",
    make("div", { class: "card", style: "padding:.2rem .9rem .5rem" },
      make("details", { open: true }, make("summary", {}, "Not the defaults ", make("span", { class: "pale" }, String(changed.length))),
        make("div", { class: "scroll" }, make("table", {},
          make("tr", {}, ["setting", "value", "default"].map((text) => make("th", {}, text))),
          changed.map((name) => make("tr", {}, make("td", { class: "mono" }, name), make("td", { class: "mono value" }, written(run.settings[name])),
            make("td", { class: "mono value pale" }, written(run.defaults[name])))))))),
    make("div", { class: "card", style: "padding:.2rem .9rem .5rem;margin-top:.7rem" },
      make("details", {}, make("summary", {}, "All ", make("span", { class: "pale" }, String(names.length))),
        [...groups].map(([prefix, members]) => make("details", {},
          make("summary", {}, prefix, make("span", { class: "pale" }, ` ${members.length}`)),
          make("div", { class: "scroll" }, make("table", {}, members.map(row))))))));
}

const headOf = (runs, first) => make("tr", {}, make("th", {}, first),
  runs.map((run, index) => make("th", { class: "number", style: `color:${color(index)}` }, run.label)));

function showDifferences(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))].filter((name) => !OF_THE_PLACE.includes(name));
  const differing = names.filter((name) => runs.some((run) => !same(run.settings[name], runs[0].settings[name])));
  const rows = differing.map((name) => make("tr", {}, make("td", { class: "mono" }, name), runs.map((run) =>
    make("td", { class: `mono value number${same(run.settings[name], runs[0].settings[name]) ? "" : " differs"}` }, written(run.settings[name])))));
  return section("settings", "Settings that differ", differing.length
    ? make("div", { class: "card scroll" }, make("table", {}, headOf(runs, "setting"), rows))
    : make("p", { class: "pale" }, "None: the runs have the same settings."));
}

function showFinal(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].sort();
  const rank = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : name.startsWith("eval/") ? 50 : name.startsWith("perf/") ? 99 : 60);
  const row = (name) => make("tr", {}, make("td", { class: "mono" }, name), runs.map((run) => {
    const curve = run.curves[name];
    if (!curve) return make("td", { class: "number pale" }, "–");
    const tail = curve.mean.slice(-Math.max(1, Math.round(curve.mean.length / 10)));
    const mean = tail.length ? tail.reduce((total, value) => total + value, 0) / tail.length : null;
    const value = curve.mean.length > 30 ? mean : curve.last;
    return make("td", { class: "number", ...told(`first ${short(curve.first)}\nlast ${short(curve.last)}`) }, short(value));
  }));
  const ordered = names.sort((a, b) => rank(a) - rank(b));
  const [first, rest] = [ordered.filter((name) => rank(name) <= 50), ordered.filter((name) => rank(name) > 50)];
  const table = (members) => make("div", { class: "scroll" }, make("table", {}, headOf(runs, "metric"), members.map(row)));
  return section("final", "Final values",
    make("p", { class: "pale" }, "The mean over the last tenth of a curve; of evaluations, and where there are few steps, the last value."),
    make("div", { class: "card" }, table(first.length ? first : rest)),
    first.length && rest.length ? make("details", {}, make("summary", {}, "Other metrics ", make("span", { class: "pale" }, String(rest.length))),
      make("div", { class: "card" }, table(rest))) : null);
}
