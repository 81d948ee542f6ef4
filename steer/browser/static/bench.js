// The steering bench: a basket of vectors, texts that are written under it side by side, and saving what was found.
//
// The address holds what a text is written from: the basket at the doses it begins with, and the changes of doses since.
// `now` holds doses that differ from those, by the key of an item, while and after a text is written.

import { useEffect, useRef, useState } from "./vendor/hooks.js";
import { get, post, stream } from "./api.js";
import { Add, Item, Save, Texts, Together, told } from "./bench_parts.js";
import { note } from "./router.js";
import { Empty, html, NumberField, Problem, useKeys, Waiting } from "./ui.js";

const MOST = 8;
const MOST_CHANGES = 100;
const OFFERED = 12;
const START = { basket: [], prompt: "", chat: true, max_new_tokens: 60, temperature: 0.7, seed: 0, control: false, force: false, changes: [] };
let newest = 0;

const refOf = ({ vector, latent }) => vector ?? latent;
const keyed = (item) => ({ ...item, key: newest++ });
const bare = (setting) => ({ ...setting, basket: setting.basket.map(({ key, ...item }) => item) });
const isRunning = (run) => ["starting", "waiting", "writing"].includes(run?.state);

// The whole setting as one value of the address, of what differs from START.
function addressOf(setting) {
  const changed = Object.entries(bare(setting)).filter(([key, value]) => JSON.stringify(value) !== JSON.stringify(START[key]));
  return changed.length ? `/bench?s=${encodeURIComponent(JSON.stringify(Object.fromEntries(changed)))}` : "/bench";
}

function settingOf(query) {
  let given;
  try {
    given = Object.entries(JSON.parse(query.s ?? "{}")).filter(([key, value]) => key in START && typeof value === typeof START[key]);
  } catch {
    given = [];
  }
  const { basket, changes, ...rest } = { ...START, ...Object.fromEntries(given) };
  const latents = (query.latents ?? "").split(",").filter(Boolean).map((latent) => ({ latent, dose: 0.5 }));
  const items = (Array.isArray(basket) ? basket : []).filter((item) => item && typeof item === "object").concat(latents).slice(0, MOST);
  const isChange = (change) => Number.isInteger(change?.at) && Array.isArray(change.doses) && change.doses.length === items.length;
  return { ...rest, basket: items.map(keyed), changes: (Array.isArray(changes) ? changes : []).filter(isChange).slice(0, MOST_CHANGES) };
}

export function View({ about, query }) {
  const [setting] = useState(() => settingOf(query));
  const [catalogue, setCatalogue] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    document.title = "Bench · saekit";
    const latents = [...new Set(setting.basket.map(({ latent }) => latent).filter(Boolean))];
    const entryOf = (ref) => get(`/api/bench/latent?ref=${encodeURIComponent(ref)}`).catch(() => null);  // told at the item
    Promise.all([get("/api/bench/catalogue"), ...latents.map(entryOf)])
      .then(([found, ...more]) => setCatalogue({ ...found, vectors: [...found.vectors, ...more.filter(Boolean)] }), setProblem);
  }, []);
  if (about.model_state === "none") return html`<${Empty} title="There is no model to steer">Start <code>saekit browse</code> with <code>--set model=…</code><//>`;
  if (problem) return html`<${Problem} error=${problem}/>`;
  return catalogue ? html`<${Bench} about=${about} start=${setting} catalogue=${catalogue}/>` : html`<${Waiting}/>`;
}

function Bench({ about, start, catalogue }) {
  const [entries, setEntries] = useState(catalogue.vectors);
  const [setting, setSetting] = useState(start);
  const [now, setNow] = useState({});
  const [run, setRun] = useState(null);
  const [weighed, setWeighed] = useState(null);
  const [problem, setProblem] = useState(null);
  const [moves, setMoves] = useState(0);
  const controller = useRef(null);
  const prompt = useRef(null);
  const shown = useRef({});
  const isDetached = useRef(false);
  const latest = useRef({});  // what is shown now, for what was begun before

  const entryOf = (item) => entries.find(({ ref }) => ref === refOf(item));
  const doseOf = (item) => now[item.key] ?? item.dose;
  const basket = setting.basket.map((item) => ({ ...item, dose: doseOf(item) }));
  latest.current = { setting, basket };
  for (const item of basket) shown.current[item.key] = item.dose ?? null;
  const weighing = JSON.stringify({ basket: bare({ basket }).basket, force: setting.force });
  useEffect(() => {
    const timer = setTimeout(() => note(addressOf(setting)), 150);  // browsers refuse many addresses in a short time
    return () => clearTimeout(timer);
  }, [setting]);
  useEffect(() => () => controller.current?.abort(), []);
  useEffect(() => {
    let isWanted = true;
    const ask = () => post("/api/bench/interference", JSON.parse(weighing)).then((found) => isWanted && setWeighed(found), (error) => isWanted && setWeighed({ error }));
    const timer = setTimeout(ask, 250);
    return () => { isWanted = false; clearTimeout(timer); };
  }, [weighing, run?.id, run?.state === "failed"]);  // again once there is a model, which refuses more
  useEffect(() => {
    if (!moves || !run?.id) return;
    const send = () => post(`/api/bench/${run.id}/doses`, { doses: run.keys.map((key) => shown.current[key]) })
      .catch((error) => { if (error.status !== 404) setProblem(error); });  // 404: it has ended meanwhile
    const timer = setTimeout(send, 60);
    return () => clearTimeout(timer);
  }, [moves, run?.id]);

  // Anything but a dose: it holds from the next text on, and begins with the doses that are shown.
  const change = (fields) => {
    isDetached.current = true;
    setSetting({ ...latest.current.setting, basket: latest.current.basket, changes: [], ...fields });
    setNow({});
  };
  const put = (item, fields) => change({ basket: basket.map((each) => (each.key === item.key ? { ...each, ...fields } : each)) });
  const slide = (item, dose) => {
    const isSteering = isRunning(run) && run.keys.includes(item.key);
    if (isSteering) setMoves(moves + 1);
    if (!isSteering || isDetached.current) put(item, { dose });
    else setNow({ ...now, [item.key]: dose });
  };
  const add = async (ref) => {
    if (!ref.includes(":") && !entries.some((each) => each.ref === ref)) throw new Error(`${ref}: expected a vector of the open libraries or SOURCE:NUMBER, got neither. Choose from the list.`);
    const entry = entries.find((each) => each.ref === ref) ?? await get(`/api/bench/latent?ref=${encodeURIComponent(ref)}`);
    if (!entries.includes(entry)) setEntries((before) => [...before, entry]);
    const item = ref.includes(":") ? { latent: ref, dose: 0.5 } : { vector: ref, dose: entry.dose };
    change({ basket: [...latest.current.basket, keyed(item)] });
  };

  const stop = () => { controller.current?.abort(); setRun((before) => isRunning(before) ? { ...before, state: "stopped", id: null } : before); };
  const write = (asked) => {
    if (!asked.prompt.trim()) return prompt.current.focus();
    controller.current?.abort();
    const mine = controller.current = new AbortController();
    const keys = asked.basket.map(({ key }) => key);
    let isOver = false;
    const on = (event, data) => {
      if (mine.signal.aborted) return;
      isOver ||= event === "end" || event === "error";
      if (event === "error" || event === "refused") setProblem(new Error(told(data)));
      if (event === "doses" && !isDetached.current) {
        if (data.planned) setNow(Object.fromEntries(keys.map((key, i) => [key, data.doses[i]])));
        else setSetting((before) => ({ ...before, changes: [...before.changes.filter(({ at }) => at < data.at), { at: data.at, doses: data.doses }] }));
      }
      setRun((before) => after(before, event, data));
    };
    isDetached.current = false;
    setProblem(null);
    setSetting(asked);
    setNow({});
    setMoves(0);
    setRun({ state: "starting", keys, most: asked.max_new_tokens, rows: [], steps: [], marks: [] });
    stream("/api/bench/stream", bare(asked), on, mine.signal)
      .then(() => isOver || on("error", { where: "server", expected: "a whole text", got: "an end within it", fix: "Run it again." }), (error) => { if (error.name !== "AbortError") { setProblem(error); setRun(null); } });
  };
  const runNow = () => write({ ...setting, basket, changes: [] });
  useKeys({ Escape: stop });
  const press = (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); runNow(); } };

  const number = (key, label, step, most) => html`<label>${label} <${NumberField} min="0" max=${most} step=${step} required value=${setting[key]} onNumber=${(value) => change({ [key]: value })}/></label>`;
  const tick = (key, label, title) => html`<label class="row" title=${title}><input type="checkbox" checked=${setting[key]} onChange=${(event) => change({ [key]: event.target.checked })}/> ${label}</label>`;
  const { changes } = setting;
  const isToldAtItem = weighed?.items?.some((why) => why && told(why) === problem?.message);
  const isReplayable = changes.length > 0 && changes.length <= MOST_CHANGES;
  return html`<section class="bench" onKeyDown=${press}>
    <div class="panel"><h2>Basket</h2>
      ${basket.length === 0 && html`<p class="faint">Add what steers: a vector of a library, or a latent as SOURCE:NUMBER.</p>
        <p class="row">${entries.slice(0, OFFERED).map(({ ref, name, hook_points }) => html`<button class="tag" title=${`${ref} at ${hook_points.join(", ")}`} onClick=${() => add(ref)}>${name}</button>`)}</p>`}
      ${basket.map((item, i) => html`<${Item} key=${item.key} item=${item} number=${i + 1} entry=${entryOf(item)} refused=${weighed?.items?.[i]} force=${setting.force} onSlide=${(dose) => slide(item, dose)} onChange=${(fields) => put(item, fields)} onRemove=${() => change({ basket: basket.filter(({ key }) => key !== item.key) })}/>`)}
      ${basket.length < MOST && html`<${Add} entries=${entries} onAdd=${add}/>`}
      ${weighed?.error && html`<${Problem} error=${weighed.error}/>`}
      ${weighed?.together && html`<${Together} together=${weighed.together}/>`}
      ${about.role !== "viewer" && basket.length > 0 && html`<${Save} about=${about} damaged=${catalogue.problems} basket=${bare({ basket }).basket} entries=${basket.map(entryOf)} onSaved=${(kept) => setEntries((before) => [...before, ...kept])}/>`}
      ${catalogue.problems.map(({ detail }) => html`<p class="problem">${told(detail)}</p>`)}
    </div>
    <div class="panel">
      <textarea ref=${prompt} rows="3" maxlength="8000" aria-label="Prompt" placeholder="What the model goes on with or answers" value=${setting.prompt} onInput=${(event) => change({ prompt: event.target.value })}></textarea>
      <div class="row">${number("max_new_tokens", "Tokens", 1, 1024)}${number("temperature", "Temperature", "any", 10)}${number("seed", "Seed", 1, 2 ** 31 - 1)}${tick("chat", "chat", "As what a user says, in the model's chat template")}${tick("control", "random control", "A third text under random directions at the same doses")}${tick("force", "force", "Allow doses beyond calibrated windows and above 2")}
        <span class="spacer"></span>
        <span class="row"><button class="primary" title="Ctrl Enter" onClick=${runNow}>Run</button>${isReplayable && html`<button onClick=${() => write(setting)}>Replay</button>`}<button title="Escape" disabled=${!isRunning(run)} onClick=${stop}>Stop</button></span></div>
      ${isReplayable && html`<p class="faint">Doses change after ${changes.map(({ at }) => at).join(", ")} tokens. Replay writes that text again, and so does this page's link; Run begins with the doses that are shown.</p>`}
      ${changes.length > MOST_CHANGES && html`<p class="faint">Doses changed ${changes.length} times, which is more than a link holds: this text cannot be written again.</p>`}
      ${isRunning(run) && isDetached.current && html`<p class="faint" data-says="detached">This text goes on with what it began with, and its doses can still be changed. What else you changed holds from the next run on.</p>`}
      ${problem && !isToldAtItem && html`<${Problem} error=${problem}/>`}
      ${run && html`<${Texts} run=${run}/>`}
    </div></section>`;
}

function after(run, event, data) {
  if (!run) return run;
  if (event === "waiting") return { ...run, state: "waiting", model: data.model };
  if (event === "begin") return { ...run, state: "writing", id: data.id, rows: data.rows, n_prompt: data.prompt_tokens[0], since: performance.now() };
  if (event === "token") return { ...run, steps: [...run.steps, data] };
  if (event === "doses") return { ...run, marks: [...run.marks, data] };
  if (event === "error") return { ...run, state: "failed", id: null };
  if (event !== "end" || !isRunning(run)) return run;
  return { ...run, state: "done", id: null, fired: data.fired ?? [], took: performance.now() - run.since };
}
