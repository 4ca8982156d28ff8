"""Records made of others: pairs whose texts hardly differ left out, and conversations turned into triplets."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jina_jax import examples
from jina_jax.examples import Example
from jina_jax.records import InputError


def overlaps(a: str, b: str, share: float = 0.8, words: int = 4) -> bool:
    """Whether one text says little but what the other does.

    Source: jina-embeddings-v3 (arXiv 2409.10173), section 4: pairs are dropped of which at least 80% of the words of
    the shorter text, and four at least, are substrings of the longer one.

    Args:
        a: A text.
        b: Another.
        share: Share of the words of the shorter text that are found in the longer one.
        words: How many these must be at least.

    Returns:
        Whether it is so.
    """
    short, long = sorted((a, b), key=len)
    there = short.split()
    found = sum(word in long for word in there)
    return found >= words and found >= share * len(there)


def differs(example: Example, share: float = 0.8, words: int = 4) -> bool:
    """Whether a record's two texts, or its query and every positive, do not overlap.

    Args:
        example: A record of a pair, a triplet or a score.
        share: As in `overlaps`.
        words: As in `overlaps`.

    Returns:
        Whether to keep it.

    Raises:
        InputError: If it has only one text.
    """
    if len(example.texts) < 2:
        raise InputError(f"{example.where}: a record of the kind {example.kind} has but one text; nothing can overlap")
    first, second = example.texts[:2]
    return not any(overlaps(first, other, share, words) for other in (second, *example.more))


# ---- Conversations ---------------------------------------------------------------------------------------------


def conversations(path: str | Path, negatives: int = 7, margin: float = 0.3, seed: int = 0) -> Iterator[Example]:
    """Triplets of a file of OpenAssistant conversations (oasst1, oasst2).

    Of each first question with two rated answers at least, the best one is the positive; negatives are those whose
    quality is lower by `margin`, and then random answers to other questions of the same language.

    Source: jina-embeddings-v3 (arXiv 2409.10173), section 4.3, data set F4.

    Args:
        path: Messages or trees, in any kind of file that `examples.read` takes.
        negatives: Negatives of a record at most.
        margin: How much worse an answer to the same question must be.
        seed: Decides the random answers.

    Yields:
        Triplets, in the order of the questions.

    Raises:
        InputError: If the file cannot be read, or holds something else.
    """
    questions, answers = _messages(path)
    by_lang: dict[str, list[tuple[str, str]]] = {}
    for question, given in answers.items():
        if question in questions:
            by_lang.setdefault(questions[question][1], []).extend((question, text) for text, _ in given)
    rng = random.Random(seed)
    for question, (text, lang, where) in questions.items():
        rated = [(answer, quality) for answer, quality in answers.get(question, ()) if quality is not None]
        if len(rated) < 2:
            continue
        best, quality = max(rated, key=lambda pair: pair[1])
        worse = sorted((pair for pair in rated if pair[1] <= quality - margin), key=lambda pair: pair[1])
        chosen = list(dict.fromkeys(answer for answer, _ in worse if answer != best))[:negatives]
        known = {answer for answer, _ in answers[question]}
        others = by_lang[lang]
        # As many draws as it takes, if need be all.
        for place in rng.sample(range(len(others)), min(len(others), 8 * negatives + len(known))):
            if len(chosen) == negatives:
                break
            other, answer = others[place]
            if other != question and answer not in known:
                known.add(answer)
                chosen.append(answer)
        if chosen:
            yield Example("triplet", (text, best, *chosen), where, lang=lang or None, query_id=question)


def _messages(
    path: str | Path,
) -> tuple[dict[str, tuple[str, str, str]], dict[str, list[tuple[str, float | None]]]]:
    """First questions by id (text, language, place), and the answers to each (text, quality)."""
    questions: dict[str, tuple[str, str, str]] = {}
    answers: dict[str, list[tuple[str, float | None]]] = {}
    for line, where in examples.lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}); every line must be a record of its own") from error
        for message in _flat(record, where):
            try:
                text, number = message["text"].strip(), message["message_id"]
                if message.get("deleted") or not text:
                    continue
                if message.get("parent_id") is None:
                    questions[number] = (text, message.get("lang") or "", where)
                elif message["role"] == "assistant":
                    answers.setdefault(message["parent_id"], []).append((text, _quality(message)))
            except (KeyError, TypeError, AttributeError) as error:
                needs = "message_id, parent_id, role and text"
                raise InputError(f"{where}: is no message of a conversation; it needs {needs}") from error
    if not questions:
        raise InputError(f"{path}: has no conversations")
    return questions, answers


def _flat(record: Any, where: str) -> Iterator[dict[str, Any]]:
    """The messages of a line: one, or a question with its answers."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: is no message of a conversation")
    if "prompt" not in record:
        yield record
        return
    question = record["prompt"]
    yield question
    for reply in question.get("replies") or ():
        yield {"parent_id": question.get("message_id"), **reply}


def _quality(message: dict[str, Any]) -> float | None:
    """How good people found it, from 0 to 1."""
    labels = message.get("labels") or {}
    if isinstance(labels.get("name"), list):  # as in Parquet
        labels = dict(itertools.zip_longest(labels["name"], labels.get("value") or ()))
    value = labels.get("quality")
    value = value.get("value") if isinstance(value, dict) else value
    return float(value) if isinstance(value, int | float) else None
