// Two SAEs, layers or seeds side by side: how much they share, and which latents are the same.

import { useEffect, useState } from "./vendor/hooks.js";
import { get, post, query } from "./api.js";
import { go } from "./router.js";
import { Empty, figure, html, Problem, share, Tokens, useCached, Waiting } from "./ui.js";

const KINDS = {
  matched: "decoder rows and encoder columns of both alike, one to one",
  aligned: "decoder rows of both alike, one to one",
  correlated: "active together, one to one",
  split: "one latent here, several there",
  merged: "several latents here, one there",
  alone: "only in the first",
  alone_other: "only in the second",
};
const PAGE = 50;
const POLL_MS = 700;

export function View({ about, query: asked }) {
  const names = about.sources.map(({ name }) => name);
  const one = asked.one ?? names[0], other = asked.other ?? names[1];
  const ask = (changes) => go(`/compare${query({ one, other, ...asked, ...changes })}`, { replace: true });
  if (names.length < 2) {
    return html`<${Empty} title="Nothing to compare">Open several indexes: <code>saekit browse INDEX INDEX</code>.<//>`;
  }
  return html`<div class="row"><h1>Compare</h1>
      <${Choice} label="First" names=${names} value=${one} onChange=${(name) => ask({ one: name, kind: undefined })}/>
      <${Choice} label="Second" names=${names} value=${other} onChange=${(name) => ask({ other: name, kind: undefined })}/></div>
    ${one === other ? html`<${Empty} title="One and the same">Choose two.<//>`
    : html`<${Comparison} key=${one + "\n" + other} one=${one} other=${other} kind=${asked.kind} onKind=${(kind) => ask({ kind })}/>`}`;
}

const Choice = ({ label, names, value, onChange }) => html`<label>${label} <select value=${value} onChange=${(event) => onChange(event.target.value)}>
  ${names.map((name) => html`<option>${name}</option>`)}</select></label>`;

function Comparison({ one, other, kind, onKind }) {
  const [state, setState] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    let timer;
    const take = (answer) => {
      setState(answer);
      if (answer.state === "running") timer = setTimeout(() => get(`/api/comparison${query({ one, other })}`).then(take, setError), POLL_MS);
    };
    post("/api/comparison", { one, other }).then(take, setError);
    return () => clearTimeout(timer);
  }, []);
  if (error) return html`<${Problem} error=${error}/>`;
  if (state?.state === "failed") return html`<${Problem} error=${state.problem}/>`;
  if (state?.state !== "done") return html`<${Waiting} what="Comparing every latent with every other: minutes where there are tens of thousands. It goes on if you leave the page"/>`;
  const { latents, tokens } = state.summary;
  const kinds = Object.keys(KINDS).filter((name) => name === "alone_other" ? latents.alone : latents[name]);
  const chosen = kinds.includes(kind) ? kind : kinds[0];
  return html`<div class="compare">
    <table class="panel">
      <thead><tr><td></td><th class="number">${one}</th><th class="number">by chance</th><th class="number">${other}</th><th class="number">by chance</th></tr></thead>
      <tbody>${Object.entries(latents).map(([name, row]) => html`<tr key=${name}><td>${name}</td>
        ${["one", "other"].map((side) => html`<td class="number">${row[side].toLocaleString("en")}${row[`${side}_share`] == null ? "" : ` (${share(row[`${side}_share`])})`}</td>
          <td class="number faint">${row[`${side}_by_chance`] == null ? "" : share(row[`${side}_by_chance`])}</td>`)}</tr>`)}</tbody>
    </table>
    <p class="faint">${tokens ? `On ${tokens.toLocaleString("en")} tokens that both saw.` : "By weights alone: no text that both saw is known."}${" "}
      By chance: random directions in the second's place.</p>
    <div class="row tabs" role="tablist">${kinds.map((name) => html`<button role="tab" aria-selected=${name === chosen} title=${KINDS[name]}
      onClick=${() => onKind(name)}>${name.replace("alone_other", "alone there").replace(/^alone$/, "alone here")}</button>`)}</div>
    <p class="faint">${KINDS[chosen]}</p>
    <${List} key=${chosen} one=${one} other=${other} kind=${chosen}/>
  </div>`;
}

function List({ one, other, kind }) {
  const [pages, setPages] = useState([]);
  const [error, setError] = useState(null);
  const [open, setOpen] = useState(null);
  const more = () => get(`/api/comparison/pairs${query({ one, other, kind, offset: pages.length * PAGE, limit: PAGE })}`)
    .then((page) => setPages((before) => [...before, page]), setError);
  useEffect(() => { more(); }, []);
  if (error) return html`<${Problem} error=${error}/>`;
  if (!pages.length) return html`<${Waiting}/>`;
  const pairs = pages.flatMap((page) => page.pairs);
  if (!pairs.length) return html`<${Empty} title="None">No latents are ${KINDS[kind]}.<//>`;
  return html`<table class="pairs"><thead><tr><th>${one}</th><th>${other}</th><th class="number">cosine</th><th class="number">encoder</th><th class="number">correlation</th></tr></thead>
    <tbody>${pairs.map((pair, i) => html`
      <tr class="pair">
        <td><${Member} source=${one} member=${pair.one}/></td><td><${Member} source=${other} member=${pair.other}/></td>
        <td class="number">${figure(pair.decoder_cosine)}</td><td class="number">${figure(pair.encoder_cosine)}</td><td class="number">${figure(pair.correlation)}</td>
        <td><button class="quiet" aria-expanded=${open === i} onClick=${() => setOpen(open === i ? null : i)}>contexts</button></td>
      </tr>
      ${open === i && html`<tr><td class="side">${pair.one && html`<${Contexts} source=${one} latent=${pair.one.latent}/>`}</td>
        <td class="side">${pair.other && html`<${Contexts} source=${other} latent=${pair.other.latent}/>`}</td><td colspan="4"></td></tr>`}`)}</tbody></table>
    ${pairs.length < pages[0].total && html`<p><button onClick=${more}>More, ${(pages[0].total - pairs.length).toLocaleString("en")} left</button></p>`}`;
}

const Member = ({ source, member }) => member && html`<a href=${`/feature/${encodeURIComponent(source)}/${member.latent}`}>${member.latent}</a>
  <span class="faint"> ${member.label ?? member.words.join(" ")}</span>`;

function Contexts({ source, latent }) {
  const { data, error } = useCached(`/api/feature${query({ source, latent })}`);
  if (error) return html`<${Problem} error=${error}/>`;
  if (!data) return html`<${Waiting}/>`;
  return data.contexts.slice(0, 4).map(({ tokens, values, peak }) => html`<p><${Tokens} texts=${tokens} values=${values} most=${data.max_activation} peak=${peak}/></p>`);
}
