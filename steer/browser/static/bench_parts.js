// Parts of the steering bench: an item of the basket, what items do to each other, saving them, and the texts.

import { useState } from "./vendor/hooks.js";
import { post } from "./api.js";
import { figure, fixed, html, NumberField, Problem } from "./ui.js";

const WIDEST = 2;
const OPERATIONS = ["add", "rotate", "ablate"];
const SCOPES = ["all", "prompt", "generated", "system", "user", "assistant", "tool", "thinking", "final", "no-tool-calls"];
const BOUND = /^(after|before):(\d+)$/;

export const told = ({ where, expected, got, fix }) => `${where}: expected ${expected}, got ${got}. ${fix}`;
const refOf = ({ vector, latent }) => vector ?? latent;

// --- an item ---

export function Item({ item, number, entry, refused, force, onSlide, onChange, onRemove }) {
  const ref = refOf(item);
  const operation = item.operation ?? entry?.operation ?? "add";
  const window = operation === entry?.operation ? entry.window : null;
  const [low, high] = operation === "ablate" ? [0, 1] : reachOf(window, force);
  const dose = item.dose ?? entry?.dose ?? 0;
  const isOutside = window && (dose < window[0] || dose > window[1]);
  return html`<div class="item" data-item=${ref}>
    <div class="title"><b><span class="faint">${number}</span> <bdi title=${ref}>${entry?.name ?? ref}</bdi></b><span class="faint" title=${entry?.headline}>${entry && `${entry.hook_points.join(", ")}, ${entry.headline}`}</span><button class="quiet" aria-label=${`Remove ${ref}`} onClick=${onRemove}>×</button></div>
    <div class="row"><input type="range" aria-label=${`Dose of ${ref}`} min=${low} max=${high} step="0.01" list=${`marks-${number}`} value=${dose} onInput=${(event) => onSlide(Number(event.target.value))}/><${NumberField} class="number" aria-label=${`${ref} in figures`} step="any" min="-16" max="16" required value=${Number(dose.toPrecision(3))} onNumber=${onSlide}/></div>
    <datalist id=${`marks-${number}`}>${[...(window ?? []), entry?.dose ?? 0, 0].map((value) => html`<option value=${value}></option>`)}</datalist>
    ${window && html`<p class=${isOutside ? "warn" : "faint"}>${isOutside ? "outside its" : ""} calibrated window ${figure(window[0], 2)} to ${figure(window[1], 2)}</p>`}
    <div class="row limits"><select aria-label="Operation" value=${operation} onChange=${(event) => onChange({ operation: event.target.value, dose: event.target.value === "ablate" ? 1 : operation === "ablate" ? 0.5 : item.dose })}>${OPERATIONS.map((name) => html`<option>${name}</option>`)}</select>
      <${Scope} scope=${item.scope ?? entry?.scope ?? "all"} onChange=${(scope) => onChange({ scope })}/></div>
    <${Gate} gate=${item.gate} isOwn=${entry?.gated} onChange=${(gate) => onChange({ gate })}/>
    ${refused && html`<p class="problem" role="alert">${told(refused)}</p>`}</div>`;
}

// What the runtime lets through either way: up to the further end of a window, unless forced.
function reachOf(window, force) {
  const most = force || !window ? WIDEST : Math.max(...window.map(Math.abs));
  return [-most, most];
}

function Scope({ scope, onChange }) {
  const words = scope.split(/\s+/).filter(Boolean);
  const bounds = Object.fromEntries(words.map((word) => word.match(BOUND)).filter(Boolean).map(([, name, value]) => [name, value]));
  const rest = words.filter((word) => !BOUND.test(word)).join(" ") || "all";
  const say = (part, { after, before }) => onChange([part === "all" && (after ?? before) !== undefined ? "" : part, after !== undefined && `after:${after}`, before !== undefined && `before:${before}`].filter(Boolean).join(" "));
  const bound = (name, label, title) => html`<label title=${title}>${label} <${NumberField} min="0" step="1" value=${bounds[name] ?? ""} onNumber=${(value) => say(rest, { ...bounds, [name]: value })}/></label>`;
  return html`<select aria-label="Scope" title="Which tokens are steered" value=${rest} onChange=${(event) => say(event.target.value, bounds)}>${[...new Set([...SCOPES, rest])].map((name) => html`<option>${name}</option>`)}</select>
    ${bound("after", "from", "Index of the first token that is steered; 0 is the prompt's first")}${bound("before", "to", "Index behind the last token that is steered")}`;
}

function Gate({ gate, isOwn, onChange }) {
  const level = (key, label, title, given, fields = {}) => html`<label title=${title}>${label} <${NumberField} step="any" ...${fields} value=${given} onNumber=${(value) => onChange(key === "on" && value === undefined ? undefined : { ...gate, [key]: value })}/></label>`;
  return html`<div class="row gate">${level("on", "gate above", "Steer only while |cos(vector, h)| has risen above this", gate?.on ?? "", { placeholder: isOwn ? "own" : "none" })}
    ${gate && level("off", "shut at", "Stop at this or below; empty: at the same", gate.off ?? "", { placeholder: String(gate.on) })}${gate && level("tokens", "for at least", "Tokens that it stays open at least", gate.tokens ?? 1, { min: 1, max: 1024, step: 1, required: true })}</div>`;
}

export function Add({ entries, onAdd }) {
  const [text, setText] = useState("");
  const [problem, setProblem] = useState(null);
  const submit = (event) => {
    event.preventDefault();
    const wanted = text.trim();
    const entry = entries.find(({ ref, name }) => ref === wanted || name === wanted);
    if (wanted) onAdd(entry?.ref ?? wanted).then(() => { setText(""); setProblem(null); }, setProblem);
  };
  return html`<form class="row add" onSubmit=${submit}><input list="bench-vectors" aria-label="Add a vector" placeholder="vector, or SOURCE:latent" value=${text} onInput=${(event) => setText(event.target.value)}/><button>Add</button>
    <datalist id="bench-vectors">${entries.map(({ ref, name }) => html`<option value=${ref}>${name}</option>`)}</datalist></form>${problem && html`<${Problem} error=${problem}/>`}`;
}

// --- what they do to each other ---

export function Together({ together }) {
  if (together.refused) return html`<p class="problem" role="alert">${told(together.refused)}</p>`;
  const { names, cosines, points, pairs } = together;
  const shares = Object.assign({}, ...Object.values(points).map((point) => point.shares));
  const sign = fixed(2, true);
  return names.length > 1 && html`<h3>Together</h3>
    <table class="cosines"><thead><tr><th>cosine</th>${names.map((name) => html`<th class="number" title=${name}>${name.split(" ")[0]}</th>`)}<th class="number" title="What is pushed along it over what was asked for: 1 if the others leave it alone">along it</th></tr></thead>
      <tbody>${names.map((name, i) => html`<tr><th title=${name}><bdi>${name}</bdi></th>${cosines[i].map((value, k) => html`<td class=${`number ${value < 0 ? "against" : "with"}`} style=${{ "--heat": k === i ? 0 : Math.abs(value).toFixed(2) }} title=${`${name} and ${names[k]}`}>${k === i ? "·" : sign(value)}</td>`)}<td class="number">${name in shares ? `×${fixed(2)(shares[name])}` : "–"}</td></tr>`)}</tbody></table>
    <table class="joint"><thead><tr><th>Hook point</th><th class="number">joint dose</th><th class="number">sum</th><th class="number" title="Of the cosines: 1 where all are at right angles, larger the more alike some are">condition</th><th class="number" title="Effective rank: directions that there are in effect">directions</th></tr></thead>
      <tbody>${Object.entries(points).map(([point, at]) => html`<tr><td>${point}</td><td class="number">${figure(at.joint_dose)}</td><td class="number">${figure(at.sum_of_doses)}</td><td class="number">${at.condition === null ? "∞" : figure(at.condition)}</td><td class="number">${figure(at.effective_rank)}</td></tr>`)}</tbody></table>
    ${pairs.map((pair) => html`<p class="faint">${pair}</p>`)}`;
}

// --- saving ---

export function Save({ about, damaged, basket, entries, onSaved }) {
  const [said, setSaid] = useState(null);
  const points = entries.map((entry) => entry?.hook_points ?? []);
  const isOne = basket.length > 1 && points.every((each) => each.length === 1) && new Set(points.flat()).size === points.length;
  const libraries = about.libraries.map((path, number) => ({ path, number })).filter(({ number }) => !damaged.some(({ library }) => library === number));
  if (!libraries.length) return html`<p class="faint">Nothing can be saved, as no library is open that can be read.</p>`;
  const submit = (event) => {
    event.preventDefault();
    const { name, library } = event.target.elements;
    const names = basket.map((_, i) => (isOne ? `${name.value}@${points[i]}` : basket.length > 1 ? `${name.value}-${i + 1}` : name.value));
    const number = Number(library.value);
    const say = (kept) => { onSaved(kept); setSaid({ kept: isOne ? name.value : names.join(", "), path: about.libraries[number] }); };
    post("/api/bench/save", { library: number, basket, names }).then(say, (error) => setSaid({ error }));
  };
  return html`<h3>Save</h3><form class="row" onSubmit=${submit}><input name="name" aria-label="Name to save as" placeholder="name" pattern="[A-Za-z0-9][A-Za-z0-9._\\-]*" required/><select name="library" aria-label="Library">${libraries.map(({ path, number }) => html`<option value=${number} title=${path}>${path.split("/").slice(-2).join("/")}</option>`)}</select><button>Save</button></form>
    ${basket.length > 1 && html`<p class="faint">${isOne ? "The items act at different hook points, so they are kept together under one name." : "A library keeps vectors and no baskets: each item becomes one, NAME-1 and so on, at the dose that is shown. This page's link keeps them together."}</p>`}
    ${said?.kept && html`<p role="status">Saved ${said.kept}.</p>`}${said?.error && html`<${Problem} error=${said.error}/>`}`;
}

// --- texts ---

function stateOf(run) {
  if (run.state === "waiting") return run.model === "ready" ? "waiting for somebody else's text" : "loading the model";
  const n = Math.min(run.steps.length, run.most);  // a last step may be the end of a character that was begun
  return [run.state, n && `${n} tokens`, run.took && `${figure((1000 * n) / run.took, 2)} a second`].filter(Boolean).join(", ");
}

export function Texts({ run }) {
  const fired = run.fired?.[0] ?? {};
  const isGated = run.steps.some(({ gates }) => Object.keys(gates[0] ?? {}).length > 0);
  const inPrompt = Object.entries(fired).map(([name, indices]) => `${name} on ${indices.filter((index) => index < run.n_prompt).length}`).join(", ");
  return html`<p class="faint" role="status">${stateOf(run)}</p>
    <div class="texts">${run.rows.map((name, row) => html`<div><h3>${name === "control" ? "random directions" : name}</h3><div class="text" dir="auto" data-row=${name}>${written(run, name, row)}</div></div>`)}</div>
    ${isGated && html`<p class="faint">Tokens on which a gate is open are marked.${inPrompt && ` Of the prompt's ${run.n_prompt} tokens: ${inPrompt}.`}</p>`}`;
}

// A text by its tokens: plain as far as nothing is to be told of them, since there may be a thousand.
function written(run, name, row) {
  const parts = [];
  let plain = "";
  const flush = () => { if (plain) parts.push(plain); plain = ""; };
  run.steps.forEach(({ pieces }, i) => {
    const mark = name !== "unsteered" && run.marks.filter(({ at }) => at === i).pop();
    const gates = Object.entries(run.steps[i + 1]?.gates?.[row] ?? {});  // the model sees a token when it writes the next one
    if (mark) { flush(); parts.push(html`<mark title=${`doses from here: ${mark.doses.map((dose) => figure(dose)).join(", ")}`} data-says="◆"></mark>`); }
    if (!gates.length || !pieces[row]) { plain += pieces[row]; return; }
    flush();
    const isOpen = name !== "unsteered" && gates.some(([, [, open]]) => open);
    parts.push(html`<span class=${isOpen ? "gated open" : "gated"} title=${gates.map(([gate, [value, open]]) => `${gate}: ${figure(value, 2)}, ${open ? "open" : "shut"}`).join("\n")}>${pieces[row]}</span>`);
  });
  flush();
  return parts;
}
