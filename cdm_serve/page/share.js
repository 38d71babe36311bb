// A picture's parameters in the forms in which they are handed on: JSON, a curl command, a file name.
import { bodyOf } from "./api.js";

// What makes this picture again: the steps that were really run, not "auto". One that was shortened on its way took
// other sigmas than any request can ask for, and will differ.
export function parametersOf({ prompt, seed, steps, width, height, format, model }) {
  return { prompt, steps, width, height, format, ...(model && { model }), seed };
}

// What a terminal could take for a command, or would not show, is written as JSON's escapes.
export const jsonOf = (entry) => bodyOf(parametersOf(entry)).replaceAll(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, (hidden) =>
  hidden.split("").map((unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`).join(""));

// In single quotes a POSIX shell leaves everything as it is, but for the quote itself.
export const quoted = (text) =>
  /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", String.raw`'\''`)}'`;

export function fileName({ prompt, seed, format }) {
  const words = prompt.normalize("NFC").match(/[\p{L}\p{M}\p{N}]+/gu) ?? ["picture"];
  return `${[...words.join("-")].slice(0, 60).join("")}-${seed}.${format}`;
}

// A key never gets into it: what is copied is pasted into chats and tickets.
export function curlOf(entry, withKey) {
  const url = new URL("generate", document.baseURI).href;
  return [
    `curl --json ${quoted(jsonOf(entry))}`,
    ...(withKey ? ['-H "Authorization: Bearer $CDM_API_KEY"'] : []),
    `${quoted(url)} -o ${quoted(fileName(entry))}`,
  ].join(" \\\n  ");
}
