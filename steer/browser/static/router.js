// The address is the state: every view reads what it shows from it, so that any view can be shared or gone back to.

import { useEffect, useState } from "./vendor/hooks.js";

const listeners = new Set();
const tell = () => listeners.forEach((listener) => listener());
addEventListener("popstate", tell);

export const here = () => ({
  path: decodeURI(location.pathname),
  parts: location.pathname.split("/").filter(Boolean).map(decodeURIComponent),
  query: Object.fromEntries(new URLSearchParams(location.search)),
});

export function go(address, { replace = false } = {}) {
  if (address === location.pathname + location.search) return;
  history[replace ? "replaceState" : "pushState"](null, "", address);
  tell();
}

// Says in the address what is shown, without anything being shown anew: such as how far somebody has scrolled.
export function note(address) {
  if (address !== location.pathname + location.search) history.replaceState(null, "", address);
}

export function useHere() {
  const [, again] = useState(0);
  useEffect(() => {
    const listener = () => again((n) => n + 1);
    listeners.add(listener);
    return () => listeners.delete(listener);
  }, []);
  return here();
}

// Links inside the page change the address without loading anything.
addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href]");
  const isPlain = event.button === 0 && !event.metaKey && !event.ctrlKey && !event.shiftKey && !event.altKey;
  if (!link || !isPlain || link.target || link.hasAttribute("download") || link.origin !== location.origin) return;
  if (link.pathname.startsWith("/api/") || link.pathname.startsWith("/static/")) return;
  event.preventDefault();
  go(link.pathname + link.search);
  if (!link.search && link.hash === "") scrollTo(0, 0);
});
