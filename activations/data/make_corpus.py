"""Make saekit's embedded English text corpus by sampling a small instruction-tuned language model.

    compose ──jobs──▶ sample ──raw samples──▶ clean ──▶ filter ──▶ deduplicate ──▶ balance ──▶ corpus.jsonl.xz
    (subject x genre     (GPU)      (JSONL)
     x register x form)

1. Compose: every job crosses one subject, genre and register. A `chat` job asks for the text; a `plain` job is an
   opening that the model continues. Names, places and days fill the slots, so that openings differ.
2. Sample: large batches at one temperature inside a nucleus, each batch under one of a few length limits. Raw samples
   go to a file, so that cleaning can be repeated without a GPU.
3. Clean: drop preambles and closing pleasantries; cut before the first loop, leaked control token, placeholder, echo of
   the request or talk about being an assistant; cut the unfinished last sentence.
4. Filter: drop what still loops or leaks, what touches on slurs, sex or atrocities (a small model rambles there), what
   is not English, and what is too short or too long.
5. Deduplicate: drop a document that shares too many 8-word shingles with the ones kept before it.
6. Balance: in an order shuffled by the seed, keep a document while its opening words and its genre are not over-full.
   Any prefix of the file is therefore a varied sample.

Everything but the sampling itself is a pure function of the seed; sampling repeats on one device and software version.
It leaves out any check of facts: the texts read like English of many kinds, and that is all they are for.

    python -m activations.data.make_corpus --model DIR --raw raw.jsonl --out corpus.jsonl.xz --seed 0 --device cuda
"""

import argparse
import json
import lzma
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

Form = Literal["chat", "plain"]

# Subjects by field, separated by semicolons. Each is a noun phrase that fits the middle of a sentence.
FIELDS: dict[str, str] = {
    "home": (
        "doing the laundry; a leaking kitchen tap; moving to a new flat; a lost set of keys; a noisy neighbour; "
        "repairing a bicycle; a power cut in the evening; an old wardrobe; painting the bedroom; a garden shed"
    ),
    "family": (
        "raising twins; a grandmother's stories; the first day at school; two brothers who stopped talking; a "
        "wedding in the village; caring for an ageing parent; a birthday party; a family photograph; bedtime"
    ),
    "food": (
        "tomato soup; fresh bread; vegetable curry; apple pie; grilled fish; pancakes; lentil stew; mushroom "
        "risotto; ginger biscuits; roast chicken; rice pudding; pickled cucumbers; potato salad; banana bread; bean "
        "tacos"
    ),
    "nature": (
        "an oak forest; wild mushrooms; the desert after rain; a mountain stream; moss and lichen; honeybees; a "
        "peat bog; autumn leaves; the life of a river; orchids; a volcano; soil"
    ),
    "sea": (
        "a fishing boat; the harbour at low tide; coral reefs; a lighthouse; deep sea currents; a shipwreck; sea "
        "turtles; sailing alone; the ferry crossing; whales; a storm at sea"
    ),
    "animals": (
        "a stray cat; migrating geese; elephants; an old dog; bats; a spider's web; horses; the fox in the garden; "
        "penguins; a talking crow; beetles; octopuses; wolves"
    ),
    "weather": (
        "the first snow; a heat wave; morning fog; a thunderstorm; the monsoon; a long drought; hail; the north wind"
    ),
    "physics": (
        "gravity; magnets; the speed of light; heat and temperature; sound waves; radioactivity; lasers; friction; "
        "electric circuits; quantum theory"
    ),
    "astronomy": ("the moon; a comet; black holes; the planet Mars; a solar eclipse; distant galaxies; space stations"),
    "chemistry": "salt; rust; acids and bases; the periodic table; soap; plastics; batteries; carbon",
    "biology": (
        "photosynthesis; the human heart; genes; bacteria; evolution; sleep; the immune system; cells; yeast; memory"
    ),
    "medicine": (
        "a broken arm; vaccines; the night shift in a hospital; migraine; diabetes; a visit to the dentist; "
        "antibiotics; physiotherapy; allergies; the history of surgery"
    ),
    "history": (
        "the Roman roads; the printing press; the Silk Road; a medieval market; the age of steam; ancient Egypt; "
        "the plague years; the fall of an empire; the first railways; castles; the invention of paper"
    ),
    "law": (
        "a rental contract; a stolen painting; copyright; a witness in court; the duties of a tenant; privacy; an "
        "inheritance dispute; a traffic offence; workers' rights; a company's bylaws"
    ),
    "politics": (
        "a town council meeting; a close election; taxes; public libraries; a new bridge; the housing shortage; "
        "voting; a border dispute; city planning"
    ),
    "money": (
        "saving for retirement; a bank loan; inflation; the stock market; a lottery ticket; a small bakery's "
        "accounts; insurance; student debt; bargaining; a family budget"
    ),
    "belief": (
        "a monastery garden; forgiveness; a pilgrimage; prayer; the meaning of luck; free will; fasting; an old "
        "temple; what makes a good life; charity; truth and lies; the idea of time"
    ),
    "feelings": (
        "loneliness; jealousy; pride; grief; a first love; shyness; gratitude; homesickness; anger; hope; boredom; "
        "courage; regret"
    ),
    "work": (
        "a job interview; the last day at the office; a factory strike; working from home; a difficult customer; "
        "the apprentice; a long meeting; a team that disagrees; starting a business; a missed deadline"
    ),
    "sport": (
        "a football match; marathon training; a chess tournament; swimming lessons; a tennis final; mountain "
        "climbing; a lost goalkeeper; cycling uphill; rowing; a rugby injury; table tennis; a young gymnast"
    ),
    "music": (
        "a jazz trio; learning the violin; a street drummer; the church organ; an opera singer; folk songs; a "
        "broken guitar string; choir practice; the history of the piano; silence"
    ),
    "arts": (
        "a portrait painter; a photograph of rain; pottery; a theatre rehearsal; modern architecture; old films; "
        "knitting; calligraphy; a novel about winter; a sculpture of ice; dance"
    ),
    "travel": (
        "a night train; a week in the mountains; getting lost in a foreign city; a missed flight; a desert road; a "
        "small island; the airport; camping in the rain; a border crossing; an old map; a hostel kitchen"
    ),
    "technology": (
        "electric cars; a broken laptop; satellites; robots in factories; passwords; search engines; solar panels; "
        "video calls; an old radio; machine learning; 3D printing; wind turbines; online shopping"
    ),
    "learning": (
        "a strict teacher; learning a new language; handwriting; an exam; a reading club; the alphabet; "
        "dictionaries; homework; a school trip; public speaking; dyslexia; a library card"
    ),
    "trouble": (
        "a burglary; a false alarm; a car accident; a forged letter; a missing child; a secret; a broken promise; "
        "the wrong suitcase; a quarrel over a fence; a house fire"
    ),
    "farming": (
        "a wheat harvest; keeping goats; an apple orchard; vegetable beds; a dry well; cheese making; greenhouses; tea"
    ),
    "code": (
        "reading a CSV file; binary search; counting words in a text; a bank account class; a to-do list; a linked "
        "list; sorting numbers; parsing dates; a temperature converter; a stack and a queue; caching results; a "
        "text adventure; matrix multiplication; validating e-mail addresses; a simple web server; drawing a "
        "triangle; finding prime numbers; merging dictionaries; logging errors; a shopping cart; removing "
        "duplicates; a password checker; a number guessing game"
    ),
    "software": (
        "a command line tool; a backup service; a chat server; a database index; a payment interface; unit tests; a "
        "thermostat controller; version control; a file format; a mobile app; a message queue; user accounts; a web "
        "form"
    ),
    "maths": (
        "fractions; prime numbers; the area of a circle; probability; linear equations; percentages; compound "
        "interest; right triangles; averages; speed and distance; infinity; sequences; graphs; negative numbers; "
        "angles; sets"
    ),
}
TOPICS = tuple(field for field in FIELDS if field not in ("code", "food", "maths"))

# register -> how to ask for it in a chat; second sentences that set it in a plain text.
REGISTERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain": (("", "Use simple, clear words.", "Write it in a neutral tone."), ()),
    "formal": (
        ("Use formal, elevated language.", "The tone must be official and polite.", "Write it for a ministry."),
        ("It should be noted that", "The undersigned wishes to state that", "In accordance with custom,", "Pursuant to",
         "With due respect,", "Permit me to observe that", "The committee has resolved that", "We hereby confirm that",
         "It is incumbent upon us to", "Notwithstanding the above,", "One must acknowledge that",
         "I have the honour to"),
    ),
    "chatty": (
        ("Make it chatty and relaxed, like talking to a friend.", "Use casual slang.", "Keep it breezy and informal."),
        ("Honestly, you won't believe it, but", "So, anyway,", "Okay, here's the thing:", "Yeah, I know, right?",
         "Look,",
         "I mean, come on.", "Guess what?", "No kidding.", "Well, you know me,", "Long story short,",
         "Oh, and get this:",
         "Not gonna lie,"),
    ),
    "joyful": (
        ("Make it joyful and full of delight.", "It should sound happy and warm.", "Let it sparkle with good cheer."),
        ("Everyone was laughing.", "What a wonderful surprise!", "It was delightful, and", "I could not stop smiling.",
         "The sun was out.", "Hurrah!", "My heart was dancing.", "We cheered and", "At last, good news!",
         "How lovely it is",
         "{other} sang all the way home.", "Never had there been such a bright"),
    ),
    "gloomy": (
        ("Make it gloomy and sad.", "It should feel bleak and hopeless.", "Give it a heavy, mournful mood."),
        ("Nothing felt right any more.", "It was a bleak sight, and", "Sadly,", "The silence was heavy, and",
         "No one came.",
         "{other} wept.", "Everything was grey.", "All that was left was", "It was already too late.",
         "I am so tired of",
         "There was little hope.", "The funeral was on {day}."),
    ),
    "angry": (
        ("Make it angry and indignant.", "It should sound furious.", "Let the writer lose patience."),
        ("This is an outrage!", "How dare they?", "Enough is enough:", "It made me furious that", "Shame on {other}!",
         "I have had it with", "{other} slammed the door.", "Not one more excuse.", "Who is to blame?",
         "It is a disgrace that",
         "We were lied to.", "Stop pretending that"),
    ),
    "humorous": (
        ("Make it funny and absurd.", "Use dry humour.", "Tell it like a joke that goes too far."),
        ("Nobody had told {other}.", "That was the first mistake.", "It went as well as you would expect.",
         "Naturally,",
         "{other} blamed the cat.", "The instructions were upside down.", "Unfortunately, there was also a parrot.",
         "I wore the wrong shoes.", "The pigeons had other plans.", "As my uncle likes to say,",
         "Luckily, I am an idiot.",
         "There was soup on the ceiling."),
    ),
    "suspenseful": (
        ("Make it tense and mysterious.", "Keep the reader in suspense.", "Let something be hidden until the end."),
        ("Then the lights went out.", "Somebody was watching.", "There was a knock.", "Something was not right:",
         "{other} did not answer.", "The door was already open.", "It was the third time this week.", "A shadow moved.",
         "Only one person knew.", "The phone rang once.", "No one had seen {other} since {day}.",
         "The envelope was empty."),
    ),
    "technical": (
        ("Be technical and precise.", "Use exact terms and numbers.", "Write for specialists."),
        ("More precisely,", "The main parameters are", "In technical terms,", "The measured values show that",
         "Formally,",
         "Let us define", "The underlying mechanism is", "Under standard conditions,", "A typical specification lists",
         "The data suggest that", "Quantitatively,", "Three components are involved:"),
    ),
    "childlike": (
        ("Write it for a child of seven.", "Use very short sentences for small children."),
        ("Do you know why?", "It was very, very big!", "Mum says that", "Let's find out!", "Can you guess?", "Yum!",
         "Oh no!",
         "My teddy wants to know.", "First comes the fun part.", "Grandpa showed me how.", "Wow!",
         "{other} has a red hat."),
    ),
}  # fmt: skip
EVERY = tuple(REGISTERS)
FACTUAL = ("plain", "formal", "technical", "chatty", "childlike", "plain")
STORY = ("plain", "joyful", "gloomy", "angry", "humorous", "suspenseful", "chatty", "childlike")


class Genre(NamedTuple):
    """One kind of text: how to ask for it, how it may open, and which registers and fields suit it."""

    name: str
    registers: tuple[str, ...]
    asks: tuple[str, ...]
    openings: tuple[str, ...]
    fields: tuple[str, ...] = TOPICS
    by_line: bool = False
    """A line is a unit of such a text, so that it may be cut at the end of one."""


GENRES: tuple[Genre, ...] = (
    Genre("encyclopedia entry", FACTUAL, (
        "Write an encyclopedia entry about {subject}.", "Give a reference article of three paragraphs on {subject}."),
        ("The subject of {subject} has been studied since {year}, when", "{Subject}: an overview.",
         "Scholars distinguish several aspects of {subject}. The first", "In {place}, {subject} has a long history.")),
    Genre("news report", EVERY, (
        "Write a short news report from {place} that has to do with {subject}.",
        "You are a reporter in {place}. Report what happened on {day}. It concerns {subject}."),
        ("{PLACE}, {day} - Residents of {place} were talking about {subject} this week.",
         "Officials in {place} announced on {day} that {subject}",
         "A dispute about {subject} divided {place} on {day}.",
         "A report published in {month} {year} looks again at {subject}.")),
    Genre("short story", STORY, (
        "Write the opening of a short story about {subject}. The main character is {name}, who lives in {place}.",
        "Tell a story about {name} and {other}. It should involve {subject}. Begin in the middle of the action."),
        ("{name} had never thought much about {subject} until the {month} when {other} came to {place}.",
         "\"It has to do with {subject},\" said {name}, and {other}",
         "By {day} evening all of {place} had heard of it.",
         "{other} was waiting at the station in {place} with one question about {subject}.")),
    Genre("dialogue", STORY, (
        "Write a conversation between {name} and {other} about {subject}.",
        "Write a scene from a play set in {place}. {name} and {other} argue about {subject}."),
        ("{name}: Can we talk about {subject}?\n{other}:", "\"Tell me about {subject},\" {name} said.\n\n\"",
         "{other}: I never understood {subject}.\n{name}: Then listen.", "{name} put down the phone. \"{other}!\""),
        by_line=True),
    Genre("letter", EVERY, (
        "Write a letter from {name} in {place} to {other} about {subject}.",
        "{name} writes to {other} after many years, and mentions {subject}. Write the letter."),
        ("Dear {other},\n\nI am writing from {place} because of {subject}.",
         "{place}, {month} {year}\n\nMy dear {other},\n\nYou asked me about {subject}.",
         "To the editor:\n\nYour article about {subject} appeared on {day}.")),
    Genre("recipe", ("plain", "chatty", "technical", "joyful"), (
        "Write a recipe for {subject} with ingredients and steps.",
        "How does {name} from {place} make {subject}? Explain."),
        ("{Subject} the way {name} makes it\n\nIngredients:\n", "In {place} we eat {subject} on {day}s. You will need",
         "My aunt {name} taught me to make {subject}."), ("food",), by_line=True),
    Genre("how-to", FACTUAL, (
        "Explain step by step how a beginner should deal with {subject}.", "Give practical advice about {subject}."),
        ("Before you start with {subject}, make sure that", "A beginner's guide to {subject}\n\n1.",
         "There are a few things to know about {subject}.", "{name} has given advice about {subject} for years."),
        by_line=True),
    Genre("review", EVERY, (
        "Write a review of a book about {subject} by {name}.", "Review a film from {year} about {subject}.",
        "Write a customer's review of a museum in {place} devoted to {subject}."),
        ("I bought the book by {name} about {subject} on {day}.", "The new exhibition on {subject} in {place} is",
         "{name}'s film about {subject} came out in {year}.", "Two stars out of five for this course on {subject}.")),
    Genre("diary entry", STORY, (
        "Write the diary entry of {name} in {place} on a {day} in {month}. It mentions {subject}.",
        "Write a page from a private journal about {subject}."),
        ("{day}, {month} {year}. All day I thought about {subject}.",
         "{month} 14th. {name} came by and talked of {subject}.",
         "Could not sleep. {Subject} again.", "Rain in {place} since {day}. I keep a note here about {subject}.")),
    Genre("poem", STORY, (
        "Write a poem about {subject}.", "Write a poem of four verses about {subject} without rhyme, set in {place}.",
        "Write a ballad about {name} and {subject}."),
        ("O {place} in {month},\n", "{Subject},\nand then the evening,\n", "I asked {name} about {subject},\nand",
         "This is a song of {subject},\n", "When {month} comes to {place},\n"), by_line=True),
    Genre("technical documentation", ("plain", "technical", "formal"), (
        "Write technical documentation for {subject}: overview, settings and limits.",
        "Write a section of a manual that explains how to configure {subject}."),
        ("## Overview\n\nThis document describes {subject}.", "Version {year}.1 changes how {subject}",
         "Troubleshooting {subject}\n\nSymptom:", "The default settings of {subject} are"), ("software",
         "technology")),
    Genre("Python code", ("plain", "technical", "childlike"), (
        "Write a Python program for {subject}, with comments that explain each step.",
        "Show Python code for {subject}, and explain it.", "Write a documented Python module for {subject}."),
        ('"""A small module for {subject}.\n\nWritten by {name}.\n"""\n\nimport', "# {Subject}, step by step.\n\ndef",
         "In this tutorial we write a Python program for {subject}. First"), ("code",), by_line=True),
    Genre("question and answer", FACTUAL, (
        "What should everybody know about {subject}?", "Why do people care about {subject}? Answer in two paragraphs.",
        "Write three questions about {subject}, each with its answer."),
        ("Q: What is so special about {subject}?\nA:", "Question from {name}, {place}: How does {subject}",
         "People often ask about {subject}."), (*TOPICS, "food")),
    Genre("worked problem", ("plain", "technical", "childlike"), (
        "Explain {subject} with a worked example.", "Make up an exercise about {subject} for a class, and solve it."),
        ("Exercise. {name} buys {n} apples in {place}. Solution:", "Today's lesson is about {subject}. Let",
         "{name} explains {subject} to {other}.", "To understand {subject}, consider the number {n}."), ("maths",)),
    Genre("list", FACTUAL, (
        "List ten surprising things about {subject}, with a sentence for each.", "Write a checklist about {subject}."),
        ("Seven things that {name} learned from {subject}:\n\n1.", "What to pack for {place}:\n\n-",
         "Pros and cons of {subject}\n\nPros:\n-"), (*TOPICS, "food"), by_line=True),
    Genre("speech", EVERY, (
        "Write a speech by {name}, mayor of {place}, about {subject}.", "Write a toast that mentions {subject}."),
        ("Ladies and gentlemen of {place}, I will speak about {subject}.",
         "Friends, {day} is a special day. {other} and",
         "Colleagues, we are here because of {subject}.")),
    Genre("legal clause", ("formal", "technical", "plain"), (
        "Draft a contract clause concerning {subject}.",
        "Summarise an imagined court ruling from {place} on {subject}."),
        ("Section {n}. {Subject}.\n\n(1) For the purposes of this section,",
         "The court in {place} held in {year} that",
         "WHEREAS {name} (the \"Owner\") and {other} (the \"Guest\")", "Article {n}\n\nAny person who"),
        ("law", "politics", "money", "work", "technology", "home", "software")),
    Genre("essay", EVERY, (
        "Write an essay about {subject}.", "Argue against a common opinion on {subject}."),
        ("There are two ways to look at {subject}.", "Few things are as misunderstood as {subject}.",
         "When {name} wrote about {subject} in {year},", "I used to have no opinion about {subject}."),
        (*TOPICS, "maths")),
    Genre("e-mail", EVERY, (
        "Write an e-mail from {name} to {other} about {subject}.",
        "Write a complaint to a company in {place} about {subject}."),
        ("Hi {other},\n\nquick question about {subject}.", "Subject: {subject}\n\nDear {other},\n\nOn {day}",
         "From: {name}\nTo: {other}\nSubject: {subject}\n\n")),
    Genre("lecture", ("plain", "technical", "formal", "humorous", "chatty", "joyful"), (
        "Give the beginning of a lecture on {subject} for first-year students.",
        "Explain {subject} as a professor would, with one everyday comparison."),
        ("Last week we spoke about {place}; today we turn to {subject}.", "If you remember one thing about {subject},",
         "Chapter {n}. {Subject}\n\nIn the previous chapter"), (*TOPICS, "maths", "code")),
    Genre("interview", EVERY, (
        "Write an interview with {name}, an expert on {subject}.",
        "{name} from {place} is interviewed about {subject}. Write it."),
        ("Interviewer: {name}, how did you come to {subject}?\n{name}:", "We met {name} in {place} on a {day}.",
         "\"I owe everything to {subject},\" {name} told us.",
         "Q: You wrote about {subject} in {year}. Why?\n{name}:"),
        by_line=True),
    Genre("advertisement", ("plain", "joyful", "chatty", "humorous", "formal"), (
        "Write an advertisement that uses {subject} to sell something.",
        "Write a flyer for an event in {place} about {subject}."),
        ("New in {place}: everything for {subject}!", "Tired of {subject}? Now", "This {day} only:")),
    Genre("fable", STORY, (
        "Tell a fable with two animals that teaches something about {subject}.",
        "Tell a legend from {place} about {subject}."),
        ("The old people of {place} tell it like this.", "A heron and a mole once quarrelled about {subject}.",
         "Before there was {subject}, there was", "A king in {place} had {n} daughters.")),
    Genre("abstract", ("technical", "formal", "plain"), (
        "Write the abstract of a scientific paper about {subject}.",
        "Summarise an imagined study from {year} on {subject}."),
        ("Abstract. We study {subject} in a sample of {n}00 people from {place}.", "Background: The role of {subject}",
         "In this paper we ask how {subject}", "We present new data on {subject} from {place} ({year}).")),
    Genre("forum post", EVERY, (
        "Write a forum post by someone who needs help with {subject}.", "Write a comment thread about {subject}."),
        ("Posted by {name}_{n}: does anyone here know about {subject}?", "Long time reader, first post. {Subject}",
         "Re: {subject}\n\n@{other} I disagree."), (*TOPICS, "code", "food")),
    Genre("biography", ("plain", "formal", "gloomy", "joyful", "technical"), (
        "Write a short biography of the invented person {name}, known for {subject}.",
        "Write about the childhood of {name} in {place}, and how it led to {subject}."),
        ("{name} was born in {place} in {year}.", "{name} is best remembered for {subject}.",
         "As a child in {place}, {name}", "In {year}, {name} left {place} because of {subject}.")),
    Genre("travel guide", ("plain", "joyful", "chatty", "humorous", "gloomy"), (
        "Describe {place} for visitors who like {subject}.",
        "Write a travel report from {place} that mentions {subject}."),
        ("{place} in {month} is", "We reached {place} on {day}.", "Visitors to {place} should not miss",
         "From {place} the road")),
    Genre("commentary", ("joyful", "angry", "suspenseful", "chatty", "humorous", "formal"), (
        "Write a live radio commentary in which {name} and {other} take part. Theme: {subject}.",
        "Write an excited commentary about {subject} in {place}."),
        ("And here we are live in {place}!", "{name} against {other}, and the crowd in {place} is on its feet!",
         "Good evening, listeners. Our theme is {subject}.")),
    Genre("sermon", ("plain", "formal", "joyful", "gloomy", "angry"), (
        "Write a short sermon or meditation about {subject}.", "Write words of comfort that mention {subject}."),
        ("My friends, consider {subject}.", "Breathe in slowly. Think of {subject}.",
         "The teacher {name} was asked about {subject}.")),
)  # fmt: skip

SLOTS: dict[str, tuple[str, ...]] = {
    "name": (
        "Amara", "Bruno", "Chloe", "Daniel", "Esther", "Farid", "Greta", "Hassan", "Ines", "Jonas", "Keiko",
        "Leon", "Marta", "Nikhil", "Olga", "Pedro", "Ruth", "Samir", "Tessa", "Umar", "Vera", "Walter", "Yusuf",
        "Zoe", "Agnes", "Boris", "Carmen", "Dmitri", "Fiona", "Gustav",
    ),
    "other": (
        "Alba", "Ben", "Cyrus", "Dora", "Emil", "Freya", "Gabriel", "Hana", "Igor", "Julia", "Kofi", "Lucia",
        "Mateo", "Nadia", "Oscar", "Priya", "Rosa", "Stefan", "Tomas", "Ursula", "Viktor", "Wanda", "Xavier",
        "Yara", "Abel", "Bella", "Conrad", "Delia", "Ewan", "Flora",
    ),
    "place": (
        "Lisbon", "Nairobi", "Bergen", "Kyoto", "Chicago", "Lima", "Glasgow", "Hanoi", "Cairo", "Vienna",
        "Montreal", "Tbilisi", "Perth", "Naples", "Dublin", "Havana", "Krakow", "Mumbai", "Boston", "Seville",
        "Accra", "Riga",
    ),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "month": ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November"),
    "year": tuple(str(year) for year in range(1893, 2021, 7)),
    "n": tuple(str(n) for n in range(3, 30)),
}  # fmt: skip

SYSTEM = "You are a writer with many voices. Reply with the requested text only."
LIMITS = (512, 384, 288, 192)
"""Most new tokens of a sample, batch by batch, so that documents differ in length."""
TOKENS = range(120, 501)
"""Lengths kept, in tokens of the sampled model."""


class Job(NamedTuple):
    """One text to sample."""

    subject: str
    genre: str
    register: str
    form: Form
    prompt: str
    """What is asked (chat) or the opening to continue (plain)."""


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


def log(message: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(message + "\n")


# ---------------------------------------------------------------------------------------------------------- compose


def compose(n: int, seed: int) -> list[Job]:
    """Return n jobs: genres in turn, half of them chats, everything else drawn at random from the seed."""
    rng = random.Random(seed)
    genres = [GENRES[i % len(GENRES)] for i in range(n)]
    rng.shuffle(genres)
    return [_compose_one(genre, rng) for genre in genres]


def _compose_one(genre: Genre, rng: random.Random) -> Job:
    subject = rng.choice(FIELDS[rng.choice(genre.fields)].split(";")).strip()
    register = rng.choice(genre.registers)
    form: Form = rng.choice(("chat", "plain"))
    asks, cues = REGISTERS[register]
    if form == "chat":
        parts = [rng.choice(genre.asks), rng.choice(asks)]
    elif register == "plain":
        parts = [rng.choice(genre.openings)]
    else:  # A second sentence can only follow a finished first one.
        finished = [opening for opening in genre.openings if opening[-1] in ".!?" and opening[-2:] != "1."]
        parts = [rng.choice(finished), rng.choice(cues)] if finished else [rng.choice(genre.openings)]
        register = register if finished else "plain"
    return Job(subject, genre.name, register, form, _fill(" ".join(filter(None, parts)), subject, rng))


def _fill(template: str, subject: str, rng: random.Random) -> str:
    values = {slot: rng.choice(choices) for slot, choices in SLOTS.items()}
    return template.format(
        subject=subject, Subject=subject[0].upper() + subject[1:], PLACE=values["place"].upper(), **values
    )


# ----------------------------------------------------------------------------------------------------------- sample


def sample(jobs: list[Job], args: argparse.Namespace, done: int = 0) -> Iterator[Sample]:
    """Yield a sample per job but the first `done`, batch by batch; a batch depends on the seed and its place only."""
    import torch

    model, tokenizer = load_model(args.model, args.device), load_tokenizer(args.model)
    begin = time.monotonic()
    total = 0
    for start in range(done, len(jobs), args.batch_size):
        index = start // args.batch_size
        batch = jobs[start : start + args.batch_size]
        torch.manual_seed(args.seed * 1000 + index)
        texts, n_tokens = _generate(model, tokenizer, batch, min(LIMITS[index % len(LIMITS)], args.max_new), args)
        total += n_tokens
        seconds = time.monotonic() - begin
        log(f"batch {index}: {start + len(batch)}/{len(jobs)} samples, {total} tokens, {total / seconds:.0f} tok/s")
        yield from (Sample(job, text, finished) for job, (text, finished) in zip(batch, texts, strict=True))


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer from a folder with a GGUF file or a Hugging Face checkpoint; it pads on the left."""
    from transformers import AutoTokenizer

    gguf = next((path.name for path in folder.glob("*.gguf")), None)
    return AutoTokenizer.from_pretrained(folder, gguf_file=gguf, padding_side="left", pad_token="<|im_end|>")


def load_model(folder: Path, device: str) -> Any:
    """Load the model, in bfloat16 on a GPU and float32 elsewhere."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    gguf = next((path.name for path in folder.glob("*.gguf")), None)
    options: dict[str, Any] = {"dtype": torch.bfloat16 if device.startswith("cuda") else torch.float32}
    if gguf:
        options |= {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.to(device).eval()


def _generate(
    model: Any, tokenizer: Any, jobs: list[Job], limit: int, args: argparse.Namespace
) -> tuple[list[tuple[str, bool]], int]:
    """Return (text, whether the model ended it) per job, and the number of tokens sampled."""
    import torch

    prompts = [_render(job, tokenizer) for job in jobs]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    with torch.inference_mode():
        ids = model.generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=limit,
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            eos_token_id=ends, pad_token_id=ends[-1], logits_processor=[_nucleus(args.temperature, args.top_p)],
        )  # fmt: skip
    rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
    results: list[tuple[str, bool]] = []
    total = 0
    for row in rows:
        length = next((i for i, token in enumerate(row) if token in ends), len(row))
        total += length
        results.append((tokenizer.decode(row[:length]), length < len(row)))
    return results, total


def _render(job: Job, tokenizer: Any) -> str:
    if job.form == "plain":
        return job.prompt
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": job.prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _nucleus(temperature: float, top_p: float, top_k: int = 200) -> Callable[..., "torch.Tensor"]:
    """Return a logits processor: the smallest set of likely tokens whose mass reaches top_p, of at most top_k tokens.

    Sorting only the top_k makes it several times faster than a full sort of the vocabulary; what it cuts is below 1%.
    """
    import torch

    def process(input_ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        top, indices = (scores / temperature).topk(top_k, dim=-1)
        mass = top.softmax(-1).cumsum(-1) - top.softmax(-1)
        return torch.full_like(scores, -torch.inf).scatter(-1, indices, top.masked_fill(mass > top_p, -torch.inf))

    return process


def append_raw(samples: Iterable[Sample], path: Path) -> None:
    """Append samples as JSON lines, flushed one by one so that an interrupted run can be continued."""
    with path.open("a", encoding="utf-8") as file:
        for item in samples:
            file.write(json.dumps({**item.job._asdict(), "text": item.text, "finished": item.finished}) + "\n")
            file.flush()


def read_raw(path: Path) -> list[Sample]:
    """Read what append_raw wrote."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Sample(Job(*(row[key] for key in Job._fields)), row["text"], row["finished"]) for row in rows]


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


def write_corpus(documents: Iterable[Document], path: Path) -> None:
    """Write documents as xz-compressed JSON lines."""
    lines = (json.dumps(document._asdict(), ensure_ascii=False) + "\n" for document in documents)
    path.write_bytes(lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))


def read_corpus(path: Path) -> list[Document]:
    """Read what write_corpus wrote."""
    return [Document(**json.loads(line)) for line in lzma.decompress(path.read_bytes()).splitlines()]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Sample, clean and pack the embedded corpus.")
    parser.add_argument(
        "--model", type=Path, required=True, help="folder with a GGUF file or a Hugging Face checkpoint"
    )
    parser.add_argument("--out", type=Path, help="the .jsonl.xz to write; without it, only sample")
    parser.add_argument("--raw", type=Path, required=True, help="raw samples: kept here, and continued from here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=12288, help="texts to sample before filtering")
    parser.add_argument("--first", type=int, help="sample only the first so many of them")
    parser.add_argument("--batch-size", type=int, default=1024, help="texts sampled at once")
    parser.add_argument("--max-new", type=int, default=LIMITS[0], help="lower it for a quick try [tokens]")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--max-tokens", type=int, default=2_100_000, help="size of the corpus at most [tokens]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run all steps."""
    args = parse_args(argv)
    jobs = compose(args.samples, args.seed)[: args.first]
    args.raw.touch()
    done = len(read_raw(args.raw))
    if done < len(jobs):
        append_raw(sample(jobs, args, done), args.raw)
    samples = read_raw(args.raw)
    if args.out:
        tokenizer = load_tokenizer(args.model)
        documents, dropped = assemble(samples, lambda text: len(tokenizer.encode(text)), args.seed, args.max_tokens)
        write_corpus(documents, args.out)
        log("\n".join(f"{name}: {count}" for name, count in dropped.items()))


if __name__ == "__main__":
    main()
