"""Texts with labels: rated sentences, mail and pages of manuals; and human judgements of similarity."""

import email
import email.policy
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from configs.mini.corpus.fetch import members, tar_members
from configs.mini.corpus.parse import clean
from configs.mini.corpus.splits import held_out, number
from configs.mini.corpus.units import Page, cut, width

Record = dict[str, object]
RATED = {
    "amazonReviewSnippets": "products",
    "movieReviewSnippets": "films",
    "nytEditorialSnippets": "editorials",
    "tweets": "tweets",
}


@dataclass(frozen=True)
class Rated:
    """A sentence of the VADER data.

    Attributes:
        domain: Where it was written.
        document: The review or article it is part of.
        score: Its mean rating, -4 to 4.
        text: The sentence.
    """

    domain: str
    document: str
    score: float
    text: str

    @property
    def tested(self) -> bool:
        """Whether its document is held out."""
        return held_out("vader", f"{self.domain} {self.document}")


def rated(path: Path) -> list[Rated]:
    """The rated sentences, in order."""
    (inner,) = [data for _, data in members(path, lambda name: name.endswith("hutto_ICWSM_2014.tar.gz"))]
    found = []
    for file, data in tar_members(inner, lambda name: name.endswith("_GroundTruth.txt") and "/._" not in name):
        domain = RATED[file.rsplit("/", 1)[-1].split("_")[0]]
        for line in data.decode("latin-1").splitlines():
            key, score, text = line.split("\t", 2)
            text = clean(text)
            if width(text) >= 3:
                document = key.split("_")[0] if domain in ("products", "editorials") else key
                found.append(Rated(domain, document, float(score), text))
    return found


def sentiment(sentences: Iterable[Rated], tested: bool) -> list[Record]:
    """Sentences labelled by whether they are positive or negative, without those that are hardly either."""
    return [
        {"text": item.text, "label": f"vader_sentiment:{'positive' if item.score > 0 else 'negative'}", "lang": "en"}
        for item in sentences
        if item.tested == tested and abs(item.score) >= 1
    ]


def domains(sentences: Iterable[Rated], tested: bool) -> list[Record]:
    """Sentences labelled by where they were written."""
    return [
        {"text": item.text, "label": f"vader_domain:{item.domain}", "lang": "en"}
        for item in sentences
        if item.tested == tested and width(item.text) >= 5
    ]


def mail(path: Path) -> Iterator[tuple[str, str, bool]]:
    """Mails: subject and first words, "spam" or "ham", and whether held out. Repeated ones come once."""
    seen: set[str] = set()
    for file, data in members(path, lambda name: re.search(r"/data/(?:easy|hard|spam)-.*[.]json$", name) is not None):
        record = json.loads(data)
        message = email.message_from_string(record["text"], policy=email.policy.compat32)
        subject = re.sub(r"^((re|fwd?): *|\[[^\]]*\] *)+", "", clean(str(message["subject"] or "")), flags=re.I)
        text = cut(f"{subject}. {_plain(message)}", 80)
        if width(text) >= 12 and text.isprintable() and subject.casefold() not in seen:
            seen.add(subject.casefold())  # a thread or a mass mailing counts once: their texts repeat each other
            yield text, "spam" if "spam" in record["group"] else "ham", held_out("spam", file.rsplit("/", 1)[-1])


def _plain(message: email.message.Message) -> str:
    """The text of a mail without quotations, signatures and markup."""
    for part in message.walk():
        if part.get_content_type() in ("text/plain", "text/html"):
            payload = part.get_payload(decode=True)
            text = payload.decode("latin-1") if isinstance(payload, bytes) else str(part.get_payload())
            text = re.sub(r"(?is)<(style|script|head)\b.*?</\1>|<!--.*?-->|<[a-z/!][^<>]*>", " ", text)
            kept = [
                line
                for line in re.split(r"(?m)^(?:-- ?|_{5,}|-{5,}.*)$", text)[0].splitlines()
                if not line.startswith((">", "|"))
            ]
            return clean(re.sub(r"\S*(?:://|@|=\d)\S*|[-=_*#~.]{3,}", " ", " ".join(kept)))
    return ""


def modules(pages: Iterable[Page], tested: bool, each: int) -> list[Record]:
    """Bodies of the pages of the LibreOffice help by module, no module of a language more than `each`."""
    counts: dict[tuple[str, str], int] = {}
    records: list[Record] = []
    for page in sorted(pages, key=lambda page: number("module", page.lang, page.doc)):
        if page.source != "help" or held_out("help", page.doc) != tested or width(page.body()) < 15:
            continue
        key = (page.lang, page.doc.split("/")[0])
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= each:
            records.append({"text": page.body(60), "label": f"modules:{key[1]}", "lang": page.lang, "group": page.doc})
    return records


def topics(pages: Iterable[Page], each: int = 12) -> list[Record]:
    """Bodies of GNOME's pages labelled by topic: what stands before the first hyphen of their name."""
    found: dict[tuple[str, str], list[Page]] = {}
    for page in pages:
        if page.source == "gnome" and not held_out("gnome", page.doc) and width(page.body()) >= 15:
            found.setdefault((page.doc.split("/")[-1].split("-")[0], page.lang), []).append(page)
    counts = {topic: len(group) for (topic, lang), group in found.items() if lang == "en"}
    return [
        {"text": page.body(60), "label": f"topics:{topic}", "lang": lang, "group": page.doc}
        for (topic, lang), group in found.items()
        if counts.get(topic, 0) >= 4
        for page in sorted(group, key=lambda page: number("topic", lang, page.doc))[:each]
    ]


# ---- Human judgements ------------------------------------------------------------------------------------------


def judged(path: Path) -> dict[str, list[Record]]:
    """Pairs with human judgements of similarity, from the test data of gensim: documents and two lists of words."""
    with zipfile.ZipFile(path) as archive:
        read = {
            name: archive.read(f"gensim/test/test_data/{name}")
            for name in ("lee.cor", "similarities0-1.txt", "simlex999.txt", "wordsim353.tsv")
        }
    sets: dict[str, list[Record]] = {}
    for name in ("simlex999.txt", "wordsim353.tsv"):
        rows = [
            line.split("\t") for line in read[name].decode("utf-8").splitlines() if line and not line.startswith("#")
        ]
        sets[name.split(".")[0]] = [{"a": a, "b": b, "score": float(score) / 10} for a, b, score in rows]
    documents = [" ".join(line.split()) for line in read["lee.cor"].decode("latin-1").splitlines() if line.strip()]
    scores = [
        [float(value) for value in line.split()]
        for line in read["similarities0-1.txt"].decode().splitlines()
        if line.strip()
    ]
    pairs = [(one, two) for one in range(len(documents)) for two in range(one + 1, len(documents))]
    sets["lee"] = [{"a": documents[one], "b": documents[two], "score": scores[one][two]} for one, two in pairs]
    return sets
