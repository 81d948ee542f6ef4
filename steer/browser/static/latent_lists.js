// Which latents a list shows: what the address says of it, what the server is asked, and the order a feature lies in.

import { useEffect, useReducer, useRef } from "./vendor/hooks.js";
import { get, query as queryString } from "./api.js";

const KEYS = ["q", "how", "sort", "desc", "show", "explained", "status", "by", "where"];

export const COLUMNS = {
  density: { name: "Density", says: "share of tokens on which it is active" },
  max_activation: { name: "Max", says: "strongest activation" },
  mean_activation: { name: "Mean", says: "mean activation where it is active" },
  score: { name: "Score", says: "of the best explanation: mean balanced accuracy of detection and fuzzing, 0.5 by chance" },
  output_score: { name: "Output", says: "output score: how much steering with it says what its logits say, above 0.01 it does" },
  confidence_change: { name: "Δ conf.", says: "change of the next token's confidence when it is amplified, in nats" },
  logit_entropy: { name: "Entropy", says: "of what its decoder row alone would predict, in nats: low where it speaks for few tokens" },
  top_logit: { name: "Top logit", says: "largest rise of a logit, a unit of activation" },
  max_ablation_effect: { name: "Max effect", says: "largest loss without it in a context, in nats a token" },
  mean_ablation_effect: { name: "Mean effect", says: "mean loss without it in its contexts, in nats a token" },
  stability: { name: "Stability", says: "largest decoder cosine in an SAE of another seed, the mean over those" },
  nearest_cosine: { name: "Cosine", says: "of the most similar decoder row" },
  nearest_jaccard: { name: "Jaccard", says: "of the latent it is most often active with" },
};

// The part of an address that says which list, for links between it and its features.
export const listOf = (query) => Object.fromEntries(KEYS.filter((key) => query[key]).map((key) => [key, query[key]]));

export const asked = (source, query) => queryString({
  source, q: query.q, how: query.q ? query.how : "", sort: query.sort, descending: query.desc ? "true" : "", show: query.show,
  explained: query.explained, status: query.status, by: query.status ? query.by : "", where: query.where,
});

export const featurePath = (source, latent) => `/api/feature${queryString({ source, latent })}`;
export const featureAddress = (source, latent, query) => `/feature/${encodeURIComponent(source)}/${latent}${queryString(listOf(query))}`;
export const listAddress = (source, query, at) => `/features${queryString({ source, ...listOf(query), at })}`;

// Bounds of columns, "density:0.001:0.1,score:0.8:", as { density: ["0.001", "0.1"], … } and back.
export const bounds = (where) => Object.fromEntries((where ?? "").split(",").filter(Boolean).map((part) => {
  const [column, low = "", high = ""] = part.split(":");
  return [column, [low, high]];
}));
export const whereOf = (table) => Object.entries(table).filter(([, [low, high]]) => low !== "" || high !== "").map(([column, [low, high]]) => `${column}:${low}:${high}`).join(",");

// --- the latents before and behind one, in the order of a list ---

const REACH = 100;
const NEAR = 8;
const parts = new Map();

// { place, total, next(k) }, where next(-1) is the latent before; in the order of numbers where the list lacks this one.
export function useOrder(source, query, latent, d_sae) {
  const [, again] = useReducer((n) => n + 1, 0);
  const path = "/api/latents/around" + asked(source, query);
  const part = parts.get(path);
  const at = part ? part.latents.indexOf(latent) : -1;
  const isNear = at >= 0 && (at >= NEAR || part.offset === 0)
    && (part.latents.length - at > NEAR || part.offset + part.latents.length >= part.total);
  const failed = useRef(null);
  useEffect(() => {
    if (isNear || failed.current === path + latent) return;
    get(`${path}&latent=${latent}&reach=${REACH}`).then((found) => {
      if (found.place === null) failed.current = path + latent;
      else parts.set(path, found);
      again();
    }, () => { failed.current = path + latent; again(); });
  }, [path, latent, isNear]);
  const isOutside = failed.current === path + latent;
  const inside = (number) => (d_sae !== undefined && number >= 0 && number < d_sae ? number : undefined);
  return {
    place: at >= 0 ? part.offset + at : undefined,
    total: part?.total,
    isOutside,
    next: (k) => (at >= 0 ? part.latents[at + k] : isOutside ? inside(latent + k) : undefined),
  };
}
