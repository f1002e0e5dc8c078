"use strict";
// Hovering over a chart: a line at the nearest step, and the value of each curve there.
const write = (value) =>
  Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
const nearest = (points, x) =>
  points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
for (const figure of document.querySelectorAll("figure[data-curves]")) {
  const { x, curves } = JSON.parse(figure.dataset.curves);
  const tip = figure.querySelector(".tip");
  const longest = curves.reduce((one, other) => (other.points.length > one.points.length ? other : one));
  for (const plot of figure.querySelectorAll(".plot")) {
    const guide = plot.querySelector(".guide"), begin = Number(plot.dataset.left), end = Number(plot.dataset.right);
    const hide = () => { tip.hidden = guide.hidden = true; };
    const show = (event) => {
      const box = plot.getBoundingClientRect(), inside = figure.getBoundingClientRect();
      const share = ((event.clientX - box.left) / box.width - begin) / (end - begin);
      const at = nearest(longest.points, x[0] + Math.min(1, Math.max(0, share)) * (x[1] - x[0]))[0];
      const place = (begin + (x[1] > x[0] ? (at - x[0]) / (x[1] - x[0]) : 0.5) * (end - begin)) * box.width;
      guide.style.left = `${place}px`;
      const lines = curves.map((curve) => {
        const line = document.createElement("div"), key = document.createElement("i"), text = document.createElement("span");
        key.className = `c${curve.colour}`;
        text.textContent = `${curve.label} ${write(nearest(curve.points, at)[1])}`;
        line.append(key, text);
        return line;
      });
      const head = document.createElement("b");
      head.textContent = `${figure.dataset.x} ${write(at)}`;
      tip.replaceChildren(head, ...lines);
      tip.hidden = guide.hidden = false;
      const left = box.left - inside.left + place;
      const beside = left + 12 + tip.offsetWidth > inside.width - 8 ? left - 12 - tip.offsetWidth : left + 12;
      tip.style.left = `${Math.max(8, beside)}px`;
      tip.style.top = `${plot.offsetTop + 12}px`;
    };
    plot.addEventListener("pointermove", show);
    plot.addEventListener("pointerdown", show);
    plot.addEventListener("pointerleave", hide);
  }
}
