// Comfort only: the values under the pointer, at the same iteration in every chart.
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const numbers = (text) => text.split(" ").map(Number);
const shown = (value) => (Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(3)));

const charts = [...document.querySelectorAll(".chart svg")].map((svg) => {
  const line = svg.querySelector(".smoothed[points]:not([points='']), .raw");
  if (!line) return null;
  const points = line.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number));
  const [left, right, top, bottom] = numbers(svg.dataset.plot);
  const [low, high] = numbers(svg.dataset.y);
  const [first, last] = numbers(svg.dataset.x);
  const cross = document.createElementNS(SVG, "g");
  cross.classList.add("cross");
  const make = (name) => cross.appendChild(document.createElementNS(SVG, name));
  const rule = make("line"), dot = make("circle"), label = make("text");
  rule.setAttribute("y1", top);
  rule.setAttribute("y2", bottom);
  dot.setAttribute("r", 4);
  label.setAttribute("y", top - 3);
  const value = (y) => {
    const share = (bottom - y) / (bottom - top);
    return "log" in svg.dataset ? low * (high / low) ** share : low + share * (high - low);
  };
  return {
    svg,
    at: (x) => first + ((x - left) / (right - left)) * (last - first),
    place: (x) => Math.min(right, Math.max(left, x)),
    show(x) {
      const near = points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
      rule.setAttribute("x1", near[0]);
      rule.setAttribute("x2", near[0]);
      dot.setAttribute("cx", near[0]);
      dot.setAttribute("cy", near[1]);
      label.setAttribute("x", near[0]);
      label.setAttribute("text-anchor", near[0] > (left + right) / 2 ? "end" : "start");
      label.textContent = `${Math.round(this.at(near[0]))}: ${shown(value(near[1]))}`;
      svg.append(cross);
    },
    hide: () => cross.remove(),
  };
}).filter(Boolean);

for (const chart of charts) {
  chart.svg.addEventListener("pointermove", (event) => {
    const box = chart.svg.getBoundingClientRect();
    const x = chart.place(((event.clientX - box.left) / box.width) * chart.svg.viewBox.baseVal.width);
    for (const other of charts) other.show(x);
  });
  chart.svg.addEventListener("pointerleave", () => charts.forEach((other) => other.hide()));
}
