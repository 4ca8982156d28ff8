"""The measures of long texts: a pass key in documents of one exact length, and late chunking against naive."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.mini.evaluation.measures import CUTOFF, Score, mean_of, ndcg
from configs.mini.evaluation.systems import Encode
from jina_jax import Embedder
from jina_jax.chunking import fixed_tokens
from jina_jax.eval import metrics
from jina_jax.records import InputError
from jina_jax.tokenizer import Tokenizer

# Of pass keys: tokens of the documents, how many there are of each length, the sentence, the question, whose they are.
LENGTHS, DOCUMENTS = (512, 1024, 2048, 4096, 8192), 20
NEEDLE, QUESTION = "The pass key of {} is {}.", "What is the pass key of {}?"
OWNERS = (
    *("the lighthouse", "the bakery", "the violin shop", "the glass tower", "the old harbour", "the chess club"),
    *("the winter garden", "the copper mine", "the night train", "the observatory", "the salt warehouse"),
    *("the puppet theatre", "the mountain hut", "the printing house", "the silk market", "the water mill"),
    *("the ice rink", "the stone bridge", "the bee farm", "the map archive"),
)
# Of late chunking: tokens of a chunk, of a document at most, and how many documents.
CHUNK, LONGEST, ARTICLES = 64, 4096, 40


def articles(work: Path) -> list[dict[str, Any]]:
    """Long articles: "id", "title", "text", and "sections" with "title", "start" and "end"."""
    path = work / "test" / "long" / "documents.jsonl"
    if not path.is_file():
        raise InputError(f"no file {path}; make it with python -m configs.mini.corpus --work {work}")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ---- Pass key --------------------------------------------------------------------------------------------------


class Haystack(NamedTuple):
    """A document with a pass key in it.

    Attributes:
        title: Of the article that it begins with.
        text: The document.
        needle: Characters of the sentence with the pass key.
    """

    title: str
    text: str
    needle: tuple[int, int]


def haystacks(documents: Sequence[dict[str, Any]], tokenizer: Tokenizer, length: int, prompt: str) -> list[Haystack]:
    """Documents of one length, each with the pass key of another owner somewhere.

    The document of an owner has the same text around the same sentence, at the same depth, in every length.

    Args:
        documents: As `articles` gives them. Each of ours begins with one of the longest, and goes on with others if
            need be.
        tokenizer: What tokens are.
        length: Tokens of each document, the prompt, `<s>` and `</s>` included.
        prompt: What will be put before each.

    Returns:
        `DOCUMENTS` documents.

    Raises:
        InputError: If the articles are too short, or too few.
    """
    rng = np.random.default_rng(0)
    depths, keys = rng.random(DOCUMENTS), rng.choice(90_000, DOCUMENTS, replace=False) + 10_000
    longest = sorted(documents, key=lambda one: -len(one["text"]))
    made = []
    for number in range(min(DOCUMENTS, len(longest))):
        words = " ".join(one["text"] for one in longest[number::DOCUMENTS]).split()
        needle = NEEDLE.format(OWNERS[number], keys[number])
        text = _haystack(words, needle, depths[number], tokenizer, length, prompt)
        start = text.index(needle)
        made.append(Haystack(longest[number]["title"], text, (start, start + len(needle))))
    return made


def _haystack(words: list[str], needle: str, depth: float, tokenizer: Tokenizer, length: int, prompt: str) -> str:
    def document(count: int, tail: str = "") -> str:
        place = next((i for i in range(int(depth * count), 0, -1) if words[i - 1].endswith(".")), 0)
        return " ".join([*words[:place], needle, *words[place:count]]) + tail

    def tokens(text: str) -> int:
        return len(tokenizer.encode(prompt + text).ids)

    low, high = 0, min(len(words), length)  # a word is a token at least
    if tokens(document(high)) < length:
        raise InputError(f"the long articles are too short for documents of {length} tokens; give more of them")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(document(middle)) <= length else (low, middle - 1)
    missing = length - tokens(document(low))
    made = document(low, " a" * missing)  # a word of one token
    assert tokens(made) == length, f"{tokens(made)} tokens, not {length}"
    return made


def pass_keys(embedder: Embedder, encode: Encode, given: Sequence[Haystack], adapters: bool) -> dict[str, float]:
    """What is found among as many documents of one length, or among the pass keys' sentences in their documents.

    Args:
        embedder: The model.
        encode: The same with or without adapters, as `adapters` says.
        given: The documents.
        adapters: Whether passages get their adapter.

    Returns:
        "document" and "document mrr": the question for a pass key finds the embedding of its document; "sentence" and
        "sentence mrr": it finds the sentence, whose tokens have seen all of the document (late chunking); "alone" and
        "alone mrr": it finds the sentence without a document; "title": the title of the article finds the document.
    """
    # The first chunk is the whole document with `<s>` and the prompt. Nobody takes `</s>`.
    chunks = ((one.text, [(0, len(one.text)), one.needle, (len(one.text),) * 2]) for one in given)
    task = "retrieval.passage" if adapters else None
    vectors = np.stack([one.embeddings for one in embedder.encode_documents(chunks, task=task)])
    alone = encode([one.text[slice(*one.needle)] for one in given], "retrieval.passage")
    return _found(encode, given, {"document": vectors[:, 0], "sentence": vectors[:, 1], "alone": alone})


def pass_keys_of_documents(encode: Encode, given: Sequence[Haystack]) -> dict[str, float]:
    """The same for a model that gives a text one vector."""
    return _found(encode, given, {"document": encode([one.text for one in given], "retrieval.passage")})


def _found(encode: Encode, given: Sequence[Haystack], vectors: dict[str, np.ndarray]) -> dict[str, float]:
    questions = encode([QUESTION.format(owner) for owner in OWNERS[: len(given)]], "retrieval.query")
    titles = encode([one.title for one in given], "retrieval.query")
    found = {"title": _places(titles @ vectors["document"].T)[0]}
    for name, passages in vectors.items():
        found[name], found[f"{name} mrr"] = _places(questions @ passages.T)
    return found


def _places(scores: np.ndarray) -> tuple[float, float]:
    """Share of the queries that find their own passage first, and the mean reciprocal rank of it."""
    ranked = [metrics.ranked(row, np.eye(len(row), dtype=np.int64)[number]) for number, row in enumerate(scores)]
    return tuple(float(np.mean([metrics.mrr(one, k) for one in ranked])) for k in (1, len(ranked)))  # type: ignore


# ---- Late chunking ---------------------------------------------------------------------------------------------


class Article(NamedTuple):
    """A document to chunk, and what is asked about it.

    Attributes:
        text: The document.
        spans: Characters of its chunks.
        queries: Questions, each with the numbers of the chunks that answer it.
    """

    text: str
    spans: list[tuple[int, int]]
    queries: list[tuple[str, list[int]]]


def chunked(documents: Sequence[dict[str, Any]], tokenizer: Tokenizer, prompt: str) -> list[Article]:
    """Articles cut into chunks. The title of an article and of a section ask for the chunks of the section.

    Args:
        documents: As `articles` gives them.
        tokenizer: What tokens are.
        prompt: What will be put before each.

    Returns:
        At most `ARTICLES`, of `LONGEST` tokens at most; those without a whole section are left out.
    """
    found: list[Article] = []
    for document in documents:
        tokens = tokenizer.encode(prompt + document["text"], LONGEST)
        text = document["text"][: int(tokens.offsets[-2, 1]) - len(prompt)]
        spans = fixed_tokens(text, tokenizer, CHUNK)
        middles = np.array([(start + end) // 2 for start, end in spans])
        queries = []
        for section in document["sections"]:
            within = np.flatnonzero((middles >= section["start"]) & (middles < section["end"])).tolist()
            told = section["title"].strip() not in ("", document["title"])  # the first section has the article's title
            if within and told and section["end"] <= len(text):
                queries.append((f"{document['title']}: {section['title']}", within))
        if queries and len(found) < ARTICLES:
            found.append(Article(text, spans, queries))
    return found


def late_chunking(embedder: Embedder, encode: Encode, given: Sequence[Article], adapters: bool) -> dict[str, Score]:
    """nDCG@10 of chunks of all articles, embedded "late" (in their context) and "naive" (each alone).

    Args:
        embedder: The model.
        encode: The same with or without adapters, as `adapters` says.
        given: The articles.
        adapters: Whether passages get their adapter.

    Returns:
        Scores by name; they are resampled by articles, whose questions depend on each other.
    """
    queries = encode([text for article in given for text, _ in article.queries], "retrieval.query")
    documents = ((article.text, article.spans) for article in given)
    task = "retrieval.passage" if adapters else None
    late = np.concatenate([one.embeddings for one in embedder.encode_documents(documents, task=task, truncate=True)])
    naive = encode([article.text[start:end] for article in given for start, end in article.spans], "retrieval.passage")
    return {name: _by_article(queries @ chunks.T, given) for name, chunks in {"late": late, "naive": naive}.items()}


def _by_article(scores: np.ndarray, given: Sequence[Article]) -> Score:
    values = [ndcg(row, relevant, CUTOFF) for row, relevant in zip(scores, _relevant(given), strict=True)]
    parts = np.split(np.array(values), np.cumsum([len(article.queries) for article in given])[:-1])

    def again(rng: np.random.Generator) -> float:
        return float(np.concatenate([parts[i] for i in rng.integers(len(parts), size=len(parts))]).mean())

    return mean_of(np.array(values))._replace(again=again)


def _relevant(given: Sequence[Article]) -> Iterator[list[int]]:
    """For each question, the numbers of its chunks among those of all articles."""
    first = 0
    for article in given:
        for _, within in article.queries:
            yield [first + number for number in within]
        first += len(article.spans)
