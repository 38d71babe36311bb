// One picture as it is made: POST /generate with stream, whose server-sent events are read as they come.
// (EventSource reads such events too, but cannot POST.)
import { Refusal, ask, bodyOf, refusalOf, unreachable } from "./api.js";

// Chunks of text → { name, data } (WHATWG HTML, section 9.2.6; the server's lines end in LF). Comments are left out.
export async function* events(chunks) {
  let rest = "";
  for await (const chunk of chunks) {
    const blocks = (rest + chunk).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => {
        const [name, ...value] = line.split(":");
        return [name, value.join(":").replace(/^ /, "")];
      }));
      if (fields.data !== undefined) yield { name: fields.event, data: JSON.parse(fields.data) };
    }
  }
}

async function* textOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader(); // not every browser can iterate a stream
  for (let part; !(part = await reader.read()).done;) yield part.value;
}

// The finished picture's event. `onPreview` is called with the previews' events before it.
// Throws a Refusal, or an AbortError when `signal` says so: the server then drops the picture at its next step.
export async function drawn(parameters, signal, onPreview) {
  const answer = await ask("generate", {
    method: "POST", signal, headers: { "content-type": "application/json" },
    body: bodyOf({ ...parameters, stream: true }),
  });
  try {
    for await (const { name, data } of events(textOf(answer.body))) {
      if (name === "preview") onPreview(data);
      if (name === "picture") return data;
      if (name === "error") throw refusalOf(data.error);
    }
  } catch (error) {
    throw error instanceof Refusal || error.name === "AbortError" ? error : unreachable();
  }
  throw new Refusal("The connection ended before the picture was there.", "again");
}
