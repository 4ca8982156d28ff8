"""WordNet: its synsets, and what they teach about words: definitions, kinds, and how alike two of them are."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.mini.corpus.fetch import members
from configs.mini.corpus.splits import held_out, number

KINDS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
UP = ("@", "@i")  # hypernyms
Record = dict[str, object]


@dataclass(frozen=True)
class Synset:
    """One meaning.

    Attributes:
        id: Its part of speech and number.
        kind: The number of its lexicographer file, which tells what kind of thing it is: 05 are animals.
        words: The words that have it.
        gloss: Its definition.
        links: Related meanings: a pointer symbol and an id.
        examples: Phrases in which its words are used.
    """

    id: str
    kind: str
    words: tuple[str, ...]
    gloss: str
    links: tuple[tuple[str, str], ...]
    examples: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its words, as a query would have them."""
        return ", ".join(self.words[:3])

    @property
    def tested(self) -> bool:
        """Whether it is held out."""
        return held_out("wordnet", self.id)


@dataclass(frozen=True)
class WordNet:
    """All meanings by id, and the ids of each common word's first meaning by part of speech and word."""

    synsets: dict[str, Synset]
    first: dict[tuple[str, str], str]


def read(path: Path) -> WordNet:
    """Reads the Debian package wordnet-base."""
    synsets: dict[str, Synset] = {}
    first: dict[tuple[str, str], str] = {}
    for file, data in members(path, lambda name: "/wordnet/data." in name or "/wordnet/index." in name):
        part = KINDS.get(file.rsplit(".", 1)[-1])
        lines = [line for line in data.decode("utf-8").splitlines() if part and not line.startswith(" ")]
        for line in lines:
            if "/index." in file:
                fields = line.split()
                links = int(fields[3])
                if int(fields[5 + links]) > 0:  # how many of its senses occur in a tagged corpus
                    first[str(part), fields[0].replace("_", " ")] = f"{part}{fields[6 + links]}"
            else:
                synset = _synset(str(part), line)
                synsets[synset.id] = synset
    return WordNet(dict(sorted(synsets.items())), dict(sorted(first.items())))


def _synset(part: str, line: str) -> Synset:
    fields, gloss = line.split(" | ", 1)
    parts = fields.split()
    count = int(parts[3], 16)
    words = tuple(parts[4 + 2 * index].split("(")[0].replace("_", " ") for index in range(count))
    start = 5 + 2 * count
    links = [
        (parts[start + 4 * index], parts[start + 4 * index + 2].replace("s", "a") + parts[start + 4 * index + 1])
        for index in range(int(parts[start - 1]))
    ]
    definition = gloss.split('; "')[0].strip(" ;")
    return Synset(part + parts[0], parts[1], words, definition, tuple(links), tuple(re.findall(r'"([^"]+)"', gloss)))


def glosses(net: WordNet, tested: bool, limit: int) -> list[Record]:
    """Pairs of a meaning's words and its definition; among those tested, no two of the same words."""
    found = [synset for synset in net.synsets.values() if synset.tested == tested and len(synset.gloss.split()) >= 4]
    common = set(net.first.values())
    found.sort(key=lambda synset: (synset.id not in common, number("gloss", synset.id)))
    records: dict[str, Record] = {}
    for synset in found:
        record: Record = {"query": synset.name, "positive": synset.gloss, "lang": "en", "id": synset.id}
        records.setdefault(synset.name.casefold(), record)
    return list(records.values())[:limit]


def kinds(net: WordNet, tested: bool, each: int) -> list[Record]:
    """Definitions labelled by the kind of what they define, no kind more often than `each`."""
    counts: dict[str, int] = {}
    records: list[Record] = []
    for synset in sorted(net.synsets.values(), key=lambda synset: number("kind", synset.id)):
        if synset.tested == tested and len(synset.gloss.split()) >= 4 and counts.get(synset.kind, 0) < each:
            counts[synset.kind] = counts.get(synset.kind, 0) + 1
            records.append({"text": synset.gloss, "label": f"lexnames:{synset.kind}", "lang": "en"})
    return records


def alike(net: WordNet, each: int) -> Iterator[tuple[str, str, float, str]]:
    """Pairs of words and of definitions, and how alike they are by the structure of WordNet.

    Args:
        net: WordNet.
        each: How many pairs of one relation.

    Yields:
        Two texts, a similarity from 0 to 1, and the relation: of words, the first meanings of common ones count.
    """
    common = [net.synsets[id] for id in sorted(set(net.first.values())) if not net.synsets[id].tested]
    common.sort(key=lambda synset: number("alike", synset.id))
    parents = {synset.id: [id for symbol, id in synset.links if symbol in UP] for synset in net.synsets.values()}
    children: dict[str, list[str]] = {}
    for id, above in parents.items():
        for parent in above:
            children.setdefault(parent, []).append(id)
    leads: dict[str, str] = {}  # the word of a meaning whose first meaning it is
    for (_, word), id in net.first.items():
        if id not in leads or word == net.synsets[id].words[0]:
            leads[id] = word
    for relation, score, related in (
        ("hypernym", 0.7, lambda synset: parents[synset.id]),
        ("similar", 0.8, lambda synset: [id for symbol, id in synset.links if symbol == "&"]),
        ("antonym", 0.2, lambda synset: [id for symbol, id in synset.links if symbol == "!"]),
        ("sibling", 0.45, lambda synset: [id for parent in parents[synset.id][:1] for id in children[parent]]),
        ("cousin", 0.25, lambda synset: _cousins(synset.id, parents, children)),
        ("random", 0.0, lambda synset: [common[int(number("random", synset.id) * len(common))].id]),
    ):
        count = 0
        for synset in common:
            others = [net.synsets[id] for id in related(synset) if id in net.synsets and id != synset.id]
            others = [other for other in others if not other.tested and other.id in leads]
            if not others or count >= each:
                continue
            other = min(others, key=lambda other: number(relation, synset.id, other.id))
            count += 1
            yield leads[synset.id], leads[other.id], score, f"words-{relation}"
            yield synset.gloss, other.gloss, 0.9 * score, f"definitions-{relation}"
    several = [synset for synset in common if len(synset.words) > 1]
    for synset in several[:each]:
        yield synset.words[0], synset.words[1], 1.0, "words-synonym"
    for synset in common[:each]:
        yield synset.name, synset.gloss, 0.9, "word-definition"


def _cousins(id: str, parents: dict[str, list[str]], children: dict[str, list[str]]) -> list[str]:
    """Children of the parent's siblings."""
    above = {up for parent in parents[id][:1] for up in parents[parent][:1]}
    uncles = sorted({child for up in above for child in children[up]} - set(parents[id]))[:40]
    return [child for uncle in uncles for child in children.get(uncle, [])[:20]]
