"""The pure parts of the corpus script and its modules, and the committed corpus file."""

import random
from collections import Counter
from pathlib import Path

import pytest

from activations.data import corpus_filters as filters
from activations.data import corpus_prompts as prompts
from activations.data import make_corpus
from activations.data.corpus_filters import Balancer, Deduplicator, Document, Sample
from activations.data.corpus_prompts import Job

FILE = Path(make_corpus.__file__).with_name("corpus.jsonl.xz")
WORDS = [f"{a}{b}{c}" for a in "bdfgklmn" for b in "aeiou" for c in ("rin", "lot", "sk", "nd", "ver")]
TEA = "Few things are as good as tea."


def prose(seed: int, n: int = 150) -> str:
    """Return n varied words in sentences of ten, a third of them common English ones."""
    rng = random.Random(seed)
    common = sorted(filters.COMMON)
    words = [rng.choice(common if i % 3 == 0 else WORDS) for i in range(n)]
    return " ".join(word.capitalize() if i % 10 == 0 else word + "." * (i % 10 == 9) for i, word in enumerate(words))


def sampled(text: str, form: prompts.Form = "chat", *, finished: bool = True, genre: str = "essay") -> Sample:
    return Sample(Job("tea", genre, "plain", form, TEA), text, finished)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return make_corpus.read_corpus(FILE)


def test_compose_is_seeded_varied_and_filled():
    jobs = prompts.compose(580, seed=3)
    assert jobs == prompts.compose(580, seed=3) != prompts.compose(580, seed=4)
    assert set(Counter(job.genre for job in jobs).values()) == {580 // len(prompts.GENRES)}
    assert {job.register for job in jobs} == set(prompts.REGISTERS)
    assert not any("{" in job.prompt or "}" in job.prompt for job in jobs)
    assert 0.4 < sum(job.form == "chat" for job in jobs) / len(jobs) < 0.6


def test_subjects_are_many_and_distinct():
    subjects = [subject.strip() for field in prompts.FIELDS.values() for subject in field.split(";")]
    assert len(subjects) == len(set(subjects) - {""}) > 300


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sure, here is an essay:\n\nTea is warm.", "Tea is warm."),
        ("Here's one:\n\n---\n\nTea is warm.", "Tea is warm."),
        ("Tea is warm, and there is a cup.\nIt is full.", "Tea is warm, and there is a cup.\nIt is full."),
        ("Tea is warm.\n\nI hope this helps!", "Tea is warm."),
        ("Tea is warm.\n\n\n\nIt is good.  \nYes.", "Tea is warm.\n\nIt is good.\nYes."),
        ("Tea is warm. As an AI language model, I drink none. Ah.", "Tea is warm."),
        ("Tea is warm.\n\nYours,\n[Your Name]", "Tea is warm."),
        ("Tea is warm. Write to me@tea.org. Soon.", "Tea is warm."),
        ("Tea is warm. <|im_start|>user", "Tea is warm."),
    ],
)
def test_clean_chat(text, expected):
    assert filters.clean(sampled(text)) == expected


def test_clean_keeps_the_opening_of_a_plain_text_and_cuts_the_last_sentence():
    assert filters.clean(sampled(" It is warm. It is al", "plain", finished=False)) == f"{TEA} It is warm."


def test_clean_keeps_the_part_before_a_loop():
    good = prose(1)
    assert filters.clean(sampled(good + " And the cup was full of tea again." * 9)).startswith(good)
    assert filters.clean(sampled(good + " And the cup was full of tea again." * 9)).count("cup") <= 1


def test_starts_of_leaks_and_loops():
    assert filters.leak_start("Tea <|im_end|> Write to www.tea.org") == 4
    assert filters.leak_start("Tea.") == filters.loop_start("Tea.") == 4
    looping = prose(1) + " One cup of tea for me." * 5
    assert len(prose(1)) < filters.loop_start(looping) < len(prose(1)) + 40
    assert filters.loop_start(looping, most=99) == len(looping)


@pytest.mark.parametrize(
    ("text", "by_line", "expected"),
    [
        ("One. Two! Thr", False, "One. Two!"),
        ('He said "no." Th', False, 'He said "no."'),
        ("I met Dr. Who", False, ""),
        ("- one\n- two\n- thr", True, "- one\n- two"),
        ("Buy:\n1. Milk.\n2.", False, "Buy:\n1. Milk."),
        ("```python\nx = 1\ny = 2\nz", True, "```python\nx = 1\ny = 2\n```"),
        ("no end here", False, ""),
    ],
)
def test_cut_unfinished(text, by_line, expected):
    assert filters.cut_unfinished(text, by_line=by_line) == expected


def test_shares():
    assert filters.repeated_share(list("abcde"), 2) == 0
    assert filters.repeated_share(["a"] * 10, 2) == pytest.approx(8 / 9)
    fresh, loop = [str(i) for i in range(150)], ["x"] * 100
    assert filters.distinct_share(fresh) == 1
    assert filters.distinct_share(fresh + loop) == pytest.approx(0.01)
    assert filters.distinct_share([]) == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (prose(2), None),
        (prose(2) + " <|im_end|>", "control token"),
        (prose(2) + " I cannot assist with it.", "assistant talk"),
        (prose(2) + " Signed, [Your Name]", "placeholder"),
        (prose(2) + " Use casual slang.", "instruction echo"),
        (prose(2) + " See www.tea.org", "address"),
        (prose(2) + " It was a massacre.", "sensitive"),
        ("Der Tee ist gut und wir trinken ihn gern. " * 3, "not English"),
        (prose(2) + " äöü" * 10, "not English"),
        (prose(2) + " 12345" * 40, "not English"),
        ("The cup is full of tea. " * 30, "loop"),
        (prose(2) + "\nA line of tea.\nAnd now.\nA line of tea.\nOr then.\nA line of tea.", "loop"),
    ],
)
def test_fault_names_the_filter(text, reason):
    assert filters.fault(text) == reason


def test_deduplicator_drops_what_shares_shingles():
    keep = Deduplicator()
    assert keep(prose(1))
    assert keep(prose(2))
    assert not keep(prose(1).upper() + " And more.")
    assert keep("short text")
    assert not keep("short text")


def test_balancer_limits_genres_and_openings():
    room = Balancer(100)
    same_genre = [Document(prose(i), "tea", "essay", "plain", "chat") for i in range(20)]
    assert sum(map(room, same_genre)) <= 5
    room = Balancer(1000)
    same_start = [Document("Once upon a time " + prose(i), "tea", f"g{i % 29}", "plain", "chat") for i in range(50)]
    assert sum(map(room, same_start)) == 3


def test_assemble_reports_and_limits():
    samples = [sampled(prose(seed)) for seed in range(40)] + [sampled(prose(99, n=60))]
    kept, dropped = filters.assemble(samples, lambda text: len(text.split()), 0, 1000)
    assert dropped["length"] == 1
    assert dropped["kept"] == len(kept) > 0
    assert dropped["kept tokens"] == sum(len(document.text.split()) for document in kept) <= 1000
    assert sum(count for name, count in dropped.items() if name != "kept tokens") == len(samples)
    assert kept == filters.assemble(samples, lambda text: len(text.split()), 0, 1000)[0]


def test_a_plain_text_can_stand_without_its_opening():
    assert filters.without_opening(f"{TEA} So is rain. Yes.", TEA) == "So is rain. Yes."
    assert filters.without_opening("Tea in May is fine. So is rain.", "Tea in May is") == "So is rain."


def test_files_round_trip(tmp_path):
    document = Document("Tee, thé\n\tand\u2028tea", "tea", "essay", "plain", "chat")
    make_corpus.write_corpus([document], tmp_path / "c.xz")
    assert make_corpus.read_corpus(tmp_path / "c.xz") == [document]
    make_corpus.append_raw([sampled("a\u2028b")], tmp_path / "raw")
    make_corpus.append_raw([sampled("c", finished=False)], tmp_path / "raw")
    assert make_corpus.read_raw(tmp_path / "raw") == [sampled("a\u2028b"), sampled("c", finished=False)]


def test_committed_corpus_has_its_size(documents):
    assert 1_000_000 <= FILE.stat().st_size <= 3_000_000
    assert len(documents) == 5122


def test_committed_corpus_is_clean(documents):
    assert len({document.text for document in documents}) == len(documents)
    assert not [document for document in documents if filters.CONTROL.search(document.text)]
    assert not [
        document for document in documents if document.text != document.text.strip() or len(document.text) < 200
    ]
    assert all(document.register in prompts.REGISTERS and document.form in ("chat", "plain") for document in documents)
    assert all(all(document) for document in documents)


@pytest.mark.parametrize("part", [slice(None), slice(500)])
def test_committed_corpus_is_balanced(documents, part):
    part = documents[part]
    for field, most in (("genre", 0.08), ("register", 0.3), ("form", 0.6), ("subject", 0.04)):
        [(value, count)] = Counter(getattr(document, field) for document in part).most_common(1)
        assert count <= most * len(part), (field, value)
    assert {document.genre for document in part} == {genre.name for genre in prompts.GENRES}
    [(start, count)] = Counter(" ".join(document.text.split()[:3]) for document in part).most_common(1)
    assert count <= 0.02 * len(part), start
