// What was said of a latent, and how well it does beside what keeps a score honest.

import { count, figure, html, Interval } from "./ui.js";

const KINDS = { explanation: "explanation", tokens: "what it is active on", logits: "what it raises" };
const MEASURES = { balanced_accuracy: "balanced accuracy", auroc: "AUROC", accuracy: "accuracy" };
const OWN = ["explanation", "contexts"];

export function Explanations({ said }) {
  return html`<section class="panel explanations"><h2>Labels</h2>
    ${said.length === 0 ? html`<p class="faint">Nobody has said what it stands for. <code>saekit label</code> asks a language model, and counts tokens without one.</p>`
    : said.map((each) => html`<div class="said"><p class=${each.kind in KINDS && each.kind !== "explanation" ? "faint" : ""}><bdi>${each.text}</bdi></p>
        <p class="faint by"><span class="tag">${KINDS[each.kind] ?? each.kind}</span> ${each.author}, <time datetime=${each.created}>${each.created.slice(0, 10)}</time></p>
        ${each.scores.length > 0 && html`<${Scores} scores=${each.scores}/>`}</div>`)}</section>`;
}

// A row a method and judge: the label, and beside it what stood in its place.
function Scores({ scores }) {
  const rows = new Map();
  for (const score of scores) {
    const key = `${score.method}\u0000${score.judge}`;
    const row = rows.get(key) ?? { ...score, controls: {} };
    if (OWN.includes(score.control)) Object.assign(row, score, { controls: row.controls, isOwn: true });
    else row.controls[score.control] = score;
    rows.set(key, row);
  }
  return html`<table class="scores"><thead><tr><td></td><th colspan="2">This label</th><th class="number" title="another latent's explanation in its place">Another's</th><th class="number" title="the latent's tokens as a label in its place">Tokens</th><th class="number" title="what one answer for all, or guessing, gets">Chance</th></tr></thead>
    <tbody>${[...rows.values()].map((row) => html`<tr><th scope="row">${row.method}</th>
      <td class="number">${row.isOwn ? figure(row.value) : "–"}</td>
      <td>${row.isOwn && row.value !== null && html`<${Interval} value=${row.value} low=${row.low} high=${row.high} chance=${row.chance}/>`}</td>
      <td class="number">${figure(row.controls.shuffled?.value)}</td><td class="number">${figure(row.controls.tokens?.value)}</td><td class="number">${figure(row.chance, 2)}</td></tr>
      <tr class="detail"><td colspan="6" class="faint">${MEASURES[row.measure] ?? row.measure}${row.isOwn && row.low !== null ? `, 95% ${figure(row.low, 2)} to ${figure(row.high, 2)}` : ""}, n ${count(row.n)}${row.n_failed > 0 && html`, <span class="warn">${row.n_failed} unreadable</span>`}; ${row.judge}</td></tr>`)}</tbody></table>`;
}
