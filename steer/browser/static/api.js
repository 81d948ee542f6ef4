// Asking the server: JSON in, JSON out, errors with what to do about them, and answers that are kept for a while.

export class ApiError extends Error {
  constructor(status, detail) {
    const { where = "server", expected = "an answer", got = `status ${status}`, fix = "" } = detail ?? {};
    super(`${where}: expected ${expected}, got ${got}. ${fix}`);
    this.status = status;
  }
}

const headersOf = (body) => ({ "x-saekit": "1", ...(body === undefined ? {} : { "content-type": "application/json" }) });

async function request(method, path, body, signal) {
  const options = { method, signal, headers: headersOf(body), body: body === undefined ? undefined : JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { where: "server", expected: "an answer", got: "none", fix: "Is saekit browse still running?" });
  }
  const isJson = (response.headers.get("content-type") ?? "").startsWith("application/json");
  const text = await response.text();
  const data = isJson && text ? JSON.parse(text) : null;
  if (!response.ok) throw new ApiError(response.status, data?.detail);
  return data;
}

export const get = (path, signal) => request("GET", path, undefined, signal);
export const post = (path, body, signal) => request("POST", path, body ?? {}, signal);
export const patch = (path, body) => request("PATCH", path, body);
export const remove = (path) => request("DELETE", path);

// An answer that is no JSON, if it is one.
async function answered(path, options) {
  const response = await fetch(path, options);
  if (!response.ok) throw new ApiError(response.status, (await response.json().catch(() => null))?.detail);
  return response;
}

// Numbers as the server keeps them, with what a header says of them.
export async function floats(path, header) {
  const response = await answered(path, { headers: headersOf() });
  return { values: new Float32Array(await response.arrayBuffer()), said: response.headers.get(header) };
}

// Answers that do not change while the page is open, such as a feature's contexts, with the newest KEPT of them.
const KEPT = 200;
const kept = new Map();

export function cached(path) {
  if (!kept.has(path)) {
    const answer = get(path);
    kept.set(path, answer);
    answer.then((data) => answer.data = data, () => kept.delete(path));
    if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  }
  return kept.get(path);
}

// The same, for what is likely to be wanted next.
export const prefetch = (path) => { cached(path).catch(() => {}); };

export const known = (path) => kept.get(path)?.data;

// Forgets answers to all paths that begin so, because something has been written since.
export const forget = (start) => { for (const path of [...kept.keys()]) if (path.startsWith(start)) kept.delete(path); };

// A stream of server-sent events that a POST answers with: calls `on(event, data)` for each; stops when `signal` says so.
export async function stream(path, body, on, signal) {
  const response = await answered(path, { method: "POST", signal, headers: headersOf(body), body: JSON.stringify(body) });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    text += part.value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 1).trim()]));
      if (fields.data !== undefined) on(fields.event ?? "message", JSON.parse(fields.data));
    }
  }
}

// A query string of what is set.
export function query(values) {
  const set = Object.entries(values).filter(([, value]) => value !== undefined && value !== null && value !== "");
  return set.length ? "?" + new URLSearchParams(set.map(([key, value]) => [key, String(value)])) : "";
}
