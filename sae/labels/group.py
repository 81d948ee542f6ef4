"""A group of latents: what is asked about them, and what the answers are worth.

Nothing here asks: from the same session the same requests follow, also in an estimate, where a text that is not there
yet is stood in for by one as long.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sae.index_db import LatentRow
from sae.labels.amplifier import NOTHING
from sae.labels.chat import Request, key_of
from sae.labels.embedding import Embedded, embedding_score, intruder_score
from sae.labels.examples import Case, make_case, marks, split, strength, text_of
from sae.labels.plain import token_label
from sae.labels.prompts import explain
from sae.labels.questions import FORMS, Material, Question, material_of, score
from sae.labels.session import Session
from sae.labels.tables import EXPLANATION, Score
from sae.labels.words import one_line, shown

MAX_TEXT = 2000
"""letters of a text that the model wrote"""

Sheet = dict[tuple[str, str], dict[str, Question]]
"""by method and control: questions by the keys of their requests"""


class Explained(NamedTuple):
    """A latent with its explanation."""

    case: Case
    text: str
    tokens: str | None
    """the label of its tokens"""
    other: str | None = None
    """another latent's explanation"""


def is_rare(session: Session, row: LatentRow) -> bool:
    """Whether a latent has too few contexts, of different documents, to be explained and scored."""
    return sum(map(len, split(row, session.config.seed))) < session.config.min_contexts


def case_of(session: Session, row: LatentRow) -> Case:
    """The contexts of a latent."""
    config = session.config
    return make_case(row, session.pool, config.n_shown, config.scoring.n_positives, config.n_bins, config.seed)


def tokens_of(session: Session, row: LatentRow) -> str | None:
    """The label of a latent's tokens."""
    return token_label(row, session.names)


def explain_request(session: Session, case: Case) -> Request:
    """What the explainer is asked."""
    largest = case.row.max_activation
    excerpts = [
        (text_of(session.decode, context.tokens, marks(context)), strength(context, largest)) for context in case.shown
    ]
    logits = [shown(text) for text, _ in case.row.top_logits] if session.config.show_logits else []
    return Request(EXPLANATION, case.latent, explain(excerpts, logits))


def with_others(explained: Sequence[Explained]) -> list[Explained]:
    """The same, each with the explanation of the next; a latent that is alone has no other."""
    if len(explained) < 2:
        return list(explained)
    return [
        one._replace(other=next_.text) for one, next_ in zip(explained, [*explained[1:], explained[0]], strict=True)
    ]


def amplified_requests(session: Session, latents: Sequence[int]) -> dict[int, list[Request]]:
    """What the model is to write as it is (NOTHING), and with each latent amplified; nothing if nobody asks."""
    if "intervention" not in session.config.scoring.methods or not latents:
        return {}
    return {latent: session.amplifier.requests(latent) for latent in (NOTHING, *latents)}


def material(session: Session, case: Case, written: Mapping[int, Sequence[str]]) -> Material:
    """The texts of a latent.

    Args:
      written: by latent, what the model wrote behind each prompt; what is not there is not asked about.
    """
    pairs: list[tuple[str, str]] = []
    if case.latent in written:
        prompts = [request.messages[-1].content for request in session.amplifier.requests(case.latent)]
        texts = [
            [one_line(prompt + text, MAX_TEXT) for prompt, text in zip(prompts, written[latent], strict=True)]
            for latent in (NOTHING, case.latent)
        ]
        pairs = list(zip(*texts, strict=True))
    return material_of(case, session.decode, session.config.seed, pairs)


def sheet_of(session: Session, each: Explained, about: Material) -> Sheet:
    """All questions about a latent's explanation and its controls."""
    scoring, seed = session.config.scoring, session.config.seed
    return {
        (method, control): {
            key_of(session.judge, question.messages): question
            for question in FORMS[method](about, text, scoring.per_prompt, seed)
        }
        for method in scoring.methods
        if method in FORMS
        for control, text in _texts(session, each).items()
    }


def score_requests(sheets: Mapping[int, Sheet]) -> list[Request]:
    """The requests of sheets by latent."""
    return [
        Request(method, latent, question.messages)
        for latent, sheet in sheets.items()
        for (method, _), questions in sheet.items()
        for question in questions.values()
    ]


def asked_scores(session: Session, sheet: Sheet, answers: Mapping[str, str | None]) -> list[Score]:
    """Scores of one latent, of the methods and controls for which all was answered."""
    found = [
        score(method, control, questions, answers, session.judge.name, session.config.seed)
        for (method, control), questions in sheet.items()
        if questions.keys() <= answers.keys()
    ]
    return [each for each in found if each is not None]


def embedded_scores(session: Session, each: Explained, about: Material) -> list[Score]:
    """Scores of one latent that ask nobody."""
    config, kind = session.config, session.config.scoring.embedding
    wanted = {"embedding", "intruder"} & set(config.scoring.methods)
    if not wanted or not about.positives:
        return []
    embedded = Embedded(session.embed(about.positives), session.embed(about.negatives))
    scores: list[Score | None] = []
    if "embedding" in wanted:
        texts = _texts(session, each)
        rows = session.embed(list(texts.values()))
        pairs = zip(texts, rows, strict=True)
        scores += [embedding_score(embedded, row, control, kind, config.seed) for control, row in pairs]
    if "intruder" in wanted:
        scores.append(intruder_score(embedded, kind, [config.seed, about.latent, 9]))
    return [one for one in scores if one is not None]


def _texts(session: Session, each: Explained) -> dict[str, str]:
    """By control: the label that is scored."""
    texts = {"explanation": each.text, "shuffled": each.other, "tokens": each.tokens}
    wanted = ("explanation", *session.config.scoring.controls)
    return {control: text for control, text in texts.items() if text is not None and control in wanted}
