// The page: who is there, which view the address asks for, and how it looks.

import { h, render } from "./vendor/preact.js";
import { useEffect, useState } from "./vendor/hooks.js";
import { ApiError, get, post } from "./api.js";
import { go, useHere } from "./router.js";
import { Empty, html, Problem, Waiting } from "./ui.js";

// By the first part of the address: the module of a view, which exports View({ about, parts, query }).
const VIEWS = {
  "": () => import("./features.js"),
  features: () => import("./features.js"),
  feature: () => import("./feature.js"),
  label: () => import("./label.js"),
  prompt: () => import("./prompt.js"),
  compare: () => import("./compare.js"),
  map: () => import("./map.js"),
  bench: () => import("./bench.js"),
  people: () => import("./people.js"),
};
const hasIndex = (about) => about.sources.length > 0;
const PAGES = [
  { path: "/features", name: "Features", also: ["", "feature"], isFor: hasIndex },
  { path: "/label", name: "Label", isFor: hasIndex },
  { path: "/prompt", name: "Prompt", isFor: hasIndex },
  { path: "/bench", name: "Bench", isFor: (about) => hasIndex(about) || about.libraries.length > 0 },
  { path: "/map", name: "Map", isFor: hasIndex },
  { path: "/compare", name: "Compare", isFor: (about) => about.sources.length > 1 },
  { path: "/people", name: "People", isFor: (about) => about.is_team && about.role === "admin" },
];
// Views whose look needs no heading get one for those who do not see it.
const HEADLESS = { "": "Features", features: "Features", prompt: "Prompt", bench: "Bench" };
const THEMES = ["auto", "light", "dark"];
const look = (theme) => { document.documentElement.dataset.theme = theme; };
look(localStorage.getItem("theme") ?? "auto");

function App() {
  const [state, setState] = useState({});
  const ask = () => get("/api/about").then((about) => setState({ about }), (error) => setState({ error }));
  useEffect(() => { enter().then(ask, (error) => setState({ error })); }, []);
  if (state.about) return html`<${Shell} about=${state.about}/>`;
  if (state.error?.status === 401) return html`<${Login} onEntered=${ask} error=${state.error}/>`;
  if (state.error) return html`<main><${Problem} error=${state.error}/></main>`;
  return html`<main><${Waiting}/></main>`;
}

// The token behind # becomes a cookie and leaves the address, so that a copied address holds none.
async function enter() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return;
  history.replaceState(null, "", location.pathname + location.search);
  await post("/api/login", { token }).catch((error) => { if (!(error instanceof ApiError)) throw error; });
}

function Login({ onEntered, error }) {
  const [problem, setProblem] = useState(null);
  const submit = (event) => {
    event.preventDefault();
    post("/api/login", { token: event.target.elements.token.value.trim() }).then(onEntered, setProblem);
  };
  return html`<main class="login"><h1>saekit</h1>
    <form onSubmit=${submit}><label>Token <input name="token" type="password" autocomplete="current-password" required autofocus/></label>
      <button class="primary">Log in</button></form>
    <p>Open the address that <code>saekit browse</code> printed, or paste the token from behind its <code>#token=</code>.</p>
    ${problem && html`<${Problem} error=${problem}/>`}</main>`;
}

function Shell({ about }) {
  const { parts, query } = useHere();
  const [first = hasIndex(about) || !about.libraries.length ? "" : "bench"] = parts;
  return html`<header class="bar">
      <a class="brand" href="/">saekit</a>
      <nav aria-label="Views">${PAGES.filter(({ isFor }) => isFor(about)).map(({ path, name, also = [] }) => html`<a href=${path} aria-current=${path === `/${first}` || also.includes(first) ? "page" : undefined}>${name}</a>`)}</nav>
      <span class="spacer"></span><span class="who" title=${about.role}>${about.account}</span><${Theme}/>
    </header>
    <main>${HEADLESS[first] && html`<h1 class="unseen">${HEADLESS[first]}</h1>`}${first in VIEWS ? html`<${Lazy} load=${VIEWS[first]} about=${about} parts=${parts.slice(1)} query=${query}/>`
    : html`<h1 class="unseen">saekit</h1><${Empty} title="There is nothing here">Choose a view above.<//>`}</main>`;
}

function Lazy({ load, ...given }) {
  const [loaded, setLoaded] = useState({});
  useEffect(() => { load().then(({ View }) => setLoaded({ load, View }), (error) => setLoaded({ load, error })); }, [load]);
  if (loaded.load !== load) return html`<${Waiting}/>`;
  return loaded.error ? html`<${Problem} error=${loaded.error}/>` : h(loaded.View, given);
}

function Theme() {
  const [theme, setTheme] = useState(localStorage.getItem("theme") ?? "auto");
  useEffect(() => { look(theme); localStorage.setItem("theme", theme); }, [theme]);
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  return html`<button class="quiet" title="Light or dark" onClick=${() => setTheme(next)}>${theme}</button>`;
}

render(html`<${App}/>`, document.getElementById("app"));
