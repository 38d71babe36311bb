// What went wrong, in the server's words, and what can be done: wait, try again, give a key.
import { hasKey, useKey } from "./api.js";
import { $, say } from "./dom.js";
import { sleep, untilReady } from "./watch.js";

const URGENCY = ["no", "again", "later", "down", "key"];
let shown = 0; // number of the notice that stands; an older one's waiting has no effect any more

export const worst = (refusals) => refusals.reduce((a, b) =>
  (URGENCY.indexOf(b.kind) - URGENCY.indexOf(a.kind) || b.waitMs - a.waitMs) > 0 ? b : a);

export function hideNotice() {
  shown++;
  $("notice").hidden = true;
}

// `retry()` is called at most once: by the button, or by itself if that is ticked.
export async function showNotice(refusal, retry) {
  const mine = ++shown;
  const { kind, message, waitMs } = refusal;
  if (kind === "key") {
    $("notice").hidden = true;
    await askForKey(message);
    return mine === shown ? retry() : undefined;
  }
  const wait = kind === "later" || kind === "down";
  $("notice").hidden = false;
  $("notice-text").textContent = message;
  $("notice-wait").textContent = kind === "down" ? "The page goes on asking, and says when it is back." : "";
  $("notice-wait").hidden = !wait;
  $("notice-tick").hidden = !wait;
  $("retry").hidden = kind === "no";
  $("retry").disabled = wait;
  $("by-itself").onchange = null;
  $("retry").onclick = () => { if (mine === shown) retry(); };
  if (kind === "later") await countDown(waitMs, () => mine === shown);
  if (kind === "down") {
    await untilReady();
    if (mine === shown) say("The server is back.");
  }
  if (!wait || mine !== shown) return undefined;
  $("notice-wait").textContent = kind === "down" ? "The server is back." : "It may work now.";
  $("retry").disabled = false;
  $("by-itself").onchange = () => { if (mine === shown && $("by-itself").checked) retry(); };
  return $("by-itself").checked ? retry() : undefined;
}

async function countDown(ms, stands) {
  const end = performance.now() + ms;
  for (let left; stands() && (left = end - performance.now()) > 0;) {
    $("notice-wait").textContent = `Again in ${Math.ceil(left / 1e3)} s.`;
    await sleep(Math.min(left, 250));
  }
}

// Resolves when one has been given; whether it is right shows when it is used.
export function askForKey(why) {
  $("key-form").hidden = false;
  $("metrics").hidden = true;
  $("key-why").textContent = why;
  $("key").focus();
  return new Promise((given) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      useKey($("key").value.trim(), $("keep-key").checked);
      $("key").value = "";
      $("key-form").hidden = true;
      showKey();
      given();
    };
  });
}

// /metrics is opened by address, where no key can be sent along.
export function showKey() {
  $("forget").hidden = !hasKey();
  $("metrics").hidden = hasKey();
}
