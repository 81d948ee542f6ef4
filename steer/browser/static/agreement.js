// How far annotators agree, and what is decided where they do not.

import { useEffect, useState } from "./vendor/hooks.js";
import { get, post, query } from "./api.js";
import { put, onChange } from "./outbox.js";
import { Empty, fixed, html, Problem, Waiting } from "./ui.js";

const FORMS = ["csv", "jsonl", "parquet"];
const two = fixed(2);

const THERE = [["model_id", "Model", "gemma-2-2b"], ["sae_id", "SAE", "12-gemmascope-res-16k"], ["author_id", "Author", "your user id there"]];

// A plain form: what answers it is a file. Names are Neuronpedia's own.
const ToNeuronpedia = ({ where }) => html`<form class="panel bounds" method="get" action="/api/label/export">
  ${Object.entries({ ...where, form: "neuronpedia" }).map(([name, value]) => html`<input type="hidden" name=${name} value=${value}/>`)}
  ${THERE.map(([name, says, such]) => html`<label for=${name}>${says}</label><input id=${name} class="wide" name=${name} required maxlength="200" placeholder=${such}/>`)}
  <span class="faint whole">as Neuronpedia names them</span><button class="primary whole">Explanations</button></form>`;

export function Agreement({ about, source, session }) {
  const [agreed, setAgreed] = useState(null);
  const [cases, setCases] = useState([]);
  const [problem, setProblem] = useState(null);
  const where = { source, session };
  const read = () => Promise.all([get(`/api/label/agreement${query(where)}`), get(`/api/label/cases${query(where)}`)])
    .then(([numbers, differing]) => { setAgreed(numbers); setCases(differing); setProblem(null); }, setProblem);
  useEffect(() => { read(); return onChange(read); }, []);
  const isAdmin = about.role === "admin";
  const unblind = () => post("/api/label/unblind", where).then(read, setProblem);
  const decide = (latent, text) => put({ ...where, latent, action: "adjudicate", text });
  const back = `/label/${encodeURIComponent(source)}/${session}`;
  if (problem) return html`<p><a href=${back}>Session</a></p><${Problem} error=${problem}/>`;
  if (!agreed) return html`<${Waiting}/>`;
  const line = (name, { value, low, high, latents }) => html`<tr><td>${name}</td><td class="number">${two(value)}</td><td class="number faint">${low === null || low === undefined ? "" : `${two(low)} to ${two(high)}`}</td><td class="number">${latents}</td></tr>`;
  return html`<div class="row"><h1><a href=${back}>Session ${session}</a>: agreement</h1><span class="spacer"></span>
      ${FORMS.map((form) => html`<a class="button" download href=${`/api/label/export${query({ ...where, form })}`}>${form}</a>`)}
      <details class="filters"><summary>Neuronpedia</summary><${ToNeuronpedia} where=${where}/></details>
      ${isAdmin && html`<button onClick=${unblind}>End blindness</button>`}</div>
    <table class="panel sessions"><thead><tr><td></td><th class="number">value</th><th class="number">95%</th><th class="number">latents</th></tr></thead>
      <tbody>${line("Krippendorff's α of verdicts", agreed.alpha)}${line("share of equal verdicts", agreed.equal_verdicts)}${line("share of equal texts, where all accepted", agreed.equal_texts)}
        ${agreed.kappas.map((each) => line(`Cohen's κ of ${each.a} and ${each.b}`, each))}</tbody></table>
    <h2>Where they differ</h2>
    ${cases.length === 0 ? html`<${Empty} title="Nowhere">No latent has two annotators who differ.<//>` : cases.map(({ latent, differ_in, opinions, decision }) => html`
      <section class="panel case" key=${latent}><div class="row"><h3><a href=${`/feature/${encodeURIComponent(source)}/${latent}`}>${latent}</a> differ in ${differ_in}</h3>
        ${decision && html`<span class="tag">decided: ${decision.text || "no label"}</span>`}</div>
        ${opinions.map(({ author, status, text }) => html`<p class="row"><strong>${author}</strong> <span class="tag">${status}</span> ${text}
          ${isAdmin && text && html`<button onClick=${() => decide(latent, text)}>Take this</button>`}</p>`)}
        ${isAdmin && html`<button onClick=${() => decide(latent, "")}>No label holds</button>`}</section>`)}`;
}
