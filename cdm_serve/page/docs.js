// The OpenAPI document as a page.
function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function table(head, rows) {
  return make("div", { className: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { textContent: text })))),
    make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells.map((text) => make("td", { textContent: text }))))),
  ));
}

function allowed(field) {
  if (field.enum) return field.enum.map((value) => value ?? "null").join(", ");
  if (field.maxLength) return `${field.minLength} to ${field.maxLength} characters`;
  if (field.maximum !== undefined) return `${field.minimum} to ${field.maximum}`;
  return [field.type].flat().join(" or ");
}

function operation(path, method, spec) {
  const title = make("h2", {}, make("span", { className: "method", textContent: method.toUpperCase() }), path);
  title.firstChild.dataset.method = method;
  const section = make("section", {}, title, make("p", { textContent: spec.description ?? spec.summary }));
  const schema = spec.requestBody?.content["application/json"].schema;
  if (schema) {
    const rows = Object.entries(schema.properties).map(([name, field]) => [
      schema.required.includes(name) ? `${name} *` : name, allowed(field), String(field.default ?? "–"), field.description,
    ]);
    const url = decodeURI(new URL(path.slice(1), location.href).href);
    const example = schema.example ? JSON.stringify(schema.example) : '{"prompt": "red apple"}';
    section.append(
      table(["field", "allowed", "default", "meaning"], rows),
      make("pre", { textContent: `curl --json '${example}' ${url} -o ${schema.example ? "answer" : "apple.png"}` }),
    );
  }
  const answers = Object.entries(spec.responses).map(([status, answer]) => [status, answer.description]);
  section.append(table(["status", "meaning"], answers));
  return section;
}

// maximum seed: exact digits, which JSON.parse would round
const text = await (await fetch("openapi.json")).text();
const api = JSON.parse(text.replace(/:\s*(\d{16,})/g, ': "$1"'));
const sections = Object.entries(api.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, spec]) => operation(path, method, spec)));
document.getElementById("docs").replaceChildren(
  make("h1", { textContent: api.info.title }), make("p", { textContent: api.info.description }), ...sections);
