// The page's whole behaviour: read /info, post to /generate, show what comes back.
const $ = (id) => document.getElementById(id);
const STAGES = { queue: "queue", encode: "text", denoise: "denoise", decode: "decode", image_encode: "encode image" };
const KEPT = 30; // results that stay on the page
let info;
let running; // AbortController of the request in flight

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

function status(state, text) {
  $("status").dataset.state = state;
  $("status").textContent = text;
}

function fill(select, values, chosen, label = String) {
  select.replaceChildren(...values.map((value) => new Option(label(value), value, value === chosen, value === chosen)));
}

async function start() {
  const response = await fetch("info");
  info = await response.json();
  document.title = `${info.model} · cdm-serve`;
  fill($("steps"), info.steps, info.default_steps);
  const counts = [1, 2, 4, 8, 12, 16, 32, 64].filter((count) => count <= info.max_images);
  fill($("count"), counts, 1);
  fill($("format"), info.formats, "png");
  const sizes = info.sizes.map(({ width, height }) => `${width}×${height}`);
  fill($("size"), sizes, `${info.default_size.width}×${info.default_size.height}`);
  $("size-knob").hidden = sizes.length < 2;
  $("prompt").maxLength = info.max_prompt_chars;
  $("examples").replaceChildren(...info.examples.map((text) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
    button.addEventListener("click", () => { $("prompt").value = text; $("form").requestSubmit(); });
    return button;
  }));
  const { runtime, version, precision, device } = info.engine;
  $("footer").textContent = `${info.model} on ${runtime} ${version}, ${precision}, ${device}`;
  for (;;) {
    const ready = await fetch("readyz").catch(() => null);
    if (ready?.ok) return status("ready", info.model);
    status(ready ? "waiting" : "down", ready ? "warming up" : "unreachable");
    await sleep(500);
  }
}

// Seeds reach 2^63, JavaScript's numbers only 2^53: they travel as digits here.
function body(wish) {
  const { seed, ...rest } = wish;
  const text = JSON.stringify(rest, null, 1).replaceAll(/\n */g, " ");
  return seed ? `${text.slice(0, -2)}, "seed": ${BigInt(seed)} }` : text;
}

const parse = (text) => JSON.parse(text.replace(/"seed":\s*(\d+)/g, '"seed": "$1"'));

function wish() {
  const [width, height] = $("size").value.split("×").map(Number);
  return {
    prompt: $("prompt").value, steps: Number($("steps").value), num_images: Number($("count").value),
    width, height, format: $("format").value, seed: $("seed").value.trim(),
  };
}

async function draw(event) {
  event.preventDefault();
  running?.abort();
  const mine = running = new AbortController();
  const asked = wish();
  $("go").dataset.busy = "";
  $("error").hidden = true;
  try {
    const response = await fetch("generate", {
      method: "POST", headers: { "content-type": "application/json" }, signal: mine.signal,
      body: body({ ...asked, response_format: "json" }),
    });
    const answer = parse(await response.text());
    if (!response.ok) throw new Error(answer.error.message);
    status("ready", info.model);
    show(asked, answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("error").textContent = error instanceof TypeError ? "The server cannot be reached." : error.message;
    $("error").hidden = false;
  } finally {
    if (running === mine) {
      running = undefined;
      delete $("go").dataset.busy;
    }
  }
}

function show(asked, answer) {
  $("hint")?.remove();
  const card = $("result").content.cloneNode(true).firstElementChild;
  card.querySelector("h2").textContent = answer.prompt;
  const grid = card.querySelector(".grid");
  if (answer.images.length < 4) grid.dataset.few = "";
  if (answer.images.length === 1) card.dataset.single = "";
  const { steps } = answer.images[0];
  card.querySelector(".meta").textContent =
    `${steps} ${steps === 1 ? "step" : "steps"} · ${answer.width}×${answer.height} · ${answer.format}`;
  grid.append(...answer.images.map((image) => picture(answer, image)));
  timings(card, answer.timings_ms);
  const seed = answer.images[0].seed;
  const command = curl({ ...asked, seed });
  card.querySelector("pre").textContent = command;
  card.querySelector(".copy").addEventListener("click", async (event) => {
    await navigator.clipboard.writeText(command);
    event.target.textContent = "Copied";
    setTimeout(() => { event.target.textContent = "Copy"; }, 1500);
  });
  card.querySelector(".again").addEventListener("click", () => {
    $("prompt").value = asked.prompt;
    $("seed").value = seed;
    $("steps").value = asked.steps;
    $("count").value = asked.num_images;
    $("prompt").focus();
  });
  $("results").prepend(card);
  for (const old of [...$("results").children].slice(KEPT)) {
    old.querySelectorAll("img").forEach((img) => URL.revokeObjectURL(img.src));
    old.remove();
  }
}

function picture(answer, image) {
  const figure = $("picture").content.cloneNode(true).firstElementChild;
  const bytes = Uint8Array.from(atob(image.b64_json), (character) => character.charCodeAt(0));
  const url = URL.createObjectURL(new Blob([bytes], { type: `image/${answer.format}` }));
  const name = answer.prompt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60);
  const img = figure.querySelector("img");
  Object.assign(img, { src: url, alt: answer.prompt, width: answer.width, height: answer.height });
  Object.assign(figure.querySelector("a"), { href: url, target: "_blank" });
  Object.assign(figure.querySelector(".save"), { href: url, download: `${name}-${image.seed}.${answer.format}` });
  figure.querySelector(".seed-of").textContent = `seed ${image.seed}`;
  return figure;
}

function timings(card, ms) {
  const known = Object.keys(STAGES).filter((stage) => ms[stage] > 0);
  const other = ms.total - known.reduce((sum, stage) => sum + ms[stage], 0);
  const parts = known.map((stage) => [stage, STAGES[stage], ms[stage]]);
  if (other > 0) parts.push(["other", "waiting, HTTP", other]);
  card.querySelector(".timing").append(...parts.map(([stage, , value]) => {
    const bar = document.createElement("i");
    bar.dataset.stage = stage;
    bar.style.flexGrow = value;
    return bar;
  }));
  const items = [...parts, ["total", "total", ms.total]].map(([stage, name, value]) => {
    const item = document.createElement("li");
    item.dataset.stage = stage;
    item.textContent = `${name} ${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
    return item;
  });
  card.querySelector(".timing").setAttribute("aria-label", items.map((item) => item.textContent).join(", "));
  card.querySelector(".legend").append(...items);
}

function curl({ prompt, steps, num_images, width, height, format, seed }) {
  const wish = { prompt, steps, seed };
  if (num_images > 1) wish.num_images = num_images;
  if (width !== info.default_size.width || height !== info.default_size.height) Object.assign(wish, { width, height });
  if (format !== "png") wish.format = format;
  const file = num_images > 1 ? "pictures.json" : `picture.${format}`;
  const quoted = body(wish).replaceAll("'", String.raw`'\''`);
  return `curl --json '${quoted}' \\\n  ${new URL("generate", location.href).href} -o ${file}`;
}

$("form").addEventListener("submit", draw);
addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
start().catch(() => status("down", "unreachable"));
