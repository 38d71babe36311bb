// Every finished picture of this tab, newest first, and the dialog that shows one of them large.
import { $, make } from "./dom.js";
import { factsOf } from "./facts.js";
import { remove, restored, save } from "./store.js";

const KEPT = 60;
const entries = []; // newest first
let actions; // of the facts
let open; // entry in the dialog

const pictureUrl = ({ b64, format }) => {
  const bytes = Uint8Array.from(atob(b64), (character) => character.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: `image/${format}` }));
};

// `discarded(entry)`: it was deleted, or everything was (no entry); `again(entry)`: it shall be drawn again.
export function startGallery({ again, discarded }) {
  const discard = (entry) => {
    const at = entries.indexOf(entry);
    const next = entries[at + 1] ?? entries[at - 1];
    forget(entry);
    discarded(entry);
    if ($("viewer").open) next ? view(next) : $("viewer").close();
    else focusOn(next);
  };
  actions = { discard, again: (entry) => { $("viewer").close(); again(entry); } };
  for (const entry of restored()) show(entry);
  $("clear").addEventListener("click", () => {
    for (const entry of [...entries]) { forget(entry); discarded(entry); }
    focusOn();
  });
  $("shelf").addEventListener("keydown", walk);
  $("viewer").addEventListener("keydown", ({ key }) => {
    if (key === "ArrowLeft") turn(-1);
    if (key === "ArrowRight") turn(1);
  });
  $("viewer").addEventListener("click", ({ target }) => { if (target === $("viewer")) $("viewer").close(); });
  $("viewer").addEventListener("close", () => { if (open) settle(open); open = undefined; });
  $("close").addEventListener("click", () => $("viewer").close());
  $("newer").addEventListener("click", () => turn(-1));
  $("older").addEventListener("click", () => turn(1));
}

export const facts = (entry) => factsOf(entry, actions);

// A new picture: gets its number and its address.
export function add(entry) {
  entry.id = Math.max(Date.now(), (entries[0]?.id ?? 0) + 1);
  save(entry);
  return show(entry);
}

function show(entry) {
  entry.url = pictureUrl(entry);
  const label = `${entry.prompt}, seed ${entry.seed}`;
  const thumb = make("button", { type: "button", title: label },
    make("img", { src: entry.url, alt: label, loading: "lazy" }));
  thumb.dataset.id = entry.id;
  thumb.addEventListener("click", () => view(entry));
  thumb.addEventListener("focus", () => settle(entry));
  entries.unshift(entry);
  $("shelf").prepend(make("li", {}, thumb));
  settle(entry);
  for (const old of entries.slice(KEPT)) forget(old);
  count();
  return entry;
}

function forget(entry) {
  remove(entry.id);
  URL.revokeObjectURL(entry.url);
  entries.splice(entries.indexOf(entry), 1);
  thumbOf(entry).parentElement.remove();
  if (entries.length && !$("shelf").querySelector("[tabindex='0']")) settle(entries[0]);
  count();
}

function count() {
  $("gallery").hidden = entries.length === 0;
  $("gallery-count").textContent = String(entries.length);
}

const thumbOf = ({ id }) => $("shelf").querySelector(`[data-id="${id}"]`);

// One stop for the tab key; the arrows do the rest (WAI-ARIA, roving tabindex).
function settle(entry) {
  for (const thumb of $("shelf").querySelectorAll("button")) thumb.tabIndex = thumb.dataset.id === String(entry.id) ? 0 : -1;
}

function focusOn(entry) {
  if (entry) thumbOf(entry).focus();
  else $("prompt").focus();
}

function walk(event) {
  const thumbs = [...$("shelf").querySelectorAll("button")];
  const at = thumbs.indexOf(document.activeElement);
  const row = thumbs.filter((thumb) => thumb.offsetTop === thumbs[0].offsetTop).length;
  const to = {
    ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - row, ArrowDown: at + row, Home: 0, End: thumbs.length - 1,
  }[event.key];
  if (event.key === "Delete") actions.discard(entries[at]);
  if (to !== undefined) {
    event.preventDefault();
    thumbs[to]?.focus();
  }
}

export function view(entry) {
  if (!entries.includes(entry)) return;
  open = entry;
  const { prompt, url, width, height } = entry;
  $("viewer-prompt").textContent = prompt;
  Object.assign($("viewer-image"), { src: url, alt: prompt, width, height });
  $("viewer-facts").replaceChildren(facts(entry));
  const at = entries.indexOf(entry);
  $("newer").disabled = at === 0;
  $("older").disabled = at === entries.length - 1;
  if (!$("viewer").open) $("viewer").showModal();
}

function turn(by) {
  const next = entries[entries.indexOf(open) + by];
  if (next) view(next);
}
