// One chart of one metric: a curve for each run, what was measured pale behind its running mean.

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let number = Math.ceil(low / step - 1e-9); number * step <= high + step * 1e-9; number++) found.push(number * step || 0);
  return found;
}

// A mark of an axis, with as many digits as tell it from its neighbours.
function markText(mark, marks) {
  const apart = marks.length > 1 ? marks[1] - marks[0] : Math.abs(mark) || 1;
  const most = Math.max(...marks.map(Math.abs));
  if (mark === 0) return "0";
  if (most >= 1e6 || most < 1e-3) return Number(mark.toPrecision(3)).toExponential().replace("e+", "e");
  return mark.toLocaleString("en", { maximumFractionDigits: Math.max(0, Math.ceil(-Math.log10(apart) - 1e-9)) });
}

function powers(low, high) {
  const found = [];
  for (let power = Math.ceil(low - 1e-9); power <= high + 1e-9; power++) found.push(power);
  return found.length >= 2 ? found : [low, high];
}

function smoothed(values, weight) {
  let mean = 0, seen = 0; // weights of a mean that begins with nothing are put right
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    seen = weight * seen + (1 - weight);
    return mean / seen;
  });
}

class Chart {
  // curves: of each run {color, steps, mean, least, greatest}; points: as few as evaluations are, which are marked
  constructor(name, curves, settings) {
    Object.assign(this, { name, curves, settings });
    this.value = make("span");
    const title = make("div", { class: "title", title: "click: wide", onclick: () => this.widen() });
    title.append(make("b", {}, name), this.value);
    this.svg = make("svg", { role: "img", "aria-label": name });
    this.element = make("div", { class: "card chart" }, title, this.svg);
    this.svg.addEventListener("mousemove", (event) => settings.hover(this.stepAt(event)));
    this.svg.addEventListener("mouseleave", () => settings.hover(null));
    this.point(null);
  }

  widen() {
    this.element.classList.toggle("wide");
    this.draw();
  }

  get shown() {
    return this.curves.filter((curve) => !this.settings.hidden.has(curve.run));
  }

  draw() {
    const width = this.element.clientWidth - 24;
    if (width <= 0) return;
    const height = this.element.classList.contains("wide") ? 320 : 150;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    clear(this.svg);
    const shown = this.shown;
    const log = this.settings.log;
    const usable = (value) => value !== null && (!log || value > 0);
    const every = shown.flatMap((curve) => [...curve.mean, ...(curve.least ?? []), ...(curve.greatest ?? [])]);
    const values = every.filter(usable).map((value) => (log ? Math.log10(value) : value));
    const steps = shown.flatMap((curve) => curve.steps);
    if (!values.length) {
      this.svg.append(make("text", { x: 4, y: height / 2 }, log && every.length ? "nothing above 0" : "no finite value"));
      this.scale = null;
      return;
    }
    let [low, high] = [Math.min(...values), Math.max(...values)];
    const room = high > low ? (high - low) * 0.06 : Math.max(Math.abs(high) * 0.1, 1e-12);
    [low, high] = [low - room, high + room];
    let [first, last] = [Math.min(...steps), Math.max(...steps)];
    if (first === last) [first, last] = [first - 1, last + 1];
    const marks = log ? powers(low, high) : ticks(low, high, height > 200 ? 7 : 4);
    const named = marks.map((mark) => (log ? short(10 ** mark) : markText(mark, marks)));
    const left = 8 + 6.2 * Math.max(...named.map((text) => text.length));
    const [right, top, bottom] = [width - 6, 8, height - 18];
    const x = (step) => left + ((step - first) / (last - first)) * (right - left);
    const y = (value) => bottom - (((log ? Math.log10(value) : value) - low) / (high - low)) * (bottom - top);
    this.scale = { x, y, first, last, left, right, top, bottom };
    marks.forEach((mark, index) => {
      const at = bottom - ((mark - low) / (high - low)) * (bottom - top);
      this.svg.append(make("line", { class: "grid", x1: left, x2: right, y1: at, y2: at }));
      this.svg.append(make("text", { x: left - 5, y: at + 3.5, "text-anchor": "end" }, named[index]));
    });
    this.svg.append(make("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
    for (const mark of ticks(first, last, Math.max(2, Math.min(6, width / 90))).filter(Number.isInteger)) {
      this.svg.append(make("text", { x: x(mark), y: height - 5, "text-anchor": "middle" }, mark.toLocaleString("en")));
    }
    for (const curve of shown) this.drawCurve(curve, usable);
    this.cross = make("line", { class: "cross", y1: top, y2: bottom, visibility: "hidden" });
    this.dots = shown.map((curve) => make("circle", { r: 3.4, fill: curve.color, visibility: "hidden" }));
    this.svg.append(this.cross, ...this.dots);
  }

  path(steps, values, usable) {
    const { x, y } = this.scale;
    let pen = "M";
    return steps.map((step, index) => {
      if (!usable(values[index])) return "";
      const point = `${pen}${x(step).toFixed(1)} ${y(values[index]).toFixed(1)}`;
      pen = "L";
      return point;
    }).join("");
  }

  drawCurve(curve, usable) {
    const { x, y, bottom } = this.scale;
    const { steps, mean, least, greatest, color } = curve;
    const few = steps.length <= 30;
    if (least && !this.settings.log) {
      const back = [...steps].reverse();
      const band = this.path([...steps, ...back], [...greatest, ...[...least].reverse()], usable);
      this.svg.append(make("path", { class: "band", d: `${band}Z`, fill: color }));
    } else if (least) {
      const clipped = (values) => steps.map((step, i) => `${x(step).toFixed(1)} ${(values[i] > 0 ? y(values[i]) : bottom).toFixed(1)}`);
      const band = [...clipped(greatest), ...clipped(least).reverse()].join("L");
      this.svg.append(make("path", { class: "band", d: `M${band}Z`, fill: color }));
    }
    const weight = few ? 0 : this.settings.smoothing;
    curve.drawn = smoothed(mean, weight);
    if (weight > 0) this.svg.append(make("path", { class: "raw", stroke: color, d: this.path(steps, mean, usable) }));
    this.svg.append(make("path", { class: "curve", stroke: color, d: this.path(steps, curve.drawn, usable) }));
    if (few) {
      steps.forEach((step, index) => {
        if (usable(mean[index])) this.svg.append(make("circle", { cx: x(step), cy: y(mean[index]), r: 2.6, fill: color }));
      });
    }
  }

  stepAt(event) {
    if (!this.scale) return null;
    const box = this.svg.getBoundingClientRect();
    const { first, last, left, right } = this.scale;
    const at = (event.clientX - box.left - left) / (right - left);
    return first + Math.min(1, Math.max(0, at)) * (last - first);
  }

  point(step) {
    // shows the values nearest to a step; without one, the last ones
    const texts = [];
    this.shown.forEach((curve, index) => {
      let near = curve.steps.length - 1;
      if (step !== null) {
        near = curve.steps.findIndex((other) => other >= step);
        if (near < 0) near = curve.steps.length - 1;
        if (near > 0 && step - curve.steps[near - 1] < curve.steps[near] - step) near -= 1;
      }
      const value = step === null ? curve.last : curve.mean[near];
      const text = make("span", this.curves.length > 1 ? { style: `color:${curve.color}` } : {}, short(value));
      if (step !== null && !index) texts.push(make("span", { class: "pale" }, `step ${curve.steps[near]} `));
      texts.push(text, " ");
      const dot = this.dots?.[index];
      if (!dot || !this.scale) return;
      const height = curve.drawn?.[near];
      const visible = step !== null && height !== null && height !== undefined && (!this.settings.log || height > 0);
      dot.setAttribute("visibility", visible ? "visible" : "hidden");
      if (!visible) return;
      dot.setAttribute("cx", this.scale.x(curve.steps[near]));
      dot.setAttribute("cy", this.scale.y(height));
    });
    clear(this.value, texts);
    if (this.cross && this.scale) {
      const inside = step !== null && step >= this.scale.first && step <= this.scale.last;
      this.cross.setAttribute("visibility", inside ? "visible" : "hidden");
      if (inside) ["x1", "x2"].forEach((end) => this.cross.setAttribute(end, this.scale.x(step)));
    }
  }
}
