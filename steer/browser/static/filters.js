// What is above a list: search, source, filters and order. Everything it changes, it changes in the address.

import { useEffect, useRef, useState } from "./vendor/hooks.js";
import { bounds, COLUMNS, whereOf } from "./latent_lists.js";
import { count, figure, html, useCached, useKeys } from "./ui.js";

const TYPING_MS = 150;
const SHOWN = { "": "all", live: "ever active", dead: "dead", dense: "dense (10%)" };
const STATUSES = Object.fromEntries([["", "any"], ...["undecided", "decided", "accepted", "rejected", "flagged", "skipped", "adjudicated"].map((status) => [status, status])]);
const HOWS = { "": "words", meaning: "meaning" };
const EXPLAINED = { "": "any", true: "explained", false: "not explained" };

export function Toolbar({ names, source, query, about, total, hasMeaning, onChange }) {
  const where = bounds(query.where);
  const n = Object.keys(where).length;
  return html`<div class="toolbar row" role="search">
      <${Search} text=${query.q ?? ""} label=${query.how ? "Search labels by meaning" : "Search labels and words"} onChange=${(q) => onChange({ q, sort: q && !query.q ? "" : query.sort }, true)}/>
      ${hasMeaning && html`<${Choice} label="Search by" value=${query.how ?? ""} options=${HOWS} onChange=${(how) => onChange({ how, sort: "", desc: "" }, true)}/>`}
      ${names.length > 1 && html`<${Choice} label="Source" value=${source} options=${Object.fromEntries(names.map((name) => [name, name]))} onChange=${(value) => onChange({ source: value })}/>`}
      <${Choice} label="Show" value=${query.show ?? ""} options=${SHOWN} onChange=${(show) => onChange({ show })}/>
      <${Choice} label="Label" value=${query.explained ?? ""} options=${EXPLAINED} onChange=${(explained) => onChange({ explained })}/>
      <${Choice} label="People" value=${query.status ?? ""} options=${STATUSES} onChange=${(status) => onChange({ status, by: status ? query.by : "" })}/>
      ${query.status && html`<${By} source=${source} by=${query.by ?? ""} onChange=${(by) => onChange({ by })}/>`}
      <${Order} query=${query} onChange=${onChange}/>
      <details class="filters"><summary>Bounds${n > 0 ? ` (${n})` : ""}</summary>
        <${Bounds} where=${where} columns=${about?.columns ?? {}} onChange=${(table) => onChange({ where: whereOf(table) })}/></details>
      ${(n > 0 || query.q || query.show || query.explained || query.status) && html`<button class="quiet" onClick=${() => onChange({ q: "", show: "", explained: "", status: "", by: "", where: "" })}>Clear</button>`}
      <span class="spacer"></span>
      <span class="faint total" role="status">${total === undefined ? "" : total === about?.d_sae || !about ? `${count(total)} latents` : `${count(total)} of ${count(about.d_sae)}`}</span>
    </div>
    ${n > 0 && html`<div class="row chips">${Object.entries(where).map(([column, [low, high]]) => html`<button class="tag" title="Take this away"
      onClick=${() => onChange({ where: whereOf({ ...where, [column]: ["", ""] }) })}>${COLUMNS[column]?.name ?? column} ${low === "" ? `≤ ${high}` : high === "" ? `≥ ${low}` : `${low} – ${high}`} ×</button>`)}</div>`}`;
}

// Searches as somebody types, a moment after the last letter.
function Search({ text, label, onChange }) {
  const field = useRef(null);
  const [typed, setTyped] = useState(text);
  const sent = useRef(text);
  useEffect(() => { if (text !== sent.current) { sent.current = text; setTyped(text); } }, [text]);
  useEffect(() => {
    if (typed === sent.current) return undefined;
    const later = setTimeout(() => { sent.current = typed; onChange(typed); }, TYPING_MS);
    return () => clearTimeout(later);
  }, [typed]);
  useKeys({ "/": () => { field.current.focus(); field.current.select(); }, Escape: () => document.activeElement === field.current && field.current.blur() });
  const leave = (event) => { if (event.key === "Enter") field.current.blur(); };
  return html`<input ref=${field} class="search" type="search" maxlength="200" placeholder=${label} aria-label=${label} aria-keyshortcuts="/"
    value=${typed} onInput=${(event) => setTyped(event.target.value)} onKeyDown=${leave}/>`;
}

const Choice = ({ label, value, options, onChange }) => html`<label class="choice"><span>${label}</span>
  <select aria-label=${label} value=${value} onChange=${(event) => onChange(event.target.value)}>${Object.entries(options).map(([key, name]) => html`<option value=${key}>${name}</option>`)}</select></label>`;

// Whose decision: names are asked for only once a status is chosen.
function By({ source, by, onChange }) {
  const authors = useCached(`/api/label/authors?source=${encodeURIComponent(source)}`);
  const names = [...new Set([...(authors.data ?? []), ...(by ? [by] : [])])];
  return html`<${Choice} label="By" value=${by} options=${{ "": "anybody", ...Object.fromEntries(names.map((name) => [name, name])) }} onChange=${onChange}/>`;
}

function Order({ query, onChange }) {
  const given = query.q ? { "": query.how ? "likest" : "best match", latent: "number" } : { "": "number" };
  const options = { ...given, ...Object.fromEntries(Object.entries(COLUMNS).map(([key, { name }]) => [key, name])) };
  const isDown = Boolean(query.desc);
  return html`<span class="row"><${Choice} label="Sort" value=${query.sort ?? ""} options=${options} onChange=${(sort) => onChange({ sort, desc: sort && sort !== "latent" ? "1" : "" })}/>
    <button class="quiet" aria-label=${isDown ? "Largest first" : "Smallest first"} title=${isDown ? "Largest first" : "Smallest first"} onClick=${() => onChange({ desc: isDown ? "" : "1" })}>${isDown ? "↓" : "↑"}</button></span>`;
}

// What is typed stays while a list arrives, and counts once the field is left or Enter is pressed.
function Bound({ onBound, value, ...rest }) {
  const [draft, setDraft] = useState(null);
  const end = (event) => { setDraft(null); onBound(event.target.value); };
  return html`<input type="number" step="any" ...${rest} value=${draft ?? value} onInput=${(event) => setDraft(event.target.value)} onChange=${end}/>`;
}

// A line a column.
function Bounds({ where, columns, onChange }) {
  const set = (column, side, text) => {
    const pair = [...(where[column] ?? ["", ""])];
    pair[side] = text.trim();
    onChange({ ...where, [column]: pair });
  };
  return html`<div class="bounds panel">${Object.entries(COLUMNS).filter(([column]) => columns[column]).map(([column, { name, says }]) => html`<span title=${says}>${name}</span>
    ${["at least", "at most"].map((word, side) => html`<${Bound} aria-label=${`${name} ${word}`} placeholder=${figure(columns[column][side])}
      value=${where[column]?.[side] ?? ""} onBound=${(text) => set(column, side, text)}/>`)}`)}</div>`;
}
