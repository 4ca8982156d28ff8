"""Losses against stored values of another library, against that library, against loops, and at their limits."""

import functools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, assert_close_relative

import jina_jax
from jina_jax.train import losses

# The same sums in another order, in float64.
EXACT = 1e-12
# The same in float32, relative to the largest component.
FLOAT32 = 1e-6
# For programs that run once: they compile in half the time.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MESHES = [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# ---- Stored values ---------------------------------------------------------------------------------------------------


def sequence(rows, width, seed):
    """Numbers that every language computes alike."""
    state = (seed * 2654435761 + 12345) % 2**32
    values = []
    for _ in range(rows * width):
        state = (1664525 * state + 1013904223) % 2**32
        values.append(state / 2**31 - 1)
    return np.array(values).reshape(rows, width)


def inputs(K=8, D=64, M=3):
    q = sequence(K, D, 1)
    hard = [0.1 * q + sequence(K, D, 3 + j) for j in range(M)]
    return q, 0.15 * q + sequence(K, D, 2), *hard


@pytest.fixture(scope="module")
def goldens(data):
    return json.loads((data / "loss_goldens.json").read_text())


def half(tau):
    """Theirs is the mean of both directions, ours the sum."""
    return lambda q, p, *hard: losses.info_nce(q, p, stacked(hard), tau=tau) / 2


def one_way(tau):
    """Queries among passages alone: all other records' passages and all negatives, given as each query's own."""

    def loss(q, p, *hard):
        K = len(q)
        others = np.array([[j for j in range(K) if j != i] for i in range(K)])
        more = (
            jnp.broadcast_to(jnp.concatenate(hard)[None], (K, K * len(hard), q.shape[1])) if hard else p[others[:, :0]]
        )
        return losses.info_nce(q, p, jnp.concatenate([p[others], more], axis=1), tau=tau, in_batch=False)

    return loss


def stacked(hard):
    return jnp.stack(hard, axis=1) if hard else None


def case(name, goldens):
    """The loss that a stored case is of, and its inputs."""
    q, p, *hard = inputs()
    scores, labels = (jnp.asarray(goldens[key]) for key in ("scores", "labels"))
    kind, _, tau = name.partition("_tau")
    tau = float(tau or 0.05)
    ordered = lambda a, b: losses.cosent(losses.cosine(a, b), scores, tau=tau)  # noqa: E731
    sizes, weights = (64, 32, 16, 8), (1.0, 0.5, 0.25, 0.125)
    return {
        "mnrl_q2d": (one_way(tau), (q, p)),
        "mnrl_q2d_hn": (one_way(tau), (q, p, *hard)),
        "mnrl_sym": (half(tau), (q, p)),
        "mnrl_sym_hn": (half(tau), (q, p, *hard)),
        "gte_joint": (lambda q, p: losses.info_nce(q, p, tau=tau, directions="joint"), (q, p)),
        "cosent": (ordered, (q, p)),
        "separation_cosent": (lambda x: losses.separation(x, labels.astype(jnp.int32), tau=tau), (p,)),
        "matryoshka_mnrl_q2d": (lambda *x: losses.matryoshka(one_way(tau), sizes)(*x)[0], (q, p)),
        "matryoshka_sym_hn_w": (lambda *x: losses.matryoshka(half(tau), sizes, weights)(*x)[0], (q, p, *hard)),
        "matryoshka_cosent": (lambda *x: losses.matryoshka(ordered, sizes)(*x)[0], (q, p)),
    }[kind]


STORED = [
    *(f"{kind}_tau{tau}" for tau in (0.05, 0.02) for kind in ("mnrl_q2d", "mnrl_sym", "mnrl_q2d_hn", "mnrl_sym_hn")),
    *(f"{kind}_tau{tau}" for tau in (0.05, 0.02) for kind in ("gte_joint", "cosent")),
    *("matryoshka_mnrl_q2d", "matryoshka_sym_hn_w", "matryoshka_cosent", "separation_cosent_tau0.02"),
]


@pytest.mark.parametrize("name", STORED)
def test_stored_values_and_gradients(name, goldens):
    """T1: the value, the norm of each gradient and its first components, in float64."""
    stored = goldens["cases"][name]
    with jax.enable_x64(True):
        loss, given = case(name, goldens)
        run = jit(jax.value_and_grad(loss, argnums=tuple(range(len(given)))))
        value, gradients = run(*map(jnp.asarray, given))
        assert_close(value, stored["value"], EXACT * max(1.0, stored["value"]))
        for gradient, norm, first in zip(gradients, stored["grad_norm"], stored["grad0"], strict=True):
            assert gradient.dtype == jnp.float64
            assert_close(np.linalg.norm(gradient), norm, EXACT * max(1.0, norm))
            assert_close(gradient[0, :4], first, EXACT * max(1.0, norm))


def test_every_stored_case_is_compared(goldens):
    """The one that is not is the paper's equation as printed, which is always 0."""
    assert {*goldens["cases"]} - {*STORED} == {"separation_eq5_literal_same_label_only"}


# ---- The other library itself ----------------------------------------------------------------------------------------


def torch_loss(kind, tau):
    """A loss of sentence-transformers as a function of vectors; its model is never run."""
    import torch
    from sentence_transformers.sentence_transformer import losses as theirs

    class Given(torch.nn.Module):
        """Gives back the vectors that it is given."""

        def forward(self, features):
            return {"sentence_embedding": features["x"]}

        def get_embedding_dimension(self):
            return 32

    def ranking(**options):
        return theirs.MultipleNegativesRankingLoss(Given(), scale=1 / tau, **options)

    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    everything = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    scores = torch.tensor(SCORES)
    if kind == "both":
        return lambda *x: 2 * ranking(**both).compute_loss_from_embeddings([*x], None)
    if kind == "joint":
        return lambda *x: ranking(directions=everything).compute_loss_from_embeddings([*x], None)
    if kind == "hardness":
        options = both | {"hardness_mode": "all_negatives", "hardness_strength": 7.0}
        return lambda *x: 2 * ranking(**options).compute_loss_from_embeddings([*x], None)
    if kind == "own":
        options = {"hardness_mode": "hard_negatives", "hardness_strength": 7.0}
        return lambda *x: (
            sum(ranking(**options).compute_loss_from_embeddings([one[i : i + 1] for one in x], None) for i in range(6))
            / 6
        )
    if kind == "matryoshka":
        inner = ranking(**both)
        loss = theirs.MatryoshkaLoss(inner.model, inner, [32, 16, 8], [1, 0.5, 2])
        return lambda *x: 2 * loss([{"x": one} for one in x], None)
    if kind == "cosent":
        loss = theirs.CoSENTLoss(Given(), scale=1 / tau)
        return lambda a, b, *_: loss.compute_loss_from_embeddings([a, b], scores)
    loss = theirs.GlobalOrthogonalRegularizationLoss(Given())
    return lambda a, *_: sum(loss.compute_loss_from_embeddings([a]).values())


SCORES = [0.1, 0.5, 0.5, 0.9, 0.2, 0.1]


def our_loss(kind, tau):
    whole = lambda q, p, n, **options: losses.info_nce(q, p, n, tau=tau, **options)  # noqa: E731
    return {
        "both": whole,
        "joint": lambda q, p, n: whole(q, p, n, directions="joint"),
        "hardness": lambda q, p, n: whole(q, p, n, hardness=7.0),
        "own": lambda q, p, n: whole(q, p, n, hardness=7.0, in_batch=False),
        "matryoshka": lambda *x: losses.matryoshka(whole, (32, 16, 8), (1.0, 0.5, 2.0))(*x)[0],
        "cosent": lambda q, p, _: losses.cosent(losses.cosine(q, p), jnp.asarray(SCORES), tau=tau),
        "spread_out": lambda q, *_: losses.spread_out(q),
    }[kind]


@pytest.mark.parametrize("kind", ["both", "joint", "hardness", "own", "matryoshka", "cosent", "spread_out"])
@pytest.mark.parametrize("tau", [0.05, 0.02])
def test_losses_and_gradients_are_those_of_sentence_transformers(kind, tau):
    """T2: all components of all gradients; in float64, and in float32 against their float64."""
    pytest.importorskip("sentence_transformers")
    import torch

    q = drawn(0, 6, 32)
    q[1:] += q[:1]  # close to each other, so that no loss is trivial
    given = [np.float32(x) for x in (q, q + drawn(1, 6, 32), q[:, None] + drawn(2, 6, 2, 32))]
    leaves = [torch.tensor(x).double().requires_grad_() for x in given]
    wanted = torch_loss(kind, tau)(leaves[0], leaves[1], leaves[2][:, 0], leaves[2][:, 1])
    wanted.backward()
    gradients = [np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy() for leaf in leaves]

    def check(dtype, tolerance):
        run = jit(jax.value_and_grad(our_loss(kind, tau), argnums=(0, 1, 2)))
        value, ours = run(*(x.astype(dtype) for x in given))
        assert_close_relative(value, wanted.detach().numpy(), tolerance)
        for one, other in zip(ours, gradients, strict=True):
            assert one.dtype == dtype
            assert_close_relative(one, other, tolerance)

    # Rounding errors of logits are relative to 1 / tau, which is as large as these get: two of them in float32, where
    # theirs are none, and some more where both are rounded.
    check(np.float32, 2 * 2.0**-24 / tau)
    with jax.enable_x64(True):
        check(np.float64, 2 * 2.0**-53 / tau * 10)


# ---- What is no negative ---------------------------------------------------------------------------------------------


def by_hand(q, p, n, *, tau, query_ids, passage_ids, negative_ids, negative_mask, groups, negative_groups, **options):
    """The definition, candidate by candidate."""
    K, M = n.shape[:2]
    q, p, n = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, p, n))
    margin, hardness = options.get("margin"), options.get("hardness", 0.0)

    def differ(i, j):
        grouped = groups[i] == groups[j] and groups[i] >= 0
        return query_ids[i] != query_ids[j] and passage_ids[i] != passage_ids[j] and not grouped

    def terms(i, anchor, others, hard, harder=0.0):
        """Logits of the negatives of record i."""
        pair, out = q[i] @ p[i], []
        found = [anchor @ others[j] for j in range(K) if j != i and differ(i, j)] if others is not None else []
        for j in range(K):
            for m in range(M):
                mine = hard == "all" or (hard == "own" and i == j) or (hard == "others" and i != j)
                grouped = negative_groups[j, m] == groups[i] and groups[i] >= 0
                if mine and negative_mask[j, m] and negative_ids[j, m] != passage_ids[i] and not grouped:
                    found.append(anchor @ n[j, m])
        for cosine in found:
            if margin is None or cosine <= pair + margin:
                out.append(cosine / tau + harder * cosine)
        return out

    rows = []
    for i in range(K):
        pair = q[i] @ p[i] / tau
        if not options.get("in_batch", True):
            rows.append(np.logaddexp.reduce([pair, *terms(i, q[i], None, "own", hardness)]) - pair)
            continue
        forth, back = terms(i, q[i], p, "all", hardness), terms(i, p[i], q, "none")
        if options.get("directions") == "joint":
            within = [*terms(i, q[i], q, "none"), *terms(i, p[i], p, "others")]
            rows.append(np.logaddexp.reduce([pair, *forth, pair, *back, *within]) - pair)
        else:
            both = np.logaddexp.reduce([pair, *forth]) + np.logaddexp.reduce([pair, *back])
            rows.append(both - 2 * pair)
    return np.mean(rows)


def batch_with_everything(K=6, M=2, D=8):
    """Equal queries, equal passages, absent negatives, negatives that are passages, groups."""
    q = drawn(0, K, D)
    p, n = 0.5 * q + drawn(1, K, D), 0.3 * q[:, None] + drawn(2, K, M, D)
    mask = np.ones((K, M), bool)
    mask[1, 1] = mask[3] = False
    ids = {
        "query_ids": np.array([0, 1, 0, 2, 3, 4], np.int32),
        "passage_ids": np.array([0, 1, 2, 3, 1, 4], np.int32),
        "negative_ids": np.array([[9, 3], [0, 8], [4, 10], [1, 1], [11, 12], [13, 2]], np.int32),
        "negative_mask": mask,
        "groups": np.array([-1, 5, -1, 5, -1, 7], np.int32),
        "negative_groups": np.array([[7, -1], [-1, 2], [-1, 5], [-1, -1], [5, 7], [-1, -1]], np.int32),
    }
    return (q, p, n), ids


OPTIONS = {
    "both": {},
    "joint": {"directions": "joint"},
    "own": {"in_batch": False},
    "margin": {"margin": 0.1},
    "hard": {"hardness": 5.0},
    "all": {"directions": "joint", "margin": 0.05, "hardness": 3.0},
    "own and hard": {"in_batch": False, "margin": 0.1, "hardness": 3.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_duplicates_groups_and_absent_negatives_do_not_count(name):
    """T5: the loss is that of loops over what is left."""
    given, ids = batch_with_everything()
    with jax.enable_x64(True):
        ours = jit(lambda given, ids: losses.info_nce(*given, tau=0.1, **ids, **OPTIONS[name]))(given, ids)
        assert_close(ours, by_hand(*given, tau=0.1, **ids, **OPTIONS[name]), EXACT)


def test_copies_are_no_negatives_of_each_other():
    """T5: of four records the first two are equal; each is compared with the other two alone, these with both."""
    q, p = drawn(0, 4, 8), drawn(1, 4, 8)
    q[1], p[1] = q[0], p[0]
    ids = jnp.array([0, 0, 1, 2], jnp.int32)
    with jax.enable_x64(True):
        loss = jit(lambda q, p: losses.info_nce(q, p, tau=0.1, query_ids=ids, passage_ids=ids))
        found = loss(q, p)
    logits = np.einsum("id,jd->ij", *(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, p))) / 0.1
    left = [[0, 2, 3], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    wanted = sum(np.logaddexp.reduce(s[i, left[i]]) - s[i, i] for s in (logits, logits.T) for i in range(4)) / 4
    assert_close(found, wanted, EXACT)


@pytest.mark.parametrize("options", [{}, {"directions": "joint"}, {"in_batch": False}], ids=str)
def test_nothing_left_is_no_loss_and_no_gradient(options):
    """T5: rows whose candidates are all masked are finite; their own pair stays."""
    q, p, n = (jnp.asarray(drawn(seed, *shape), jnp.float32) for seed, shape in enumerate([(4, 8), (4, 8), (4, 2, 8)]))
    same = jnp.zeros(4, jnp.int32)
    masks = {"groups": same, "negative_mask": jnp.zeros((4, 2), bool)}
    loss = lambda *x: losses.info_nce(*x, tau=0.02, **masks, **options)  # noqa: E731
    value, gradients = jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, p, n)
    # With one softmax over all directions, the pair is there twice.
    assert_close(value, np.log(2) if options.get("directions") == "joint" else 0.0, 1e-5)
    for gradient in gradients:
        assert_close(gradient, np.zeros(gradient.shape), 1e-5)


def test_vectors_of_zeros_have_finite_gradients():
    zeros, labels = jnp.zeros((4, 8)), jnp.array([0, 0, 1, 1], jnp.int32)

    def total(x):
        near = losses.cosent(losses.cosine(x, x), labels, tau=0.05)
        parts = (losses.info_nce(x, x, tau=0.02), losses.separation(x, labels, tau=0.02), near, losses.spread_out(x))
        return sum(parts) + losses.distill(x, x + 1, how="cosine") + losses.distill(x, x + 1, how="similarity_kl")

    value, gradient = jit(jax.value_and_grad(total))(zeros)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["all", "own and hard"])
def test_chunks_of_rows_change_nothing(name):
    """Of 6 rows, 4 at most are held: 3 at a time."""
    given, ids = batch_with_everything()
    with jax.enable_x64(True):
        given, ids = jax.tree.map(jnp.asarray, (given, ids))

        def loss(chunk, *x):
            return losses.info_nce(*x, tau=0.1, chunk=chunk, **ids, **OPTIONS[name])

        run = jit(jax.value_and_grad(loss, argnums=(1, 2, 3)), static_argnums=0)
        (one, ones), (other, others) = run(None, *given), run(4, *given)
        assert_close(other, one, EXACT)
        for a, b in zip(others, ones, strict=True):
            assert_close(a, b, EXACT)


def test_chunks_of_rows_need_less_memory():
    x = jax.ShapeDtypeStruct((1024, 16), jnp.float32)

    def memory(chunk):
        gradient = jax.grad(lambda q, p: losses.info_nce(q, p, tau=0.05, chunk=chunk), argnums=(0, 1))
        return jax.jit(gradient).lower(x, x).compile().memory_analysis().temp_size_in_bytes

    assert memory(64) <= memory(None) / 8  # 16 times fewer rows, and some for the candidates


def test_what_contradicts_itself_is_refused():
    q, n, ids = jnp.ones((2, 4)), jnp.ones((2, 3, 4)), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(ValueError, match="must be both or joint"):
        losses.info_nce(q, q, tau=0.1, directions="forth")
    with pytest.raises(ValueError, match="negatives is None"):
        losses.info_nce(q, q, tau=0.1, negative_ids=ids)
    with pytest.raises(ValueError, match="need passage_ids"):
        losses.info_nce(q, q, n, tau=0.1, negative_ids=ids)
    with pytest.raises(ValueError, match="width 8 cannot be compared with vectors of width 4"):
        losses.distill(q, jnp.ones((2, 8)))
    with pytest.raises(ValueError, match="must be cosine or similarity_kl"):
        losses.distill(q, q, how="l2")
    with pytest.raises(ValueError, match="must be sum or mean"):
        losses.matryoshka(losses.spread_out, (2,), reduce="max")
    with pytest.raises(ValueError, match="2 weights for 1 sizes"):
        losses.matryoshka(losses.spread_out, (2,), (1.0, 2.0))
    with pytest.raises(ValueError, match="the model's own size"):
        losses.matryoshka(losses.spread_out, (8,))(q)


def test_statistics():
    q = jnp.eye(4)[:3]
    p = jnp.array([[1.0, 0, 0, 0], [0.6, 0.8, 0, 0], [0, 0.8, 0.6, 0]])
    n = jnp.array([[[0.0, 0, 0, 1]], [[0, 0, 0, 2]], [[0, 0, 1, 0]]])
    mask = jnp.array([[True], [False], [True]])
    look = jit(losses.info_nce_statistics, static_argnames="chunk")
    found = look(q, p, n, negative_mask=mask)
    # Rows of cosines: [1 .6 0 | 0 -], [0 .8 .8 | - 0], [0 0 .6 | 0 1]; the second is a tie, which is not a win.
    wanted = {"accuracy": 1 / 3, "positive": 0.8, "negative": (0.6 + 0.8 + 1) / 12, "hardest": 0.8, "masked": 0}
    found, wanted = ({name: float(value) for name, value in one.items()} for one in (found, wanted))
    assert found == pytest.approx(wanted, abs=1e-6)
    ids = {"query_ids": jnp.array([0, 1, 1], jnp.int32), "passage_ids": jnp.array([0, 1, 2], jnp.int32)}
    negative_ids = jnp.array([[2], [5], [2]], jnp.int32)
    found = look(q, p, n, negative_mask=mask, negative_ids=negative_ids, **ids, chunk=1)
    wanted = {"accuracy": 1, "positive": 0.8, "negative": 0.6 / 8, "hardest": 0.2, "masked": 4}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted, abs=1e-6)
    alone = look(q, p, groups=jnp.zeros(3, jnp.int32))
    assert {name: float(value) for name, value in alone.items()} == pytest.approx(
        {"accuracy": 1, "positive": 0.8, "negative": 0, "hardest": 0, "masked": 6}, abs=1e-6
    )


# ---- Order of similarities -------------------------------------------------------------------------------------------

PAIRS = 12
RUN = {
    name: jit(jax.value_and_grad(loss), static_argnames="tau")
    for name, loss in {
        "sorted": losses.cosent,
        "binary": lambda x, scores, **options: losses.cosent_binary(x, scores > 0, **options),
        "naive": losses.cosent_naive,
    }.items()
}


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    scores=st.lists(st.sampled_from([0, 1]) | st.integers(0, 4), min_size=PAIRS, max_size=PAIRS),
    valid=st.lists(st.booleans(), min_size=PAIRS, max_size=PAIRS),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_fast_ways_to_cosent_are_the_slow_one(scores, valid, seed):
    """T6: with ties, with pairs that do not count, with one pair, with none."""
    cosines, valid, tau = np.random.default_rng(seed).uniform(-1, 1, PAIRS), np.array(valid), 0.02
    for binary in (False, True):
        levels = np.minimum(scores, 1) if binary else np.array(scores)
        with jax.enable_x64(True):
            rows = np.flatnonzero(valid)
            wanted = naive(cosines[rows], levels[rows], tau)
            for name in ("sorted", "binary") if binary else ("sorted",):
                found = RUN[name](jnp.asarray(cosines), jnp.asarray(levels), tau=tau, valid=jnp.asarray(valid))
                assert_close(found[0], wanted[0], EXACT * max(1.0, wanted[0]))
                assert_close(found[1][rows], wanted[1], EXACT * max(1.0, 1 / tau))
                assert not np.asarray(found[1])[~valid].any()


def naive(cosines, scores, tau):
    """Value and gradient by their formula, in NumPy."""
    higher = scores[:, None] > scores[None]
    terms = np.where(higher, np.exp((cosines[None] - cosines[:, None]) / tau), 0.0)
    share = terms / (1 + terms.sum()) / tau
    return np.log1p(terms.sum()), share.sum(axis=0) - share.sum(axis=1)


def test_the_judge_of_cosent_is_its_formula():
    cosines, scores = np.random.default_rng(0).uniform(-1, 1, 9), np.arange(9) % 4
    with jax.enable_x64(True):
        found = RUN["naive"](jnp.asarray(cosines), jnp.asarray(scores), tau=0.1)
        for one, other in zip(found, naive(cosines, scores, 0.1), strict=True):
            assert_close(one, other, EXACT * 10)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", ["sorted", "binary"])
def test_no_two_scores_that_differ_are_no_loss_and_no_gradient(name, count):
    """T6: one pair, and equal scores, in float32."""
    value, gradient = RUN[name](jnp.linspace(-1, 1, count), jnp.ones(count, jnp.int32), tau=0.02)
    assert float(value) == 0.0
    np.testing.assert_array_equal(gradient, np.zeros(count))


def test_separation_of_512_texts():
    """T6: 130,816 pairs, for which the formula as it stands needs 68 GB."""
    x = jnp.asarray(drawn(0, 512, 64), jnp.float32)
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 9, 512), jnp.int32)
    run = jax.jit(jax.value_and_grad(lambda x: losses.separation(x, labels, tau=0.05))).lower(x).compile()
    assert run.memory_analysis().temp_size_in_bytes < 200e6
    value, gradient = run(x)
    one, other = np.triu_indices(512, 1)
    unit = np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64), axis=1, keepdims=True)
    cosines, same = (unit @ unit.T)[one, other] / 0.05, (np.asarray(labels)[one] == np.asarray(labels)[other])
    wanted = np.logaddexp(0, np.logaddexp.reduce(cosines[~same]) + np.logaddexp.reduce(-cosines[same]))
    assert_close_relative(value, wanted, FLOAT32)
    assert np.isfinite(gradient).all()


def test_separation_leaves_out_what_does_not_count():
    x, labels = jnp.asarray(drawn(0, 6, 8), jnp.float32), jnp.array([0, 1, 0, 1, 2, 2], jnp.int32)
    valid = jnp.array([True, True, True, False, True, False])
    rows = jnp.flatnonzero(valid)
    separation = jit(losses.separation, static_argnames="tau")
    whole = separation(x, labels, tau=0.1, valid=valid)
    assert_close_relative(whole, separation(x[rows], labels[rows], tau=0.1), FLOAT32)
    alone = jit(jax.value_and_grad(lambda x: losses.separation(x, labels * 0, tau=0.1)))(x)
    assert float(alone[0]) == 0.0
    assert not np.asarray(alone[1]).any()


# ---- Words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("V", "chunk"), [(10, None), (10, 4), (13, 4)])
def test_words_in_chunks_are_words_at_once(V, chunk):
    """Both where the table can be divided and where it has to be filled up; its last row is not a word."""
    x, table, bias = drawn(0, 5, 8), drawn(1, V, 8), drawn(2, V)
    targets, weights = np.array([0, V - 2, 3, 1, 7], np.int32), np.array([1.0, 0.5, 0.0, 2.0, 1.0])

    def wanted(x, table, bias):
        logs = jax.nn.log_softmax((x @ table.T + bias[None])[:, :-1])
        return -(weights * logs[np.arange(5), targets]).sum() / weights.sum()

    def found(x, table, bias):
        return losses.mlm(x, table, bias, jnp.asarray(targets), jnp.asarray(weights), chunk=chunk, words=V - 1)

    with jax.enable_x64(True):
        given = tuple(map(jnp.asarray, (x, table, bias)))
        one, other = (jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*given) for loss in (wanted, found))
        jax.tree.map(lambda a, b: assert_close(a, b, EXACT * 10), other, one)


def test_no_word_to_tell_is_no_loss():
    x, table = jnp.asarray(drawn(0, 3, 8), jnp.float32), jnp.asarray(drawn(1, 10, 8), jnp.float32)
    loss = lambda x: losses.mlm(x, table, jnp.zeros(10), jnp.zeros(3, jnp.int32), jnp.zeros(3), chunk=4)  # noqa: E731
    value, gradient = jit(jax.value_and_grad(loss))(x)
    assert float(value) == 0.0
    assert not np.asarray(gradient).any()


def test_words_in_chunks_need_less_memory():
    N, V, D = 256, 16_384, 16
    shapes = [(N, D), (V, D), (V,)]
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    targets, weights = jnp.zeros(N, jnp.int32), jnp.ones(N)

    def memory(chunk):
        loss = lambda *x: losses.mlm(*x, targets, weights, chunk=chunk)  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(None) >= N * V * 4
    assert memory(1024) <= memory(None) / 4


# ---- On top of other losses ------------------------------------------------------------------------------------------


def test_matryoshka():
    x = jnp.asarray(drawn(0, 5, 8), jnp.float32)
    total, by_size = losses.matryoshka(jnp.sum, (2, 8), (3.0, 1.0), "mean")(x)
    assert {size: float(one) for size, one in by_size.items()} == {2: float(x[:, :2].sum()), 8: float(x.sum())}
    assert float(total) == pytest.approx((3 * float(by_size[2]) + float(by_size[8])) / 2)
    total, by_size = losses.matryoshka(lambda a, b, scale: scale * a.sum() if b is None else b.sum(), None)(
        x, None, scale=2.0
    )
    assert {size: float(one) for size, one in by_size.items()} == {8: float(2 * x.sum())}
    assert float(total) == float(by_size[8])


def test_spread_out():
    K, D = 6, 8
    x = drawn(0, K, D) + 1
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(K, dtype=bool)]
    with jax.enable_x64(True):
        value = jit(losses.spread_out)(x)
        assert_close(value, cosines.mean() ** 2 + max((cosines**2).mean() - 1 / D, 0), EXACT)
    assert float(losses.spread_out(jnp.ones((1, D)))) == 0.0
    assert float(losses.spread_out(jnp.eye(D))) == 0.0  # better than random


def test_distillation():
    import torch

    x, teacher = drawn(0, 6, 8), drawn(1, 6, 8)
    wide, tau = drawn(2, 6, 12), 0.1
    ours, theirs, wider = (torch.tensor(one, requires_grad=True) for one in (x, teacher, wide))

    def log_softmax(x):
        unit = torch.nn.functional.normalize(x)
        return torch.log_softmax((unit @ unit.T)[~torch.eye(6, dtype=bool)].reshape(6, 5) / tau, dim=1)

    wanted = {
        "cosine": (1 - torch.nn.functional.cosine_similarity(ours, theirs)).mean(),
        "similarity_kl": torch.nn.functional.kl_div(
            log_softmax(ours), log_softmax(wider), log_target=True, reduction="batchmean"
        ),
    }
    with jax.enable_x64(True):
        for how, given in (("cosine", teacher), ("similarity_kl", wide)):
            run = jit(jax.value_and_grad(lambda x, y: losses.distill(x, y, how=how, tau=tau), argnums=(0, 1)))  # noqa: B023
            value, gradients = run(x, given)
            assert_close(value, wanted[how].detach().numpy(), EXACT)
            assert_close(gradients[0], torch.autograd.grad(wanted[how], ours)[0].numpy(), EXACT * 10)
            assert not np.asarray(gradients[1]).any()
        one = jnp.ones((1, 4))
        assert float(losses.distill(one, one, how="similarity_kl")) == 0.0


# ---- Types and devices -----------------------------------------------------------------------------------------------


def test_similarities_are_float32_whatever_comes_in():
    """T15: no product of matrices has fewer bits, and what it is of are float32 vectors at unit length."""
    x = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16)

    def total(q, p):
        labels = jnp.arange(16, dtype=jnp.int32) // 2
        return losses.info_nce(q, p, tau=0.02) + losses.separation(q, labels, tau=0.02) + losses.spread_out(p)

    jaxpr = jax.make_jaxpr(jax.value_and_grad(total, argnums=(0, 1)))(x, x)
    products = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(products) >= 4
    for product in products:
        assert {v.aval.dtype for v in (*product.invars, *product.outvars)} == {jnp.dtype(jnp.float32)}
        assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    assert jaxpr.out_avals[0].dtype == jnp.float32


def equations(jaxpr):
    """Those of a program and of all programs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def everything(q, p, n, table, bias):
    """One of each kind of a loss."""
    number = jnp.arange(16, dtype=jnp.int32)
    ids = {"query_ids": number // 2, "passage_ids": number, "negative_mask": jnp.ones((16, 2), bool)}
    return jnp.stack(
        [
            losses.info_nce(q, p, n, tau=0.05, chunk=8, **ids),
            losses.cosent(losses.cosine(q, p), number // 3, tau=0.05),
            losses.separation(q, number // 4, tau=0.05),
            losses.mlm(q, table, bias, number, jnp.ones(16), chunk=16),
        ]
    )


def test_losses_on_eight_devices_are_those_on_one():
    """T7: values, and the gradient of each loss along one direction of weights, on three meshes."""
    given = [drawn(0, 16, 8), drawn(1, 16, 8), drawn(2, 16, 2, 8), drawn(3, 48, 8), drawn(4, 48)]
    given = [jnp.asarray(x, jnp.float32) for x in given]
    weights = jnp.asarray([1.0, -0.7, 0.5, 0.3])

    def loss(*x):
        values = everything(*x)
        return jnp.sum(values * weights), values

    def run(mesh):
        spec = [("data", "fsdp")] * 3 + ["tensor"] * 2
        placed = [jax.device_put(x, jax.NamedSharding(mesh, jax.P(axes))) for x, axes in zip(given, spec, strict=True)]
        with jina_jax.use(mesh):
            return jit(jax.value_and_grad(loss, argnums=tuple(range(5)), has_aux=True))(*placed)

    (_, values), gradients = run(jina_jax.make_mesh(devices=jax.devices()[:1]))
    for sizes in MESHES:
        (_, split), others = run(jina_jax.make_mesh(**sizes))
        for one, other in zip([values, *gradients], [split, *others], strict=True):
            assert_close_relative(other, one, FLOAT32)
