// Completions over time: the groups of a step side by side, tokens by how likely, how good, how sure they were.

// What tokens are coloured by: its name, its values, and whether they have two sides of 0.
function quantities(sample, settings) {
  const { logprobs, old_logprobs: old, ref_logprobs: ref, advantages, entropy, values } = sample.by_token;
  const plain = (settings["sampling.temperature"] ?? 1) === 1;
  const policy = old ?? (plain ? logprobs : null);
  const each = (one, other, of) => one.map((a, i) => (a === null || other[i] === null ? null : of(a, other[i])));
  const constant = logprobs && sample.advantage !== null ? logprobs.map(() => sample.advantage) : null;
  return [
    ["log-prob", logprobs, false],
    ["advantage", advantages ?? constant, true],
    ["entropy", entropy, false],
    ["KL to the reference", ref && policy ? each(ref, policy, (r, p) => Math.exp(r - p) - 1 - (r - p)) : null, false],
    ["ratio learner / sampler", old && logprobs && plain ? each(old, logprobs, (o, l) => Math.exp(o - l)) : null, true, 1],
    ["value", values, true],
  ].filter(([, found]) => found?.some((value) => value !== null));
}

function tint(value, extent, signed, center = 0) {
  if (value === null || value === undefined) return "transparent";
  if (!signed) {
    const [low, high] = extent;
    const part = high > low ? (value - low) / (high - low) : 0;
    return `rgb(var(--heat) / ${(0.72 * part).toFixed(3)})`;
  }
  const far = Math.max(Math.abs(extent[0] - center), Math.abs(extent[1] - center)) || 1;
  const part = (value - center) / far;
  return `rgb(var(${part < 0 ? "--cold" : "--heat"}) / ${(0.72 * Math.abs(part)).toFixed(3)})`;
}

function heatMap(sample, settings, wanted) {
  const found = quantities(sample, settings);
  const chosen = found.find(([name]) => name === wanted);
  if (!chosen) return null;
  const [name, values, signed, center] = chosen;
  const reversed = name === "log-prob"; // the less likely, the stronger
  const shown = values.map((value) => (value === null ? null : reversed ? -value : value));
  const known = shown.filter((value) => value !== null);
  const extent = [signed ? Math.min(...known) : 0, Math.max(...known)];
  return make("div", {}, sample.by_token.texts.map((text, index) => {
    const lines = found.map(([other, all]) => `${other}: ${short(all[index])}`).join("\n");
    const visible = text === "" ? "∅" : text.replaceAll("\n", "⏎\n");
    const style = `background:${tint(shown[index], extent, signed, center)}`;
    return make("span", { class: "token", style, ...told(`${JSON.stringify(text)}\n${lines}`) }, visible);
  }), sample.tokens > values.length ? make("span", { class: "pale" }, ` … ${sample.tokens - values.length} tokens more`) : null);
}

const advantageChip = (value, far) =>
  value === null ? "" : make("span", { class: "chip", style: `background:${tint(value, [-far, far], true)}` }, short(value));

function groupCard(group, settings, wanted) {
  const { samples } = group;
  const functions = Object.keys(samples[0].rewards);
  const several = functions.length > 1;
  const told = Object.keys(samples[0].extra ?? {});
  const advantages = samples.some((sample) => sample.advantage !== null);
  const far = Math.max(...samples.map((sample) => Math.abs(sample.advantage ?? 0)));
  const order = [...samples].sort((a, b) => Boolean(b.by_token) - Boolean(a.by_token) || b.reward - a.reward);
  const mean = samples.reduce((total, sample) => total + (sample.reward ?? 0), 0) / samples.length;
  const number = (text) => make("th", { class: "number" }, text);
  const head = make("tr", {}, make("th", {}, "completion"), number("reward"), several ? functions.map(number) : [],
    advantages ? number("advantage") : null, number("tokens"), number("log-prob / token"), told.map((name) => make("th", {}, name)));
  const rows = order.map((sample) => {
    const cell = (value) => make("td", { class: "number" }, value);
    const text = (sample.by_token && heatMap(sample, settings, wanted)) || make("div", {}, sample.text || "∅");
    return make("tr", {}, make("td", { class: "text" }, text), cell(short(sample.reward)),
      several ? functions.map((name) => cell(short(sample.rewards[name]))) : [],
      advantages ? cell(advantageChip(sample.advantage, far)) : null,
      cell(sample.finished ? String(sample.tokens) : `${sample.tokens} ✂`),
      cell(sample.logprob === null ? "–" : short(sample.logprob / Math.max(1, sample.tokens))),
      told.map((name) => make("td", {}, sample.extra?.[name] ?? "")));
  });
  const where = group.row === null ? "" : `row ${group.row} of the data · `;
  return make("div", { class: "card group" },
    make("div", { class: "pale small" }, `${where}${samples.length} completion(s), mean reward ${short(mean)}`),
    make("div", { class: "prompt text" }, group.prompt || "∅"),
    make("div", { class: "scroll" }, make("table", {}, head, rows)));
}

function showSamples(run) {
  const steps = run.samples;
  if (!steps.length) return null;
  const every = new Set();
  for (const { groups } of steps) for (const group of groups) for (const sample of group.samples) {
    if (sample.by_token) quantities(sample, run.settings).forEach(([name]) => every.add(name));
  }
  const body = make("div");
  const label = make("b");
  const choice = make("select", { onchange: draw }, [...every].map((name) => make("option", {}, name)));
  const slider = make("input", { type: "range", class: "long", min: 0, max: steps.length - 1, value: steps.length - 1, oninput: draw,
    "aria-label": "step" });
  const legend = make("span", { class: "legend small pale" });
  function draw() {
    const { step, groups } = steps[slider.value];
    label.textContent = `step ${step.toLocaleString("en")}`;
    const signed = !["log-prob", "entropy", "KL to the reference"].includes(choice.value);
    const ends = choice.value === "log-prob" ? ["likely", "unlikely"] : choice.value.startsWith("ratio") ? ["below 1", "above 1"]
      : signed ? ["below 0", "above 0"] : ["0", "most"];
    const from = signed ? "rgb(var(--cold) / 72%), transparent" : "transparent";
    clear(legend, ends[0], make("i", { style: `background:linear-gradient(90deg, ${from}, rgb(var(--heat) / 72%))` }), ends[1]);
    clear(body, groups.map((group) => groupCard(group, run.settings, choice.value)));
  }
  draw();
  return section("samples", "Samples",
    make("p", { class: "pale" }, "The completions of a prompt beside each other, the best first; tokens that were written one by one are coloured. ",
      `Of ${steps.length} step(s), spread over the run. ✂ was cut at the length limit.`),
    make("div", { class: "controls" }, slider, label, every.size ? make("label", {}, "tokens by", choice) : null, every.size ? legend : null),
    body);
}

function showHeldOut(run) {
  const prompts = run.held_out;
  if (!prompts.length) return null;
  const body = make("div", { class: "card scroll", style: "padding:.3rem .5rem" });
  const choice = make("select", { onchange: draw, style: "max-width:70vw" },
    prompts.map((prompt, index) => make("option", { value: index }, prompt.prompt.replace(/\s+/g, " ").slice(-90) || "∅")));
  function draw() {
    const { prompt, answers } = prompts[choice.value];
    const number = (text) => make("td", { class: "number" }, text);
    clear(body, make("table", {},
      make("tr", {}, make("th", { class: "number" }, "step"), make("th", { class: "number" }, "reward"), make("th", {}, "greedy completion")),
      answers.map((answer) => make("tr", {}, number(answer.step.toLocaleString("en")), number(short(answer.reward)),
        make("td", { class: "text" }, make("div", {}, answer.text || "∅"))))));
    shown.textContent = prompt;
  }
  const shown = make("div", { class: "prompt text" });
  draw();
  return section("held-out", "One prompt over time",
    make("div", { class: "controls" }, make("label", {}, "held-out prompt", choice)),
    make("div", { class: "card group" }, shown), body);
}
