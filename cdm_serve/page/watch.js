// Whether the server is there: asked for only while it is known to be down or warming up.
import { ask } from "./api.js";
import { $ } from "./dom.js";

const PAUSES_MS = [500, 1000, 2000, 4000];
let model = "";
let watching;

export const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

export function showStatus(state, text, title = "") {
  $("status").dataset.state = state;
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").title = title;
}

export function nameModel(name) {
  model = name;
  if ($("status").dataset.state === "ready") showStatus("ready", model);
}

// Resolves when the server is ready; until then the page shows what it is waiting for.
export function untilReady() {
  watching ??= watch().finally(() => { watching = undefined; });
  return watching;
}

async function watch() {
  for (let round = 0; ; round++) {
    try {
      await ask("readyz");
      $("warmth").hidden = true;
      return showStatus("ready", model || "ready");
    } catch ({ message }) {
      const [, done, total] = message.match(/warming up\D*(\d+) of (\d+)/) ?? [];
      $("warmth").hidden = !total;
      if (total) Object.assign($("warmth"), { max: Number(total), value: Number(done) });
      if (total) {
        showStatus("waiting", `warming up, ${done} of ${total}`, message);
        round = 0; // it will not be long
      } else showStatus("down", message.startsWith("The server cannot") ? "unreachable" : "not available", message);
    }
    await sleep(PAUSES_MS[Math.min(round, PAUSES_MS.length - 1)]);
  }
}
