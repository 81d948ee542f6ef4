// What several views are made of. All text reaches the page as text nodes: nothing here, and nothing elsewhere, sets HTML.

import { h } from "./vendor/preact.js";
import htm from "./vendor/htm.js";
import { useEffect, useLayoutEffect, useRef, useState } from "./vendor/hooks.js";
import { cached, known } from "./api.js";

export const html = htm.bind(h);

// --- states of a view ---

export const Problem = ({ error }) => html`<p class="problem" role="alert">${error.message ?? String(error)}</p>`;
export const Empty = ({ title, children }) => html`<div class="empty"><h2>${title}</h2><p>${children}</p></div>`;
export const Waiting = ({ what = "Loading" }) => html`<p class="waiting" role="status">${what}…</p>`;

// What a path answers: { data, error }, at once if it is known already; nothing for no path.
export function useCached(path) {
  const [answer, setAnswer] = useState({ path, data: known(path) });
  useEffect(() => {
    if (!path) return undefined;
    let isWanted = true;
    const already = known(path);
    if (already !== undefined) setAnswer({ path, data: already });
    else cached(path).then((data) => isWanted && setAnswer({ path, data }), (error) => isWanted && setAnswer({ path, error }));
    return () => { isWanted = false; };
  }, [path]);
  return answer.path === path ? answer : { data: known(path) };
}

// Keys while a view is shown: a table from a key, such as "j" or "Escape", to what it does. Not while somebody types, and
// Enter not on what it presses by itself.
export function useKeys(table) {
  const current = useRef(table);
  current.current = table;
  useLayoutEffect(() => {
    const listener = (event) => {
      const isTyping = event.target.closest?.("input:not([type=range]):not([type=checkbox]), textarea, select, [contenteditable]");
      if (event.ctrlKey || event.metaKey || event.altKey || (isTyping && event.key !== "Escape")) return;
      if ((event.key === "Enter" || event.key === " ") && event.target.closest?.("a[href], button, summary")) return;
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

// The same number of decimals whatever the value, for columns.
export const fixed = (digits, sign = false) => (value) => (value === null || value === undefined ? "–" : `${sign && value > 0 ? "+" : ""}${value.toFixed(digits)}`);

export const count = (value) => (value ?? 0).toLocaleString("en");

export function share(value) {
  if (value === null || value === undefined) return "–";
  return value === 0 ? "0%" : `${value < 1e-6 ? (100 * value).toExponential(0) : (100 * value).toPrecision(2)}%`;
}

// --- tokens ---

// Tokens of a text, those with a value as dark as it is in shares of `most`; hovering tells it. The others are plain text,
// as a page full of contexts has thousands of them. Texts are as the server gives them, with nothing in them unseen.
export function Tokens({ texts, values, most, peak, from = 0, to = texts.length, dir = "auto" }) {
  const parts = [];
  let plain = "";
  const flush = () => { if (plain) parts.push(plain); plain = ""; };
  for (let i = from; i < to; i++) {
    const value = values?.[i] ?? 0;
    if (value === 0 && i !== peak) { plain += texts[i]; continue; }
    flush();
    const heat = most > 0 ? Math.min(Math.max(value / most, 0), 1) : 0;
    parts.push(html`<span class=${`token${i === peak ? " peak" : ""}`} title=${`${texts[i]}  ${figure(value)}`} style=${{ "--heat": heat.toFixed(2) }}>${texts[i]}</span>`);
  }
  flush();
  return html`<span class="tokens" dir=${dir}>${parts}</span>`;
}

// --- charts ---

// Bars of counts, as an image with a description; `titles` tell each bar, `mark` is the number of one that stands out.
export function Bars({ counts, label, ticks = [], titles = [], mark, log = false, height = 64 }) {
  const size = (n) => (log ? Math.log1p(n) : n);
  const most = Math.max(...counts.map(size), 1e-12);
  const width = 4 * counts.length;
  return html`<figure class="chart">
    <svg viewBox=${`0 0 ${width} ${height}`} preserveAspectRatio="none" role="img" aria-label=${label}>
      ${counts.map((n, i) => {
    const tall = n > 0 ? Math.max((size(n) / most) * height, 1.5) : 0;
    return html`<rect class=${i === mark ? "mark" : undefined} x=${4 * i + 0.25} width="3.5" y=${height - tall} height=${tall}>${titles[i] && html`<title>${titles[i]}</title>`}</rect>`;
  })}
    </svg>
    <figcaption>${ticks.map((tick) => html`<span>${tick}</span>`)}</figcaption>
  </figure>`;
}

// Bars of counts as small as a line of text; what they tell is told elsewhere.
export function Spark({ counts }) {
  const most = Math.max(...counts, 1);
  const path = counts.map((n, i) => `M${4 * i} 16h3v-${n > 0 ? Math.max(1, Math.round((16 * n) / most)) : 0}h-3z`).join("");
  return html`<svg class="spark" viewBox=${`0 0 ${4 * Math.max(counts.length, 8)} 16`} preserveAspectRatio="none" aria-hidden="true"><path d=${path}/></svg>`;
}

// A value between 0 and 1 with its interval, and where chance is.
export function Interval({ value, low, high, chance }) {
  const x = (share) => 2 + 96 * share;
  return html`<svg class="interval" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">
    <path class="axis" d="M2 6H98"/>${chance !== null && html`<path class="chance" d=${`M${x(chance)} 1V11`}/>`}
    ${low !== null && html`<path class="reach" d=${`M${x(low)} 6H${x(high)}`}/>`}<rect class="dot" x=${x(value) - 1.5} y="2" width="3" height="8"/>
  </svg>`;
}

// --- actions ---

// A field for a number, "" for none: what somebody is typing stays as it is, however often the page is drawn meanwhile, and
// is told as soon as it is a number that the field may hold.
export function NumberField({ value, onNumber, ...rest }) {
  const [draft, setDraft] = useState(null);
  const type = (event) => {
    setDraft(event.target.value);
    if (event.target.checkValidity() && (event.target.value !== "" || !rest.required)) onNumber(event.target.value === "" ? undefined : Number(event.target.value));
  };
  return html`<input type="number" ...${rest} value=${draft ?? value} onInput=${type} onBlur=${() => setDraft(null)}/>`;
}

// Puts text on the clipboard, also where the page came over plain HTTP, which gives pages no clipboard.
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

// A line that asks for a latent's number.
export function GoTo({ most, onGo, onClose }) {
  const field = useRef(null);
  useLayoutEffect(() => field.current.focus(), []);  // before the next key
  const submit = (event) => {
    event.preventDefault();
    if (field.current.value !== "") onGo(Number(field.current.value));
    onClose();
  };
  return html`<div class="goto" role="dialog" aria-label="Go to a latent"><form onSubmit=${submit} onKeyDown=${(event) => event.key === "Escape" && onClose()}>
    <label>Go to latent <input ref=${field} type="number" min="0" max=${most} step="1" required onBlur=${onClose}/></label><kbd>Enter</kbd></form></div>`;
}

// What keys do, as a line: [["j", "k"], "moves"], …
export const KeyHints = ({ keys }) => html`<p class="hints" aria-label="Keys">${keys.map(([names, what]) => html`<span>${names.map((name) => html`<kbd>${name}</kbd>`)} ${what}</span>`)}</p>`;
