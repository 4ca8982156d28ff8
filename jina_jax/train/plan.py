"""The order of records: which of them are in the batch of which step, for any step at once.

The batch of a step is a function of the seed, the recipe, the records and the number of the step. No process, thread or
earlier step has a say, so that a run can go on anywhere.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jina_jax.records import InputError
from jina_jax.tokenizer import TrainingTokenizer
from jina_jax.train import batches, index, masking, packing
from jina_jax.train.batches import Batch, Rows, Source
from jina_jax.train.draws import Companions, Tuples
from jina_jax.train.index import Index
from jina_jax.train.masking import Words
from jina_jax.train.packing import Split
from jina_jax.train.recipe import DEFAULT_LOSS, FITTING_KINDS, Data, Dataset, Phase, Recipe

VERSION = 1
# Sources that a description lists; of more it tells the number.
_LISTED = 20
_ENDLESS = 2**62
# Batches of a source by which the shape of all is chosen.
_TRIED = 8
# Batches that the hash of a plan is told.
_SAMPLED = 2


class Plan:
    """The batches of a phase.

    Attributes:
        hash: A hash of all that decides the batches.
        sources: Records that may be in one batch.
        weights: Share of the steps of each source.
        records: Number of records of all sources.
        epoch: Batches in which all sources are gone through once.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], identity: str, threads: int) -> None:
        self.sources, self.weights = tuple(sources), tuple(weights)
        self._grain, self._threads = _import_grain(), threads
        self._chosen: dict[tuple[int, Split], packing.Rows] = {}
        parts = [self._order(number) for number in range(len(sources))]
        self._steps = self._grain.MapDataset.mix(parts, self.weights)
        self.records = sum(len(source.records) for source in sources)
        self.epoch = sum(map(_batches, sources))
        # Another version of a library might order records otherwise: the first batches tell.
        first = [self.rows(step) for step in range(_SAMPLED)]
        order = [[source.name, source.records[members].tolist()] for source, members in first]
        self.hash = hashlib.sha256(f"{identity}{json.dumps(order)}".encode()).hexdigest()

    def _order(self, number: int) -> Any:
        """The batches of a source, endless: its number, and which of its records."""
        source, dataset = self.sources[number], self._grain.MapDataset
        if source.loss == "separation":
            deal = _companions(source)
            return dataset.range(_ENDLESS).map(lambda batch: (number, deal(batch)))
        # Batches are made before the epoch repeats, so that none has records of two.
        shuffled = dataset.range(len(source.records)).seed(source.key % 2**32).shuffle()
        order = shuffled.batch(source.batch, drop_remainder=True).repeat()
        # The records of tuples are drawn from all, but not all of them can be the first.
        first = None if source.tuples is None else source.tuples.queries()
        return order.map(lambda rows: (number, np.asarray(rows) if first is None else first[rows]))

    def rows(self, step: int) -> tuple[Source, np.ndarray]:
        """The records of a step.

        Args:
            step: Number of the step, from 0.

        Returns:
            The source, and which of its records, int64 [B].
        """
        number, members = self._steps[step]
        return self.sources[number], members

    def shape(self, step: int) -> tuple[int, int, int]:
        """Sizes B, G and T of the tokens of a step; no record is read."""
        source, members = self.rows(step)
        return (*(drawn := batches.draw(source, members, step)).records.shape, drawn.T)

    def batch(self, step: int, rows: Rows = None, split: Split | None = None) -> Batch:
        """The batch of a step.

        Args:
            step: Number of the step, from 0.
            rows: Rows that are held here, or how to get them from the batch's size; None holds all.
            split: How the batch is computed, to have its texts packed for that (but for "mlm"); None packs nothing.

        Returns:
            The batch.
        """
        source, members = self.rows(step)
        drawn, held = batches.draw(source, members, step), batches.held_rows(rows, len(members))
        made = batches.make(source, drawn, step, held)
        if split is None or source.loss == "mlm":
            return made
        return packing.pack(made, drawn.lengths, held, self._rows(source, split), split, source.tokenizer.pad_id)

    def _rows(self, source: Source, split: Split) -> packing.Rows:
        """Rows for the batches of a source, from its first ones."""
        number = self.sources.index(source)
        if (number, split) not in self._chosen:
            # Draws depend on the step by their negatives alone: any steps will do.
            some = [self._order(number)[batch][1] for batch in range(min(_batches(source), _TRIED))]
            lengths = [batches.draw(source, members, step).lengths for step, members in enumerate(some)]
            self._chosen[number, split] = packing.choose(lengths, split)
        return self._chosen[number, split]

    def batches(self, start: int, stop: int, rows: Rows = None, split: Split | None = None) -> Iterator[Batch]:
        """The batches of some steps, prepared ahead by threads.

        Args:
            start: First step.
            stop: The one after the last.
            rows: As in `batch`.
            split: As in `batch`.

        Yields:
            Batch after batch, in order.
        """
        if start >= stop:
            return
        options = self._grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=2 * self._threads)
        made = self._grain.MapDataset.range(start, stop).map(lambda step: self.batch(step, rows, split))
        yield from made.to_iter_dataset(options)

    def describe(self) -> list[str]:
        """What there is, a line for each source and one for all."""
        total = sum(self.weights)
        lines = [
            f"{source.name}: {len(source.records):,} {source.index.kind} records by {source.loss}, "
            f"{weight / total:.1%} of the steps, {_batches(source):,} batches of {source.batch} an epoch"
            + (f", {source.index.bad:,} bad ones left out" if source.index.bad else "")
            for source, weight in zip(self.sources, self.weights, strict=True)
        ]
        if len(lines) > _LISTED:
            lines[_LISTED:] = [f"... and {len(lines) - _LISTED} more"]
        return [*lines, f"{len(self.sources)} sources, {self.records:,} records, {self.epoch:,} batches an epoch"]


def make(
    recipe: Recipe,
    phase: Phase,
    tokenizer: TrainingTokenizer,
    prompts: tuple[str, str] = ("", ""),
    max_tokens: int | None = None,
) -> Plan:
    """Plan a phase.

    Args:
        recipe: The recipe.
        phase: One of its phases.
        tokenizer: The model's tokenizer.
        prompts: Put before queries, and before passages, of data sets that name no prefixes.
        max_tokens: Tokens that the model can read at most.

    Returns:
        The plan.

    Raises:
        InputError: If a file cannot be read or has bad records, or a data set cannot make a batch.
        OSError: If an index cannot be written because the disk is full.
    """
    chosen = [one for one in recipe.datasets if phase.datasets is None or one.name in phase.datasets]
    if not chosen:
        raise InputError(f"{phase.name}: there is no data set; name some in data.datasets or with --data")
    words = None
    sources: list[Source] = []
    weights: list[float] = []
    facts: list[Any] = []
    for dataset in chosen:
        found = index.open(dataset.path, tokenizer, dataset.kind, recipe.data.index, recipe.data.on_bad_record)
        loss = dataset.loss or DEFAULT_LOSS[found.kind]
        if found.kind not in FITTING_KINDS[loss]:
            fitting = ", ".join(FITTING_KINDS[loss])
            raise InputError(f"{dataset.name}: the loss {loss} is for records of {fitting}, but these are {found.kind}")
        words = words or (masking.words_of(tokenizer) if loss == "mlm" else None)
        source = _source(recipe, phase, dataset, found, loss, tokenizer, prompts, max_tokens, words)
        parts = list(_parts(source, dataset, recipe, phase))
        sizes = np.array([len(part.records) for part in parts], float)
        whole = sizes.sum() ** recipe.data.alpha if dataset.weight is None else dataset.weight
        shares = sizes**recipe.data.alpha
        sources += parts
        weights += (whole * shares / shares.sum()).tolist()
        facts.append([dataset.name, found.content, None if source.teacher is None else _sha256(dataset.teacher)])
    problems = [problem for source in sources if (problem := _problem(source))]
    if problems:
        raise InputError("\n".join(problems))
    identity = _identity(recipe, phase, chosen, prompts, max_tokens) | {"content": facts}
    return Plan(sources, weights, json.dumps(identity, sort_keys=True), recipe.data.threads)


# ---- Parts of a plan -------------------------------------------------------------------------------------------


def _source(
    recipe: Recipe,
    phase: Phase,
    dataset: Dataset,
    found: Index,
    loss: str,
    tokenizer: TrainingTokenizer,
    prompts: tuple[str, str],
    max_tokens: int | None,
    words: Words | None,
) -> Source:
    """All records of a data set that are not too short and not held out."""
    held_out = max(round(len(found) * dataset.hold_out), 1) if dataset.hold_out else 0
    records = np.flatnonzero(found.longest() >= phase.min_tokens)
    records = records[records < len(found) - held_out]
    if not len(records):
        raise InputError(f"{dataset.name}: all {len(found):,} records are held out or below {phase.min_tokens} tokens")
    given = zip((dataset.query_prefix, dataset.passage_prefix), prompts, strict=True)
    prefixes = tuple(prompt if prefix is None else prefix for prefix, prompt in given)
    max_length = min(dataset.max_length or phase.max_length, max_tokens or _ENDLESS)
    room = max(len(tokenizer.encode(prefix).ids) for prefix in prefixes)
    if room >= max_length:
        raise InputError(f"{dataset.name}: max_length={max_length} leaves no room for a text; its prefix takes {room}")
    info_nce = loss == "info_nce"
    return Source(
        name=dataset.name,
        dataset=dataset.name,
        index=found,
        records=records,
        lang=None,
        loss=loss,
        batch=dataset.batch or phase.batch,
        max_length=max_length,
        prefixes=(prefixes[0], prefixes[1]),
        tokenizer=tokenizer,
        negatives=_negatives(found, recipe.data.negatives) if info_nce else 0,
        in_batch=dataset.in_batch_negatives,
        labels_part=found.kind == "labelled" and recipe.loss.false_negatives == "label",
        unique_ids=info_nce and recipe.loss.false_negatives == "unique_id",
        key=0,
        words=words if loss == "mlm" else None,
        mask_rate=recipe.data.mask_rate,
        teacher=_teacher(dataset, found) if loss == "distill" else None,
    )


def _negatives(found: Index, wanted: int) -> int:
    """Negatives of a record, at most as many as any has."""
    return wanted if found.kind == "labelled" else min(wanted, int(found.counts().max()) - 2)


def _parts(source: Source, dataset: Dataset, recipe: Recipe, phase: Phase) -> Iterator[Source]:
    """The sources of a data set: by language, and by length."""
    found, data = source.index, recipe.data
    # Records that name no language have that of the data set.
    names = np.array([*found.lang_names, dataset.lang or ""], object)[found.langs[source.records]]
    longest = np.minimum(found.longest(), source.max_length)[source.records]
    bucket = np.digitize(longest, data.buckets, right=True)
    langs = sorted(set(names))
    for lang in langs if data.by_language else [None]:
        for number in sorted(set(bucket.tolist())):
            chosen = (bucket == number) & (True if lang is None else names == lang)
            if not chosen.any():
                continue
            one = (langs[0] if len(langs) == 1 else None) if lang is None else lang
            name = "/".join(
                [dataset.name]
                + ([lang or "no language"] if lang is not None and len(langs) > 1 else [])
                + ([_bucket_name(data, number)] if data.buckets else [])
            )
            key = hashlib.sha256(json.dumps([recipe.seed, phase.name, name]).encode()).digest()
            records = source.records[chosen]
            tuples, negatives = None, source.negatives
            if found.kind == "labelled" and source.loss == "info_nce":
                tuples = Tuples(found.labels[records])
                negatives = min(negatives, tuples.negatives())
            yield dataclasses.replace(
                source,
                name=name,
                records=records,
                lang=one or None,
                key=int.from_bytes(key[:8], "little"),
                tuples=tuples,
                negatives=negatives,
            )


def _bucket_name(data: Data, number: int) -> str:
    if number == len(data.buckets):
        return f"over {data.buckets[-1]} tokens"
    return f"up to {data.buckets[number]} tokens"


def _companions(source: Source) -> Companions:
    return Companions(source.index.labels[source.records], source.batch, source.key)


def _batches(source: Source) -> int:
    """Batches of an epoch."""
    if source.loss == "separation":
        return _companions(source).batches
    return (len(source.records) if source.tuples is None else len(source.tuples.queries())) // source.batch


def _problem(source: Source) -> str | None:
    """Why no batch can be made of a source, and what to do about it."""
    count, batch = len(source.records), source.batch
    fix = "lower its batch, take languages or lengths together (data.by_language, data.buckets), or leave it out"
    if source.loss == "separation" and (batch % 2 or batch < 4):
        return f"{source.name}: separation needs an even batch of at least 4, not {batch}"
    if source.tuples is not None and source.negatives < 1:
        return f"{source.name}: all records have one label, so that there are no negatives; labels are to differ"
    if source.loss == "info_nce" and not source.in_batch and not source.negatives:
        return f"{source.name}: without in-batch negatives its records need negatives of their own; mine some first"
    if _batches(source):
        return None
    if source.loss == "separation" and count >= batch:
        return f"{source.name}: {count:,} records have too few labels, or too few of one, for a batch of {batch}; {fix}"
    if source.tuples is not None and count >= batch:
        return f"{source.name}: too few of its {count:,} records share a label for a batch of {batch}; {fix}"
    return f"{source.name}: {count:,} records do not make a batch of {batch}; {fix}"


def _teacher(dataset: Dataset, found: Index) -> np.ndarray:
    """Vectors of the teacher, which stay on disk."""
    if dataset.teacher is None:
        raise InputError(f"{dataset.name}: the loss distill needs a teacher: a .npy file with a vector for each record")
    try:
        vectors = np.load(dataset.teacher, mmap_mode="r")
    except FileNotFoundError as error:
        raise InputError(f"no file {dataset.teacher}, the teacher of {dataset.name}; check the path") from error
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{dataset.teacher}: cannot be read as .npy ({error})") from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or len(vectors) != len(found):
        left_out = f" ({found.bad:,} bad ones left out)" if found.bad else ""
        raise InputError(
            f"{dataset.teacher}: must be floats [{len(found)}, Dt], a vector for each record of {dataset.name}"
            f"{left_out}, not {vectors.dtype} {list(vectors.shape)}"
        )
    return vectors


def _sha256(path: str | None) -> str:
    with Path(path or "").open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _identity(
    recipe: Recipe, phase: Phase, chosen: Sequence[Dataset], prompts: tuple[str, str], max_tokens: int | None
) -> dict[str, Any]:
    """All of the recipe that decides batches; not where files lie, nor how they are read."""
    free_data = ("datasets", "exclude", "index", "threads")
    return {
        "version": VERSION,
        "seed": recipe.seed,
        "phase": [phase.name, phase.batch, phase.max_length, phase.min_tokens],
        "data": {k: v for k, v in dataclasses.asdict(recipe.data).items() if k not in free_data},
        "datasets": [
            {k: v for k, v in dataclasses.asdict(one).items() if k not in ("path", "teacher")} for one in chosen
        ],
        "false_negatives": recipe.loss.false_negatives,
        "prompts": prompts,
        "max_tokens": max_tokens,
    }


def _import_grain() -> Any:
    try:
        import grain
    except ImportError as error:
        raise ImportError("training needs grain to read records; pip install 'jina-jax[train]'") from error
    return grain
