// Elements and numbers. Text of models goes into text nodes alone, and is never read as markup.

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "rect", "circle", "g"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const clear = (element, ...children) => (element.replaceChildren(...children.flat()), element);

function short(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (size >= 1e7) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size !== 0 && size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(3)));
}

const share = (part, whole) => (whole ? `${Math.round((100 * part) / whole)} %` : "–");

const tip = {
  show(event, text) {
    const box = document.getElementById("tip");
    box.textContent = text;
    box.hidden = false;
    const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
    const below = event.clientY + 18;
    box.style.left = `${Math.max(4, left)}px`;
    box.style.top = `${below + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 12 : below}px`;
  },
  hide: () => (document.getElementById("tip").hidden = true),
};

const told = (text) => ({ onmousemove: (event) => tip.show(event, text), onmouseleave: tip.hide });

function section(id, title, ...children) {
  return make("section", { id }, make("h2", {}, title), ...children);
}

// Draws again whenever an element has become wider or narrower.
function onWidth(element, draw) {
  let before = 0;
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (element.clientWidth === before) return;
    before = element.clientWidth;
    draw();
  })).observe(element);
}
