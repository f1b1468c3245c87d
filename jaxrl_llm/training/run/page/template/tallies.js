// Counts over all completions that were written: lengths, and which prompts are solved.

function showLengths(run) {
  const { lengths } = run;
  if (!lengths) return null;
  const parts = Math.max(...lengths.counts.map(([time]) => time)) + 1;
  const slots = Math.max(...lengths.counts.map(([, bucket]) => bucket)) + 1;
  const range = (bucket) => {
    const from = bucket * lengths.width;
    return lengths.width === 1 ? `${from} token(s)` : `${from} to ${from + lengths.width - 1} tokens`;
  };
  const svgs = [make("svg"), make("svg")];
  function draw() {
    for (const [svg, drawn] of [[svgs[0], histogram], [svgs[1], overTime]]) {
      const width = svg.parentElement.clientWidth - 30;
      if (width <= 0) continue;
      svg.setAttribute("viewBox", `0 0 ${width} 210`);
      svg.setAttribute("height", 210);
      clear(svg);
      drawn(svg, width);
    }
  }
  const lengthMarks = (svg, place, vertical, count) => {
    for (const mark of ticks(0, slots * lengths.width, count).filter(Number.isInteger)) {
      const at = place(mark / lengths.width + 0.5 * (lengths.width === 1));
      if (mark / lengths.width <= slots - 0.5 * (lengths.width === 1)) svg.append(make("text", vertical ? { x: 34, y: at + 3.5, "text-anchor": "end" }
        : { x: at, y: 206, "text-anchor": "middle" }, mark.toLocaleString("en")));
    }
  };
  function histogram(svg, width) {
    const sums = Array.from({ length: slots }, () => [0, 0]);
    for (const [, bucket, ended, count] of lengths.counts) sums[bucket][ended] += count;
    const most = Math.max(...sums.map(([cut, ended]) => cut + ended));
    const x = (bucket) => 40 + (bucket / slots) * (width - 46);
    const y = (count) => 190 - (count / most) * 178;
    for (const mark of ticks(0, most, 4)) {
      svg.append(make("line", { class: "grid", x1: 40, x2: width - 6, y1: y(mark), y2: y(mark) }));
      svg.append(make("text", { x: 34, y: y(mark) + 3.5, "text-anchor": "end" }, short(mark)));
    }
    sums.forEach(([cut, ended], bucket) => {
      const text = `${range(bucket)}\nended: ${ended.toLocaleString("en")}\ncut: ${cut.toLocaleString("en")}`;
      const bar = { x: x(bucket) + 0.5, width: Math.max(1, x(bucket + 1) - x(bucket) - 1), ...told(text) };
      svg.append(make("rect", { ...bar, y: y(ended), height: 190 - y(ended), fill: "var(--accent)" }));
      svg.append(make("rect", { ...bar, y: y(ended + cut), height: y(ended) - y(ended + cut), fill: "var(--bad)" }));
    });
    lengthMarks(svg, x, false, Math.min(8, width / 70));
  }
  function overTime(svg, width) {
    const counts = new Map();
    const totals = Array(parts).fill(0);
    for (const [time, bucket, , count] of lengths.counts) {
      const key = time * slots + bucket;
      counts.set(key, (counts.get(key) ?? 0) + count);
      totals[time] += count;
    }
    const x = (time) => 40 + (time / parts) * (width - 46);
    const y = (bucket) => 190 - (bucket / slots) * 178;
    const most = Math.max(...[...counts].map(([key, count]) => count / totals[Math.floor(key / slots)]));
    for (const [key, count] of counts) {
      const [time, bucket] = [Math.floor(key / slots), key % slots];
      const steps = `steps ${time * lengths.time} to ${(time + 1) * lengths.time - 1}`;
      const part = count / totals[time];
      svg.append(make("rect", { x: x(time), y: y(bucket + 1), width: x(time + 1) - x(time) + 0.3, height: y(bucket) - y(bucket + 1) + 0.3,
        fill: `rgb(var(--heat) / ${(0.08 + (0.92 * part) / most).toFixed(3)})`,
        ...told(`${steps}\n${range(bucket)}: ${share(part, 1)} of completions`) }));
    }
    for (const mark of ticks(0, parts * lengths.time, Math.min(6, width / 90)).filter(Number.isInteger)) {
      svg.append(make("text", { x: x(mark / lengths.time), y: 206, "text-anchor": "middle" }, mark.toLocaleString("en")));
    }
    lengthMarks(svg, y, true, 6);
  }
  const charts = make("div", { class: "pair" },
    make("div", { class: "card" }, make("h3", {}, "All completions ", key("var(--accent)", "ended"), " ", key("var(--bad)", "cut")), svgs[0]),
    make("div", { class: "card" }, make("h3", {}, "Over time ", make("span", { class: "pale small" }, "share by length, against steps")), svgs[1]));
  onWidth(charts, draw);
  return section("lengths", "Lengths in tokens", charts);
}

const key = (background, text) =>
  make("span", { class: "small pale", style: "margin-left:.7rem;font-weight:400" },
    make("i", { style: `display:inline-block;width:.7rem;height:.7rem;border-radius:2px;background:${background}` }), ` ${text}`);

function showPrompts(run) {
  const { prompts } = run;
  if (!prompts) return null;
  const all = prompts.never + prompts.sometimes + prompts.always;
  const kinds = [["never", "var(--bad)"], ["sometimes", "rgb(var(--heat) / 45%)"], ["always", "var(--good)"]];
  const bar = make("div", { class: "bar" }, kinds.filter(([kind]) => prompts[kind]).map(([kind, background]) =>
    make("span", { style: `flex:${prompts[kind]};background:${background}`, ...told(`${kind} solved: ${prompts[kind]}`) })));
  const keys = make("div", {}, kinds.map(([kind, background]) =>
    key(background, `${kind}: ${prompts[kind].toLocaleString("en")} (${share(prompts[kind], all)})`)));
  const most = Math.max(...prompts.shares);
  const histogram = make("div", { style: "display:flex;align-items:flex-end;gap:2px;height:7rem;margin-top:.8rem" }, prompts.shares.map((count, part) =>
    make("span", { style: `flex:1;background:var(--accent);height:${(100 * count) / most}%;border-radius:2px 2px 0 0`,
      ...told(`${10 * part} to ${10 * part + (part < 9 ? 9 : 10)} % of completions solve it:\n${count.toLocaleString("en")} prompts`) })));
  const axis = make("div", { class: "pale small", style: "display:flex;justify-content:space-between" }, make("span", {}, "0 %"),
    make("span", {}, "prompts by the share of their completions that solve them"), make("span", {}, "100 %"));
  const titles = prompts.any_solved ? ["Never solved", "Always solved"] : ["Least reward", "Most reward"];
  const lists = prompts.lists.map((list, index) => make("div", { class: "card" },
    make("details", { open: list.length > 0 }, make("summary", {}, titles[index], make("span", { class: "pale" }, ` ${list.length ? "the most tried first" : "none"}`)),
      list.length ? make("div", { class: "scroll", style: "max-height:22rem;overflow-y:auto" }, make("table", {},
        make("tr", {}, ["row", "completions", "mean reward"].map((text) => make("th", { class: "number" }, text)), make("th", {}, "prompt")),
        list.map((tally) => make("tr", {}, [tally.row ?? "–", tally.samples, short(tally.mean)].map((text) =>
          make("td", { class: "number" }, String(text))), make("td", { class: "text" }, tally.text))))) : null)));
  const what = prompts.any_solved ? `A completion solves its prompt where ${prompts.by} gives it 1 or more.`
    : `No completion got 1 or more from ${prompts.by}, which would say that it solves its prompt.`;
  return section("prompts", "Prompts",
    make("p", { class: "pale" }, `${what} Counted over ${prompts.covers ?? "the completions that the run wrote"}, of ${all.toLocaleString("en")} prompts.`),
    prompts.any_solved ? make("div", { class: "card", style: "padding:.7rem .9rem;margin-bottom:.7rem" }, bar, keys, histogram, axis) : null,
    make("div", { class: "pair" }, lists));
}
