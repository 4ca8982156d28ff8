"""Batches: texts of records as arrays of fixed shape."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jina_jax.examples import Example
from jina_jax.tokenizer import TrainingTokenizer
from jina_jax.train import draws, masking
from jina_jax.train.draws import Tuples
from jina_jax.train.index import Index
from jina_jax.train.masking import Words

# Texts are filled up to one of these lengths, so that there are few shapes to compile.
LADDER = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
# A prefix and a text may share a piece, or be cut otherwise where they meet.
SEAM = 2

# Rows of a batch that are held here: their numbers, or how to get them from its size; None holds all.
Rows = np.ndarray | Callable[[int], np.ndarray] | None


@dataclass(frozen=True, eq=False)
class Batch:
    """Records of one data set, B of them of which some are held here, with G texts each.

    Attributes:
        arrays: Of the rows held. "tokens" int32 [B, G, T] and "lengths" int32 [B, G], 0 for a negative that there is
            not. For "info_nce" "query_ids" and "passage_ids" int32 [B] and "negative_ids" int32 [B, M], alike for
            equal texts, and "groups" int32 [B], -1 for none. For "cosent" "scores" float32 [B]; for "separation"
            "labels" int32 [B]; for "distill" "teacher" float32 [B, Dt]. For "mlm" "positions" int32 [B, P], "targets"
            int32 [B, P] and "weights" float32 [B, P].
        dataset: Name of the data set.
        lang: Language of all records, if it is one.
        loss: Which loss.
        roles: Of each text of a record, 0 for queries and 1 for passages.
        in_batch: Whether other records are negatives.
        size: Rows of the whole batch.
        records: Names of the records held: the data set's and the line or row.
        tokens: Tokens of the whole batch.
        padded: The same with what fills up.
    """

    arrays: dict[str, np.ndarray]
    dataset: str
    lang: str | None
    loss: str
    roles: tuple[int, ...]
    in_batch: bool
    size: int
    records: tuple[str, ...]
    tokens: int
    padded: int


@dataclass(frozen=True, eq=False)
class Source:
    """Records of which a batch may consist, and what becomes of them.

    Attributes:
        name: Its data set's, and its language and lengths if the set has several.
        dataset: Name of the data set.
        index: The records.
        records: Which of them, int64 [n].
        lang: Their language, if it is one.
        loss: Which loss.
        batch: Records of a batch.
        max_length: Tokens of a text at most.
        prefixes: Put before queries, and before passages.
        tokenizer: Makes the tokens.
        negatives: Negatives of a record.
        in_batch: Whether other records are negatives.
        labels_part: Whether records of one label are no negatives of each other.
        unique_ids: Whether texts get the number of their record appended.
        key: Decides, with the step, which texts of a record are drawn.
        tuples: For labelled records with negatives.
        words: For "mlm".
        mask_rate: For "mlm".
        teacher: For "distill", float [N, Dt].
    """

    name: str
    dataset: str
    index: Index
    records: np.ndarray
    lang: str | None
    loss: str
    batch: int
    max_length: int
    prefixes: tuple[str, str]
    tokenizer: TrainingTokenizer
    negatives: int
    in_batch: bool
    labels_part: bool
    unique_ids: bool
    key: int
    tuples: Tuples | None = None
    words: Words | None = None
    mask_rate: float = 0.0
    teacher: np.ndarray | None = None

    @property
    def roles(self) -> tuple[int, ...]:
        """Roles of the texts of a record."""
        if self.loss == "info_nce":
            return (0, *[1] * (1 + self.negatives))
        return (0, 0) if self.loss == "cosent" else (0,)


def padded_length(longest: int, most: int) -> int:
    """The length to which texts are filled up.

    Args:
        longest: Tokens of the longest.
        most: Tokens of a text at most.

    Returns:
        One of `LADDER`, or `most`.
    """
    return min((step for step in LADDER if longest <= step < most), default=most)


@dataclass(frozen=True, eq=False)
class Draw:
    """Which texts are in a batch.

    Attributes:
        records: int64 [B, G], record of each text.
        slots: int64 [B, G], number of the text within its record; -1 for none.
        lengths: int64 [B, G], tokens at most, 0 for none.
        tokens: Tokens in all.
        T: To which length texts are filled up.
        suffixes: Ids to append to all texts of a row, one array for each.
    """

    records: np.ndarray
    slots: np.ndarray
    lengths: np.ndarray
    tokens: int
    T: int
    suffixes: list[np.ndarray] | None


def draw(source: Source, members: np.ndarray, step: int) -> Draw:
    """Choose the texts of a batch and its shape; no text is read.

    Args:
        source: The records.
        members: Which of `source.records`, int64 [B].
        step: Number of the step; another one draws other negatives.

    Returns:
        The choice.
    """
    index, G = source.index, len(source.roles)
    rng = draws.generator(source.key, step)
    if source.tuples is not None:
        records = source.records[source.tuples(members, source.negatives, rng)]
        slots = np.zeros_like(records)
    else:
        records = np.repeat(source.records[members][:, None], G, axis=1)
        slots = np.tile(np.arange(G), (len(records), 1))
        if source.loss == "info_nce":
            counts = index.counts()[records[:, 0]]
            slots[:, 1] = draws.positives(counts, index.more[records[:, 0]], rng)
            slots[:, 2:] = draws.negatives(counts, source.negatives, rng)
    there = slots >= 0
    lengths = np.where(there, index.lengths[index.starts[records] + np.maximum(slots, 0)], 0).astype(np.int64)
    prefixes = [len(source.tokenizer.encode(prefix).ids) - 2 if prefix else 0 for prefix in source.prefixes]
    prefix = np.array([prefixes[role] for role in source.roles])
    seam = np.where(prefix > 0, SEAM, 0)
    suffixes = None
    if source.unique_ids:
        numbers = [f" {number}" for number in index.numbers[records[:, 0]].tolist()]
        suffixes = [one.ids[1:-1] for one in source.tokenizer.encode_batch(numbers, offsets=False)]
        prefix = prefix + np.array([len(suffix) for suffix in suffixes])[:, None]
    lengths = np.where(there, lengths + prefix, 0)
    tokens = int(np.minimum(lengths, source.max_length).sum())
    lengths = np.where(there, np.minimum(lengths + seam, source.max_length), 0)
    T = padded_length(int(lengths.max()), source.max_length)
    return Draw(records, slots, lengths, tokens, T, suffixes)


def held_rows(rows: Rows, size: int) -> np.ndarray:
    """Numbers of the rows that are held here, of a batch of so many."""
    return np.arange(size) if rows is None else rows(size) if callable(rows) else rows


def make(source: Source, drawn: Draw, step: int, held: np.ndarray) -> Batch:
    """Make a batch.

    Args:
        source: The records.
        drawn: What `draw` gave for the step.
        step: Number of the step.
        held: Rows that are held here. Neither shapes nor numbers depend on it.

    Returns:
        The batch.
    """
    B, index = len(drawn.records), source.index
    first = drawn.records[:, 0]
    tokens, lengths = _tokens(source, drawn, held)
    arrays = {"tokens": tokens, "lengths": lengths}
    if source.loss == "info_nce":
        arrays |= {name: ids[held] for name, ids in _ids(source, drawn).items()}
    elif source.loss == "cosent":
        scores = [index[record].score for record in first[held].tolist()]
        arrays["scores"] = np.array(scores, np.float32)
    elif source.loss == "separation":
        arrays["labels"] = index.labels[first[held]]
    elif source.teacher is not None:
        arrays["teacher"] = np.asarray(source.teacher[first[held]], np.float32)
    elif source.words is not None:
        noise = draws.generator(source.key, step).random((3, B, drawn.T))[:, held]
        masked = masking.mask_words(tokens[:, 0], lengths[:, 0], source.words, source.mask_rate, noise)
        arrays |= masked | {"tokens": masked["tokens"][:, None]}
    names = tuple(f"{source.dataset}:{number}" for number in index.numbers[first[held]].tolist())
    return Batch(
        arrays,
        source.dataset,
        source.lang,
        source.loss,
        source.roles,
        source.in_batch,
        B,
        names,
        drawn.tokens,
        drawn.lengths.size * drawn.T,
    )


def _ids(source: Source, drawn: Draw) -> dict[str, np.ndarray]:
    """Small numbers that are alike for equal texts of the batch, and groups."""
    index, there = source.index, drawn.slots >= 0
    hashes = index.hashes[index.starts[drawn.records] + np.maximum(drawn.slots, 0)]
    ids = np.unique(hashes, return_inverse=True)[1].reshape(hashes.shape).astype(np.int32)
    ids = np.where(there, ids, np.int32(-1))
    groups = index.labels if source.labels_part else index.groups
    found = {"query_ids": ids[:, 0], "passage_ids": ids[:, 1], "groups": groups[drawn.records[:, 0]]}
    return found | ({"negative_ids": ids[:, 2:]} if source.negatives else {})


def _tokens(source: Source, drawn: Draw, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [b, G, T] and lengths int32 [b, G] of the rows held."""
    records, slots = drawn.records[held], drawn.slots[held]
    b, G = records.shape
    examples: dict[int, Example] = {}
    texts, row_of = [], []
    for row, (of, which) in enumerate(zip(records.tolist(), slots.tolist(), strict=True)):
        for role, record, slot in zip(source.roles, of, which, strict=True):
            if slot < 0:
                continue
            if record not in examples:
                examples[record] = source.index[record]
            example = examples[record]
            count = len(example.texts)
            text = example.texts[slot] if slot < count else example.more[slot - count]
            texts.append(source.prefixes[role] + text)
            row_of.append(row)
    if drawn.suffixes is None:
        ids = [one.ids for one in source.tokenizer.encode_batch(texts, drawn.T, offsets=False)]
    else:
        ids = []
        for row, one in zip(row_of, source.tokenizer.encode_batch(texts, offsets=False), strict=True):
            suffix = drawn.suffixes[held[row]]
            ids.append(np.concatenate([one.ids[:-1][: drawn.T - 1 - len(suffix)], suffix, one.ids[-1:]]))
    lengths = np.zeros((b, G), np.int32)
    lengths[slots >= 0] = [len(one) for one in ids]
    tokens = np.full((b, G, drawn.T), source.tokenizer.pad_id, np.int32)
    tokens[np.arange(drawn.T) < lengths[..., None]] = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    return tokens, lengths
