// Labelling sessions: a list of them, and the desk at which one is worked through with keys alone.

import { useEffect, useRef, useState } from "./vendor/hooks.js";
import { forget, get, post, prefetch, query } from "./api.js";
import { Lines } from "./feature.js";
import { Logits, Others } from "./feature_panels.js";
import { featurePath } from "./latent_lists.js";
import { answerTo, dismiss, onChange, put, refused, send, unique, waiting } from "./outbox.js";
import { go } from "./router.js";
import { count, Empty, GoTo, html, KeyHints, Problem, share, useCached, useKeys, Waiting } from "./ui.js";
import { Agreement } from "./agreement.js";

const KINDS = { random: "random", density: "in bands of density", uncertainty: "the least certain explanations first", unlabelled: "without a label", disagreement: "where annotators differ most" };
const HINTS = [[["a"], "accept"], [["x"], "reject"], [["e"], "edit"], [["Space"], "skip"], [["f"], "flag"], [["⌫"], "undo"], [["g"], "go to a number"]];
const MARKS = { accept: "✓", edit: "✎", reject: "✗", skip: "→", flag: "⚑", adjudicate: "§" };
const AHEAD = 4, DRAFT_MS = 400;
const TAB = sessionStorage.tab ??= unique();

export function View({ about, parts, query: asked }) {
  const [source, number, view] = parts;
  if (!about.sources.length) return html`<${Empty} title="Nothing to label">Open an index with saekit browse.<//>`;
  if (number === undefined) return html`<${Sessions} key=${asked.source} about=${about} source=${asked.source ?? source ?? about.sources[0].name}/>`;
  if (!about.sources.some(({ name }) => name === source) || !/^\d{1,12}$/.test(number)) return html`<${Empty} title="There is no such session"><a href="/label">All sessions</a><//>`;
  const given = { about, source, session: Number(number) };
  return view === "agreement" ? html`<${Agreement} ...${given}/>` : html`<${Desk} key=${source + number} ...${given}/>`;
}

// --- sessions ---

function Sessions({ about, source }) {
  const [sessions, setSessions] = useState(null);
  const [problem, setProblem] = useState(null);
  const read = () => get(`/api/label/sessions${query({ source })}`).then(setSessions, setProblem);
  useEffect(() => { read(); }, [source]);
  const create = (event) => {
    event.preventDefault();
    const { name, kind, n, annotators, blind } = event.target.elements;
    const body = { source, name: name.value.trim(), kind: kind.value, n: n.value ? Number(n.value) : null, annotators_per_latent: Number(annotators.value), blind: blind.checked };
    post("/api/label/sessions", body).then((made) => go(`/label/${encodeURIComponent(source)}/${made.id}`), setProblem);
  };
  return html`<div class="row"><h1>Label</h1>
      <label>Layer <select value=${source} onChange=${(event) => go(`/label${query({ source: event.target.value })}`)}>${about.sources.map(({ name }) => html`<option>${name}</option>`)}</select></label></div>
    ${problem && html`<${Problem} error=${problem}/>`}
    ${sessions === null ? html`<${Waiting}/>` : sessions.length === 0 ? html`<p class="faint">No session yet.</p>` : html`<table class="panel sessions">
      <thead><tr><th>Session</th><th>Queue</th><th class="number">done</th><th class="number">of</th><td></td></tr></thead>
      <tbody>${sessions.map((each) => html`<tr key=${each.id}>
        <td><a href=${`/label/${encodeURIComponent(source)}/${each.id}`}>${each.name}</a> ${each.is_blind_now && html`<span class="tag">blind</span>`}</td>
        <td class="faint">${KINDS[each.queue.kind] ?? each.queue.kind}${each.annotators_per_latent > 1 ? `, ${each.annotators_per_latent} annotators each` : ""}</td>
        <td class="number">${count(each.progress.done)}</td><td class="number">${count(each.progress.latents)}</td>
        <td><a href=${`/label/${encodeURIComponent(source)}/${each.id}/agreement`}>agreement</a></td></tr>`)}</tbody></table>`}
    ${about.role !== "viewer" && html`<form class="panel row new-session" onSubmit=${create}><h2>New session</h2>
      <label>Name <input name="name" required maxlength="100"/></label>
      <label>Queue <select name="kind">${Object.entries(KINDS).map(([kind, said]) => html`<option value=${kind}>${said}</option>`)}</select></label>
      <label>Latents <input name="n" type="number" min="1" placeholder="all"/></label>
      <label>Annotators a latent <input name="annotators" type="number" min="1" max="100" value="1"/></label>
      <label title="Annotators do not see each other's labels"><input name="blind" type="checkbox"/> blind</label>
      <button class="primary">Begin</button></form>`}`;
}

// --- desk ---

function Desk({ about, source, session }) {
  const [queue, setQueue] = useState(null);
  const [desk, setDesk] = useState(null);
  const [shown, setShown] = useState(null);
  const [problem, setProblem] = useState(null);
  const [isAsking, setAsking] = useState(false);
  const decided = useRef(new Set());
  const [local, setLocal] = useState([]);
  const isViewer = about.role === "viewer";
  const where = { source, session };
  useOutbox();

  const readDesk = () => get(`/api/label/desk${query(where)}`).then(setDesk, setProblem);
  const lease = (latent) => post("/api/label/lease", { ...where, n: AHEAD + 1, latent }).then((answer) => {
    if (!answer.is_mine) { setProblem(new Error(`Latent ${latent} is with other annotators, or needs no more of them.`)); return; }
    const next = answer.latents.filter((each) => !decided.current.has(each));
    next.slice(0, AHEAD).forEach((each) => prefetch(featurePath(source, each)));
    setQueue(next);
    setShown((old) => latent ?? (old !== null && !decided.current.has(old) ? old : next[0] ?? null));
  }, setProblem);
  useEffect(() => {
    readDesk();
    if (isViewer) setQueue([]); else lease();
    send();
    return onChange(() => { if (waiting() === 0) readDesk(); });
  }, []);

  const decide = (latent, action, rest) => {
    const key = put({ ...where, latent, action, ...rest });
    decided.current.add(latent);
    setLocal((old) => [{ key, latent, action, text: rest.text ?? "", counts: true }, ...old].slice(0, 10));
    const left = queue.filter((each) => each !== latent);
    setQueue(left);
    setShown(left[0] ?? null);
    forget("/api/latents");
    forget("/api/label/authors");
    if (left.length < AHEAD) lease();
  };
  const last = merged(local, desk?.last ?? []);
  const revisit = (latent) => { decided.current.delete(latent); setProblem(null); lease(latent); };
  const undo = async () => {
    const target = last.find(({ counts }) => counts);
    if (!target) return;
    const id = target.id ?? answerTo(target.key)?.id;
    if (id === undefined) { setProblem(new Error("Not saved yet: it can be undone once the server has answered.")); return; }
    put({ ...where, latent: target.latent, action: "undo", undoes: id });
    setLocal((old) => old.filter(({ key }) => key !== target.key));
    setDesk((old) => old && { ...old, last: old.last.filter((each) => each.id !== id) });
    await settled();
    revisit(target.latent);
  };
  const jump = (latent) => { setAsking(false); revisit(latent); };
  useKeys({ g: () => setAsking(true), Backspace: undo });
  if (problem && queue === null) return html`<${Problem} error=${problem}/>`;
  if (queue === null || desk === null) return html`<${Waiting}/>`;
  const { progress, name, is_blind_now } = desk.session;
  return html`<div class="desk">
    ${isAsking && html`<${GoTo} most=${about.sources.find((each) => each.name === source).d_sae - 1} onGo=${jump} onClose=${() => setAsking(false)}/>`}
    <div class="row title"><h1><a href=${`/label${query({ source })}`}>${name}</a></h1>${is_blind_now && html`<span class="tag">blind: others' labels are hidden</span>`}
      <progress max=${Math.max(progress.latents, 1)} value=${progress.done} aria-label="Done"></progress>
      <span class="faint">${count(progress.done)} of ${count(progress.latents)}${desk.pace.latents_an_hour ? `, ${Math.round(desk.pace.latents_an_hour)} an hour` : ""}</span>
      <span class="spacer"></span><${Saved}/></div>
    ${problem && html`<${Problem} error=${problem}/>`}
    <${Refused}/>
    <div class="columns">
      <div>${shown === null ? html`<${Empty} title=${isViewer ? "You may look on" : "Nothing is left for you"}>${progress.done < progress.latents ? "Others hold the rest, or have to." : "Every latent of this session has its labels."}<//>`
    : html`<${Latent} key=${shown} source=${source} session=${session} latent=${shown} onDecide=${decide}/>`}</div>
      <aside><section class="panel"><h2>Last ten</h2>${last.length === 0 ? html`<p class="faint">Nothing yet.</p>` : html`<ol class="last">${last.map((each) => html`<li key=${each.key} class=${each.counts ? "" : "faint"}>
        <button class="quiet" title="Decide again" onClick=${() => revisit(each.latent)}>${MARKS[each.action] ?? each.action} <span class="mono">${each.latent}</span> ${each.text}</button></li>`)}</ol>`}</section>
        <section class="panel"><h2>Keys</h2><${KeyHints} keys=${HINTS}/></section></aside>
    </div>
  </div>`;
}

// What the server knows of, and in front of it what it does not know of yet.
function merged(local, known) {
  const there = new Set(known.map(({ key }) => key));
  return [...local.filter(({ key }) => !there.has(key)), ...known].slice(0, 10);
}

const settled = () => new Promise((resolve) => {
  const stop = onChange(() => { if (waiting() === 0) { stop(); resolve(); } });
  if (waiting() === 0) { stop(); resolve(); }
});

function useOutbox() {
  const [, again] = useState(0);
  useEffect(() => onChange(() => again((n) => n + 1)), []);
}

function Saved() {
  useOutbox();
  const n = waiting();
  return html`<span class=${n ? "unsaved" : "faint"} role="status">${n ? `${n} not saved yet` : "all saved"}</span>`;
}

function Refused() {
  useOutbox();
  return refused().map(({ key, body, message }) => html`<p class="problem" role="alert">Not taken, latent ${body.latent}${body.text ? `, “${body.text}”` : ""}: ${message} <button onClick=${() => dismiss(key)}>Dismiss</button></p>`);
}

function Latent({ source, session, latent, onDecide }) {
  const { data: feature, error } = useCached(featurePath(source, latent));
  const [known, setKnown] = useState(null);
  const [text, setText] = useState(null);
  const box = useRef(null);
  const revision = useRef(Number(sessionStorage.revision ?? 0));
  const place = `saekit:draft:${source}:${session}:${latent}`;
  useEffect(() => {
    const mine = localStorage.getItem(place);
    if (mine) setText(mine);
    get(`/api/label/latent${query({ source, session, latent })}`).then((answer) => {
      setKnown(answer);
      setText((old) => old ?? (answer.draft || answer.state.text || null));
    }, () => setKnown({ suggestions: [], history: [], state: {} }));
  }, [latent]);
  const suggestion = known?.suggestions.find(({ kind }) => kind === "explanation") ?? known?.suggestions[0];
  const label = text ?? suggestion?.text ?? "";
  const timer = useRef(null);
  const type = (value) => {
    setText(value);
    localStorage.setItem(place, value);
    sessionStorage.revision = ++revision.current;
    clearTimeout(timer.current);
    timer.current = setTimeout(() => post("/api/label/drafts", { source, session, latent, text: value, tab: TAB, revision: revision.current }).catch(() => {}), DRAFT_MS);
  };
  const finish = (action, rest = {}) => {
    clearTimeout(timer.current);
    localStorage.removeItem(place);
    const seen = suggestion ? { seen_label: suggestion.id, seen_text: suggestion.text } : {};
    onDecide(latent, action, { ...seen, ...rest, tab: TAB, revision: revision.current });
  };
  const accept = () => { if (label.trim()) finish(suggestion && label === suggestion.text ? "accept" : "edit", { text: label.trim() }); else box.current.focus(); };
  const edit = () => { if (text === null && label) setText(label); box.current.focus(); box.current.select(); };
  useKeys({ a: accept, x: () => finish("reject", text ? { text } : {}), " ": () => finish("skip"), f: () => finish("flag", text ? { text } : {}), e: edit, Enter: edit });
  const typed = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); accept(); }
    if (event.key === "Escape") event.target.blur();
  };
  if (error) return html`<${Problem} error=${error}/>`;
  return html`<section class="panel label-box">
      <div class="row"><h2><span class="faint">${source}</span> <span class="mono">${latent}</span></h2>${feature && html`<span class="faint">active on ${share(feature.density)} of tokens</span>`}
        <span class="spacer"></span><a href=${`/feature/${encodeURIComponent(source)}/${latent}`}>whole feature</a></div>
      <label>Label <textarea ref=${box} rows="2" maxlength="10000" value=${label} onInput=${(event) => type(event.target.value)} onKeyDown=${typed}></textarea></label>
      <div class="row"><button class="primary" onClick=${accept}>Accept</button><button onClick=${() => finish("reject", text ? { text } : {})}>Reject</button><button onClick=${() => finish("skip")}>Skip</button><button onClick=${() => finish("flag", text ? { text } : {})}>Flag</button>
        ${suggestion && html`<span class="faint">suggested by ${suggestion.author}${suggestion.kind === "explanation" ? "" : `, from ${suggestion.kind}`}</span>`}<span class="spacer"></span><span class="faint"><kbd>Ctrl</kbd> <kbd>Enter</kbd> saves while typing</span></div>
      ${known?.suggestions.length > 1 && html`<ul class="suggestions">${known.suggestions.map((each) => html`<li key=${each.id}><button class="quiet" onClick=${() => type(each.text)}>${each.text}</button> <span class="faint">${each.author}</span></li>`)}</ul>`}
    </section>
    ${!feature ? html`<${Waiting}/>` : html`<section class="panel contexts"><h2>Strongest contexts</h2>
      ${feature.contexts.length ? html`<${Lines} windows=${feature.contexts} name="Strongest contexts" most=${feature.max_activation}/>` : html`<p class="faint">None were kept.</p>`}
      ${[...feature.bins].reverse().slice(1).map((bin) => html`<h3>${Math.round(100 * bin.share_low)} to ${Math.round(100 * bin.share_high)}% of its active tokens</h3><${Lines} windows=${bin.contexts.slice(0, 3)} name=${`Contexts from ${bin.low}`} most=${feature.max_activation}/>`)}
      ${feature.near_misses.length > 0 && html`<h2>Near misses</h2><${Lines} windows=${feature.near_misses.slice(0, 3)} name="Near misses" most=${feature.max_activation}/>`}</section>
      <div class="below"><${Logits} feature=${feature}/><${Others} title="Most similar decoder rows" none="None is known." others=${feature.neighbours} figures=${[["cosine", "cosine"]]} source=${source} query=${{}}/></div>`}`;
}
