// A finished picture's parameters, its stages, and what can be done with it: beside the picture and in the dialog.
import { hasKey } from "./api.js";
import { fillBar, fillLegend } from "./bar.js";
import { copy, copyOf, make, say } from "./dom.js";
import { curlOf, fileName, jsonOf } from "./share.js";

export const stepsOf = ({ steps, planned }) =>
  steps === planned ? `${steps} ${steps === 1 ? "step" : "steps"}` : `${steps} of ${planned} steps`;

// `again(entry)` and `discard(entry)` are what the buttons of those names do.
export function factsOf(entry, { again, discard }) {
  const facts = copyOf("facts-form");
  const rows = {
    seed: entry.seed, steps: stepsOf(entry).replace(/ steps?$/, ""), size: `${entry.width}×${entry.height}`,
    format: entry.format, model: entry.servedBy,
  };
  facts.querySelector("dl").append(...Object.entries(rows).map(([name, value]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
  fillBar(facts.querySelector(".timing"), entry.timings);
  fillLegend(facts.querySelector(".legend"), entry.timings);
  const command = curlOf(entry, hasKey());
  facts.querySelector("pre").textContent = command;
  copies(facts.querySelector(".copy-json"), jsonOf(entry));
  copies(facts.querySelector(".copy-curl"), command);
  facts.querySelector(".again").addEventListener("click", () => again(entry));
  facts.querySelector(".delete").addEventListener("click", () => discard(entry));
  Object.assign(facts.querySelector(".save"), { href: entry.url, download: fileName(entry) });
  return facts;
}

function copies(button, text) {
  const { textContent: label } = button;
  button.addEventListener("click", async () => {
    try {
      await copy(text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not copied";
    }
    say(`${label}: ${button.textContent.toLowerCase()}`);
    setTimeout(() => { button.textContent = label; }, 1500);
  });
}
