// What stands beside the contexts of a latent: figures, charts, logits, and other latents.

import { featureAddress } from "./latent_lists.js";
import { Bars, count, figure, html, share, useCached } from "./ui.js";

const SAYS_ITS_LOGITS = 0.01;

const Fact = ({ name, value, says }) => html`<div><dt>${name}</dt><dd class="mono">${value}</dd><dd class="faint">${says}</dd></div>`;

export function Facts({ feature }) {
  const { density, n_tokens, max_activation, mean_activation, logit_entropy, output_score, confidence_change, stability } = feature;
  const often = density > 0 ? `1 in ${count(Math.round(1 / density))} tokens` : `0 of ${count(n_tokens)} tokens`;
  return html`<dl class="facts">
    <${Fact} name="Density" value=${share(density)} says=${often}/>
    <${Fact} name="Activation" value=${figure(max_activation)} says=${`at most; mean ${figure(mean_activation)}`}/>
    <${Fact} name="Output score" value=${figure(output_score)} says=${outputMeans(output_score)}/>
    <${Fact} name="Confidence change" value=${confidence_change > 0 ? `+${figure(confidence_change)}` : figure(confidence_change)} says=${confidenceMeans(confidence_change)}/>
    <${Fact} name="Logit entropy" value=${figure(logit_entropy)} says=${logit_entropy === null ? "not computed" : "nats; low: it speaks for few tokens"}/>
    ${stability !== null && html`<${Fact} name="Stability" value=${figure(stability)} says="nearest decoder cosine in other seeds"/>`}
  </dl>`;
}

function outputMeans(score) {
  if (score === null) return "not measured";
  return score > SAYS_ITS_LOGITS ? "steering with it says what its logits say" : "its logits tell little of what steering does";
}

function confidenceMeans(change) {
  if (change === null) return "not measured";
  return change > 0 ? "nats; amplified, the next token is surer" : change < 0 ? "nats; amplified, the next token is less sure" : "nats; amplified, nothing changes";
}

export function Activations({ feature }) {
  const { counts, edges } = feature.histogram;
  if (!counts.length) return null;
  const titles = counts.map((n, i) => `${figure(edges[i])} to ${figure(edges[i + 1])}: ${count(n)} tokens`);
  const ticks = [0, 0.5, 1].map((at) => figure(edges[Math.round(at * counts.length)]));
  const total = counts.reduce((sum, n) => sum + n, 0);
  return html`<section class="panel"><h2>Activations</h2>
    <${Bars} counts=${counts} titles=${titles} ticks=${ticks} label=${`${count(total)} active tokens by activation, from ${ticks[0]} to ${ticks[2]}, in bins that grow with it`}/></section>`;
}

// Where the latent is among all of its source.
export function Density({ feature }) {
  const { data } = useCached(`/api/source?source=${encodeURIComponent(feature.source)}`);
  const density = data?.density;
  if (!density) return null;
  const wide = (density.high - density.low) / density.counts.length;
  const log = Math.log10(feature.density);
  const mark = feature.density > 0 ? Math.min(Math.max(Math.floor((log - density.low) / wide), 0), density.counts.length - 1) : undefined;
  const at = (i) => figure(10 ** (density.low + i * wide), 2);
  const titles = density.counts.map((n, i) => `${at(i)} to ${at(i + 1)}: ${count(n)} latents`);
  const says = feature.denser_than === null ? `One of ${count(data.n_dead)} that are dead.` : `Active more often than ${share(feature.denser_than)} of the live latents.`;
  return html`<section class="panel"><h2>Density among all latents</h2>
    <${Bars} counts=${density.counts} titles=${titles} mark=${mark} ticks=${[at(0), at(density.counts.length / 2), at(density.counts.length)]} label=${`Latents by density, on a logarithmic scale. ${says}`}/>
    <p class="faint">${says}</p></section>`;
}

export function Logits({ feature }) {
  const most = Math.max(...[...feature.raised, ...feature.lowered].map(({ value }) => Math.abs(value)), 1e-12);
  const side = (name, tokens, kind) => html`<div><h3>${name}</h3><ul class=${`logits ${kind}`}>${tokens.map(({ text, value }) => html`<li>
      <bdi class="mono word" title=${text}>${text}</bdi><span class="rod"><span style=${{ width: `${(100 * Math.abs(value)) / most}%` }}></span></span><span class="number">${figure(value, 2)}</span></li>`)}</ul></div>`;
  return html`<section class="panel"><h2>Logits</h2><div class="halves">${side("Raises", feature.raised, "up")}${side("Lowers", feature.lowered, "down")}</div></section>`;
}

export function Others({ title, none, others, source, query, figures }) {
  return html`<section class="panel"><h2>${title}</h2>${others.length === 0 ? html`<p class="faint">${none}</p>` : html`<table class="others"><thead><tr><th>Latent</th><td></td>${figures.map(([, name]) => html`<th class="number">${name}</th>`)}</tr></thead>
    <tbody>${others.map((other) => html`<tr><td class="number">${other.latent}</td>
      <td class="says"><a href=${featureAddress(source, other.latent, query)}><bdi class=${other.label ? "" : "mono"}>${other.label ?? (other.words.join(" ") || `latent ${other.latent}`)}</bdi></a></td>
      ${figures.map(([key]) => html`<td class="number">${figure(other[key])}</td>`)}</tr>`)}</tbody></table>`}</section>`;
}
