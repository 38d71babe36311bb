// Pictures that stay over a reload: in this tab's storage, as many of the newest as it has room for.
const PREFIX = "cdm-serve picture ";

const names = () => Object.keys(sessionStorage).filter((name) => name.startsWith(PREFIX)).sort();
const nameOf = (id) => PREFIX + String(id).padStart(16, "0");

export function save(entry) {
  try {
    const text = JSON.stringify(entry);
    for (;;) {
      try { return sessionStorage.setItem(nameOf(entry.id), text); } catch {
        const [oldest] = names();
        if (oldest === undefined) return; // larger than the whole store: it stays until the reload
        sessionStorage.removeItem(oldest);
      }
    }
  } catch { /* storage is forbidden here: pictures stay until the reload */ }
}

export function remove(id) {
  try { sessionStorage.removeItem(nameOf(id)); } catch { /* nothing was kept */ }
}

// Oldest first.
export function restored() {
  try {
    return names().flatMap((name) => {
      try { return [JSON.parse(sessionStorage.getItem(name))]; } catch { return []; } // not ours
    });
  } catch { return []; }
}
