// The page's conduct: what happens on which key and button, and what follows from what.
import { ask, useKey } from "./api.js";
import { lay, takeDown } from "./easel.js";
import { $, say } from "./dom.js";
import { fillForm, grow, refill, wishes } from "./form.js";
import { add, facts, startGallery, view } from "./gallery.js";
import { askForKey, hideNotice, showKey, showNotice, worst } from "./notice.js";
import { nameModel, showStatus, sleep, untilReady } from "./watch.js";

let info;
let running; // AbortController of the pictures on their way

async function learn(model) {
  info = await (await ask(model ? `info?model=${encodeURIComponent(model)}` : "info")).json();
  document.title = `${info.model} · cdm-serve`;
  fillForm(info);
  const { runtime, version, precision, device } = info.engine;
  $("served").textContent = `${info.model} on ${runtime} ${version.split("-")[0]}, ${precision}, ${device}`;
  nameModel(info.model);
}

async function start() {
  showKey();
  for (;;) {
    try {
      await learn();
      $("form").inert = false;
      $("prompt").focus();
      break;
    } catch (refusal) {
      if (refusal.kind === "key") {
        showStatus("waiting", "key needed");
        await askForKey(refusal.message);
      } else if (refusal.kind === "down") {
        await untilReady();
        await sleep(500); // ready, and yet it did not answer: not at once again
      } else throw refusal;
    }
  }
  await untilReady();
}

function draw() {
  try {
    run(lay(wishes(), view));
  } catch (refusal) {
    if (!refusal.kind) throw refusal;
    showNotice(refusal);
  }
}

async function run(tiles) {
  running?.abort();
  const mine = running = new AbortController();
  hideNotice();
  busy(true);
  const many = tiles.length > 1;
  say(many ? `Drawing ${tiles.length} pictures.` : "Drawing.");
  let done = 0;
  const refusals = (await Promise.all(tiles.map((tile) => tile.draw(mine.signal, (event) => {
    done++;
    if (many) say(`${done} of ${tiles.length} pictures are there.`);
    return finished(tile.wish, event);
  })))).filter(Boolean);
  if (running !== mine) return;
  running = undefined;
  busy(false);
  if (mine.signal.aborted) say("Cancelled.");
  else if (refusals.length) showNotice(worst(refusals), () => again(tiles.filter(({ entry }) => !entry)));
  else {
    say(many ? "All pictures are there." : "The picture is there.");
    if ($("easel").hasAttribute("data-single")) $("easel-facts").replaceChildren(facts(tiles[0].entry));
  }
}

async function again(tiles) {
  // A server that is back may be another. What ails it, the run will say.
  await learn($("model").value).catch(() => learn()).catch(() => {});
  run(tiles);
}

function finished({ steps, ...wish }, { steps: run, planned_steps: planned, timings_ms: timings, b64_json: b64 }) {
  return add({ ...wish, steps: run, planned, timings, b64, servedBy: wish.model ?? info.model });
}

function busy(on) {
  $("go").toggleAttribute("data-busy", on);
  if (!on && document.activeElement === $("cancel")) $("prompt").focus();
  $("cancel").hidden = !on;
}

const cancel = () => running?.abort();

function onKey(event) {
  const { key, target, isComposing } = event;
  const typing = target.matches("input, textarea, select");
  if (key === "Escape" && !$("viewer").open) cancel();
  if (key === "/" && !typing && !$("viewer").open) {
    event.preventDefault();
    $("prompt").focus();
  }
  // Enter draws; with Shift it begins a line. While an input method composes, it belongs to that.
  if (key === "Enter" && target === $("prompt") && !event.shiftKey && !isComposing) {
    event.preventDefault();
    draw();
  }
}

addEventListener("keydown", onKey);
$("form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
$("cancel").addEventListener("click", cancel);
$("model").addEventListener("change", () => learn($("model").value).catch(showNotice));
$("forget").addEventListener("click", () => { cancel(); useKey("", false); showKey(); start(); });
$("examples").addEventListener("click", ({ target }) => {
  if (!target.matches("button")) return;
  $("prompt").value = target.textContent;
  grow();
  draw();
});
startGallery({ again: refill, discarded: ({ id }) => takeDown(id) });
start();
