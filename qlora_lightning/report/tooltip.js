"use strict";
// Hovering over a chart: a line at the nearest step, and the value of each curve there.
const write = (value) =>
  Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
const nearest = (points, x) =>
  points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
for (const figure of document.querySelectorAll("figure[data-curves]")) {
  const { x, curves } = JSON.parse(figure.dataset.curves);
  const plot = figure.querySelector("svg.plot");
  const guide = plot.querySelector(".guide");
  const tip = figure.querySelector(".tip");
  const hide = () => { tip.hidden = true; guide.style.display = "none"; };
  const show = (event) => {
    const style = getComputedStyle(plot), box = plot.getBoundingClientRect();
    const left = box.left + parseFloat(style.paddingLeft);
    const width = box.right - parseFloat(style.paddingRight) - left;
    const wanted = x[0] + Math.min(1, Math.max(0, (event.clientX - left) / width)) * (x[1] - x[0]);
    const longest = curves.reduce((one, other) => (other.points.length > one.points.length ? other : one));
    const at = nearest(longest.points, wanted)[0];
    const share = x[1] > x[0] ? (at - x[0]) / (x[1] - x[0]) : 0.5;
    guide.setAttribute("x1", `${100 * share}%`);
    guide.setAttribute("x2", `${100 * share}%`);
    guide.style.display = "";
    const lines = curves.map((curve) => {
      const line = document.createElement("div"), key = document.createElement("i"), text = document.createElement("span");
      const point = curve.points.length === 1 ? curve.points[0] : nearest(curve.points, at);
      key.className = `c${curve.colour}`;
      text.textContent = `${curve.label} ${write(point[1])}`;
      line.append(key, text);
      return line;
    });
    const head = document.createElement("b");
    head.textContent = `${figure.dataset.x} ${write(at)}`;
    tip.replaceChildren(head, ...lines);
    tip.hidden = false;
    const inside = figure.getBoundingClientRect(), place = left - inside.left + share * width;
    tip.style.left = `${Math.max(8, Math.min(inside.width - tip.offsetWidth - 8, place + 12))}px`;
    if (place + 12 + tip.offsetWidth > inside.width - 8 && place - 12 - tip.offsetWidth > 8) {
      tip.style.left = `${place - 12 - tip.offsetWidth}px`;
    }
    tip.style.top = `${plot.offsetTop + 12}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}
