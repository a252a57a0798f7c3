// The view in the address. It comes after the #, which browsers do not send, so no server logs a question.
const FIELDS = ["example", "question", "method", "keep", "mode", "step", "patch"];

export function write(state) {
  const fields = new URLSearchParams();
  for (const name of FIELDS) {
    if (state[name] !== null && state[name] !== undefined && state[name] !== "") fields.set(name, state[name]);
  }
  history.replaceState(null, "", `#${fields}`);
}

// Fields of the address; those that are absent are null.
export function read() {
  const fields = new URLSearchParams(location.hash.slice(1));
  const state = Object.fromEntries(FIELDS.map((name) => [name, fields.get(name)]));
  for (const name of ["keep", "step", "patch"]) state[name] = /^\d+$/.test(state[name] ?? "") ? Number(state[name]) : null;
  return state;
}
