"""From raw samples to corpus documents: clean, filter, deduplicate and balance; pure functions of their arguments.

1. Clean: drop preambles and closing pleasantries; cut before the first loop, leaked control token, placeholder, echo of
   the request or talk about being an assistant; cut the unfinished last sentence.
2. Filter: drop what still loops or leaks, what touches on slurs, sex or atrocities (a small model rambles there), what
   is not English, and what is too short or too long.
3. Deduplicate: drop a document that shares too many 8-word shingles with the ones kept before it.
4. Balance: in an order shuffled by the seed, keep a document while its opening words and its genre are not over-full.
   Any prefix of the corpus is therefore a varied sample.

    >>> fault("See www.tea.org")
    'address'
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from activations.data.corpus_prompts import GENRES, REGISTERS, Form, Job

TOKENS = range(90, 501)
"""Lengths kept, in tokens of the sampled model."""


class Sample(NamedTuple):
    """One sampled text as the model wrote it."""

    job: Job
    text: str
    finished: bool
    """Whether the model ended it, rather than the length limit."""


class Document(NamedTuple):
    """One line of the corpus."""

    text: str
    subject: str
    genre: str
    register: str
    form: Form


# ------------------------------------------------------------------------------------------------------------ clean

WORD = re.compile(r"[^\W_]+(?:['’]\w+)?")
CODE = re.compile(r"```|^\s*(def \w+\(|import \w+$|from [\w.]+ import|class \w+[:(]|print\()", re.MULTILINE)
BY_LINE = frozenset(genre.name for genre in GENRES if genre.by_line)
PREAMBLE = re.compile(
    r"\A(\s*([-*_=]{3,}|(sure|certainly|of course|absolutely|okay|here('s| is| are)|below is|this is an?|i'd be"
    r"|i'm glad|i am glad|title|\*\*title)\b[^\n]{0,200})\n+)+",
    re.IGNORECASE,
)
CLOSING = re.compile(
    r"\n+[^\n\w]*(i hope|let me know|feel free|please (let|note|feel)|note|remember to adjust|if you (have|need) any)\b"
    r"[^\n]*\s*$",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bDr)(?<!\bMrs)(?<!\bSt)(?<![\n ]\d)(?<!\n\d\d)[.!?][\"')\]*`”’]*(?=\s|$)")
BARE_MARKER = re.compile(r"\n+[ \t]*([-*•#]+|\(?\w{1,2}[.):]|\*\*)?[ \t]*$")
CONTROL = re.compile(r"<\||\|>|im_start|im_end|endoftext|\ufffd|^\s*(user|assistant|system)\s*$", re.MULTILINE)
ASSISTANT = re.compile(
    r"\bas an? (large |virtual |digital )?(ai\b|language model|assistant|writer with)|\bsmollm|hugging ?face"
    r"|\bai assistant|requested text|many voices|(your|the|this) (request|prompt|instructions?)\b"
    r"|i('m| am) (so )?(sorry,? but|here to help)|glad you (reached out|wanted to know)|creative writing|\bchanged \""
    r"|i (cannot|can't|am unable to|'m unable to) (assist|help you|provide|fulfil|write|generate|create)"
    r"|i('d| would) be (happy|glad) to|hope (this|that) (helps|email finds|letter finds|message finds)"
    r"|(revised|rewritten|edited|original) (sentence|version|text|paragraph|story|passage)|more concise|can i help you"
    r"|(version|end|rest|tone|changes) (of|to) (the|this) text|(made|make|making|keep) it (more )?(sad|gloomy|joyful"
    r"|funny|angry|formal|tense|chatty|concise|upbeat)|let me know (if|how)"
    r"|feel free to (ask|reach|modify|adjust|contact)"
    r"|provide (a|my) (response|correction)|the text i('m| am)|neutral as possible",
    re.IGNORECASE,
)
PLACEHOLDER = re.compile(
    r"\[[A-Z][^\]\n]{2,60}\](?!\()|\[(your|insert|name|date)\b|_{5,}|\{\w+\}\}|<[A-Za-z ]*(name|date)>"
)
ECHO = re.compile(
    "|".join(re.escape(ask) for asks, _ in REGISTERS.values() for ask in asks if ask)
    + r"|\A(write|describe|explain|summari[sz]e|give|tell|draft|list|show|make up|argue) (a|an|the|me|ten|three|your)\b"
    r"|\b(tone|mood|style|language|voice) (is|was|should be|must be) (formal|official|casual|gloomy|joyful|angry)"
    r"|for a ministry|ministry setting|chatty and relaxed|(sad and gloomy|gloomy and sad)"
    r"|child of seven|encyclopedia entry",
    re.IGNORECASE,
)
ADDRESS = re.compile(r"https?:|www\.|\w@\w+\.\w|\b\d{3}\W{1,2}\d{3,4}[- ]\d{4}\b")
SENSITIVE = re.compile(
    r"\b(jew(s|ish)?|nazi\w*|hitler|holocaust|genocid\w*|muslims?|islamis\w*|gypsy|gypsies|negro\w*|slave\w*|racis\w*"
    r"|white (man|men|people|race)|black (man|men|people|race)|rap(e|ed|ist)|porn\w*|sex(y|ual\w*)?|nude|naked"
    r"|suicid\w*|fuck\w*|shit\w*|bitch\w*|whore\w*|terroris\w*|murder\w*|massacre\w*|tortur\w*)\b",
    re.IGNORECASE,
)
LEAKS = {
    "control token": CONTROL,
    "assistant talk": ASSISTANT,
    "placeholder": PLACEHOLDER,
    "instruction echo": ECHO,
    "address": ADDRESS,
}


def clean(item: Sample) -> str:
    """Return the text of a sample as it goes into the corpus: with its opening, without chatter around it.

    >>> job = Job("tea", "essay", "plain", "plain", "Few things are as good as tea.")
    >>> clean(Sample(job, " It is warm. It is also che", finished=False))
    'Few things are as good as tea. It is warm.'
    """
    if item.job.form == "plain":
        text = item.job.prompt + item.text
    else:
        text = CLOSING.sub("", PREAMBLE.sub("", item.text.strip() + "\n", count=1).strip())
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()
    by_line = item.job.genre in BY_LINE
    for most in (6, 3, 1):  # Cut earlier if what is left still loops.
        end = min(leak_start(text), len(text) if CODE.search(text) else loop_start(text, most=most))
        part = text if item.finished and end == len(text) else cut_unfinished(text[:end], by_line=by_line)
        if not is_loop(part):
            break
    return part


def leak_start(text: str) -> int:
    """Return where text leaks a control token, a placeholder, an address, the request or assistant talk, or its length.

    >>> leak_start("Yours, [Your Name]"), leak_start("Yours, Ann")
    (7, 10)
    """
    found = (pattern.search(text) for pattern in LEAKS.values())
    return min((match.start() for match in found if match), default=len(text))


def loop_start(text: str, n: int = 4, window: int = 24, most: int = 6) -> int:
    """Return where text begins to loop, or its length.

    Small models often start well and then repeat themselves, so the good part is worth keeping. A loop begins at a
    repeated n-gram of words that opens a window of words with more than `most` repeated ones.
    """
    matches = list(WORD.finditer(text.lower()))
    words = [match[0] for match in matches]
    seen: set[tuple[str, ...]] = set()
    repeats: list[bool] = []
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        repeats.append(gram in seen)
        seen.add(gram)
    starts = (i for i, repeat in enumerate(repeats) if repeat and sum(repeats[i : i + window]) > most)
    first = next(starts, None)
    return len(text) if first is None else matches[first].start()


def cut_unfinished(text: str, *, by_line: bool) -> str:
    """Cut text after its last finished sentence, or after its last finished line if that is later and allowed.

    >>> cut_unfinished("One. Two! Thr", by_line=False)
    'One. Two!'
    """
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    if by_line:
        ends.append(text.rfind("\n"))
    text = text[: max(ends, default=0)].rstrip() if ends else ""
    text = BARE_MARKER.sub("", text)
    return text + "\n```" if text.count("```") % 2 else text


# ----------------------------------------------------------------------------------------------------------- filter

COMMON = frozenset(
    re.findall(r"\w+", """
    the of and to a in is it that for was on with as are at be by this from or had not have his her you i we they he she
""")
)  # fmt: skip


def words_of(text: str) -> list[str]:
    """Return the lower-case words of text.

    >>> words_of("It's Tea-time, again!")
    ["it's", 'tea', 'time', 'again']
    """
    return WORD.findall(text.lower())


def repeated_share(items: list[str], n: int) -> float:
    """Return the share of n-grams that occurred before: 0 if all differ, near 1 in a loop.

    >>> repeated_share("a b c a b c".split(), 3)
    0.25
    """
    grams = list(zip(*(items[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_share(items: list[str], window: int = 100) -> float:
    """Return the lowest share of distinct words in any window, so that a late loop counts whatever comes before it."""
    windows = [items[i : i + window] for i in range(0, max(len(items) - window, 0) + 1, window // 4)]
    return min(len(set(part)) / len(part) for part in windows) if items else 0.0


def is_loop(text: str) -> bool:
    """Whether text repeats itself: its phrases, words, lines or the way its sentences begin."""
    words, code = words_of(text), bool(CODE.search(text))
    if repeated_share(words, 4) > (0.25 if code else 0.1) or distinct_share(words) < (0.25 if code else 0.43):
        return True
    if code:
        return False
    top = max(Counter(word for word in words if word not in COMMON).values(), default=0)
    lines = Counter(line.strip() for line in text.split("\n") if len(line.split()) > 2)
    heads = Counter(
        tuple(words_of(part)[:2]) for part in re.split(r"[.!?]+\s+|\n+(?:\d+\.)?", text) if len(part.split()) > 2
    )
    most_heads = max(heads.values(), default=0)
    return (
        max(lines.values(), default=0) > 2
        or top > 0.1 * len(words)
        or (most_heads > 3 and most_heads > 0.4 * heads.total())
    )


def is_not_english(text: str) -> bool:
    """Whether text holds many digits, foreign or single letters, few common English words, or only scraps of lines."""
    words = words_of(text)
    foreign = sum(char.isalpha() and not char.isascii() for char in text)
    digits = sum(char.isdigit() for char in text)
    if foreign > 0.01 * len(text) or digits > 0.12 * len(text):
        return True
    if CODE.search(text):
        return False
    common = sum(word in COMMON for word in words)
    letters = sum(len(word) == 1 and word.isalpha() and word not in ("a", "i") for word in words)
    return common < 0.12 * len(words) or letters > 0.1 * len(words) or len(words) < 3 * text.count("\n")


FILTERS: dict[str, Callable[[str], object]] = {
    **{name: pattern.search for name, pattern in LEAKS.items()},
    "sensitive": SENSITIVE.search,
    "not English": is_not_english,
    "loop": is_loop,
}


def fault(text: str) -> str | None:
    """Return the name of the first filter that rejects text, or None."""
    return next((name for name, rejects in FILTERS.items() if rejects(text)), None)


class Deduplicator:
    """Remembers the 8-word shingles of what it kept.

    >>> keep = Deduplicator()
    >>> text = "one two three four five six seven eight nine"
    >>> keep(text), keep(text + " ten")
    (True, False)
    """

    def __init__(self, n: int = 8, most_shared: float = 0.1):
        self.n, self.most_shared = n, most_shared
        self.seen: set[int] = set()

    def __call__(self, text: str) -> bool:
        """Whether text shares little with all kept before; if so it is kept."""
        words = words_of(text)
        shingles = {hash(tuple(words[i : i + self.n])) for i in range(max(len(words) - self.n + 1, 1))}
        if len(shingles & self.seen) > self.most_shared * len(shingles):
            return False
        self.seen |= shingles
        return True


class Balancer:
    """Keeps a document while none of its keys holds more than its share of `total` documents."""

    SHARES: tuple[tuple[str, float], ...] = (("genre", 0.05), ("word", 0.05), ("2 words", 0.012), ("4 words", 0.003))

    def __init__(self, total: int):
        self.total = total
        self.counts: Counter[tuple[str, str]] = Counter()

    def __call__(self, document: Document) -> bool:
        """Whether there is room for this document; if so it is counted."""
        words = words_of(document.text)
        values = (document.genre, *(" ".join(words[:n]) for n in (1, 2, 4)))
        keys = [(kind, value) for (kind, _), value in zip(self.SHARES, values, strict=True)]
        limits = [max(share * self.total, 2) for _, share in self.SHARES]
        if any(self.counts[key] >= limit for key, limit in zip(keys, limits, strict=True) if key[1] not in COMMON):
            return False
        self.counts.update(keys)
        return True


# ---------------------------------------------------------------------------------------------------------- assemble


def without_opening(text: str, opening: str) -> str:
    """Return text after its given opening, from the next full sentence on.

    >>> without_opening("It rained in Lima, and then more. We left. It was cold.", "It rained in Lima, and")
    'We left. It was cold.'
    """
    start = len(opening)
    if not SENTENCE_END.search(opening[-2:]):
        match = SENTENCE_END.search(text, start)
        start = match.end() if match else len(text)
    return text[start:].strip()


def candidates(samples: Iterable[Sample], count_tokens: Callable[[str], int]) -> Iterator[tuple[list[Document], str]]:
    """Yield per sample the usable variants of its text, best first, and why it has none if so.

    A plain text is offered with its opening and without, for openings are few and soon over-full.
    """
    for item in samples:
        text = clean(item)
        reason = fault(text)
        variants = [text]
        if item.job.form == "plain" and text.startswith(item.job.prompt):
            variants.append(without_opening(text, item.job.prompt))
        usable = [] if reason else [Document(part, *item.job[:4]) for part in variants if count_tokens(part) in TOKENS]
        yield usable, reason or ("" if usable else "length")


def assemble(
    samples: Iterable[Sample], count_tokens: Callable[[str], int], seed: int, max_tokens: int
) -> tuple[list[Document], Counter[str]]:
    """Clean, filter, deduplicate and balance samples; return the documents and how many each step dropped."""
    dropped: Counter[str] = Counter()
    pool: list[list[Document]] = []
    for variants, reason in candidates(samples, count_tokens):
        if reason:
            dropped[reason] += 1
        else:
            pool.append(variants)
    random.Random(seed).shuffle(pool)
    is_new, has_room = Deduplicator(), Balancer(len(pool))
    kept: list[Document] = []
    tokens = 0
    for variants in pool:
        document = next((variant for variant in variants if has_room(variant)), None)
        if document is None:
            dropped["balance"] += 1
        elif not is_new(document.text):
            dropped["near-duplicate"] += 1
        elif tokens + count_tokens(document.text) > max_tokens:
            dropped["over the token limit"] += 1
        else:
            kept.append(document)
            tokens += count_tokens(document.text)
    dropped["kept"], dropped["kept tokens"] = len(kept), tokens
    return kept, dropped
