// What is asked for: the fields, filled from /info, and read as the parameters of single pictures.
import { Refusal } from "./api.js";
import { $, make } from "./dom.js";

const COUNTS = [1, 2, 3, 4, 6, 8, 12, 16];
let info;

function fill(id, values, preferred, label = String) {
  const before = $(id).value; // what was chosen outlives the server's restart
  const chosen = values.map(String).includes(before) ? before : String(preferred);
  $(id).replaceChildren(...values.map((value) => new Option(label(value), value, value === preferred, String(value) === chosen)));
}

export function fillForm(served) {
  info = served;
  fill("model", info.models ?? [info.model], info.model);
  $("model-knob").hidden = $("model").length < 2;
  fill("steps", ["auto", ...info.steps], info.default_steps);
  fill("count", COUNTS.filter((count) => count <= info.max_images), 1);
  fill("format", info.formats, "png");
  const sizes = info.sizes.map(({ width, height }) => `${width}×${height}`);
  fill("size", sizes, `${info.default_size.width}×${info.default_size.height}`);
  $("examples").replaceChildren(...info.examples.map((text) => make("button", { type: "button", textContent: text })));
  showDeadline();
}

// [parameters of one picture, …]: the first has the given seed or a drawn one, the next have those that follow.
// Throws a Refusal for what the server would not understand; what it does not offer, it says itself.
export function wishes() {
  const prompt = $("prompt").value;
  if (!prompt.trim()) throw new Refusal("Say what to draw.", "no");
  const [width, height] = $("size").value.split("×").map(Number);
  const auto = $("steps").value === "auto";
  const wish = {
    prompt, steps: auto ? "auto" : Number($("steps").value), width, height, format: $("format").value,
    ...(auto && $("deadline").value.trim() && { deadline_ms: whole("deadline", 3_600_000n) }),
    ...($("model").length > 1 && { model: $("model").value }),
  };
  const last = BigInt(info.max_seed);
  const first = $("seed").value.trim() ? whole("seed", last) : crypto.getRandomValues(new Uint32Array(1))[0];
  return Array.from({ length: Number($("count").value) }, (_, index) =>
    ({ ...wish, seed: String((BigInt(first) + BigInt(index)) % (last + 1n)) }));
}

function whole(id, last) {
  const text = $(id).value.trim();
  if (!/^\d{1,30}$/.test(text) || BigInt(text) > last) {
    throw new Refusal(`${id}=${text} is no whole number from 0 to ${last}; leave it empty for the server’s choice.`, "no");
  }
  return id === "seed" ? text : Number(text);
}

// Exactly that picture, to be drawn again or varied.
export function refill({ prompt, steps, width, height, format, seed, servedBy }) {
  const values = { prompt, steps, size: `${width}×${height}`, format, seed, count: 1, model: servedBy };
  const modelChanges = $("model").value !== servedBy && [...$("model").options].some((option) => option.value === servedBy);
  for (const [id, value] of Object.entries(values)) {
    if ($(id).tagName !== "SELECT" || [...$(id).options].some((option) => option.value === String(value))) $(id).value = value;
  }
  if (modelChanges) $("model").dispatchEvent(new Event("change"));
  showDeadline();
  grow();
  $("prompt").focus();
}

function showDeadline() {
  $("deadline-knob").hidden = $("steps").value !== "auto";
}

export function grow() {
  const { style } = $("prompt");
  style.height = "auto";
  style.height = `${$("prompt").scrollHeight}px`;
}

$("steps").addEventListener("change", showDeadline);
$("prompt").addEventListener("input", grow);
