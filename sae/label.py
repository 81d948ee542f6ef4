"""From a feature index to labels of its latents, and how far they can be believed.

Flow:
1. labels without a language model for every latent, so that search is never empty (`sae.labels.plain`);
2. a sample of latents is explained from contexts of all strengths (`sae.labels.examples`, `sae.labels.prompts`), by an
   endpoint or by a model that runs here;
3. each explanation is scored on contexts of other documents, beside another latent's explanation, the latent's tokens,
   and what one answer for all gets (`sae.labels.questions`, `sae.labels.embedding`);
4. the means stand in one table (`sae.labels.report`).

Every answer is in the index's database before it is used, and is never asked for again, so that a run which was
stopped anywhere goes on where it was (`sae.labels.ledger`). Left out: labels that people give, and simulation of
activations, which needs log-probabilities.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from activations.errors import InterruptedRunError
from activations.models import LoadedModel, Status
from sae.labels.chat import Reply, Request, key_of
from sae.labels.config import LabelConfig
from sae.labels.examples import Case
from sae.labels.group import (
    Explained,
    Sheet,
    amplified_requests,
    asked_scores,
    case_of,
    embedded_scores,
    explain_request,
    is_rare,
    material,
    score_requests,
    sheet_of,
    tokens_of,
    with_others,
)
from sae.labels.ledger import Estimate
from sae.labels.prompts import EXPLAIN_SHA256, read_explanation
from sae.labels.report import summarise
from sae.labels.session import Session, open_session
from sae.labels.store import NewLabel
from sae.labels.tables import EXPLANATION

CONFIG_NAME = "label.yaml"
GROUP = 32
"""latents that are explained, and then scored, together"""
ESTIMATED = 200
"""latents, evenly over those that were chosen, that an estimate is made from"""
FILLER_LETTERS = 5
"""letters a token of a text that is yet to be written, rather too many"""
UNKNOWN = "words and phrases that have to do with one subject, in sentences of one kind"
"""stands for an explanation in an estimate"""


@dataclass
class Tally:
    """What became of the latents that were chosen."""

    labels: dict[int, tuple[int, str]] = field(default_factory=dict)
    """number and text of each explanation, by latent"""
    tokens: dict[int, str | None] = field(default_factory=dict)
    too_rare: int = 0
    unreadable: int = 0
    """answers in which there was no explanation"""


def label(config: LabelConfig, loaded: LoadedModel | None = None, *, on_status: Status | None = None) -> dict[str, Any]:
    """Label the index at `config.index`, and say how good the labels are; docs/formats.md lists what is returned.

    Raises: MismatchError if index, SAE and model do not belong together; EndpointError if an endpoint is not usable or
      gives no answer for too long; InterruptedRunError on Ctrl-C. Whatever was answered is kept.
    """
    say, tally = on_status or (lambda line: None), Tally()
    try:
        with open_session(config, loaded, on_status, write=True) as session:
            config.save(config.index / CONFIG_NAME)
            if session.chosen:
                say(_line(session, _estimate(session)))
                _finish(_label(session, tally))
            return _result(session, tally)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            config.index,
            expected="labels of all latents that were asked for",
            got=f"a stop after {len(tally.labels)} explanations",
            fix="Every answer is kept: run the same command again to go on.",
        ) from None


def estimate(
    config: LabelConfig, loaded: LoadedModel | None = None, *, on_status: Status | None = None
) -> dict[str, Any]:
    """What a run would ask and cost; writes nothing.

    Raises: whatever `label` raises before it asks.
    """
    with open_session(config, loaded, on_status, write=False) as session:
        found = _estimate(session)
        return {"latents": len(session.chosen), **found._asdict(), "cost": _money(session, found.cost)}


def _finish(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, also where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(asyncio.run, work).result()


async def _label(session: Session, tally: Tally) -> None:
    """Explain and score one group after the other, until all are done or the budget is used up."""
    for start in range(0, len(session.chosen), GROUP):
        cases = _cases(session, session.chosen[start : start + GROUP], tally)
        asked = {case.latent: explain_request(session, case) for case in cases}
        replies = await session.ledger.answers(session.explainer, asked.values(), "explanations")
        explained = []
        for case in cases:
            text = _explanation(session, asked[case.latent], replies, tally)
            if text is not None:
                explained.append(Explained(case, text, tally.tokens[case.latent]))
        await _score(session, with_others(explained), tally)
        if session.ledger.stopped:
            return


def _cases(session: Session, latents: Sequence[int], tally: Tally) -> list[Case]:
    """Latents with enough contexts; the others are counted."""
    cases = []
    for latent in latents:
        row = session.index.latent(latent)
        tally.tokens[latent] = tokens_of(session, row)
        if is_rare(session, row):
            tally.too_rare += 1
        else:
            cases.append(case_of(session, row))
    return cases


def _explanation(session: Session, request: Request, replies: Mapping[str, Reply], tally: Tally) -> str | None:
    """The explanation in an answer, which becomes a label."""
    key = key_of(session.explainer, request.messages)
    if key not in replies:
        return None
    text = read_explanation(replies[key].text or "")
    if text is None:
        tally.unreadable += 1
        return None
    new = NewLabel(request.latent, EXPLANATION, text, session.explainer.name, EXPLAIN_SHA256, key)
    tally.labels[request.latent] = session.store.add_label(new), text
    return text


async def _score(session: Session, explained: Sequence[Explained], tally: Tally) -> None:
    """Ask all that is to be asked of a group, and write the scores for which all was answered."""
    requests = amplified_requests(session, [each.case.latent for each in explained])
    asked = [request for each in requests.values() for request in each]
    replies = await session.ledger.answers(session.amplifier, asked, "amplified texts")
    written = {
        latent: [replies[key_of(session.amplifier, request.messages)].text or "" for request in each]
        for latent, each in requests.items()
    }
    abouts = {each.case.latent: material(session, each.case, written) for each in explained}
    sheets = {each.case.latent: sheet_of(session, each, abouts[each.case.latent]) for each in explained}
    replies = await session.ledger.answers(session.judge, score_requests(sheets), "scores")
    answers = {key: reply.text for key, reply in replies.items()}
    for each in explained:
        latent = each.case.latent
        scores = asked_scores(session, sheets[latent], answers) + embedded_scores(session, each, abouts[latent])
        session.store.add_scores(tally.labels[latent][0], latent, scores)


def _estimate(session: Session) -> Estimate:
    """What is not answered yet, from some of the latents; of what is not known, something as long stands in."""
    n, total = len(session.chosen), Estimate()
    some = np.unique(np.linspace(0, n - 1, min(n, ESTIMATED)).astype(int)).tolist()
    for start in range(0, len(some), GROUP):
        explained = []
        for case in _cases(session, [session.chosen[i] for i in some[start : start + GROUP]], Tally()):
            request = explain_request(session, case)
            total += session.ledger.estimate(session.explainer, [request])
            answer = session.ledger.kept(session.explainer, request)
            text = f"{UNKNOWN} {case.latent}" if answer is None else read_explanation(answer)
            if text is not None:
                explained.append(Explained(case, text, tokens_of(session, case.row)))
        sheets = {each.case.latent: _guessed_sheet(session, each) for each in with_others(explained)}
        total += session.ledger.estimate(session.judge, score_requests(sheets))
    return total.times(n / max(len(some), 1))


def _guessed_sheet(session: Session, each: Explained) -> Sheet:
    """Questions about a latent, with as many letters in place of texts that the model has yet to write."""
    filler = "x" * (FILLER_LETTERS * session.config.scoring.max_new_tokens)
    written = {
        latent: [session.ledger.kept(session.amplifier, request) or filler for request in requests]
        for latent, requests in amplified_requests(session, [each.case.latent]).items()
    }
    return sheet_of(session, each, material(session, each.case, written))


def _line(session: Session, found: Estimate) -> str:
    cost = _money(session, found.cost)
    money = "cost not known without price_in and price_out" if cost is None else f"at most {cost:,.2f} of money"
    return (
        f"about {found.requests:,} requests to make ({found.kept:,} are answered already): {found.tokens_in:,} tokens "
        f"of prompts, at most {found.tokens_out:,} of answers, {money}"
    )


def _money(session: Session, cost: float) -> float | None:
    """A cost in the unit of the prices; none if an endpoint has no prices."""
    chats = session.config.explainer, session.config.judge or session.config.explainer
    is_known = all(chat.base_url is None or None not in (chat.price_in, chat.price_out) for chat in chats)
    return round(cost, 6) if is_known else None


def _result(session: Session, tally: Tally) -> dict[str, Any]:
    config, ledger = session.config, session.ledger
    found = session.store.scores(number for number, _ in tally.labels.values())
    judges = session.judge.name, config.scoring.embedding
    scores = {
        latent: [each for each in found[number] if each.judge in judges] for latent, (number, _) in tally.labels.items()
    }
    n_done = len(tally.labels) + tally.too_rare + tally.unreadable
    return {
        "index": str(config.index),
        "explainer": session.explainer.name,
        "judge": session.judge.name,
        "latents": len(session.chosen),
        "explained": len(tally.labels),
        "too_rare": tally.too_rare,
        "unreadable_explanations": tally.unreadable,
        "not_reached": len(session.chosen) - n_done,
        "requests_answered": ledger.n_answered,
        "requests_failed": ledger.n_failed,
        "requests_answered_before": ledger.n_kept,
        "tokens_in": ledger.spent.tokens_in,
        "tokens_out": ledger.spent.tokens_out,
        "cost": _money(session, ledger.spent.cost),
        "stopped": ledger.stopped,
        "scores": summarise(scores, config.scoring.methods, config.seed),
        "labels": [
            {
                "latent": latent,
                "explanation": tally.labels[latent][1] if latent in tally.labels else None,
                "tokens": tally.tokens.get(latent),
                "scores": {f"{each.method}, {each.control}": each.value for each in scores.get(latent, [])},
            }
            for latent in session.chosen
        ],
    }
