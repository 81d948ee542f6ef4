// A picture of all latents: one point each, near what it is like. Drag to move, scroll to zoom, click to open.

import { useEffect, useMemo, useRef, useState } from "./vendor/hooks.js";
import { cached, floats, get, query } from "./api.js";
import { go } from "./router.js";
import { Empty, figure, html, Problem, Waiting } from "./ui.js";

const FOUND = 2000;
const NEAR = 14;
const MARGIN = 0.94;

export function View({ about, query: asked }) {
  const source = asked.source ?? about.sources[0]?.name;
  const [state, setState] = useState({});
  const [found, setFound] = useState(null);
  useEffect(() => {
    setState({ source });
    if (source === undefined) return;
    floats(`/api/map${query({ source })}`, "x-saekit-map").then(({ values, said }) => {
      const n = values.length / 3;
      setState({ source, n, places: values.subarray(0, 2 * n), density: values.subarray(2 * n), said });
    }, (error) => setState({ source, error }));
  }, [source]);
  useEffect(() => {
    setFound(null);
    if (!asked.q || source === undefined) return;
    const stop = new AbortController();
    searched(source, asked.q, stop.signal).then(setFound, (error) => error.name === "AbortError" || setFound({ error }));
    return () => stop.abort();
  }, [source, asked.q]);
  if (source === undefined) return html`<${Empty} title="No index is open">Open one with saekit browse.<//>`;
  const ask = (changes) => go(`/map${query({ ...asked, ...changes })}`, { replace: true });
  const isBlank = state.places?.every((value) => value === 0);
  return html`<div class="map-view">
    <form class="row" role="search" onSubmit=${(event) => { event.preventDefault(); ask({ q: event.target.elements.q.value }); }}>
      <h1>Map</h1>
      <label>Layer <select value=${source} onChange=${(event) => ask({ source: event.target.value })}>
        ${about.sources.map(({ name }) => html`<option>${name}</option>`)}</select></label>
      <input name="q" type="search" placeholder="highlight by label or word" aria-label="Highlight by label or word" value=${asked.q ?? ""}/>
      <button>Find</button>
      ${found?.latents && html`<span class="faint" role="status">${found.latents.length === FOUND ? `the first ${FOUND}` : found.latents.length} found</span>`}
      <span class="spacer"></span>
      ${state.n !== undefined && html`<span class="faint">${state.n.toLocaleString("en")} latents, laid out by ${state.said === "umap" ? "UMAP" : "principal components"}</span>`}
    </form>
    ${found?.error && html`<${Problem} error=${found.error}/>`}
    ${state.error ? html`<${Problem} error=${state.error}/>` : state.places === undefined ? html`<${Waiting} what="Reading the map"/>`
    : isBlank ? html`<${Empty} title="This index has no map">Build it again with saekit index.<//>`
    : html`<${Canvas} key=${source} source=${source} places=${state.places} density=${state.density} found=${found?.latents}/>`}
  </div>`;
}

async function searched(source, q, signal) {
  const latents = [];
  for (let offset = 0, total = 1; offset < Math.min(total, FOUND); offset += 200) {
    const page = await get(`/api/latents${query({ source, q, offset, limit: 200 })}`, signal);
    total = page.total;
    latents.push(...page.rows.map((row) => row.latent));
  }
  return { latents };
}

function Canvas({ source, places, density, found }) {
  const canvas = useRef(null);
  const [view, setView] = useState({ x: 0, y: 0, zoom: 1 });
  const [size, setSize] = useState({ width: 0, height: 0 });
  const [near, setNear] = useState(null);
  const [isKeyed, setKeyed] = useState(false);
  const drag = useRef(null);
  const colours = useMemo(() => ranked(density), [density]);

  useEffect(() => {
    const watch = new ResizeObserver(([{ contentRect: { width, height } }]) => setSize({ width: Math.round(width), height: Math.round(height) }));
    watch.observe(canvas.current.parentElement);
    return () => watch.disconnect();
  }, []);
  const scale = (MARGIN * Math.min(size.width, size.height) / 2) * view.zoom;
  const left = size.width / 2 - view.x * scale;
  const top = size.height / 2 - view.y * scale;

  useEffect(() => {
    if (size.width > 0) draw(canvas.current, size, places, colours, found, near, { scale, left, top, zoom: view.zoom });
  }, [size, view, places, colours, found, near]);

  const at = (event) => {
    const box = canvas.current.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };
  const nearest = ({ x, y }, reach = NEAR) => {
    let best = -1, least = reach * reach;
    for (let i = 0; i < density.length; i++) {
      const dx = places[2 * i] * scale + left - x, dy = places[2 * i + 1] * scale + top - y;
      const distance = dx * dx + dy * dy;
      if (distance < least) { least = distance; best = i; }
    }
    return best;
  };
  // What lies nearest to the middle, for those who move the map with keys.
  useEffect(() => {
    if (!isKeyed || size.width === 0) return;
    const latent = nearest({ x: size.width / 2, y: size.height / 2 }, Infinity);
    if (latent >= 0) setNear({ latent, x: places[2 * latent] * scale + left, y: places[2 * latent + 1] * scale + top });
  }, [isKeyed, view, size, places]);
  const open = (latent) => go(`/feature/${encodeURIComponent(source)}/${latent}`);
  const move = (event) => {
    setKeyed(false);
    if (drag.current) {
      const { x, y } = drag.current;
      drag.current = { x: event.clientX, y: event.clientY, moved: drag.current.moved + Math.abs(event.clientX - x) + Math.abs(event.clientY - y) };
      setView((old) => ({ ...old, x: old.x - (event.clientX - x) / scale, y: old.y - (event.clientY - y) / scale }));
      return;
    }
    const point = at(event), latent = nearest(point);
    setNear(latent < 0 ? null : { latent, ...point });
  };
  const zoom = (event) => {
    event.preventDefault();
    const { x, y } = at(event);
    const factor = Math.exp(-event.deltaY / 400);
    setView((old) => {
      const next = Math.min(Math.max(old.zoom * factor, 0.5), 400);
      const gain = 1 / scale - 1 / (scale * next / old.zoom);
      return { x: old.x + (x - size.width / 2) * gain, y: old.y + (y - size.height / 2) * gain, zoom: next };
    });
  };
  const release = (event) => {
    const wasClick = drag.current?.moved < 4;
    drag.current = null;
    const latent = wasClick ? nearest(at(event)) : -1;
    if (latent >= 0) open(latent);
  };
  const keys = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1] };
  const press = (event) => {
    if (keys[event.key]) setView((old) => ({ ...old, x: old.x + keys[event.key][0] / old.zoom, y: old.y + keys[event.key][1] / old.zoom }));
    else if (event.key === "+" || event.key === "-") setView((old) => ({ ...old, zoom: Math.min(Math.max(old.zoom * (event.key === "+" ? 1.5 : 1 / 1.5), 0.5), 400) }));
    else if (event.key === "0") setView({ x: 0, y: 0, zoom: 1 });
    else if (event.key === "Enter" && near) open(near.latent);
    else return;
    setKeyed(true);
    event.preventDefault();
  };
  return html`<div class="map">
    <canvas ref=${canvas} tabindex="0" role="application" aria-label="Map of latents: arrow keys move, plus and minus zoom, 0 shows all, Enter opens what is ringed"
      onPointerDown=${(event) => { drag.current = { x: event.clientX, y: event.clientY, moved: 0 }; event.target.setPointerCapture(event.pointerId); }}
      onPointerMove=${move} onPointerUp=${release} onPointerLeave=${() => setNear(null)} onWheel=${zoom} onKeyDown=${press}></canvas>
    ${near && html`<${Tip} source=${source} density=${density} ...${near} width=${size.width}/>`}
    <p class="map-legend faint"><span class="map-scale"></span> rarely to often active${found && html` · <span class="map-found"></span> found`}</p>
  </div>`;
}

function Tip({ source, latent, density, x, y, width }) {
  const [feature, setFeature] = useState(null);
  useEffect(() => {
    let isWanted = true;
    const ask = () => cached(`/api/feature${query({ source, latent })}`).then((data) => isWanted && setFeature(data), () => {});
    const wait = setTimeout(ask, 60);
    return () => { isWanted = false; clearTimeout(wait); };
  }, [source, latent]);
  const shown = feature?.latent === latent ? feature : null;
  const said = shown?.said[0]?.text ?? shown?.raised.slice(0, 4).map((token) => token.text).join(" ");
  return html`<div class="map-tip panel" role="status" style=${{ top: `${y + 14}px`, ...(x > width / 2 ? { right: `${width - x + 14}px` } : { left: `${x + 14}px` }) }}>
    <strong>${latent}</strong> ${said ?? ""}<br/>
    <span class="faint">density ${figure(density[latent])}</span></div>`;
}

// Points as pixels of one image, so that a million of them are drawn in one go.
function draw(canvas, { width, height }, places, colours, found, near, { scale, left, top, zoom }) {
  const ratio = devicePixelRatio || 1;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  const isDark = getComputedStyle(document.documentElement).colorScheme === "dark";
  const dot = Math.max(1, Math.round(ratio * Math.min(1 + Math.sqrt(zoom * 20000 / colours.length), 5)));
  const table = Array.from({ length: 17 }, (_, i) => colour((i - 1) / 15, isDark, found ? 0.35 : 0.9));
  for (let i = 0; i < colours.length; i++) {
    const x = Math.round((places[2 * i] * scale + left) * ratio), y = Math.round((places[2 * i + 1] * scale + top) * ratio);
    const shade = table[colours[i] < 0 ? 0 : 1 + Math.round(colours[i] * 15)];
    for (let dy = 0; dy < dot; dy++) {
      for (let dx = 0; dx < dot; dx++) {
        if (x + dx >= 0 && x + dx < canvas.width && y + dy >= 0 && y + dy < canvas.height) pixels[(y + dy) * canvas.width + x + dx] = shade;
      }
    }
  }
  context.putImageData(image, 0, 0);
  context.scale(ratio, ratio);
  const ring = (latent, radius, style) => {
    context.beginPath();
    context.arc(places[2 * latent] * scale + left, places[2 * latent + 1] * scale + top, radius, 0, 7);
    context[style === "fill" ? "fill" : "stroke"]();
  };
  context.fillStyle = isDark ? "#ff9838" : "#d9480f";
  (found ?? []).forEach((latent) => ring(latent, 3.5, "fill"));
  context.strokeStyle = isDark ? "#ffffff" : "#000000";
  context.lineWidth = 1.5;
  if (near) ring(near.latent, 6);
}

// From rare (blue) over pink to frequent (amber); what is never active is grey. As the canvas stores it: alpha, blue,
// green, red.
function colour(part, isDark, alpha) {
  const stops = isDark ? [[96, 140, 255], [225, 110, 190], [255, 190, 80]] : [[42, 91, 215], [190, 50, 130], [215, 120, 0]];
  const at = Math.min(Math.max(part, 0) * 2, 1.999), low = Math.floor(at);
  const mixed = stops[low].map((from, i) => Math.round(from + (stops[low + 1][i] - from) * (at - low)));
  const [red, green, blue] = part < 0 ? [140, 140, 140] : mixed;
  return ((Math.round(alpha * 255) << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

// Each live latent's place among all by how often it is active, in 0..1; -1 for the dead.
function ranked(density) {
  const order = [...density.keys()].filter((i) => density[i] > 0).sort((a, b) => density[a] - density[b]);
  const places = new Float32Array(density.length).fill(-1);
  order.forEach((latent, place) => { places[latent] = place / Math.max(order.length - 1, 1); });
  return places;
}
