// The few words that the page's files share about the document.
export const $ = (id) => document.getElementById(id);

export const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

export const copyOf = (id) => $(id).content.firstElementChild.cloneNode(true);

// For those who hear the page: not every step, or they would hear nothing else.
export const say = (text) => { $("said").textContent = text; };

// The clipboard's own API is closed on plain http to another machine; there, a selection can still be copied.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const before = document.activeElement;
  const field = make("textarea", { value: text, className: "unseen" });
  (document.querySelector("dialog[open]") ?? document.body).append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  before?.focus();
  if (!copied) throw new Error("the browser does not let this page copy");
}
