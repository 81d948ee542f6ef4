// Search by running a text: its tokens, the latents that are active on each, and those that stand out on the whole.

import { useEffect, useState } from "./vendor/hooks.js";
import { post, query as queryString } from "./api.js";
import { featureAddress } from "./latent_lists.js";
import { go } from "./router.js";
import { Empty, figure, html, Problem, share, useKeys, Waiting } from "./ui.js";

const KEPT = 20;
const answers = new Map();
const MOST_LETTERS = 8000;

export function View({ about, query }) {
  const able = about.sources.filter(({ can_run }) => can_run).map(({ name }) => name);
  useEffect(() => { document.title = "Prompt · saekit"; }, []);
  if (about.model_state === "none") return html`<${Empty} title="There is no model to run a text through">Start <code>saekit browse</code> with <code>--set model=…</code><//>`;
  if (!able.length) return html`<${Empty} title="No SAE is where its index says">A text needs the SAE itself; an index alone does not have it.<//>`;
  const source = able.includes(query.source) ? query.source : able[0];
  return html`<${Asked} key=${source + query.text} able=${able} source=${source} query=${query} state=${about.model_state}/>`;
}

function Asked({ able, source, query, state }) {
  const [text, setText] = useState(query.text ?? "");
  const [isChat, setChat] = useState(Boolean(query.chat));
  const [chosen, setChosen] = useState(source);
  const body = { source, text: query.text ?? "", chat: Boolean(query.chat) };
  const { data, error } = useAnswer(query.text ? body : null);
  const run = (event) => {
    event?.preventDefault();
    if (text.trim()) go(`/prompt${queryString({ source: chosen, text, chat: isChat ? 1 : "" })}`);
  };
  const press = (event) => { if (event.key === "Enter" && !event.shiftKey) run(event); };
  useKeys({ "/": () => document.getElementById("prompt-text").focus() });
  return html`<section class="prompt">
    <form class="panel" onSubmit=${run}>
      <textarea id="prompt-text" rows="3" maxlength=${MOST_LETTERS} required autofocus aria-label="Text to run" placeholder="A text: which latents are active on it?" value=${text} onInput=${(event) => setText(event.target.value)} onKeyDown=${press}></textarea>
      <div class="row">
        ${able.length > 1 && html`<label class="choice"><span>Source</span><select value=${chosen} onChange=${(event) => setChosen(event.target.value)}>${able.map((name) => html`<option>${name}</option>`)}</select></label>`}
        <label class="row"><input type="checkbox" checked=${isChat} onChange=${(event) => setChat(event.target.checked)}/> as a message in a chat</label>
        <span class="spacer"></span><span class="faint"><kbd>Enter</kbd> runs, <kbd>Shift</kbd> <kbd>Enter</kbd> breaks the line</span><button class="primary">Run</button>
      </div>
    </form>
    ${error ? html`<${Problem} error=${error}/>` : data ? html`<${Answer} data=${data} query=${query}/>` : query.text ? html`<${Waiting} what=${state === "ready" ? "Running" : "Loading the model, then running"}/>` : null}
  </section>`;
}

// What the server makes of a text; kept, so that going back to it shows it at once.
function useAnswer(body) {
  const key = JSON.stringify(body);
  const [answer, setAnswer] = useState({ key, data: answers.get(key) });
  useEffect(() => {
    if (!body || answers.has(key)) return setAnswer({ key, data: answers.get(key) });
    const controller = new AbortController();
    post("/api/prompt", body, controller.signal).then((data) => {
      answers.set(key, data);
      if (answers.size > KEPT) answers.delete(answers.keys().next().value);
      setAnswer({ key, data });
    }, (error) => error.name !== "AbortError" && setAnswer({ key, error }));
    return () => controller.abort();
  }, [key]);
  return answer.key === key ? answer : {};
}

function Answer({ data, query }) {
  const token = /^\d+$/.test(query.token ?? "") ? data.tokens[Number(query.token)] : undefined;
  const at = token ? Number(query.token) : -1;
  const [looked, setLooked] = useState(null);
  const here = (values) => `/prompt${queryString({ source: data.source, text: query.text, chat: query.chat, ...values })}`;
  const values = data.tokens.map(({ active }) => active.find(({ latent }) => latent === looked)?.value ?? 0);
  const most = Math.max(...values, 1e-12);
  const choose = (i) => go(here({ token: i === at ? "" : i }), { replace: true });
  const step = (by) => {
    for (let i = at + by; i >= 0 && i < data.tokens.length; i += by) if (data.tokens[i].counts) return choose(i);
  };
  useKeys({ j: () => step(1), ArrowRight: () => step(1), k: () => step(-1), ArrowLeft: () => step(-1), Escape: () => at >= 0 && choose(at) });
  const latents = token ? token.active.map(({ latent, value }) => ({ latent, value, name: data.names[latent] })) : null;
  const look = (latent) => ({ onMouseEnter: () => setLooked(latent), onMouseLeave: () => setLooked(null), onFocusIn: () => setLooked(latent), onFocusOut: () => setLooked(null) });
  return html`<div class="columns">
    <div class="panel"><h2>Tokens</h2><p class="faint">Choose one to see what is active on it; point at a latent to see where else it is.</p>
      <div class="pieces" dir="auto">${data.tokens.map((each, i) => (each.counts
    ? html`<button class=${`piece token${i === at ? " at" : ""}`} aria-pressed=${i === at} title=${`${each.n_active} latents`} style=${{ "--heat": (values[i] / most).toFixed(2) }} onClick=${() => choose(i)}>${each.text}</button>`
    : html`<span class="piece faint" title="not looked at">${each.text}</span>`))}</div></div>
    <aside class="panel">${latents ? html`<h2>Active on <bdi class="mono">${token.text}</bdi></h2>
      ${latents.length === 0 ? html`<p class="faint">No latent is active here.</p>` : html`<table class="others"><thead><tr><th>Latent</th><td></td><th class="number">activation</th></tr></thead>
        <tbody>${latents.map(({ latent, value, name }) => html`<tr ...${look(latent)}><td class="number">${latent}</td><td class="says"><a href=${featureAddress(data.source, latent, {})}><bdi>${name}</bdi></a></td><td class="number">${figure(value)}</td></tr>`)}</tbody></table>
        <p class="faint">${token.n_active > latents.length ? `The strongest ${latents.length} of ${token.n_active}.` : ""}</p>`}`
    : html`<h2>Strong here, rare elsewhere</h2>${data.latents.length === 0 ? html`<p class="faint">No latent is active on this text that is not active on most texts.</p>` : html`<table class="others"><thead><tr><th>Latent</th><td></td><th class="number" title="peak over usual activation, times minus the logarithm of the density">score</th><th class="number">peak</th><th class="number">tokens</th><th class="number">density</th></tr></thead>
        <tbody>${data.latents.map((each) => html`<tr ...${look(each.latent)}><td class="number">${each.latent}</td><td class="says"><a href=${featureAddress(data.source, each.latent, {})}><bdi class=${each.label ? "" : "mono"}>${each.label ?? each.words.join(" ")}</bdi></a></td>
          <td class="number">${figure(each.score)}</td><td class="number">${figure(each.peak)}</td><td class="number">${each.n_tokens}</td><td class="number">${share(each.density)}</td></tr>`)}</tbody></table>`}`}</aside>
  </div>`;
}
