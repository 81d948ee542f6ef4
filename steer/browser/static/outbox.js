// What was decided and not yet answered for. It is written down in the browser before anything else happens, and sent
// until the server has answered, by whichever tab is open: each event has a key of its own, under which it counts once.

import { ApiError, post } from "./api.js";

const PREFIX = "saekit:event:", REFUSED = "saekit:refused:";
const FIRST_WAIT = 1000, LONGEST_WAIT = 15000;
const listeners = new Set();
let isSending = false, again = null, wait = FIRST_WAIT, answers = new Map();

const keys = (prefix) => Object.keys(localStorage).filter((key) => key.startsWith(prefix));
const tell = () => listeners.forEach((listener) => listener());

export const waiting = () => keys(PREFIX).length;
export const refused = () => keys(REFUSED).map((key) => ({ key, ...JSON.parse(localStorage.getItem(key)) }));
export const dismiss = (key) => { localStorage.removeItem(key); tell(); };
export const answerTo = (key) => answers.get(key);

export function onChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

// crypto.randomUUID is not there on a page that came without TLS from another machine.
export const unique = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export function put(event) {
  const key = unique();
  localStorage.setItem(PREFIX + key, JSON.stringify({ at: Date.now() + performance.now() / 1e6, body: { ...event, key } }));
  tell();
  send();
  return key;
}

// Until nothing waits, or the server does not answer.
export async function send() {
  if (isSending) return;
  isSending = true;
  clearTimeout(again);
  try {
    for (let next = oldest(); next; next = oldest()) {
      const { place, body } = next;
      try {
        answers.set(body.key, await post("/api/label/events", body));
        localStorage.removeItem(place);
      } catch (error) {
        if (!(error instanceof ApiError) || isPassing(error.status)) throw error;
        localStorage.setItem(REFUSED + body.key, JSON.stringify({ body, message: error.message }));
        localStorage.removeItem(place);
      }
      wait = FIRST_WAIT;
      tell();
    }
  } catch {
    again = setTimeout(send, wait);
    wait = Math.min(2 * wait, LONGEST_WAIT);
  } finally {
    isSending = false;
    tell();
  }
}

// No answer, no permission for now, too many requests, or a server in trouble: it may be answered later.
const isPassing = (status) => status === 0 || status === 401 || status === 408 || status === 429 || status >= 500;

function oldest() {
  const all = keys(PREFIX).map((place) => ({ place, text: localStorage.getItem(place) })).filter(({ text }) => text !== null)
    .map(({ place, text }) => ({ place, ...JSON.parse(text) }));
  return all.sort((a, b) => a.at - b.at)[0];
}

addEventListener("online", send);
addEventListener("storage", tell);
