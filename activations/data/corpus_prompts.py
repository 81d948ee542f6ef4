"""What the corpus script asks the model for: tables of subjects, registers and genres, and the jobs made of them.

Every job crosses one subject, genre and register. A `chat` job asks for the text; a `plain` job is an opening that the
model continues. Names, places and days fill the slots, so that openings differ.

    >>> compose(1, seed=0)[0].form in ("chat", "plain")
    True
"""

import random
from typing import Literal, NamedTuple

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


class Job(NamedTuple):
    """One text to sample."""

    subject: str
    genre: str
    register: str
    form: Form
    prompt: str
    """What is asked (chat) or the opening to continue (plain)."""


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
