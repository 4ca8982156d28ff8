"""What a run of training is, as data: frozen dataclasses that `configs/*.py` fill in and `--set` changes.

A recipe says where the weights come from, which of them train, on which records, by which loss and for how long. It
says nothing about how that is computed but what changes results or memory: types, devices, remat and gradient caching.
"""

import ast
import dataclasses
import glob
import json
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jina_jax import examples
from jina_jax.config import REMAT_POLICIES, Config
from jina_jax.records import InputError

STAGES = ("mlm", "pairs", "adapter", "distill")
KINDS = ("text", "pair", "triplet", "scored", "labelled")
LOSSES = ("mlm", "info_nce", "cosent", "separation", "distill")
# The loss of a kind of records where a data set names none. Labelled records make tuples for classification.
DEFAULT_LOSS = {
    "text": "mlm",
    "pair": "info_nce",
    "triplet": "info_nce",
    "scored": "cosent",
    "labelled": "separation",
}
FITTING_KINDS = {
    "mlm": ("text",),
    "info_nce": ("pair", "triplet", "labelled"),
    "cosent": ("scored",),
    "separation": ("labelled",),
    "distill": ("text", "pair", "labelled"),
}
FALSE_NEGATIVES = ("ids", "margin", "label", "unique_id")
EVAL_KINDS = ("ir", "sts", "triplet", "classification", "clustering", "reranking", "mlm")


@dataclass(frozen=True)
class Init:
    """Where the weights come from.

    Attributes:
        model: A directory, a name on the hub, or "mini", as for `jina_jax.load`; its tokenizer is used. The export of
            an earlier run is such a directory.
        config: Random weights of this configuration instead; `model` then gives the tokenizer alone.
        rope_base: Rotary base in training; None keeps that of the model.
        export_rope_base: Rotary base that the export says; None keeps that of the model.
        max_tokens: Longest text that the model takes, in training and in the export; None keeps that of the model.
    """

    model: str = "mini"
    config: Config | None = None
    rope_base: float | None = None
    export_rope_base: float | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Dataset:
    """Records of one kind in one file.

    Attributes:
        name: Its name in messages, metrics and the model card.
        path: A `.jsonl`, `.jsonl.gz`, `.jsonl.zst` or `.parquet` file; relative paths start where the run starts.
        kind: One of `KINDS`; None tells it by the fields of the first record.
        lang: Language of records that name none.
        loss: One of `LOSSES`; None means the kind's own.
        weight: Share of the steps, relative to the other sets; None means its number of records to the power of
            `Data.alpha`.
        query_prefix: Put before queries; None means the adapter's prompt where there is one, else nothing.
        passage_prefix: The same for positives and negatives.
        max_length: Tokens of a text at most; None means the phase's.
        batch: Records of a batch; None means the phase's.
        in_batch_negatives: Whether other records of the batch are negatives.
        teacher: For "distill", a `.npy` file with a vector for each record, in their order.
        hold_out: Share of the records, the last of the file, that are not trained on.
        license: Their licence, for the model card.
    """

    name: str
    path: str
    kind: str | None = None
    lang: str | None = None
    loss: str | None = None
    weight: float | None = None
    query_prefix: str | None = None
    passage_prefix: str | None = None
    max_length: int | None = None
    batch: int | None = None
    in_batch_negatives: bool = True
    teacher: str | None = None
    hold_out: float = 0.0
    license: str | None = None


@dataclass(frozen=True)
class Data:
    """All records, and how batches are drawn.

    Attributes:
        datasets: The data sets.
        exclude: Names of those to leave out.
        alpha: Sets without a weight are drawn in proportion to their number of records to this power; 0 takes all in
            turn.
        by_language: Whether a batch holds one language only. It always holds one data set only.
        pack: Whether texts share rows, so that little is padding; texts of "mlm" never do.
        buckets: Lengths in tokens that part records by their longest text: a batch comes from one part. Off if empty.
        negatives: Hard negatives of a record: more are left out (another choice each time), fewer filled up by absent
            ones. For tuples of labelled records, how many to draw.
        mask_rate: Share of the tokens that are to be told, for "mlm".
        on_bad_record: "fail", or "skip", which counts and says how many.
        index: Directory for indexes; None puts each next to its file.
        threads: Threads that prepare batches.
    """

    datasets: tuple[Dataset, ...] = ()
    exclude: tuple[str, ...] = ()
    alpha: float = 1.0
    by_language: bool = True
    pack: bool = True
    buckets: tuple[int, ...] = ()
    negatives: int = 7
    mask_rate: float = 0.3
    on_bad_record: str = "fail"
    index: str | None = None
    threads: int = 2


@dataclass(frozen=True)
class Loss:
    """What is minimised; which loss a data set has, it says itself.

    Attributes:
        dims: Matryoshka sizes; the loss is taken at each. None takes it at full size alone.
        dim_weights: Their weights; None means 1 for all.
        reduce: "sum" or "mean" over the sizes.
        chunk: Rows of similarities held at once; None holds all.
        directions: "both" (query to passages and back) or "joint" (one softmax over passages, queries and both among
            themselves, as GTE does).
        false_negatives: What is not counted as a negative besides equal texts: "ids" nothing more, "margin" those
            more similar than the positive by `margin`, "label" (or group) those of the same one; "unique_id" appends
            the record's id to its texts, as the paper does.
        margin: For "margin".
        hardness: Weight of negatives by their similarity; 0 for none.
        gor: Weight of the spread-out regulariser.
        distill: "cosine" to the teacher's vectors, "similarity_kl" between similarities within the batch (at each
            size), or "both".
        cosine_weight: Weight of the cosine in "both".
        vocab_chunk: Rows of the vocabulary scored at once, for "mlm"; None scores all.
    """

    dims: tuple[int, ...] | None = None
    dim_weights: tuple[float, ...] | None = None
    reduce: str = "sum"
    chunk: int | None = None
    directions: str = "both"
    false_negatives: str = "ids"
    margin: float = 0.1
    hardness: float = 0.0
    gor: float = 0.0
    distill: str = "cosine"
    cosine_weight: float = 1.0
    vocab_chunk: int | None = 16_384


@dataclass(frozen=True)
class Phase:
    """Steps with one schedule; the optimizer starts anew with each phase.

    Attributes:
        name: Its name in metrics.
        steps: Number of steps.
        batch: Records of a batch, over all devices.
        max_length: Tokens of a text at most.
        lr: Highest learning rate.
        tau: Temperature.
        grad_cache: Parts in which a batch is embedded, one after the other; 1 embeds it at once.
        min_tokens: Records whose longest text is shorter are left out.
        datasets: Names of the sets of this phase; None means all.
    """

    name: str
    steps: int
    batch: int
    max_length: int
    lr: float
    tau: float = 0.05
    grad_cache: int = 1
    min_tokens: int = 0
    datasets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule.

    Attributes:
        b1: Decay of the first moment.
        b2: Decay of the second.
        eps: Added to the root of the second.
        weight_decay: Decay of matrices; biases and norms have none.
        clip: Largest norm of the gradient; None does not clip.
        schedule: After the warmup: "linear" to 0, "cosine" to 0, or "constant".
        warmup: Steps in which the learning rate rises from 0: a number, or below 1 a share of the phase.
    """

    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip: float | None = 1.0
    schedule: str = "linear"
    warmup: float = 0.06


@dataclass(frozen=True)
class Adapters:
    """Which adapters train; for the stage "adapter".

    Attributes:
        trains: One task, or that of queries and that of passages. A task that the model has not is added to it.
        shared: Whether two tasks have one and the same adapter (one column of the paper's Table 8).
        instructions: Whether texts get the prompt of their task.
        prompts: Prompts of the tasks; None means those of the model, and none for new tasks.
        start: "fresh" (no effect at first), "model" (that of the model), or a task whose adapter is copied.
        rank: Rank of new adapters; None means the model's.
        alpha: Scale times rank; None means the model's scale.
        dropout: On the input of adapters.
    """

    trains: tuple[str, ...] = ()
    shared: bool = False
    instructions: bool = True
    prompts: tuple[str, ...] | None = None
    start: str = "fresh"
    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class EvalTask:
    """Something to measure on held-out records.

    Attributes:
        name: Its name in metrics.
        kind: One of `EVAL_KINDS`: "ir" (pairs or triplets; all passages are the corpus; or a directory as BEIR has
            them), "sts" (scored), "triplet", "classification" and "clustering" (labelled), "reranking" (triplets),
            "mlm" (texts).
        path: The records.
        task: Task of the texts, or of queries; None means the bare backbone.
        passage_task: Task of passages; None means `task`.
        train_path: For "classification", records to fit on; None fits on every second of each label.
        share: Share of the records, the last of the file, that are measured.
    """

    name: str
    kind: str
    path: str
    task: str | None = None
    passage_task: str | None = None
    train_path: str | None = None
    share: float = 1.0


@dataclass(frozen=True)
class Eval:
    """Evaluation during training; it takes no random numbers and no records from it.

    Attributes:
        tasks: What to measure.
        every: Steps between evaluations; 0 evaluates at the end alone.
        on_start: Whether to evaluate before the first step.
        dims: Sizes at which everything is measured; None means the model's Matryoshka sizes.
        best: Name of the task whose main score, at full size, tells the best checkpoint; None means the mean of all.
    """

    tasks: tuple[EvalTask, ...] = ()
    every: int = 0
    on_start: bool = True
    dims: tuple[int, ...] | None = None
    best: str | None = None


@dataclass(frozen=True)
class Mesh:
    """Sizes of the axes of `jina_jax.make_mesh`; -1, for one, takes all devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


@dataclass(frozen=True)
class Log:
    """What is written, and how often.

    Attributes:
        every: Steps between lines of the log, where there is no terminal.
        tensorboard: Whether TensorBoard's files are written.
        wandb: Project of Weights & Biases; None does not report there.
    """

    every: int = 10
    tensorboard: bool = True
    wandb: str | None = None


@dataclass(frozen=True)
class Save:
    """Checkpoints.

    Attributes:
        every: Steps between checkpoints.
        last: How many of the last are kept; besides, the best one is.
        keep_every: Checkpoints at multiples of so many steps are kept for good; 0 for none.
    """

    every: int = 1000
    last: int = 3
    keep_every: int = 0


@dataclass(frozen=True)
class Recipe:
    """A run of training.

    Attributes:
        stage: "mlm" and "distill" and "pairs" train the backbone, "adapter" adapters on a frozen one.
        phases: Its phases, one after the other.
        data: Its records.
        init: Where the weights come from.
        loss: Its loss.
        optim: Its optimizer.
        adapters: Which adapters train.
        eval: What is measured.
        mesh: Its devices.
        log: What is written.
        save: Checkpoints.
        seed: Of the order of records, of masks, of dropout and of new weights.
        dropout: Dropout on activations and attention; None means the model's.
        dtype: Type of activations and of products' inputs.
        backbone_dtype: Type in which a frozen backbone is held. What trains is float32.
        remat: What the backward pass keeps of each layer, see `jina_jax.Config.remat`.
        max_bad_steps: Steps in a row whose loss or gradient is not finite before the run gives up; their updates are
            left out.
    """

    stage: str
    phases: tuple[Phase, ...]
    data: Data = Data()
    init: Init = Init()
    loss: Loss = Loss()
    optim: Optim = Optim()
    adapters: Adapters = Adapters()
    eval: Eval = Eval()
    mesh: Mesh = Mesh()
    log: Log = Log()
    save: Save = Save()
    seed: int = 0
    dropout: float | None = None
    dtype: str = "float32"
    backbone_dtype: str = "float32"
    remat: str = "none"
    max_bad_steps: int = 3

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; all of it in one error."""
        problems = list(_problems(self))
        if problems:
            raise InputError("this recipe cannot be run:\n  " + "\n  ".join(problems))

    def replace(self, **changes: Any) -> "Recipe":
        """Copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    @property
    def datasets(self) -> tuple[Dataset, ...]:
        """The data sets that are not left out."""
        return tuple(one for one in self.data.datasets if one.name not in self.data.exclude)

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)


def _problems(recipe: Recipe) -> Iterator[str]:
    def one_of(name: str, value: str, choices: Sequence[str]) -> Iterator[str]:
        if value not in choices:
            yield f"{name}={value!r} must be one of {', '.join(choices)}"

    yield from one_of("stage", recipe.stage, STAGES)
    yield from one_of("remat", recipe.remat, REMAT_POLICIES)
    yield from one_of("dtype", recipe.dtype, ("float32", "bfloat16"))
    yield from one_of("backbone_dtype", recipe.backbone_dtype, ("float32", "bfloat16"))
    yield from one_of("loss.reduce", recipe.loss.reduce, ("sum", "mean"))
    yield from one_of("loss.directions", recipe.loss.directions, ("both", "joint"))
    yield from one_of("loss.false_negatives", recipe.loss.false_negatives, FALSE_NEGATIVES)
    yield from one_of("loss.distill", recipe.loss.distill, ("cosine", "similarity_kl", "both"))
    yield from one_of("optim.schedule", recipe.optim.schedule, ("linear", "cosine", "constant"))
    yield from one_of("data.on_bad_record", recipe.data.on_bad_record, ("fail", "skip"))
    names = [one.name for one in recipe.data.datasets]
    yield from (f"data.datasets: two are named {name!r}" for name in sorted({n for n in names if names.count(n) > 1}))
    asked = [("data.exclude", name) for name in recipe.data.exclude]
    asked += [(f"phases: {phase.name}", name) for phase in recipe.phases for name in phase.datasets or ()]
    there = ", ".join(names)
    yield from (f"{where} names {name!r}; there are: {there}" for where, name in asked if name not in names)
    for one in recipe.data.datasets:
        if one.kind is not None:
            yield from one_of(f"data.datasets: {one.name}: kind", one.kind, KINDS)
        if one.loss is not None:
            yield from one_of(f"data.datasets: {one.name}: loss", one.loss, LOSSES)
        if not 0 <= one.hold_out < 1:
            yield f"data.datasets: {one.name}: hold_out={one.hold_out} must be at least 0 and less than 1"
    if not recipe.phases:
        yield "phases: there is none"
    for phase in recipe.phases:
        for name in ("steps", "batch", "max_length", "grad_cache"):
            if getattr(phase, name) < 1:
                yield f"phases: {phase.name}: {name}={getattr(phase, name)} must be at least 1"
        if phase.tau <= 0:
            yield f"phases: {phase.name}: tau={phase.tau} must be positive"
        if phase.batch % phase.grad_cache:
            yield f"phases: {phase.name}: batch={phase.batch} must be a multiple of grad_cache={phase.grad_cache}"
    if recipe.stage == "adapter" and not 1 <= len(recipe.adapters.trains) <= 2:
        yield "adapters.trains: name the task that trains, or that of queries and that of passages"
    if recipe.adapters.prompts is not None and len(recipe.adapters.prompts) != len(recipe.adapters.trains):
        yield "adapters.prompts: give one for each of adapters.trains"
    if recipe.loss.dim_weights is not None and len(recipe.loss.dim_weights) != len(recipe.loss.dims or ()):
        yield "loss.dim_weights: give one for each of loss.dims"
    for task in recipe.eval.tasks:
        yield from one_of(f"eval.tasks: {task.name}: kind", task.kind, EVAL_KINDS)
        if not 0 < task.share <= 1:
            yield f"eval.tasks: {task.name}: share={task.share} must be more than 0 and at most 1"


# ---- Parts of recipes ------------------------------------------------------------------------------------------


def datasets(paths: str | Sequence[str]) -> tuple[Dataset, ...]:
    """Data sets from files.

    Args:
        paths: Files, directories (all files of records in them, at any depth) or globs.

    Returns:
        One for each file, named after it: "msmarco" for "data/msmarco.jsonl.gz". Files of one name in several
        directories have these before it.

    Raises:
        InputError: If there is no such file.
    """
    files: dict[Path, str] = {}
    for pattern in [paths] if isinstance(paths, str) else paths:
        path = Path(pattern)
        found = [path] if path.is_file() else path.rglob("*") if path.is_dir() else map(Path, glob.glob(pattern))
        chosen = sorted(file for file in found if file.name.endswith(examples.SUFFIXES) and file.name[0] != ".")
        if not chosen:
            raise InputError(f"{pattern}: no file that ends in {', '.join(examples.SUFFIXES)}")
        files |= {file: file.name[: file.name.index(".")] for file in chosen}
    names = list(files.values())
    return tuple(
        Dataset(name if names.count(name) == 1 else f"{file.parent.name}/{file.name}", str(file))
        for file, name in files.items()
    )


# What is measured with records of a kind.
_MEASURED = {"pair": "ir", "triplet": "ir", "scored": "sts", "labelled": "classification", "text": "mlm"}


def eval_tasks(
    paths: str | Sequence[str] | None,
    task: str | None = None,
    passage_task: str | None = None,
    share: float = 1.0,
    **kinds: str,
) -> tuple[EvalTask, ...]:
    """What to measure with held-out records: retrieval, similarity, classification or perplexity, by their kind.

    Args:
        paths: As for `datasets`, or directories as BEIR has them; None for nothing.
        task: As in `EvalTask`.
        passage_task: As in `EvalTask`.
        share: As in `EvalTask`.
        **kinds: Another kind of task for a kind of records, such as labelled="clustering".

    Returns:
        A task for each file or directory, named after it.

    Raises:
        InputError: If there is no such file, or its first record is malformed.
    """
    found = []
    for path in [paths] if isinstance(paths, str) else paths or ():
        if (Path(path) / "corpus.jsonl").exists():
            found.append(EvalTask(Path(path).name, "ir", path, task, passage_task, share=share))
            continue
        for one in datasets(path):
            first = next(examples.read(one.path), None)
            if first is None:
                raise InputError(f"{one.path} holds no records")
            kind = (_MEASURED | kinds)[first.kind]
            passages = passage_task if kind in ("ir", "reranking", "triplet") else None
            found.append(EvalTask(one.name, kind, one.path, task, passages, share=share))
    return tuple(found)


# ---- Changes from the command line -----------------------------------------------------------------------------

T = TypeVar("T")


def override(recipe: T, assignments: Sequence[str]) -> T:
    """A recipe with some of its values changed.

    Args:
        recipe: The recipe, or a part of it.
        assignments: Such as "optim.clip=None", "phases.0.steps=100" or "data.exclude=['a']". What is no Python
            literal is a string.

    Returns:
        The recipe changed.

    Raises:
        InputError: If there is no such value, or it cannot be what is asked.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: must be NAME=VALUE, such as optim.clip=1.0")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = {"true": True, "false": False, "null": None, "none": None}.get(text.lower(), text)
        recipe = _set(recipe, path.split("."), value, f"--set {assignment}")
    return recipe


def _set(node: Any, path: list[str], value: Any, where: str) -> Any:
    name, *rest = path
    if isinstance(node, tuple):
        names = [str(getattr(item, "name", index)) for index, item in enumerate(node)]
        index = names.index(name) if name in names else int(name) if name.isdecimal() else -1
        if not 0 <= index < len(node):
            raise InputError(f"{where}: there is no {name!r}; there are: {', '.join(names)}")
        return (*node[:index], _set(node[index], rest, value, where) if rest else value, *node[index + 1 :])
    if not dataclasses.is_dataclass(node):
        raise InputError(f"{where}: {name!r} is in something that has no parts")
    known = {field.name: field for field in dataclasses.fields(node)}
    if name not in known:
        raise InputError(f"{where}: there is no {name!r}; there are: {', '.join(known)}")
    if rest:
        changed = _set(getattr(node, name), rest, value, where)
    else:
        changed = _checked(value, typing.get_type_hints(type(node))[name], where)
    return dataclasses.replace(node, **{name: changed})  # type: ignore[type-var]


def _checked(value: Any, kind: Any, where: str) -> Any:
    """A value as the annotation of its attribute wants it."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        origin = typing.get_origin(option) or option
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(_checked(item, typing.get_args(option)[0], where) for item in value)
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(origin, type) and isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
            return value
    raise InputError(f"{where}: must be {getattr(kind, '__name__', kind)}, not {value!r}")


def to_json(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON has it, for checkpoints and model cards."""
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=str))


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines that say where two values of JSON differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}".strip("."))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{path}.{i}")]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]
