// The list of all latents: searched, filtered, sorted, walked through with keys. The address says which part is in view.

import { Component } from "./vendor/preact.js";
import { useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState } from "./vendor/hooks.js";
import { cached, get, known, post } from "./api.js";
import { Toolbar } from "./filters.js";
import { asked, COLUMNS, featureAddress, featurePath, listAddress } from "./latent_lists.js";
import { go, note } from "./router.js";
import { count, Empty, fixed, GoTo, html, KeyHints, Problem, Spark, share, useCached, useKeys, Waiting } from "./ui.js";
import { VirtualList } from "./virtual.js";

const ROW_PX = 30;
const PAGE = 100;
const PATIENCE_MS = 40;
const NOTE_MS = 250;
const LOOK_MS = 300;
const HINTS = [[["j", "k"], "move"], [["Enter"], "open"], [["/"], "search"], [["g"], "go to a number"], [["Home", "End"], "first, last"]];
const FIGURES = [["density", share], ["max_activation", fixed(2)], ["score", fixed(3)], ["output_score", fixed(3)], ["confidence_change", fixed(3, true)], ["logit_entropy", fixed(2)]];

export function View({ about, query }) {
  const names = about.sources.map(({ name }) => name);
  useEffect(() => { document.title = "Features · saekit"; }, []);
  if (!names.length) return html`<${Empty} title="No feature index is open"><code>saekit index</code> makes one.<//>`;
  const source = query.source ?? names[0];
  if (!names.includes(source)) return html`<${Empty} title=${`No index is called ${source}`}><a href="/features">Show ${names[0]}</a><//>`;
  return html`<${Listed} names=${names} source=${source} query=${query} hasMeaning=${about.has_meaning}/>`;
}

function Listed({ names, source, query, hasMeaning }) {
  const path = "/api/latents" + asked(source, query);
  const meaning = useMeaning(query.how && query.q ? source : null);
  const shown = useFirstPage(meaning.state === "ready" ? path : null);
  const about = useCached(`/api/source?source=${encodeURIComponent(source)}`);
  const change = (values, isReplaced = false) => go(listAddress(values.source ?? source, { ...query, ...values }), { replace: isReplaced });
  return html`<section class="features">
    <${Toolbar} names=${names} source=${source} query=${query} about=${about.data} total=${shown.total} hasMeaning=${hasMeaning} onChange=${change}/>
    ${meaning.error ? html`<${Problem} error=${meaning.error}/>`
    : meaning.state === "running" ? html`<${Waiting} what=${meaning.n_texts ? `Reading labels: ${count(meaning.n_done)} of ${count(meaning.n_texts)}` : "Loading the embedding model"}/>`
    : shown.error ? html`<${Problem} error=${shown.error}/>`
    : shown.total === undefined ? html`<${Waiting}/>`
    : shown.total === 0 ? html`<${Empty} title="No latent is like that">${query.q || query.where || query.show || query.explained || query.status ? "Search for something else, or take filters away." : "The index is empty."}<//>`
    : html`<${Rows} key=${shown.path} path=${shown.path} isAsked=${shown.path === path} total=${shown.total} source=${source} query=${query} about=${about.data} onSort=${change}/>`}
    <${KeyHints} keys=${HINTS}/>
  </section>`;
}

// The newest list whose first page is there: while another is fetched, the one before stays.
function useFirstPage(path) {
  const first = useCached(path && `${path}&offset=0`);
  const last = useRef({});
  if (path && first.data) last.current = { path, total: first.data.total };
  return first.error ? { error: first.error } : last.current;
}

// How far the labels of a source are read, for a search by meaning: asked for once, then looked at until they are.
function useMeaning(source) {
  const [meaning, setMeaning] = useState({});
  useEffect(() => {
    if (!source) return undefined;
    let later;
    const failed = (error) => setMeaning({ source, error });
    const look = (found) => {
      if (found.state === "failed") return failed(new Error(found.problem));
      setMeaning({ source, ...found });
      if (found.state === "running") later = setTimeout(() => get(`/api/meaning?source=${encodeURIComponent(source)}`).then((next) => later && look(next), failed), LOOK_MS);
    };
    post("/api/meaning", { source }).then(look, failed);
    return () => { clearTimeout(later); later = undefined; };
  }, [source]);
  if (!source) return { state: "ready" };
  return meaning.source === source ? meaning : { state: "running" };
}

// `isAsked`: whether it is this list that the address asks for; while another is fetched, the address is that one's.
function Rows({ path, isAsked, total, source, query, about, onSort }) {
  const list = useRef(null);
  const [at, setAt] = useState(Math.min(Math.max(Number.parseInt(query.at ?? "0", 10) || 0, 0), total - 1));
  const [isAsking, setAsking] = useState(false);
  const [pages, want] = usePages(path);
  const rowAt = (i) => pages(i)?.rows[i % PAGE];

  const move = (i) => {
    const next = Math.min(Math.max(i, 0), total - 1);
    setAt(next);
    list.current.show(next);
  };
  const open = () => {
    const row = rowAt(at);
    if (row) { note(listAddress(source, query, at)); go(featureAddress(source, row.latent, query)); }
  };
  const find = (latent) => get(`${path.replace("/api/latents", "/api/latents/around")}&latent=${latent}&reach=1`).then(
    ({ place }) => (place === null ? go(featureAddress(source, latent, query)) : move(place)),
    () => go(featureAddress(source, latent, query)),
  );
  const page = () => Math.max(Math.floor(list.current.view / ROW_PX) - 1, 1);
  useKeys({
    j: () => move(at + 1), ArrowDown: () => move(at + 1), k: () => move(at - 1), ArrowUp: () => move(at - 1),
    PageDown: () => move(at + page()), PageUp: () => move(at - page()), Home: () => move(0), End: () => move(total - 1),
    Enter: open, g: () => setAsking(true),
  });
  useLayoutEffect(() => {
    if (!isAsked) return undefined;
    const later = setTimeout(() => note(listAddress(source, query, at || undefined)), NOTE_MS);
    return () => clearTimeout(later);
  }, [at, isAsked]);
  useEffect(() => { const row = rowAt(at); if (row) cached(featurePath(source, row.latent)).catch(() => {}); }, [at]);

  const draw = (i) => html`<${Row} key=${i} i=${i} row=${rowAt(i)} isAt=${i === at} source=${source} query=${query}/>`;
  return html`${isAsking && html`<${GoTo} most=${(about?.d_sae ?? 1) - 1} onGo=${find} onClose=${() => setAsking(false)}/>`}
    <${VirtualList} ref=${list} total=${total} row=${ROW_PX} at=${at} draw=${draw} onRange=${want}
      head=${html`<${Head} query=${query} onSort=${onSort}/>`}
      class="list" role="grid" tabindex="0" aria-label="Latents" aria-rowcount=${total + 1} aria-activedescendant=${`row-${at}`}/>`;
}

// Pages of a list by row, and a function that fetches those of a range, a moment later: not each one that flies past.
function usePages(path) {
  const [, again] = useReducer((n) => n + 1, 0);
  const kept = useRef(new Map());
  const wanted = useRef(null);
  const later = useRef(0);
  useEffect(() => () => clearTimeout(later.current), []);
  const pathOf = (number) => `${path}&offset=${number * PAGE}`;
  const pageAt = (i) => kept.current.get(Math.floor(i / PAGE)) ?? known(pathOf(Math.floor(i / PAGE)));
  const fetchAll = () => {
    later.current = 0;
    const [first, end] = wanted.current;
    for (let number = Math.floor(first / PAGE); number * PAGE < end; number++) {
      if (kept.current.has(number)) continue;
      cached(pathOf(number)).then((page) => { kept.current.set(number, page); again(); }, () => {});
    }
  };
  const want = useMemo(() => (first, end) => {
    wanted.current = [first, end];
    if (!later.current) later.current = setTimeout(fetchAll, PATIENCE_MS);
  }, [path]);
  return [pageAt, want];
}

const NUMBERED = [["latent", { name: "#", says: "number of the latent" }], ["", { name: "Label, or what it raises" }], ...["density", "max_activation"].map((name) => [name, COLUMNS[name]]),
  ["", { name: "Activations", says: "active tokens by activation, in octaves" }], ...["score", "output_score", "confidence_change", "logit_entropy"].map((name) => [name, COLUMNS[name]])];

function Head({ query, onSort }) {
  const sorted = query.sort ?? (query.q ? "given" : "latent");
  const ways = { true: "descending", false: "ascending" };
  return html`<div class="entry head" role="row" aria-rowindex="1">${NUMBERED.map(([column, { name, says }]) => {
    if (!column) return html`<span role="columnheader" title=${says}>${name}</span>`;
    const isSorted = sorted === column;
    const isDown = isSorted ? !query.desc : column !== "latent";
    return html`<span role="columnheader" aria-sort=${isSorted ? ways[Boolean(query.desc)] : "none"} class="figure">
      <button class="quiet" title=${says} onClick=${() => onSort({ sort: column, desc: isDown ? "1" : "" })}>${name}<span class="way" aria-hidden="true">${isSorted ? (query.desc ? "▾" : "▴") : ""}</span></button></span>`;
  })}</div>`;
}

class Row extends Component {
  shouldComponentUpdate(next) { return next.row !== this.props.row || next.isAt !== this.props.isAt || next.i !== this.props.i || next.query !== this.props.query; }

  render({ i, row, isAt, source, query }) {
    const given = { class: `entry${isAt ? " at" : ""}`, role: "row", id: `row-${i}`, "aria-rowindex": i + 2, "aria-selected": isAt };
    if (!row) return html`<div ...${given} aria-busy="true"><span role="gridcell" class="figure faint">…</span></div>`;
    const leave = () => note(listAddress(source, query, i));
    return html`<div ...${given}>
      <span role="gridcell" class="figure faint">${row.latent}</span>
      <span role="gridcell" class="says"><a href=${featureAddress(source, row.latent, query)} tabindex="-1" onClick=${leave}><${Says} row=${row}/></a></span>
      ${FIGURES.slice(0, 2).map(([name, shown]) => html`<span role="gridcell" class="figure">${shown(row[name])}</span>`)}
      <span role="gridcell"><${Spark} counts=${row.spark}/></span>
      ${FIGURES.slice(2).map(([name, shown]) => html`<span role="gridcell" class="figure">${shown(row[name])}</span>`)}
    </div>`;
  }
}

function Says({ row }) {
  return html`${row.cosine !== null && html`<span class="number faint likeness" title="cosine of the label and the text">${fixed(2)(row.cosine)}</span> `}<${Called} row=${row}/>`;
}

function Called({ row }) {
  if (row.density === 0) return html`<span class="tag">dead</span> <bdi class="faint">${row.words.join(" ")}</bdi>`;
  if (row.label) return html`<bdi class=${row.explained ? "" : "faint"}>${row.label}</bdi>`;
  return html`<bdi class="faint mono">${row.words.join(" ")}</bdi>`;
}

