// Where a picture's time went, as a bar with a legend. What the stages do not account for is "rest".
import { make } from "./dom.js";

const REST = "waiting between steps, HTTP";

export const STAGES = {
  queue: "queue", encode: "text", denoise: "denoise", preview: "previews", decode: "decode", image_encode: "image file",
  rest: "rest",
};

export const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;

// { stage: ms } with `total` → [stage, ms] of those that took any time, in the order in which they happen.
export function parts({ total, ...stages }) {
  const sum = Object.values(stages).reduce((a, b) => a + b, 0);
  const all = { ...stages, rest: Math.max(0, total - sum) };
  return Object.keys(STAGES).map((stage) => [stage, all[stage] ?? 0]).filter(([, value]) => value > 0);
}

export const summary = (timings) =>
  [...parts(timings).map(([stage, value]) => `${STAGES[stage]} ${ms(value)}`), `total ${ms(timings.total)}`].join(", ");

export function fillBar(bar, timings) {
  bar.replaceChildren(...parts(timings).map(([stage, value]) => {
    const part = make("i", { title: `${STAGES[stage]} ${ms(value)}` });
    part.dataset.stage = stage;
    part.style.flexGrow = value;
    return part;
  }));
  bar.setAttribute("aria-label", `Time spent: ${summary(timings)}`);
  bar.hidden = false;
}

export function fillLegend(list, timings) {
  list.replaceChildren(...[...parts(timings), ["total", timings.total]].map(([stage, value]) => {
    const item = make("li", {}, make("span", { textContent: STAGES[stage] ?? stage }), make("b", { textContent: ms(value) }));
    item.dataset.stage = stage;
    if (stage === "rest") item.title = REST;
    return item;
  }));
}
