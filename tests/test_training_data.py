"""Indexes, plans and batches: every batch is a function of its step, and says what its records say."""

import collections
import dataclasses
import errno
import gzip
import itertools
import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jina_jax import hub
from jina_jax.records import InputError, whole_file
from jina_jax.tokenizer import load_tokenizer
from jina_jax.train import batches, draws, index, plan
from jina_jax.train.recipe import Data, Dataset, Loss, Phase, Recipe

TEXT = "the quick brown fox jumps over a lazy dog and runs home 猫は 元気です día größe мир"
WORDS = TEXT.split()


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(hub.find("mini"))


@pytest.fixture
def write(tmp_path):
    """Write records to a file; gives its path."""

    def write(name: str, rows: list[dict]) -> str:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def make(tokenizer):
    """Plan one phase over some data sets."""

    def make(*datasets: Dataset, prompts=("", ""), max_tokens=None, **changes) -> plan.Plan:
        phase = {"name": "one", "steps": 10, "batch": 4, "max_length": 64, "lr": 1.0}
        parts: dict = {Phase: phase, Data: {"datasets": datasets}, Loss: {}}
        for name, value in changes.items():
            parts[next(part for part in parts if name in part.__dataclass_fields__)][name] = value
        one = Phase(**parts[Phase])
        recipe = Recipe("pairs", (one,), Data(**parts[Data]), loss=Loss(**parts[Loss]))
        return plan.make(recipe, one, tokenizer, prompts, max_tokens)

    return make


def sentence(rng: random.Random, low: int = 3, high: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def pairs(count: int, seed: int = 0, **fields) -> list[dict]:
    rng = random.Random(seed)
    return [{"query": f"{sentence(rng)} {i}", "pos": f"{sentence(rng, 8, 40)} {i}", **fields} for i in range(count)]


def labelled(counts: dict[str, int]) -> list[dict]:
    rng = random.Random(0)
    rows = [{"text": f"{sentence(rng)} {label} {i}", "label": label} for label in counts for i in range(counts[label])]
    return random.Random(1).sample(rows, len(rows))


def same(a: batches.Batch, b: batches.Batch) -> bool:
    arrays = a.arrays.keys() == b.arrays.keys() and all(np.array_equal(a.arrays[k], b.arrays[k]) for k in a.arrays)
    facts = [dataclasses.replace(one, arrays={}).__dict__ for one in (a, b)]
    return arrays and facts[0] == facts[1]


# ---- Indexes ---------------------------------------------------------------------------------------------------

MESSY = b'\xef\xbb\xbf{"query": "q0", "pos": "p0", "lang": "en"}\r\n\n{"query": "q1", "pos": ["p1", "x"]}\n'
MESSY += b'{"query": "q2", "pos": "p\xc3\xa4", "lang": "de", "group": "g"}'


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kept", ["beside", "elsewhere"])
def test_records_are_found_without_those_before(tmp_path, tokenizer, packed, kept):
    path = tmp_path / f"f.jsonl{packed}"
    pack = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: pa.compress(content, "zstd", asbytes=True)}
    path.write_bytes(pack[packed](MESSY))
    directory = None if kept == "beside" else tmp_path / "new" / "folder"
    for _ in range(2):
        found = index.open(path, tokenizer, directory=directory)
        assert [found[i].texts for i in (2, 0, 1)] == [("q2", "pä"), ("q0", "p0"), ("q1", "p1")]
        assert (found[1].more, found[2].where, len(found)) == (("x",), f"{path}:4", 3)
        assert found.kind == "pair"
        assert found.lang_names == ["en", "de"]
        assert found.langs.tolist() == [0, -1, 1]
        assert found.groups.tolist() == [-1, -1, 0]
        assert found.more.tolist() == [0, 1, 0]
        assert found.starts.tolist() == [0, 2, 5, 7]
        texts = [text for i in range(3) for text in (*found[i].texts, *found[i].more)]
        assert found.lengths.tolist() == [len(tokenizer.encode(text).ids) for text in texts]
    names = sorted(one.name for one in (directory or tmp_path).iterdir() if ".idx" in one.name)
    assert [name.endswith(".idx.npz") for name in names] == ([True] if packed == "" else [False, True])


def test_parquet_is_indexed(tmp_path, tokenizer):
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"text": ["x", "y"], "label": [3, 4]}), path)
    found = index.open(path, tokenizer)
    assert (found[1].texts, found[1].label, found.label_names) == (("y",), 4, ["3", "4"])
    assert found.where(1) == f"{path}, row 2"


def test_an_index_is_made_once_and_again_if_the_file_has_changed(tmp_path, write, tokenizer, monkeypatch):
    path = Path(write("f.jsonl", pairs(5)))
    made = []
    scan = index._scan
    monkeypatch.setattr(index, "_scan", lambda *a: made.append(1) or scan(*a))
    first = index.open(path, tokenizer).content
    assert index.open(path, tokenizer).content == first
    os.utime(path, (1, 1))  # another time, the same records
    assert index.open(path, tokenizer).content == first
    assert index.open(path, tokenizer, on_bad="skip").content == first
    assert len(made) == 1
    path.write_text(path.read_text().replace("fox", "fix"))
    second = index.open(path, tokenizer)
    assert len(made) == 2
    assert second.content != first
    kept = tmp_path / "f.jsonl.idx.npz"
    kept.write_bytes(kept.read_bytes()[:-100])
    assert index.open(path, tokenizer).content == second.content
    assert len(made) == 3
    assert index.open(path, tokenizer, "pair").content == second.content
    with pytest.raises(InputError, match=r'f.jsonl:1: "neg" is missing'):
        index.open(path, tokenizer, "triplet")


def test_the_content_hash_is_that_of_records_not_of_places(tmp_path, write, tokenizer):
    one, two = tmp_path / "a", tmp_path / "b"
    hashes = set()
    for folder in (one, two):
        folder.mkdir()
        hashes.add(index.open(write(f"{folder.name}/f.jsonl", pairs(5)), tokenizer, directory=tmp_path / "i").content)
    assert len(hashes) == 1
    assert len(list((tmp_path / "i").iterdir())) == 2


def test_equal_texts_have_equal_hashes_and_ids_go_first(write, tokenizer):
    rows = [
        {"query": "é", "pos": "p", "pos_id": 1},
        {"query": " e\u0301\n", "pos": "other", "pos_id": "1"},
        {"query": "e", "pos": "p"},
        {"query": "1", "pos": "p", "pos_id": 2},
    ]
    hashes = index.open(write("f.jsonl", rows), tokenizer).hashes.reshape(4, 2)
    assert hashes[0, 0] == hashes[1, 0] != hashes[2, 0]
    assert hashes[0, 1] == hashes[1, 1] == hashes[2, 1] != hashes[3, 1]
    assert hashes.dtype == np.uint64


def test_bad_records_stop_or_are_left_out(write, tokenizer, capsys):
    """T17: bad records."""
    path = write("f.jsonl", [*pairs(3), {"query": "q"}, *pairs(2)])
    with pytest.raises(InputError, match=r'f.jsonl:4: "pos" is missing; a record of the kind pair has query, pos'):
        index.open(path, tokenizer)
    assert not os.path.exists(f"{path}.idx.npz")
    found = index.open(path, tokenizer, on_bad="skip")
    assert (len(found), found.bad, found[3].where) == (5, 1, f"{path}:5")
    assert "f.jsonl: 1 bad record left out; the first: " in capsys.readouterr().err
    with pytest.raises(InputError, match=r'f.jsonl:4: "pos" is missing'):
        index.open(path, tokenizer)


def test_files_without_records_and_files_that_are_not_there(write, tokenizer):
    """T17: missing file."""
    with pytest.raises(InputError, match=r"f.jsonl: has no records$"):
        index.open(write("f.jsonl", []), tokenizer)
    with pytest.raises(InputError, match=r"g.jsonl: has no records; .*: 1 bad record left out"):
        index.open(write("g.jsonl", [{}]), tokenizer, on_bad="skip")
    with pytest.raises(InputError, match=r"no file none.jsonl; check the path"):
        index.open("none.jsonl", tokenizer)


def test_a_file_that_changes_while_it_is_read_is_told(write, tokenizer):
    path = Path(write("f.jsonl", pairs(5)))
    found = index.open(path, tokenizer)
    with path.open("r+b") as handle:
        handle.write(b"x" * 40)
    with pytest.raises(InputError, match=r"f.jsonl:1: not JSON .*; has the file changed since the run began\?"):
        found[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, write, tokenizer, monkeypatch, call, packed):
    """T17: full disk while the index is written."""
    path = Path(write("f.jsonl", pairs(50)))
    if packed:
        (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "f.jsonl.gz"
    before = sorted(tmp_path.iterdir())
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*_):
        raise full

    class Full:
        def __init__(self, handle):
            self.handle = handle

        def __getattr__(self, key):
            return getattr(self.handle, key)

        def write(self, content):
            self.handle.write(content[: len(content) // 2])
            raise full

    @index.contextlib.contextmanager
    def file(target):
        with monkeypatch.context() as patch:
            if call != "write":
                patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), refuse)
            with whole_file(target) as handle:
                yield Full(handle) if call == "write" else handle

    with monkeypatch.context() as patch:
        patch.setattr(index, "whole_file", file)
        with pytest.raises(OSError, match="No space left on device"):
            index.open(path, tokenizer)
    assert sorted(tmp_path.iterdir()) == before
    assert len(index.open(path, tokenizer)) == 50


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_directories_that_cannot_be_written_name_the_way_out(write, tokenizer, monkeypatch, code, tmp_path):
    """T17: unwritable index directory."""
    path = write("f.jsonl", pairs(5))

    @index.contextlib.contextmanager
    def refuse(target):
        raise OSError(code, os.strerror(code), str(target))
        yield

    with monkeypatch.context() as patch:
        patch.setattr(index, "whole_file", refuse)
        with pytest.raises(InputError, match=r"the index of f.jsonl cannot be written there .*name a directory for in"):
            index.open(path, tokenizer)
    with pytest.raises(InputError, match=r"the index of f.jsonl cannot be written there"):
        index.open(path, tokenizer, directory=path)  # a file
    assert len(index.open(path, tokenizer, directory=tmp_path / "elsewhere")) == 5


# ---- Plans -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixture(write):
    rng = random.Random(3)
    triplets = [
        {
            "query": f"{sentence(rng)} {i}",
            "pos": [f"{sentence(rng)} {i}", sentence(rng)] if i % 4 == 0 else f"{sentence(rng)} {i}",
            "neg": [sentence(rng) for _ in range(1 + i % 5)],
        }
        for i in range(20)
    ]
    scored = [{"a": sentence(rng), "b": sentence(rng), "score": i / 10} for i in range(13)]
    texts = [{"text": sentence(rng, 5, 60)} for _ in range(9)]
    langs = [row | {"lang": "de" if i % 3 else "en"} for i, row in enumerate(pairs(30))]
    return (
        Dataset("pairs", write("pairs.jsonl", langs)),
        Dataset("triplets", write("triplets.jsonl", triplets), query_prefix="Q: ", passage_prefix="P: "),
        Dataset("scored", write("scored.jsonl", scored)),
        Dataset("topics", write("labelled.jsonl", labelled({"a": 9, "b": 6, "c": 4}))),
        Dataset("tuples", write("tuples.jsonl", labelled({"a": 9, "b": 6, "c": 4})), loss="info_nce"),
        Dataset("texts", write("texts.jsonl", texts)),
    )


def test_a_batch_holds_one_data_set_and_language(make, mixture):
    """T13: homogeneous batches."""
    one = make(*mixture)
    langs = collections.Counter()
    for step in range(24):
        source, members = one.rows(step)
        batch = one.batch(step)
        names = {record.split(":")[0] for record in batch.records}
        assert names == {batch.dataset} == {source.dataset}
        found = {source.index[int(record)].lang for record in source.records[members]}
        assert found == {batch.lang}
        langs[batch.dataset, batch.lang] += 1
    assert {("pairs", "de"), ("pairs", "en"), ("scored", None)} < set(langs)


@pytest.mark.parametrize("number", range(6))
def test_every_record_comes_once_in_an_epoch_and_no_batch_has_one_twice(make, mixture, number):
    """T13: no duplicate row in a batch; every row once per epoch of the full batches."""
    one = make(mixture[number], by_language=False)
    orders = []
    for epoch in range(3):
        steps = [one.rows(step)[1] for step in range(epoch * one.epoch, (epoch + 1) * one.epoch)]
        assert all(len(set(members.tolist())) == len(members) == 4 for members in steps)
        rows = np.concatenate(steps)
        assert len(set(rows.tolist())) == len(rows)
        orders.append(rows.tolist())
    assert orders[0] != orders[1] != orders[2]
    seen = set(itertools.chain(*orders))
    assert len(seen) > len(orders[0]) or len(orders[0]) == one.records


def test_epochs_are_whole_batches(make, write):
    assert make(Dataset("p", write("p.jsonl", pairs(19)))).epoch == 4
    assert make(Dataset("p", write("p.jsonl", pairs(19))), batch=19).epoch == 1


def test_steps_are_shared_out_by_weight(make, write):
    """T13: proportions."""
    sets = [Dataset(name, write(f"{name}.jsonl", pairs(count))) for name, count in (("a", 400), ("b", 100), ("c", 100))]

    def shares(*sets: Dataset, **changes) -> list[int]:
        one = make(*sets, batch=2, **changes)
        found = collections.Counter(one.rows(step)[0].dataset for step in range(120))
        return [found[name] for name in "abc"]

    assert shares(*sets) == [80, 20, 20]
    assert shares(*sets, alpha=0.5) == [60, 30, 30]
    assert shares(*sets, alpha=0.0) == [40, 40, 40]
    weighted = [dataclasses.replace(one, weight=w) for one, w in zip(sets, (1.0, 2.0, 3.0), strict=True)]
    assert shares(*weighted) == [20, 40, 60]


def test_languages_share_the_steps_of_their_set(make, write):
    rows = [row | {"lang": "en" if i < 30 else "de"} for i, row in enumerate(pairs(40))]
    one = make(Dataset("a", write("a.jsonl", rows), weight=1.0), Dataset("b", write("b.jsonl", pairs(9)), weight=1.0))
    assert [source.name for source in one.sources] == ["a/de", "a/en", "b"]
    assert np.allclose(np.array(one.weights) / sum(one.weights), [0.125, 0.375, 0.5])


def test_batches_do_not_depend_on_threads_start_or_rows(make, mixture):
    """T13: independent of threads."""
    changes = {"prompts": ("query: ", "passage: "), "false_negatives": "unique_id"}
    one, many = (make(*mixture, threads=threads, **changes) for threads in (1, 4))
    assert one.hash == many.hash
    direct = [one.batch(step) for step in range(24)]
    assert all(map(same, direct, one.batches(0, 24)))
    assert all(map(same, direct[5:24], many.batches(5, 24)))
    assert list(many.batches(7, 7)) == []
    assert {batch.loss for batch in direct} == {"info_nce", "cosent", "separation", "mlm"}
    for rows in (np.array([1]), np.array([0, 1])):
        for whole, part in zip(direct, many.batches(0, 24, lambda size, rows=rows: rows), strict=True):
            assert {name: array.shape[1:] for name, array in whole.arrays.items()} == {
                name: array.shape[1:] for name, array in part.arrays.items()
            }
            assert all(np.array_equal(whole.arrays[name][rows], part.arrays[name]) for name in whole.arrays)
            assert part.records == tuple(whole.records[row] for row in rows)
            for name in ("tokens", "padded", "size", "roles", "lang"):
                assert getattr(part, name) == getattr(whole, name)


def test_shapes_are_known_without_reading(make, mixture):
    one = make(*mixture)
    for step in range(20):
        assert one.shape(step) == one.batch(step).arrays["tokens"].shape


def test_the_seed_decides_the_order(make, mixture, tokenizer):
    phase = Phase("one", 10, 4, 64, 1.0)
    plans = [plan.make(Recipe("pairs", (phase,), Data(mixture[:1]), seed=seed), phase, tokenizer) for seed in (0, 0, 1)]
    orders = [[one.batch(step).records for step in range(4)] for one in plans]
    assert orders[0] == orders[1] != orders[2]
    assert plans[0].hash == plans[1].hash != plans[2].hash


def test_the_hash_covers_what_decides_batches_and_no_more(tmp_path, make, write):
    """T17: a changed file changes the plan."""
    rows = pairs(12)
    path, moved = write("a.jsonl", rows), tmp_path / "moved"
    moved.mkdir()
    base = Dataset("a", path)
    first = make(base).hash
    assert first == make(base, threads=7, steps=99, lr=0.5, grad_cache=2).hash
    assert first == make(Dataset("a", write("moved/b.jsonl", rows)), index=str(tmp_path / "i")).hash
    others = [
        make(base, batch=6),
        make(base, max_length=32),
        make(base, min_tokens=5),
        make(base, alpha=0.5),
        make(base, false_negatives="unique_id"),
        make(base, prompts=("q: ", "")),
        make(base, max_tokens=40),
        make(dataclasses.replace(base, lang="de")),
        make(dataclasses.replace(base, weight=2.0)),
        make(dataclasses.replace(base, query_prefix="x")),
        make(dataclasses.replace(base, hold_out=0.2)),
        make(base, Dataset("b", path)),
        make(Dataset("a", write("c.jsonl", [*rows[:-1], rows[-1] | {"pos": "changed"}]))),
    ]
    hashes = [one.hash for one in others]
    assert len({first, *hashes}) == 1 + len(hashes)


def test_the_hash_covers_the_order_whatever_made_it(make, write, monkeypatch):
    base = Dataset("a", write("a.jsonl", pairs(12)))
    first, rows = make(base).hash, plan.Plan.rows
    monkeypatch.setattr(plan.Plan, "rows", lambda self, step: (rows(self, step)[0], rows(self, step)[1][::-1]))
    assert make(base).hash != first


def test_held_out_records_are_the_last(make, write):
    one = make(Dataset("a", write("a.jsonl", pairs(30)), hold_out=0.2))
    assert one.sources[0].records.tolist() == list(range(24))


def test_short_records_and_other_sets_are_left_out(make, write, tokenizer):
    rows = pairs(10) + [{"query": "a", "pos": "b"}] * 5
    sets = (Dataset("a", write("a.jsonl", rows)), Dataset("b", write("b.jsonl", rows)))
    one = make(*sets, min_tokens=5, datasets=("b",))
    assert [(source.name, len(source.records)) for source in one.sources] == [("b", 10)]
    with pytest.raises(InputError, match="a: all 15 records are held out or below 500 tokens"):
        make(*sets, min_tokens=500)
    with pytest.raises(InputError, match="one: there is no data set; name some"):
        make()


def test_lengths_part_records(make, write):
    one = make(Dataset("a", write("a.jsonl", pairs(40))), buckets=(24, 40), batch=2)
    bounds = {"a/up to 24 tokens": (0, 24), "a/up to 40 tokens": (25, 40), "a/over 40 tokens": (41, 64)}
    assert [source.name for source in one.sources] == list(bounds)
    assert sum(len(source.records) for source in one.sources) == 40
    for step in range(40):
        source, members = one.rows(step)
        longest = np.minimum(source.index.longest(), 64)[source.records[members]]
        low, high = bounds[source.name]
        assert low <= longest.min() <= longest.max() <= high


# ---- Problems --------------------------------------------------------------------------------------------------


def test_sets_that_are_too_small_are_named(make, write):
    """T17: too-small data set."""
    rows = [row | {"lang": "en" if i else "de"} for i, row in enumerate(pairs(9))]
    sets = (Dataset("a", write("a.jsonl", rows)), Dataset("b", write("b.jsonl", pairs(3))))
    with pytest.raises(InputError) as error:
        make(*sets)
    fix = "lower its batch, take languages or lengths together (data.by_language, data.buckets), or leave it out"
    assert str(error.value).splitlines() == [
        f"a/de: 1 records do not make a batch of 4; {fix}",
        f"b: 3 records do not make a batch of 4; {fix}",
    ]
    assert make(sets[0], dataclasses.replace(sets[1], batch=3), by_language=False).epoch == 3


def test_losses_that_do_not_fit_are_refused(make, write):
    path = write("a.jsonl", pairs(9))
    with pytest.raises(InputError, match="a: the loss cosent is for records of scored, but these are pair"):
        make(Dataset("a", path, loss="cosent"))
    with pytest.raises(InputError, match="a: without in-batch negatives its records need negatives of their own"):
        make(Dataset("a", path, in_batch_negatives=False))
    with pytest.raises(InputError, match="a: max_length=4 leaves no room for a text; its prefix takes"):
        make(Dataset("a", path, query_prefix="the quick brown fox"), max_length=4)


def test_labels_that_make_no_batches_are_refused(make, write):
    one = write("one.jsonl", labelled({"a": 9}))
    single = write("single.jsonl", labelled({str(i): 1 for i in range(9)}))
    with pytest.raises(InputError, match="a: 9 records have too few labels, or too few of one, for a batch of 4"):
        make(Dataset("a", one))
    with pytest.raises(InputError, match="a: 9 records have too few labels, or too few of one, for a batch of 4"):
        make(Dataset("a", single))
    with pytest.raises(InputError, match="a: separation needs an even batch of at least 4, not 3"):
        make(Dataset("a", one, batch=3))
    with pytest.raises(InputError, match="a: all records have one label, so that there are no negatives"):
        make(Dataset("a", one, loss="info_nce"))
    with pytest.raises(InputError, match="a: too few of its 9 records share a label for a batch of 4"):
        make(Dataset("a", single, loss="info_nce"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.ones((9, 4, 1), np.float32), r"must be floats \[9, Dt\], .* of a, not float32 \[9, 4, 1\]"),
        (np.ones((8, 4), np.float32), r"must be floats \[9, Dt\], .* of a, not float32 \[8, 4\]"),
        (np.ones((9, 4), np.int32), r"must be floats \[9, Dt\], .* of a, not int32 \[9, 4\]"),
        (b"no array", "cannot be read as .npy"),
        (None, "no file .*, the teacher of a; check the path"),
    ],
)
def test_teachers_of_the_wrong_shape_are_refused(tmp_path, make, write, content, message):
    """T17: wrong teacher shape."""
    teacher = tmp_path / "t.npy"
    if isinstance(content, bytes):
        teacher.write_bytes(content)
    elif content is not None:
        np.save(teacher, content)
    path = write("a.jsonl", [{"text": row["pos"]} for row in pairs(9)])
    with pytest.raises(InputError, match=message):
        make(Dataset("a", path, loss="distill", teacher=str(teacher)))
    with pytest.raises(InputError, match="a: the loss distill needs a teacher"):
        make(Dataset("a", path, loss="distill"))


def test_what_goes_wrong_in_a_thread_is_told_as_it_is(make, write):
    path = Path(write("a.jsonl", pairs(9)))
    one = make(Dataset("a", str(path)))
    path.write_bytes(b"\n" * path.stat().st_size)
    with pytest.raises(InputError, match="has the file changed since the run began"):
        list(one.batches(0, 2))


def test_grain_that_is_not_there_is_named(make, write, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"training needs grain to read records; pip install 'jina-jax\[train\]'"):
        make(Dataset("a", write("a.jsonl", pairs(9))))


# ---- Batches ---------------------------------------------------------------------------------------------------


def texts_of(batch: batches.Batch, tokenizer, row: int) -> list[str]:
    tokens, lengths = batch.arrays["tokens"][row], batch.arrays["lengths"][row]
    return [
        tokenizer._backend.decode(ids[:length].tolist(), skip_special_tokens=False)
        for ids, length in zip(tokens, lengths, strict=True)
    ]


def plain(tokenizer, text: str) -> str:
    return tokenizer._backend.decode(tokenizer.encode(text).ids.tolist(), skip_special_tokens=False)


def test_tokens_are_those_of_prefix_and_text(make, mixture, tokenizer):
    one = make(mixture[1], negatives=3)
    for batch in one.batches(0, 8):
        tokens, lengths = batch.arrays["tokens"], batch.arrays["lengths"]
        assert tokens.shape[:2] == lengths.shape == (4, 5)
        assert batch.roles == (0, 1, 1, 1, 1)
        assert np.all(tokens[np.arange(tokens.shape[2]) >= lengths[..., None]] == tokenizer.pad_id)
        assert lengths[:, :2].min() > 0
        for row, name in enumerate(batch.records):
            example = one.sources[0].index[int(name.split(":")[1]) - 1]
            found = texts_of(batch, tokenizer, row)
            assert found[0] == plain(tokenizer, "Q: " + example.texts[0])
            assert found[1] in [plain(tokenizer, "P: " + text) for text in example.positives]
            there = [text for text in found[2:] if text]
            assert len(there) == min(3, len(example.negatives)) == len(set(there))
            assert set(there) <= {plain(tokenizer, "P: " + text) for text in example.negatives}


def test_another_epoch_takes_other_positives_and_negatives(make, mixture, tokenizer):
    one = make(mixture[1], negatives=2, batch=20)
    positives, negatives = collections.defaultdict(set), collections.defaultdict(set)
    for batch in one.batches(0, 12):
        for row, name in enumerate(batch.records):
            found = texts_of(batch, tokenizer, row)
            positives[name].add(found[1])
            negatives[name] |= set(found[2:]) - {""}
    index_ = one.sources[0].index
    for name in positives:
        example = index_[int(name.split(":")[1]) - 1]
        assert len(positives[name]) == len(example.positives)
        assert len(negatives[name]) == len(set(example.negatives))


def test_the_number_of_negatives_is_that_of_the_set(make, mixture, write):
    assert make(mixture[1], negatives=99).batch(0).arrays["tokens"].shape[1] == 2 + 5
    one = make(mixture[1], negatives=0).batch(0)
    assert one.arrays["tokens"].shape[1] == 2
    assert "negative_ids" not in one.arrays
    assert one.in_batch
    assert not make(dataclasses.replace(mixture[1], in_batch_negatives=False)).batch(0).in_batch


def test_ids_are_alike_for_equal_texts(make, write):
    rows = [
        {"query": "q", "pos": "p", "neg": ["x", "p"], "group": "g"},
        {"query": "r", "pos": " p ", "neg": ["y"], "group": "h"},
        {"query": "q", "pos": "z", "neg": ["x", "z", "w"], "group": "g"},
        {"query": "s", "pos": "t", "neg": ["u"]},
    ]
    batch = make(Dataset("a", write("a.jsonl", rows))).batch(0)
    order = np.argsort([int(name.split(":")[1]) for name in batch.records])
    arrays = {name: array[order] for name, array in batch.arrays.items()}
    assert all(arrays[name].dtype == np.int32 for name in ("query_ids", "passage_ids", "negative_ids", "groups"))
    queries, passages, negatives = arrays["query_ids"], arrays["passage_ids"], arrays["negative_ids"]
    assert queries[0] == queries[2]
    assert len(set(queries.tolist())) == 3
    assert passages[0] == passages[1]
    assert len(set(passages.tolist())) == 3
    assert passages[0] in negatives[0]
    assert passages[2] in negatives[2]
    assert set(negatives[0]) & set(negatives[2]) - {-1}
    assert (negatives == -1).sum(axis=1).tolist() == [1, 2, 0, 2]
    assert np.array_equal(negatives == -1, arrays["lengths"][:, 2:] == 0)
    groups = arrays["groups"]
    assert groups[0] == groups[2] != groups[1] != groups[3] == -1


def test_scores_go_with_their_texts(make, mixture, tokenizer):
    for batch in make(mixture[2]).batches(0, 3):
        assert (batch.loss, batch.roles) == ("cosent", (0, 0))
        assert batch.arrays["scores"].dtype == np.float32
        expected = [(int(name.split(":")[1]) - 1) / 10 for name in batch.records]
        assert np.allclose(batch.arrays["scores"], expected)


def test_teachers_go_with_their_records(tmp_path, make, write):
    np.save(tmp_path / "t.npy", np.arange(18, dtype=np.float64).reshape(9, 2))
    path = write("a.jsonl", pairs(9))
    one = make(Dataset("a", path, loss="distill", teacher=str(tmp_path / "t.npy")))
    batch = one.batch(0)
    assert batch.arrays["tokens"].shape[1] == 1
    numbers = np.array([int(name.split(":")[1]) - 1 for name in batch.records])
    assert np.array_equal(batch.arrays["teacher"], np.stack([2 * numbers, 2 * numbers + 1], 1).astype(np.float32))
    np.save(tmp_path / "t.npy", np.ones((9, 2)))
    assert make(Dataset("a", path, loss="distill", teacher=str(tmp_path / "t.npy"))).hash != one.hash


@pytest.mark.parametrize(
    "counts",
    [{"a": 8, "b": 8}, {"a": 97, "b": 2, "c": 2}, {"a": 5, "b": 5, "c": 5, "d": 1}, {str(i): 3 for i in range(20)}],
)
def test_batches_for_separation_have_two_of_a_label_and_two_labels(counts):
    labels = np.repeat(np.arange(len(counts)), list(counts.values()))
    for batch in (4, 6, 8):
        deal = draws.Companions(labels, batch, 5)
        assert deal.batches > 0
        drawn = np.stack([deal(number) for number in range(3 * deal.batches)])
        assert drawn.shape == (3 * deal.batches, batch)
        for row in drawn:
            found = collections.Counter(labels[row].tolist())
            assert len(set(row.tolist())) == batch
            assert len(found) >= 2
            assert min(found.values()) >= 2
        assert not np.array_equal(drawn[: deal.batches], drawn[deal.batches : 2 * deal.batches])
        assert np.array_equal(deal(1), draws.Companions(labels, batch, 5)(1))


def test_labels_of_a_batch_are_those_of_its_records(make, mixture):
    for batch in make(mixture[3]).batches(0, 6):
        index_ = make(mixture[3]).sources[0].index
        labels = [index_[int(name.split(":")[1]) - 1].label for name in batch.records]
        codes = batch.arrays["labels"]
        assert len(dict(zip(codes.tolist(), labels, strict=True))) == len(set(labels)) == len(set(codes.tolist()))


def test_tuples_have_one_label_and_others(make, mixture, tokenizer):
    one = make(mixture[4], negatives=7)
    index_ = one.sources[0].index
    labels = {plain(tokenizer, index_[i].texts[0]): index_[i].label for i in range(len(index_))}
    partners = collections.defaultdict(set)
    for batch in one.batches(0, 30):
        assert batch.arrays["tokens"].shape[1] == 9
        for row in range(4):
            found = texts_of(batch, tokenizer, row)
            assert len(set(found)) == 9
            assert labels[found[0]] == labels[found[1]]
            assert labels[found[0]] not in [labels[text] for text in found[2:]]
            partners[found[0]].add(found[1])
    assert all(len(found) > 1 for found in partners.values())


def test_tuples_take_fewer_negatives_where_there_are_fewer(make, write):
    path = write("a.jsonl", labelled({"a": 6, "b": 3}))
    assert make(Dataset("a", path, loss="info_nce"), negatives=7).batch(0).arrays["tokens"].shape[1] == 2 + 3


def test_labels_or_ids_keep_false_negatives_apart(make, mixture, tokenizer):
    batch = make(mixture[4]).batch(0)
    assert batch.arrays["groups"].tolist() == [-1] * 4
    one = make(mixture[4], false_negatives="label")
    index_ = one.sources[0].index
    batch = one.batch(0)
    numbers = [int(name.split(":")[1]) - 1 for name in batch.records]
    assert [json.loads(index_.label_names[code]) for code in batch.arrays["groups"]] == [
        index_[number].label for number in numbers
    ]
    batch = make(mixture[4], false_negatives="unique_id", max_length=12).batch(0)
    for row, name in enumerate(batch.records):
        suffix = tokenizer.encode(f" {name.split(':')[1]}").ids[1:]
        for tokens, length in zip(batch.arrays["tokens"][row], batch.arrays["lengths"][row], strict=True):
            assert tokens[:length][-len(suffix) :].tolist() == suffix.tolist()
            assert length <= 12


def test_lengths_are_few_and_counts_are_those_of_all_rows(make, write):
    one = make(Dataset("a", write("a.jsonl", pairs(40))), max_length=40)
    for batch in one.batches(0, 10):
        T = batch.arrays["tokens"].shape[2]
        assert T in (16, 32, 40)
        assert batch.arrays["lengths"].max() <= T
        assert batch.tokens == batch.arrays["lengths"].sum()
        assert batch.padded == batch.arrays["tokens"].size
    assert [batches.padded_length(n, 100) for n in (3, 16, 17, 97, 150)] == [16, 16, 32, 100, 100]


def test_texts_to_be_told_are_hidden_alike_each_time(make, mixture):
    one = make(mixture[5], mask_rate=0.3)
    first, second = one.batch(1), one.batch(1)
    assert same(first, second)
    assert first.loss == "mlm"
    arrays = first.arrays
    assert arrays["tokens"].shape[1] == 1
    assert arrays["positions"].shape == arrays["targets"].shape == arrays["weights"].shape
    later = next(b for b in one.batches(2, 40) if set(b.records) & set(first.records))
    name = (set(later.records) & set(first.records)).pop()
    rows = first.records.index(name), later.records.index(name)
    assert not np.array_equal(arrays["positions"][rows[0]][:4], later.arrays["positions"][rows[1]][:4])


def test_a_batch_is_made_fast(make, write):
    """256 pairs of 192 tokens take some 60 ms with two threads of a slow machine."""
    rng = random.Random(0)
    rows = [{"query": sentence(rng, 10, 30), "pos": sentence(rng, 100, 140)} for _ in range(1024)]
    one = make(Dataset("a", write("a.jsonl", rows)), batch=256, max_length=192)
    list(one.batches(0, 2))
    start = time.perf_counter()
    assert len(list(one.batches(0, 6))) == 6
    assert (time.perf_counter() - start) / 6 < 0.5  # a bound for busy machines; it must not be a step's time


def test_describe(make, mixture):
    lines = make(*mixture).describe()
    assert lines[0] == "pairs/de: 20 pair records by info_nce, 18.2% of the steps, 5 batches of 4 an epoch"
    assert lines[-1].startswith("7 sources, 110 records, ")
