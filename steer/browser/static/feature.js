// One latent: where it is active, what it says and does, who is like it, and what was said of it.

import { useEffect, useMemo, useRef, useState } from "./vendor/hooks.js";
import { prefetch } from "./api.js";
import { Explanations } from "./explanations.js";
import { Activations, Density, Facts, Logits, Others } from "./feature_panels.js";
import { featureAddress, featurePath, listAddress, listOf, useOrder } from "./latent_lists.js";
import { go } from "./router.js";
import { copy, count, Empty, figure, fixed, GoTo, html, KeyHints, Problem, Tokens, useCached, useKeys, Waiting } from "./ui.js";

const AHEAD = 3;
const HINTS = [[["j", "k"], "next, previous"], [["u"], "list"], [["g"], "go to a number"], [["w"], "wrap lines"], [["c"], "copy link"], [["b"], "bench"]];

export function View({ about, parts, query }) {
  const [source, text = ""] = parts;
  const known = about.sources.find(({ name }) => name === source);
  if (!known) return html`<${Empty} title=${source ? `No index is called ${source}` : "No feature is named"}><a href="/features">Show all features</a><//>`;
  if (!/^\d{1,10}$/.test(text) || Number(text) >= known.d_sae) {
    return html`<${Empty} title=${`${source} has no latent ${text}`}>Its latents have numbers from 0 to ${count(known.d_sae - 1)}. <a href=${listAddress(source, query)}>Show them</a><//>`;
  }
  return html`<${Shown} source=${source} latent=${Number(text)} d_sae=${known.d_sae} query=${query}/>`;
}

function Shown({ source, latent, d_sae, query }) {
  const { data, error } = useCached(featurePath(source, latent));
  const before = useRef(null);
  if (data) before.current = data;
  const feature = data ?? before.current;
  const order = useOrder(source, query, latent, d_sae);
  const [isAsking, setAsking] = useState(false);
  const [isCopied, setCopied] = useState(false);
  const addressOf = (number) => featureAddress(source, number, query) + (query.wrap ? `${Object.keys(listOf(query)).length ? "&" : "?"}wrap=1` : "");
  const visit = (number) => number !== undefined && go(addressOf(number));
  const list = listAddress(source, query, order.place);
  const bench = `/bench?latents=${encodeURIComponent(`${source}:${latent}`)}`;
  const share = () => copy(location.href).then(() => { setCopied(true); setTimeout(() => setCopied(false), 1500); });
  const wrap = () => go(featureAddress(source, latent, query) + (query.wrap ? "" : `${Object.keys(listOf(query)).length ? "&" : "?"}wrap=1`), { replace: true });
  useKeys({
    j: () => visit(order.next(1)), ArrowRight: () => visit(order.next(1)), k: () => visit(order.next(-1)), ArrowLeft: () => visit(order.next(-1)),
    u: () => go(list), g: () => setAsking(true), c: share, b: () => go(bench), w: wrap,
  });
  useEffect(() => {
    document.title = `${source} ${latent} · saekit`;
    for (const k of [...Array.from({ length: AHEAD }, (_, i) => i + 1), -1]) {
      if (order.next(k) !== undefined) prefetch(featurePath(source, order.next(k)));
    }
  }, [source, latent, order.place]);
  useEffect(() => scrollTo(0, 0), [source, latent]);

  const step = (k, name, mark) => html`<a class=${`step${order.next(k) === undefined ? " off" : ""}`} href=${order.next(k) === undefined ? undefined : addressOf(order.next(k))} aria-label=${name} title=${name} aria-disabled=${order.next(k) === undefined}>${mark}</a>`;
  return html`<article class="feature" aria-busy=${!data && !error}>
    ${isAsking && html`<${GoTo} most=${d_sae - 1} onGo=${visit} onClose=${() => setAsking(false)}/>`}
    <div class="row title">
      ${step(-1, "Previous latent", "‹")}${step(1, "Next latent", "›")}
      <h1><span class="faint">${source}</span> <span class="mono">${latent}</span></h1>
      <span class="faint place">${order.place === undefined ? (order.isOutside ? "not in the list" : "") : `${count(order.place + 1)} of ${count(order.total)}`}</span>
      <span class="spacer"></span>
      <a class="button" href=${list}>List</a><a class="button" href=${bench}>Try in the bench</a>
      <button class="fixed" onClick=${share}>${isCopied ? "Copied" : "Copy link"}</button><span class="unseen" role="status">${isCopied ? "Copied" : ""}</span>
    </div>
    ${error ? html`<${Problem} error=${error}/>` : !feature ? html`<${Waiting}/>` : html`<div class=${data ? "" : "stale"}><${Body} feature=${feature} query=${query} isWrapped=${Boolean(query.wrap)} onWrap=${wrap}/></div>`}
    <${KeyHints} keys=${HINTS}/>
  </article>`;
}

// What one looks at first is painted at once; what is below and beside it stays as it was for one more frame.
function Body({ feature, query, isWrapped, onWrap }) {
  const late = useLate(feature);
  const isDead = feature.density === 0;
  const below = useMemo(() => html`<${Below} feature=${late} isWrapped=${isWrapped}/>`, [late, isWrapped]);
  const beside = useMemo(() => html`<${Beside} feature=${late} query=${query}/>`, [late]);
  return html`<${Heading} feature=${feature}/><${Facts} feature=${feature}/>
    <div class="columns">
      <div>
        ${isDead ? html`<section class="panel"><h2>Never active</h2><p>Not on one of the ${count(feature.n_tokens)} tokens that were indexed: it has no contexts, no histogram and nothing it is active with. What its decoder row says is still there.</p></section>`
    : html`<section class="panel contexts">
          <div class="row"><h2>Strongest contexts</h2><span class="spacer"></span>${feature.contexts.some(({ effect }) => effect !== null) && html`<span class="faint by">right: nats a token that the text costs more without it</span>`}<label class="row faint"><input type="checkbox" checked=${isWrapped} onChange=${onWrap}/> Wrap lines</label></div>
          ${feature.contexts.length ? html`<${Lines} windows=${feature.contexts} name="Strongest contexts" most=${feature.max_activation} isWrapped=${isWrapped}/>` : html`<p class="faint">None were kept.</p>`}
          ${below}</section>`}
      </div>
      <aside><${Explanations} said=${feature.said}/>${!isDead && html`<${Activations} feature=${feature}/>`}${beside}</aside>
    </div>`;
}

function useLate(value) {
  const [late, setLate] = useState(value);
  useEffect(() => setLate(value), [value]);
  return late;
}

function Beside({ feature, query }) {
  const given = { source: feature.source, query };
  const none = feature.density === 0 ? "It is never active." : "It is too rare for the sample on which pairs were counted.";
  return html`<${Density} feature=${feature}/><${Logits} feature=${feature}/>
    <${Others} title="Most similar decoder rows" none="None is known." others=${feature.neighbours} figures=${[["cosine", "cosine"]]} ...${given}/>
    <${Others} title="Active together" none=${none} others=${feature.coactive} figures=${[["jaccard", "Jaccard"], ["lift", "lift"]]} ...${given}/>`;
}

function Heading({ feature }) {
  const [first] = feature.said;
  const words = feature.raised.slice(0, 5).map(({ text }) => text).join(" ");
  if (first?.kind === "explanation" || (first && !["tokens", "logits"].includes(first.kind))) return html`<p class="label"><bdi>${first.text}</bdi> <span class="faint by">${first.author}</span></p>`;
  return html`<p class="label faint"><bdi>${first ? first.text : `raises ${words}`}</bdi> <span class="by">counted, not explained</span></p>`;
}

// --- contexts ---

function Below({ feature, isWrapped }) {
  const lines = (windows, name) => html`<${Lines} windows=${windows} name=${name} most=${feature.max_activation} isWrapped=${isWrapped}/>`;
  return html`${feature.bins.length > 0 && html`<h2>Contexts by quantile of activation</h2>
      ${[...feature.bins].reverse().map((bin) => html`<h3>${Math.round(100 * bin.share_low)} to ${Math.round(100 * bin.share_high)}% <span class="faint">of its active tokens, ${figure(bin.low)} to ${figure(bin.high)}</span></h3>${lines(bin.contexts, `Contexts from ${figure(bin.low)} to ${figure(bin.high)}`)}`)}`}
    ${feature.near_misses.length > 0 && html`<h2>Near misses</h2><h3>Texts where it is never active, by how close it comes</h3>${lines(feature.near_misses, "Near misses")}`}`;
}

export const Lines = ({ windows, name, most, isWrapped }) => html`<div class="lines" role="list" aria-label=${name}>${windows.map((window) => html`<${Line} window=${window} most=${most} isWrapped=${isWrapped}/>`)}</div>`;

// A context: around its peak in one line, or whole.
function Line({ window, most, isWrapped }) {
  const { tokens, values, peak, score, effect } = window;
  const part = (from, to, dir) => html`<${Tokens} dir=${dir} texts=${tokens} values=${values} most=${most} peak=${peak} from=${from} to=${to}/>`;
  return html`<div class="line" role="listitem">
    <span class="number" title="pre-activation at the peak">${fixed(2)(score)}</span>
    ${isWrapped ? html`<span class="whole">${part(0, tokens.length)}</span>` : html`<span class="kwic" dir="ltr"><span class="before">${part(0, peak, "ltr")}</span><span class="after">${part(peak, tokens.length, "ltr")}</span></span>`}
    <span class="number effect" title=${effect === null ? undefined : `without the latent the text behind the peak costs ${figure(effect)} nats a token more`}>${effect === null ? "" : fixed(3, true)(effect)}</span>
  </div>`;
}
