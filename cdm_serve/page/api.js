// What is sent to the server, with the key if there is one, and how its refusals are read.
const STORED = "cdm-serve key";
let key = stored();

function stored() {
  try { return sessionStorage.getItem(STORED) ?? ""; } catch { return ""; } // a browser may forbid storage
}

export const hasKey = () => key !== "";

export function useKey(secret, keep) {
  key = secret;
  try {
    if (keep && secret) sessionStorage.setItem(STORED, secret);
    else sessionStorage.removeItem(STORED);
  } catch { /* it is used, and not kept */ }
}

// A refusal. `kind`: what the reader can do about it. `waitMs`: when to come back, if the server says so.
//   key    give (another) key            later  come back after a while      down  wait until the server is back
//   again  the same may work next time   no     ask for something else
export class Refusal extends Error {
  constructor(message, kind, waitMs = 0) {
    super(message);
    this.kind = kind;
    this.waitMs = waitMs;
  }
}

export const unreachable = () => new Refusal("The server cannot be reached.", "down");

// `code`: of the error's body, which is all that a stream's last event has.
function kindOf(status, code) {
  if (status === 401) return "key";
  if (status === 429) return "later";
  if (status === 503 || code === "unavailable") return "down";
  return status >= 500 ? "again" : "no";
}

export function refusalOf({ message, type, code }, status = type === "server_error" ? 500 : 400, headers = new Headers()) {
  const waitMs = Number(headers.get("retry-after-ms") ?? Number(headers.get("retry-after") ?? 1) * 1e3);
  return new Refusal(message, kindOf(status, code), Number.isFinite(waitMs) ? waitMs : 1e3);
}

// The answer to a request, once its head is there. Throws a Refusal, or an AbortError when `signal` says so.
export async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  if (key) headers.set("authorization", `Bearer ${key}`);
  const answer = await fetch(path, { ...options, headers, cache: "no-store" }).catch((error) => {
    throw error.name === "AbortError" ? error : unreachable();
  });
  if (answer.ok) return answer;
  const text = await answer.text().catch(() => "");
  let error;
  try { ({ error } = JSON.parse(text)); } catch { /* a proxy in between answers in its own words */ }
  throw refusalOf(error ?? { message: `The server answered ${answer.status} ${answer.statusText}.` }, answer.status, answer.headers);
}

// Parameters as JSON. Seeds reach 2^63, JavaScript's numbers only 2^53: they are digits here and numbers there.
export function bodyOf({ seed, ...rest }) {
  const text = JSON.stringify(rest, null, 1).replaceAll(/\n */g, " "); // strings have no raw line breaks
  return `${text.slice(0, -2)}, "seed": ${BigInt(seed)} }`;
}
