"""Makes the small data sets beside this file, which the tiny presets train on: always the same ones.

    python configs/data/make.py [DIRECTORY]

They are about a little world of who does what where and when, in six languages. Most sets come with another one of
records that are not in it, to measure with: `pairs.jsonl` and `pairs.eval.jsonl`. `synthetic_f1` to `synthetic_f3` and
`oasst` are in the manner of the paper's four failure cases: misleading syntactic similarity, named entities, polar
questions and answers of low quality.
"""

import itertools
import json
import random
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Who, does what, where and when; in Chinese the verb comes last.
WORLD = {
    "en": (
        ("the cat", "the teacher", "the doctor", "the old man", "the girl", "the dog", "the baker", "the pilot"),
        ("sleeps", "sings", "reads", "waits", "eats", "dances", "works", "laughs"),
        ("in the kitchen", "in the garden", "on the bridge", "at the station", "in the museum", "at the harbour"),
        ("today", "every morning", "at night", "on Sunday"),
    ),
    "de": (
        (
            "die Katze",
            "die Lehrerin",
            "der Arzt",
            "der alte Mann",
            "das Mädchen",
            "der Hund",
            "der Bäcker",
            "der Pilot",
        ),
        ("schläft", "singt", "liest", "wartet", "isst", "tanzt", "arbeitet", "lacht"),
        ("in der Küche", "im Garten", "auf der Brücke", "am Bahnhof", "im Museum", "am Hafen"),
        ("heute", "jeden Morgen", "in der Nacht", "am Sonntag"),
    ),
    "es": (
        ("el gato", "la maestra", "el médico", "el anciano", "la niña", "el perro", "el panadero", "el piloto"),
        ("duerme", "canta", "lee", "espera", "come", "baila", "trabaja", "ríe"),
        ("en la cocina", "en el jardín", "en el puente", "en la estación", "en el museo", "en el puerto"),
        ("hoy", "cada mañana", "de noche", "el domingo"),
    ),
    "fr": (
        (
            "le chat",
            "la maîtresse",
            "le médecin",
            "le vieil homme",
            "la fille",
            "le chien",
            "le boulanger",
            "le pilote",
        ),
        ("dort", "chante", "lit", "attend", "mange", "danse", "travaille", "rit"),
        ("dans la cuisine", "dans le jardin", "sur le pont", "à la gare", "au musée", "au port"),
        ("aujourd'hui", "chaque matin", "la nuit", "le dimanche"),
    ),
    "ru": (
        ("кошка", "учительница", "врач", "старик", "девочка", "собака", "пекарь", "лётчик"),
        ("спит", "поёт", "читает", "ждёт", "ест", "танцует", "работает", "смеётся"),
        ("на кухне", "в саду", "на мосту", "на вокзале", "в музее", "в порту"),
        ("сегодня", "каждое утро", "ночью", "в воскресенье"),
    ),
    "zh": (
        ("猫", "老师", "医生", "老人", "女孩", "狗", "面包师", "飞行员"),
        ("睡觉", "唱歌", "看书", "等待", "吃饭", "跳舞", "工作", "大笑"),
        ("在厨房里", "在花园里", "在桥上", "在车站", "在博物馆里", "在港口"),
        ("今天", "每天早上", "晚上", "星期天"),
    ),
}
WHO_ASKS = {
    "en": "Who {does} {where} {when}?",
    "de": "Wer {does} {when} {where}?",
    "es": "¿Quién {does} {where} {when}?",
}
# The same in other words, in English.
WHO_ELSE = dict(
    zip(
        WORLD["en"][0],
        (
            *("the kitten", "the tutor", "the physician", "the grandfather"),
            *("the young lady", "the puppy", "the bread maker", "the airman"),
        ),
        strict=True,
    )
)
DOES_ELSE = dict(
    zip(
        WORLD["en"][1],
        (
            *("takes a nap", "hums a song", "studies a book", "stays patiently"),
            *("has a meal", "moves to music", "does a job", "giggles"),
        ),
        strict=True,
    )
)
WHERE_ELSE = dict(
    zip(
        WORLD["en"][2],
        (
            *("next to the stove", "among the flowers", "high above the river"),
            *("beside the trains", "between old paintings", "near the ships"),
        ),
        strict=True,
    )
)
BASE = dict(zip(WORLD["en"][1], ("sleep", "sing", "read", "wait", "eat", "dance", "work", "laugh"), strict=True))
FIRST = ("Anna", "Bruno", "Clara", "David", "Elena", "Felix", "Greta", "Hugo")
LAST = ("Berg", "Castell", "Dorn", "Ekman", "Falk", "Grau", "Holm", "Ivens", "Jung", "Kern", "Lund")
FINDS = ("a silver key", "an old map", "a red umbrella", "two gold coins", "a broken watch", "a blue bottle")
POOR = (
    *("No idea.", "Just look it up.", "Why do you ask?", "As I said before.", "lol", "It is what it is."),
    *("Yes yes yes yes yes.", "See the link.", "Ask somebody else, please.", "I do not want to answer that."),
)
TOPICS = {
    "sport": ("the match", "a goal", "the referee", "the team", "the stadium", "a medal", "the coach", "the race"),
    "food": ("the soup", "fresh bread", "the recipe", "a spoon", "the oven", "sweet cake", "the salad", "hot tea"),
    "weather": ("the storm", "heavy rain", "the sun", "thick fog", "the wind", "deep snow", "the clouds", "the frost"),
    "music": ("the violin", "a melody", "the choir", "the drums", "the concert", "a song", "the organ", "the chord"),
    "travel": ("the ticket", "a suitcase", "the airport", "the hotel", "a passport", "the border", "the bus", "a tour"),
    "money": ("the bank", "a loan", "the price", "the bill", "the salary", "the tax", "a coin", "the budget"),
}
SAYINGS = ("Everybody talks about {0} and {1}.", "First came {0}, then {1}.", "{0}, {1}: that was the whole day.")

SLOTS = ("who", "does", "where", "when")
Fact = dict[str, str]
Records = Iterator[dict]


def facts(lang: str, rng: random.Random) -> Iterator[Fact]:
    """All that may be the case, in random order."""
    every = list(itertools.product(*WORLD[lang]))
    rng.shuffle(every)
    return (dict(zip(SLOTS, one, strict=True)) for one in every)


def say(lang: str, fact: Fact) -> str:
    """A fact as a sentence."""
    if lang == "zh":
        return "{when}{who}{where}{does}。".format(**fact)
    text = "{who} {does} {when} {where}." if lang == "de" else "{who} {does} {where} {when}."
    return capital(text.format(**fact))


def capital(text: str) -> str:
    """A text whose first letter is a capital."""
    return text[0].upper() + text[1:]


def otherwise(fact: Fact) -> Fact:
    """The same fact in other words."""
    changed = {"who": WHO_ELSE[fact["who"]], "does": DOES_ELSE[fact["does"]], "where": WHERE_ELSE[fact["where"]]}
    return fact | changed


def changed(fact: Fact, slots: Sequence[str], rng: random.Random) -> list[Fact]:
    """For each of some parts a fact in which it is another one; all of them differ."""
    names = {slot: list(column) for slot, column in zip(SLOTS, WORLD["en"], strict=True)}
    for slot in names:
        names[slot].remove(fact[slot])
        rng.shuffle(names[slot])
    return [fact | {slot: names[slot].pop()} for slot in slots]


# ---- The sets --------------------------------------------------------------------------------------------------


def texts(rng: random.Random) -> Records:
    """Some sentences in each language, in turn."""
    of = {lang: facts(lang, rng) for lang in WORLD}
    for lang in itertools.cycle(WORLD):
        yield {"text": ("" if lang == "zh" else " ").join(say(lang, next(of[lang])) for _ in range(3)), "lang": lang}


def pairs(rng: random.Random) -> Records:
    """Questions and answers in three languages, in turn."""
    of = {lang: facts(lang, rng) for lang in WHO_ASKS}
    for lang in itertools.cycle(WHO_ASKS):
        fact = next(of[lang])
        yield {"query": question(lang, fact), "pos": say(lang, fact), "lang": lang}


def question(lang: str, fact: Fact) -> str:
    """The question that a fact answers."""
    return WHO_ASKS[lang].format(**fact)


def translations(rng: random.Random) -> Records:
    """English sentences in German, Spanish, French or Russian."""
    every = list(itertools.product(*map(range, (8, 8, 6, 4))))
    rng.shuffle(every)
    for places, lang in zip(every, itertools.cycle(("de", "es", "fr", "ru")), strict=False):
        two = []
        for one in ("en", lang):
            words = (column[place] for column, place in zip(WORLD[one], places, strict=True))
            two.append(say(one, dict(zip(SLOTS, words, strict=True))))
        yield {"query": two[0], "pos": two[1]}


def search(rng: random.Random) -> Records:
    """Questions, with answers to others as hard negatives."""
    for fact in facts("en", rng):
        slots = ("does", "where", "when", "does", "where", "when", "does")
        negatives = [say("en", other) for other in changed(fact, slots, rng)]
        yield {"query": question("en", fact), "pos": say("en", fact), "neg": negatives}


def synthetic_f1(rng: random.Random) -> Records:
    """The answer has other words; what has the same words means something else."""
    for fact in facts("en", rng):
        same = otherwise(fact)
        slots = ("who", "does", "where", "who", "does", "where", "who")
        yield {
            "query": "{who} {does} {where}".format(**fact),
            "pos": capital("{where}, {who} {does}.".format(**same)),
            "neg": [capital("{who} {does} {where}.".format(**other)) for other in changed(fact, slots, rng)],
        }


def synthetic_f2(rng: random.Random) -> Records:
    """The right person among others of the same first or last name."""
    every = list(itertools.product(FIRST, LAST))
    rng.shuffle(every)
    for first, last in every:
        others = rng.sample([name for name in FIRST if name != first], 4)
        names = [f"{other} {last}" for other in others]
        names += [f"{first} {other}" for other in rng.sample([name for name in LAST if name != last], 3)]
        wrong = [f"{name} found {rng.choice(FINDS)} {rng.choice(WORLD['en'][2])}." for name in names]
        right = f"{first} {last} found {rng.choice(FINDS)} {rng.choice(WORLD['en'][2])}."
        yield {"query": f"What did {first} {last} find?", "pos": right, "neg": wrong}


def synthetic_f3(rng: random.Random) -> Records:
    """Questions to be answered by yes, whose words an answer to another question has, too."""
    for fact in facts("en", rng):
        wrong = changed(fact, ("who", "does", "where", "who", "does", "where", "who"), rng)
        yield {
            "query": f"Does {fact['who']} {BASE[fact['does']]} {fact['where']}?",
            "pos": "Yes, {who} {does} {where} {when}.".format(**fact),
            "neg": [rng.choice(("Yes", "No")) + ", {who} {does} {where} {when}.".format(**other) for other in wrong],
        }


def oasst(rng: random.Random) -> Records:
    """A good answer, four poor ones, and three good ones to other questions."""
    every = list(facts("en", rng))
    for fact in every:
        names = rng.sample([name for name in WORLD["en"][0] if name != fact["who"]], 3)
        others = [rng.choice([other for other in every if other["who"] == name]) for name in names]
        yield {
            "query": f"Tell me why {fact['who']} {fact['does']} {fact['where']}.",
            "pos": reason(fact, rng),
            "neg": rng.sample(POOR, 4) + [reason(other, rng) for other in others],
        }


def reason(fact: Fact, rng: random.Random) -> str:
    """A good answer."""
    because = rng.choice(("it is quiet there", "there is a lot of room", "friends are there", "it is warm there"))
    return f"{capital(fact['who'])} likes to {BASE[fact['does']]} {fact['where']} because {because}."


def nli(rng: random.Random) -> Records:
    """Premises, with what follows and what contradicts."""
    for fact in facts("en", rng):
        no = f"{capital(fact['who'])} does not {BASE[fact['does']]} {fact['where']}."
        yield {"query": say("en", fact), "pos": capital("{who} {does}.".format(**otherwise(fact))), "neg": [no]}


def scored(rng: random.Random) -> Records:
    """Sentences, half of them in other words, that agree in none to all of three parts."""
    for fact in facts("en", rng):
        other, differ = fact, rng.sample(("who", "does", "where"), rng.randrange(4))
        for slot in differ:
            (other,) = changed(other, (slot,), rng)
        other = otherwise(other) if not differ or rng.random() < 0.5 else other
        a, b = (capital("{who} {does} {where}.".format(**one)) for one in (fact, other))
        yield {"a": a, "b": b, "score": round(5 * (3 - len(differ)) / 3, 2)}


def labelled(rng: random.Random) -> Records:
    """Sentences about six topics, in turn."""
    of = {topic: list(itertools.product(itertools.permutations(words, 2), SAYINGS)) for topic, words in TOPICS.items()}
    for every in of.values():
        rng.shuffle(every)
    for number in itertools.count():
        topic = list(TOPICS)[number % len(TOPICS)]
        words, saying = of[topic][number // len(TOPICS)]
        yield {"text": capital(saying.format(*words)), "label": topic}


# Name, maker, how many records to train on and how many to measure with.
SETS: tuple[tuple[Callable[[random.Random], Records], int, int], ...] = (
    (texts, 288, 36),
    (pairs, 288, 60),
    (translations, 96, 32),
    (search, 96, 32),
    (synthetic_f1, 64, 24),
    (synthetic_f2, 64, 24),
    (synthetic_f3, 64, 24),
    (oasst, 64, 24),
    (nli, 96, 0),
    (scored, 192, 64),
    (labelled, 180, 60),
)


def distinct(records: Records) -> Records:
    """Those with a text or query, or two sentences, that none before them has."""
    seen = set()
    for record in records:
        key = record.get("query") or record.get("text") or (record["a"], record["b"])
        if key not in seen:
            seen.add(key)
            yield record


def make(directory: Path) -> list[Path]:
    """Write all sets.

    Args:
        directory: Where to.

    Returns:
        The files.
    """
    jargon = runpy.run_path(str(Path(__file__).with_name("jargon.py")))
    wanted: list[tuple[str, Sequence[dict]]] = []
    for maker, count, held_out in SETS:
        records = list(itertools.islice(distinct(maker(random.Random(maker.__name__))), count + held_out))
        wanted += [(maker.__name__, records[:count]), (f"{maker.__name__}.eval", records[count:])]
    records = jargon["pairs"](650)
    wanted += [("jargon", records[:500]), ("jargon.eval", records[500:])]
    return [jargon["write"](directory / f"{name}.jsonl", made) for name, made in wanted if made]


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent
    for path in make(target):
        print(f"{path.stat().st_size:7,} {path.name}", json.loads(path.read_text(encoding="utf-8").splitlines()[0]))
