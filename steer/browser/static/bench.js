// The steering bench: a basket of vectors, texts that are written under it side by side, and saving what was found.

import { useEffect, useRef, useState } from "./vendor/hooks.js";
import { get, post, stream } from "./api.js";
import { note } from "./router.js";
import { Empty, figure, html, Problem, useKeys, Waiting } from "./ui.js";

const MOST = 8;
const WIDEST = 2;
const OPERATIONS = ["add", "rotate", "ablate"];
const START = { basket: [], prompt: "", chat: true, max_new_tokens: 60, temperature: 0.7, seed: 0, control: false, force: false };

// The whole setting as one value of the address, of what differs from START.
function addressOf(setting) {
  const changed = Object.entries(setting).filter(([key, value]) => JSON.stringify(value) !== JSON.stringify(START[key]));
  return changed.length ? `/bench?s=${encodeURIComponent(JSON.stringify(Object.fromEntries(changed)))}` : "/bench";
}

function settingOf(query) {
  try {
    const given = JSON.parse(query.s ?? "{}");
    const known = Object.entries(given).filter(([key, value]) => key in START && typeof value === typeof START[key]);
    const setting = { ...START, ...Object.fromEntries(known) };
    return Array.isArray(setting.basket) ? { ...setting, basket: setting.basket.filter((item) => item && typeof item === "object").slice(0, MOST) } : { ...setting, basket: [] };
  } catch {
    return START;
  }
}

const refOf = ({ vector, latent }) => vector ?? latent;

export function View({ about, query }) {
  const [entries, setEntries] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    document.title = "Bench · saekit";
    const latents = new Set([...(query.latents ?? "").split(",").filter(Boolean), ...settingOf(query).basket.map(({ latent }) => latent).filter(Boolean)]);
    Promise.all([get("/api/bench/catalogue"), ...[...latents].slice(0, MOST).map((ref) => get(`/api/bench/latent?ref=${encodeURIComponent(ref)}`))])
      .then(([vectors, ...found]) => setEntries([...vectors, ...found]), setProblem);
  }, []);
  if (about.model_state === "none") return html`<${Empty} title="There is no model to steer">Start <code>saekit browse</code> with <code>--set model=…</code><//>`;
  if (problem) return html`<${Problem} error=${problem}/>`;
  return entries ? html`<${Bench} about=${about} query=${query} known=${entries}/>` : html`<${Waiting}/>`;
}

function Bench({ about, query, known }) {
  const [entries, setEntries] = useState(known);
  const [setting, setSetting] = useState(() => {
    const start = settingOf(query);
    const more = (query.latents ?? "").split(",").filter(Boolean).map((latent) => ({ latent, dose: 0.5 }));
    return { ...start, basket: [...start.basket, ...more].slice(0, MOST) };
  });
  const [run, setRun] = useState(null);
  const [weighed, setWeighed] = useState(null);
  const [problem, setProblem] = useState(null);
  const controller = useRef(null);
  const id = useRef(null);
  const change = (fields) => setSetting((before) => ({ ...before, ...fields }));
  const entryOf = (item) => entries.find(({ ref }) => ref === refOf(item));
  const basketKey = JSON.stringify(setting.basket);
  useEffect(() => { note(addressOf(setting)); }, [setting]);
  useEffect(() => () => controller.current?.abort(), []);
  useEffect(() => {
    if (!setting.basket.length) return setWeighed(null);
    const timer = setTimeout(() => post("/api/bench/interference", { basket: setting.basket }).then(setWeighed, () => setWeighed(null)), 250);
    return () => clearTimeout(timer);
  }, [basketKey]);
  const doses = JSON.stringify(setting.basket.map(({ dose }) => dose ?? null));
  useEffect(() => {
    if (!id.current) return;
    const timer = setTimeout(() => id.current && post(`/api/bench/${id.current}/doses`, { doses: JSON.parse(doses) }).catch((error) => id.current && setProblem(error)), 60);
    return () => clearTimeout(timer);
  }, [doses]);
  const stop = () => { controller.current?.abort(); id.current = null; setRun((before) => before && { ...before, state: "stopped" }); };
  const start = () => {
    if (!setting.prompt.trim()) return;
    controller.current?.abort();
    const mine = controller.current = new AbortController();
    setProblem(null);
    setRun({ state: "starting", rows: [], steps: [], marks: [] });
    const on = (event, data) => {
      if (mine.signal.aborted) return;
      if (event === "begin") id.current = data.id;
      if (event === "end" || event === "error") id.current = null;
      if (event === "error" || event === "refused") setProblem(new Error(`${data.where}: expected ${data.expected}, got ${data.got}. ${data.fix}`));
      setRun((before) => after(before, event, data));
    };
    stream("/api/bench/stream", setting, on, mine.signal).catch((error) => { if (error.name !== "AbortError") { setProblem(error); setRun(null); } });
  };
  useKeys({ Escape: stop });
  const press = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); start(); } };
  const put = (i, fields) => change({ basket: setting.basket.map((item, k) => (k === i ? { ...item, ...fields } : item)) });
  const add = async (ref) => {
    const entry = entries.find((each) => each.ref === ref);
    if (entry && !ref.includes(":")) return change({ basket: [...setting.basket, { vector: ref, dose: entry.dose }] });
    const found = entry ?? await get(`/api/bench/latent?ref=${encodeURIComponent(ref)}`);
    if (!entry) setEntries((before) => [...before, found]);
    change({ basket: [...setting.basket, { latent: ref, dose: 0.5 }] });
  };
  const number = (key, label, step) => html`<label>${label} <input type="number" min="0" step=${step} value=${setting[key]} onChange=${(event) => change({ [key]: Number(event.target.value) })}/></label>`;
  const tick = (key, label) => html`<label class="row"><input type="checkbox" checked=${setting[key]} onChange=${(event) => change({ [key]: event.target.checked })}/> ${label}</label>`;
  return html`<section class="bench" onKeyDown=${press}>
    <div class="panel"><h2>Basket</h2>
      ${setting.basket.map((item, i) => html`<${Line} key=${i} item=${item} entry=${entryOf(item)} force=${setting.force} onChange=${(fields) => put(i, fields)} onRemove=${() => change({ basket: setting.basket.filter((_, k) => k !== i) })}/>`)}
      ${setting.basket.length < MOST && html`<${Add} entries=${entries} onAdd=${(ref) => add(ref).catch(setProblem)}/>`}
      ${weighed && html`<${Interference} weighed=${weighed}/>`}
      ${about.role !== "viewer" && about.libraries.length > 0 && setting.basket.length > 0 && html`<${Save} about=${about} basket=${setting.basket}/>`}
    </div>
    <div class="panel">
      <textarea rows="3" maxlength="8000" aria-label="Prompt" placeholder="What the model goes on with or answers" value=${setting.prompt} onInput=${(event) => change({ prompt: event.target.value })}></textarea>
      <div class="row">${number("max_new_tokens", "Tokens", 1)}${number("temperature", "Temperature", 0.1)}${number("seed", "Seed", 1)}${tick("chat", "chat")}${tick("control", "random control")}${tick("force", "force")}
        <span class="spacer"></span><button class="primary" title="Ctrl Enter" onClick=${start}>Run</button><button title="Escape" onClick=${stop}>Stop</button></div>
      ${problem && html`<${Problem} error=${problem}/>`}
      ${run && html`<${Texts} run=${run}/>`}
    </div></section>`;
}

function after(run, event, data) {
  if (event === "waiting") return { ...run, state: "waiting for the model" };
  if (event === "begin") return { ...run, state: "writing", rows: data.rows };
  if (event === "token") return { ...run, steps: [...run.steps, data.pieces] };
  if (event === "doses") return { ...run, marks: [...run.marks, data] };
  return event === "end" ? { ...run, state: "done" } : event === "error" ? { ...run, state: "failed" } : run;
}

function Texts({ run }) {
  return html`<p class="faint" role="status">${run.state}</p><div class="texts">${run.rows.map((name, row) => html`<div><h3>${name}</h3><div class="text" dir="auto" data-row=${name}>${run.steps.map((pieces, i) => {
    const mark = name !== "unsteered" && run.marks.filter(({ at }) => at === i).pop();
    return html`${mark && html`<mark title=${`doses from here: ${mark.doses.join(", ")}`} data-says="◆"></mark>`}${pieces[row]}`;
  })}</div></div>`)}</div>`;
}

function Line({ item, entry, force, onChange, onRemove }) {
  const [low, high] = force || !entry?.window ? [-WIDEST, WIDEST] : entry.window;
  const list = `marks-${refOf(item)}`;
  const gate = item.gate?.on ?? "";
  return html`<div class="item"><div class="row"><b><bdi>${entry?.name ?? refOf(item)}</bdi></b><span class="faint">${entry ? `${entry.hook_point}, ${entry.headline}` : "not there any more"}</span><span class="spacer"></span><button class="quiet" aria-label=${`Remove ${refOf(item)}`} onClick=${onRemove}>×</button></div>
    <div class="row"><input type="range" aria-label=${`Dose of ${refOf(item)}`} min=${low} max=${high} step="0.01" list=${list} value=${item.dose ?? entry?.dose ?? 0} onInput=${(event) => onChange({ dose: Number(event.target.value) })}/><output class="number">${figure(item.dose ?? entry?.dose)}</output></div>
    <datalist id=${list}>${[low, entry?.dose ?? 0, high].map((value) => html`<option value=${value}></option>`)}</datalist>
    <div class="row"><select aria-label="Operation" value=${item.operation ?? entry?.operation ?? "add"} onChange=${(event) => onChange({ operation: event.target.value })}>${OPERATIONS.map((name) => html`<option>${name}</option>`)}</select>
      <select aria-label="Scope" value=${item.scope ?? entry?.scope ?? "all"} onChange=${(event) => onChange({ scope: event.target.value })}>${[...new Set(["all", "prompt", "generated", entry?.scope ?? "all"])].map((name) => html`<option>${name}</option>`)}</select>
      <label>gate above <input type="number" step="any" value=${gate} placeholder=${entry?.gated ? "own" : "none"} onChange=${(event) => onChange({ gate: event.target.value === "" ? undefined : { on: Number(event.target.value) } })}/></label></div></div>`;
}

function Add({ entries, onAdd }) {
  const [text, setText] = useState("");
  const submit = (event) => {
    event.preventDefault();
    const wanted = text.trim();
    const entry = entries.find(({ ref, name }) => ref === wanted || name === wanted);
    if (wanted) onAdd(entry?.ref ?? wanted);
    setText("");
  };
  return html`<form class="row" onSubmit=${submit}><input list="bench-vectors" aria-label="Add a vector" placeholder="vector, or SOURCE:latent" value=${text} onInput=${(event) => setText(event.target.value)}/><button>Add</button>
    <datalist id="bench-vectors">${entries.map(({ ref, name }) => html`<option value=${ref}>${name}</option>`)}</datalist></form>`;
}

const Interference = ({ weighed }) => html`<table class="others"><thead><tr><th>Hook point</th><th class="number">joint dose</th><th class="number">sum</th></tr></thead><tbody>${Object.entries(weighed.points).map(([point, at]) => html`<tr><td>${point}</td><td class="number">${figure(at.joint_dose)}</td><td class="number">${figure(at.sum_of_doses)}</td></tr>`)}</tbody></table>${weighed.pairs.map((pair) => html`<p class="faint">${pair}</p>`)}`;

function Save({ about, basket }) {
  const [said, setSaid] = useState(null);
  const submit = (event) => {
    event.preventDefault();
    const { name, library } = event.target.elements;
    const names = basket.map((_, i) => (basket.length > 1 ? `${name.value}-${i + 1}` : name.value));
    post("/api/bench/save", { library: Number(library.value), basket, names }).then((kept) => setSaid({ kept }), (error) => setSaid({ error }));
  };
  return html`<form class="row" onSubmit=${submit}><input name="name" aria-label="Name to save as" placeholder="name" pattern="[A-Za-z0-9][A-Za-z0-9._\\-]*" required/><select name="library" aria-label="Library">${about.libraries.map((path, i) => html`<option value=${i}>${path.split("/").pop()}</option>`)}</select><button>Save</button></form>
    ${said?.kept && html`<p role="status">Saved ${said.kept.map(({ name }) => name).join(", ")}.</p>`}${said?.error && html`<${Problem} error=${said.error}/>`}`;
}
