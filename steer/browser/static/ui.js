// What several views are made of. All text reaches the page as text nodes: nothing here, and nothing elsewhere, sets HTML.

import { h } from "./vendor/preact.js";
import htm from "./vendor/htm.js";
import { useEffect, useRef, useState } from "./vendor/hooks.js";
import { cached, known } from "./api.js";

export const html = htm.bind(h);

// --- states of a view ---

export const Problem = ({ error }) => html`<p class="problem" role="alert">${error.message ?? String(error)}</p>`;
export const Empty = ({ title, children }) => html`<div class="empty"><h2>${title}</h2><p>${children}</p></div>`;
export const Waiting = ({ what = "Loading" }) => html`<p class="waiting" role="status">${what}…</p>`;

// What a path answers: { data, error }, at once if it is known already.
export function useCached(path) {
  const [answer, setAnswer] = useState({ path, data: known(path) });
  useEffect(() => {
    let isWanted = true;
    const already = known(path);
    if (already !== undefined) setAnswer({ path, data: already });
    else cached(path).then((data) => isWanted && setAnswer({ path, data }), (error) => isWanted && setAnswer({ path, error }));
    return () => { isWanted = false; };
  }, [path]);
  return answer.path === path ? answer : { data: known(path) };
}

// Keys while a view is shown: a table from a key, such as "j" or "Escape", to what it does. Not while somebody types.
export function useKeys(table) {
  const current = useRef(table);
  current.current = table;
  useEffect(() => {
    const listener = (event) => {
      const isTyping = event.target.closest?.("input:not([type=range]):not([type=checkbox]), textarea, select, [contenteditable]");
      if (event.ctrlKey || event.metaKey || event.altKey || (isTyping && event.key !== "Escape")) return;
      const action = current.current[event.key];
      if (action) { event.preventDefault(); action(event); }
    };
    addEventListener("keydown", listener);
    return () => removeEventListener("keydown", listener);
  }, []);
}

// --- numbers ---

export function figure(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 0.001 && size < 100000 ? String(Number(value.toPrecision(digits))) : value.toExponential(1);
}

export function share(value) {
  return value === null || value === undefined ? "–" : `${figure(100 * value, 2)}%`;
}

// --- tokens ---

// Tokens of a text, each as dark as `values` says in shares of `most`; hovering tells the value.
export function Tokens({ texts, values, most, peak }) {
  return html`<span class="tokens" dir="auto">${texts.map((text, i) => {
    const strength = values && most > 0 ? Math.min(Math.max(values[i] / most, 0), 1) : 0;
    const title = values && values[i] !== 0 ? `${text}  ${figure(values[i])}` : undefined;
    const name = `token${i === peak ? " peak" : ""}`;
    return html`<span class=${name} title=${title} style=${strength > 0 ? { "--heat": strength.toFixed(2) } : undefined}>${text}</span>`;
  })}</span>`;
}

// --- charts ---

// Bars of counts, as an image with a description.
export function Bars({ counts, label, ticks = [], log = false, height = 64 }) {
  const size = (n) => (log ? Math.log1p(n) : n);
  const most = Math.max(...counts.map(size), 1e-12);
  const width = 4 * counts.length;
  return html`<figure class="chart">
    <svg viewBox=${`0 0 ${width} ${height}`} preserveAspectRatio="none" role="img" aria-label=${label}>
      ${counts.map((n, i) => html`<rect x=${4 * i} width="3" y=${height - (size(n) / most) * height} height=${(size(n) / most) * height}/>`)}
    </svg>
    <figcaption>${ticks.map((tick) => html`<span>${tick}</span>`)}</figcaption>
  </figure>`;
}
