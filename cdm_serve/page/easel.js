// The latest pictures, side by side, as they are made: a tile for each.
import { STAGES, fillBar, ms } from "./bar.js";
import { $, copyOf, make } from "./dom.js";
import { stepsOf } from "./facts.js";
import { drawn } from "./stream.js";

const dataUrl = (format, b64) => `data:image/${format};base64,${b64}`;

// One picture on its way. `node.dataset.state`: waiting, drawing, done, cancelled, refused.
class Tile {
  constructor(wish) {
    this.wish = wish;
    this.node = copyOf("tile-form");
    this.node.style.setProperty("--ratio", `${wish.width} / ${wish.height}`);
    this.part(".seed-of").textContent = `seed ${wish.seed}`;
    this.image = this.part("img");
    this.show("waiting", "waiting");
  }

  part(selector) {
    return this.node.querySelector(selector);
  }

  show(state, text) {
    this.node.dataset.state = state;
    this.part(".state").textContent = text;
  }

  see(url, alt) {
    Object.assign(this.image, { src: url, alt, hidden: false });
    this.part(".strip").append(make("li", {}, make("img", { src: url, alt: "" })));
  }

  // Null, or the refusal. `finish(event)` makes the picture's entry of its event.
  async draw(signal, finish) {
    this.show("waiting", "waiting");
    this.part(".strip").replaceChildren();
    try {
      const event = await drawn(this.wish, signal, ({ step, steps, b64_json: b64 }) => {
        this.show("drawing", `step ${step} of ${steps}`);
        this.see(dataUrl(this.wish.format, b64), `${this.wish.prompt}, after step ${step} of ${steps}`);
      });
      const entry = finish(event);
      this.entry = entry;
      this.node.dataset.id = entry.id;
      this.see(entry.url, entry.prompt);
      this.part(".frame").disabled = false;
      this.part(".frame").setAttribute("aria-label", `${entry.prompt}, seed ${entry.seed}: open`);
      fillBar(this.part(".timing"), entry.timings);
      this.show("done", `${stepsOf(entry)} · ${ms(entry.timings.total)}`);
      return null;
    } catch (error) {
      const cancelled = error.name === "AbortError";
      if (!cancelled && !error.kind) throw error; // the page's own mistake
      this.show(cancelled ? "cancelled" : "refused", cancelled ? "cancelled" : "not drawn");
      return cancelled ? null : error;
    }
  }
}

// New tiles, in place of those before. `open(entry)` is what a click on a finished picture does.
export function lay(wishes, open) {
  const tiles = wishes.map((wish) => new Tile(wish));
  for (const tile of tiles) tile.part(".frame").addEventListener("click", () => open(tile.entry));
  $("easel-prompt").textContent = wishes[0].prompt;
  $("easel").toggleAttribute("data-single", tiles.length === 1);
  $("tiles").replaceChildren(...tiles.map(({ node }) => node));
  $("easel-facts").replaceChildren(...(tiles.length > 1 ? [names()] : []));
  $("easel").hidden = false;
  $("hint").hidden = true;
  return tiles;
}

function names() {
  return make("ul", { className: "legend" }, ...Object.entries(STAGES).map(([stage, name]) => {
    const item = make("li", {}, make("span", { textContent: name }));
    item.dataset.stage = stage;
    return item;
  }));
}

// A picture that was deleted is not shown here either.
export function takeDown(id) {
  document.querySelector(`#tiles [data-id="${id}"]`)?.remove();
  if ($("easel").hasAttribute("data-single")) $("easel-facts").replaceChildren();
  $("easel").hidden = $("tiles").childElementCount === 0;
}
