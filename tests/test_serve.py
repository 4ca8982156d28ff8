"""The server over HTTP: what it answers, whatever else it is doing."""

import base64
import concurrent.futures
import json
import os
import signal
import socket
import time

import numpy as np
import pytest
from serving import LONGEST, TASKS, WIDTH, running, save_small, until

import jina_jax
from jina_jax.serve.supervisor import Supervisor

WORDS = ["river", "Haus", "図書館", "مكتبة", "music", "Übung", "of", "the", "12", "café,", "библиотека", "sleeps."]
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def embedder(folder):
    return jina_jax.Embedder.load(folder)


@pytest.fixture(scope="module")
def server(folder):
    with running(folder, batch_tokens=256) as one:
        yield one


@pytest.fixture(scope="module")
def strict(folder):
    """A server with small limits, keys, a cache, token ids, CORS and two models."""
    changes = {
        "max_queue_tokens": 2000,
        "max_queue_requests": 8,
        "max_request_tokens": 4000,
        "max_body": 100_000,
        "body_timeout": 0.5,
        "header_timeout": 0.5,
        "cache_size": 50,
        "allow_token_ids": True,
        "cors_origin": ("http://page.example",),
        "default_task": "separation",
        "batch_tokens": 128,
    }
    with running(folder, keys=("first-key", "second-key"), more=("other",), **changes) as one:
        yield one


def vectors(response):
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return np.array([one["embedding"] for one in data], np.float32)


def draw(rng, longest=40):
    return " ".join(rng.choice(WORDS, rng.integers(0, longest)))


class TestEmbeddings:
    @pytest.mark.parametrize("task", TASKS)
    def test_as_embedder(self, server, embedder, task):
        texts = ["", "one text", "ein längerer Text über Bibliotheken " * 2, "four"]
        found = vectors(server.ask(texts, task=task))
        np.testing.assert_allclose(found, embedder.encode(texts, task=task), atol=TOLERANCE)
        late = vectors(server.ask(texts[1:], task=task, late_chunking=True, dimensions=17))
        wanted = embedder.encode_chunks(chunks=texts[1:], task=task, dimensions=17).embeddings
        np.testing.assert_allclose(late, wanted, atol=TOLERANCE)

    def test_whatever_else_is_in_the_batch(self, server, embedder):
        """64 clients at once, with random tasks, lengths, dimensions and forms, late chunking among them."""

        def one(seed):
            rng = np.random.default_rng(seed)
            texts = [draw(rng) + f" {seed} {i}" for i in range(rng.integers(1, 8))]
            task, size = TASKS[rng.integers(6)], int(rng.integers(1, WIDTH + 1))
            late = bool(rng.integers(3) == 0) and len(" ".join(texts)) < 250
            fields = {"task": task, "dimensions": size, "normalized": bool(rng.integers(2)), "late_chunking": late}
            found = vectors(server.ask(texts, truncate=True, **fields))
            return texts, task, size, fields["normalized"], late, found

        with concurrent.futures.ThreadPoolExecutor(64) as threads:
            answers = list(threads.map(one, range(128)))
        for texts, task, size, normalized, late, found in answers:
            options = {"task": task, "dimensions": size, "normalize": normalized, "truncate": True}
            if late:
                wanted = embedder.encode_chunks(chunks=texts, **options).embeddings
            else:
                wanted = embedder.encode(texts, **options)
            scale = max(1.0, float(np.abs(wanted).max()))
            np.testing.assert_allclose(found, wanted, atol=TOLERANCE * scale)

    def test_forms_of_input(self, server):
        plain = vectors(server.ask(["a", "b"]))
        for other in ([{"text": "a"}, {"text": "b"}], ["a", {"text": "b"}]):
            np.testing.assert_array_equal(vectors(server.ask(other)), plain)
        np.testing.assert_allclose(vectors(server.ask("a")), plain[:1], atol=TOLERANCE)
        np.testing.assert_allclose(vectors(server.ask({"text": "a"})), plain[:1], atol=TOLERANCE)

    def test_types(self, server):
        wanted = vectors(server.ask("a text"))[0]
        types = ["float", "base64", "binary", "ubinary", "int8", "uint8"]
        [found] = server.ask("a text", embedding_type=types).json()["data"]
        found = found["embedding"]
        assert list(found) == types
        assert np.allclose(np.frombuffer(base64.b64decode(found["base64"]), "<f4"), wanted, atol=TOLERANCE)
        assert np.unpackbits(np.array(found["ubinary"], np.uint8)).tolist() == (wanted > 0).astype(int).tolist()
        assert [one + 128 for one in found["binary"]] == found["ubinary"]
        assert np.corrcoef(found["int8"], wanted)[0, 1] > 0.99
        for name in ("embedding_type", "encoding_format", "encoding_type", "embedding_types"):
            assert server.ask("a", **{name: "base64"}).json()["data"][0]["embedding"].endswith("=")

    def test_wire(self, server):
        response = server.ask("a", model="jinaai/jina-embeddings-v3", user="somebody", unknown={"x": 1})
        assert response.status_code == 200
        assert list(response.json()) == ["model", "object", "usage", "data"]
        assert response.json()["usage"] == {"total_tokens": 3, "prompt_tokens": 3}
        assert response.json()["model"] == "jinaai/jina-embeddings-v3"
        assert len(response.headers["x-request-id"]) == 32
        with server.client() as client:
            given = client.get("/live", headers={"x-request-id": "my-id.1"})
            assert given.headers["x-request-id"] == "my-id.1"
            bad = client.get("/live", headers={"x-request-id": "a b" * 50})
            assert len(bad.headers["x-request-id"]) == 32

    def test_normalized_and_dimensions(self, server):
        raw, unit = vectors(server.ask("a", normalized=False))[0], vectors(server.ask("a"))[0]
        np.testing.assert_allclose(unit, raw / np.linalg.norm(raw), atol=TOLERANCE)
        np.testing.assert_allclose(vectors(server.ask("a", normalized=False, dimensions=5))[0], raw[:5], atol=1e-5)
        assert abs(np.linalg.norm(vectors(server.ask("a", dimensions=5))) - 1) < 1e-6

    def test_too_long(self, server, embedder):
        text = "word " * 300
        error = server.ask(["short", text])
        assert error.status_code == 400
        assert error.json()["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
        assert "input[1] has 302 tokens" in error.json()["detail"]
        cut = server.ask(text, truncate=True)
        assert cut.json()["usage"]["total_tokens"] == LONGEST
        np.testing.assert_allclose(vectors(cut)[0], embedder.encode(text), atol=TOLERANCE)
        assert server.ask([text, text], late_chunking=True).status_code == 400
        late = vectors(server.ask(["short", text, "beyond"], late_chunking=True, truncate=True))
        assert np.linalg.norm(late, axis=1).round(3).tolist() == [1, 1, 0]


class TestErrors:
    @pytest.mark.parametrize(
        ("body", "status", "word"),
        [
            ({"input": []}, 422, "empty"),
            ({}, 422, "input"),
            ({"input": None}, 422, "null"),
            ({"input": [None]}, 422, "input[0]"),
            ({"input": ["a", 1]}, 422, "input[1]"),
            ({"input": [["a"]]}, 422, "input[0]"),
            ({"input": [1, 2, 3]}, 400, "token"),
            ({"input": [[1], [2, 3]]}, 400, "check_embedding_ctx_length"),
            ({"input": {"image": "http://localhost"}}, 400, "text"),
            ({"input": "a", "model": "no-such-model"}, 400, "small"),
            ({"input": "a", "task": "retrieval"}, 422, "retrieval.query"),
            ({"input": "a", "task": "clustering"}, 422, "separation"),
            ({"input": "a", "task": 1}, 422, "task"),
            ({"input": "a", "dimensions": 0}, 422, "dimensions"),
            ({"input": "a", "dimensions": WIDTH + 1}, 422, str(WIDTH)),
            ({"input": "a", "dimensions": "5"}, 422, "integer"),
            ({"input": "a", "embedding_type": "float64"}, 422, "ubinary"),
            ({"input": "a", "embedding_type": []}, 422, "empty"),
            ({"input": "a", "late_chunking": "maybe"}, 422, "boolean"),
            ({"input": "a", "return_multivector": True}, 422, "return_multivector"),
            ({"input": ["a"] * 2049}, 422, "2048"),
            ([], 422, "object"),
        ],
    )
    def test_bodies(self, server, body, status, word):
        with server.client() as client:
            response = client.post("/v1/embeddings", json=body)
        found = response.json()
        assert response.status_code == status, found
        assert word in found["detail"]
        assert isinstance(found["detail"], str)
        assert found["code"]
        assert found["request_id"] == response.headers["x-request-id"]
        assert set(found["error"]) == {"message", "type", "param", "code"}
        assert found["error"]["message"] == found["message"] == found["detail"]
        assert ("errors" in found) == (status == 422)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"input":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
            b'{"input":"a\\ud800b"}',
            b'{"input":NaN,"inputs":NaN}',
            b'{"input":' + b"9" * 5000 + b"}",
            b'{"input":"' + b"x" * 70_000 + b'"',
            b"\0" * 1000,
        ],
        ids=range(10),
    )
    def test_bytes(self, server, body):
        for path in ("/v1/embeddings", "/embed", "/v2/embed", "/invocations", "/tokenize", "/similarity"):
            with server.client() as client:
                response = client.post(path, content=body)
            assert 400 <= response.status_code < 500
            assert "Traceback" not in response.text
            assert response.json()["detail"]

    def test_nul_bytes_are_text(self, server):
        assert server.ask("a\0b").status_code == 200

    def test_paths(self, server):
        with server.client() as client:
            assert client.get("/nowhere").json()["code"] == "RESOURCE_NOT_FOUND"
            assert client.get("/v1/embeddings").status_code == 405

    def test_a_body_too_large_is_not_read(self, server):
        start = time.perf_counter()
        with server.client() as client:
            said = client.post("/v1/embeddings", content=b"x" * (100 << 20))
            unsaid = client.post("/v1/embeddings", content=(b"x" * (1 << 20) for _ in range(100)))
        assert said.status_code == unsaid.status_code == 413
        assert time.perf_counter() - start < 20


class TestDialects:
    def test_tei(self, server, embedder):
        with server.client() as client:
            for path in ("/embed", "/"):
                found = client.post(path, json={"inputs": ["a", "b"], "prompt_name": "retrieval.query"}).json()
                np.testing.assert_allclose(found, embedder.encode(["a", "b"], task="retrieval.query"), atol=TOLERANCE)
            assert client.post("/embed", json={"inputs": "a", "dimensions": 3, "normalize": False}).status_code == 200
            assert client.post("/embed", json={"inputs": "a", "prompt_name": "query"}).status_code == 422
            assert client.get("/info").json()["max_input_length"] == LONGEST

    def test_cohere(self, server, embedder):
        body = {"model": "small", "texts": ["a", "b"], "input_type": "search_document", "embedding_types": ["float"]}
        with server.client() as client:
            found = client.post("/v2/embed", json=body).json()
            wanted = embedder.encode(["a", "b"], task="retrieval.passage")
            np.testing.assert_allclose(found["embeddings"]["float"], wanted, atol=TOLERANCE)
            assert found["response_type"] == "embeddings_by_type"
            body = {"texts": ["a"], "input_type": "clustering", "embedding_types": ["ubinary", "int8"]}
            assert set(client.post("/v2/embed", json=body).json()["embeddings"]) == {"ubinary", "int8"}
            assert client.post("/v2/embed", json={"texts": ["word " * 300]}).status_code == 200  # cut, as there
            assert client.post("/v2/embed", json={"texts": ["a"], "input_type": "image"}).status_code == 422

    def test_sagemaker(self, server, embedder):
        parameters = {"task": "separation", "dimensions": 8, "late_chunking": True}
        with server.client() as client:
            found = client.post("/invocations", json={"data": [{"text": "a"}, {"text": "b"}], "parameters": parameters})
            wanted = embedder.encode_chunks(chunks=["a", "b"], task="separation", dimensions=8).embeddings
            np.testing.assert_allclose(vectors(found), wanted, atol=TOLERANCE)
            assert client.post("/invocations", json={"input": ["x"]}).status_code == 200
            assert client.post("/invocations", json={"data": "x", "parameters": {"dimensions": -1}}).status_code == 422
            assert client.get("/ping").status_code == 200

    def test_similarity_and_tokenize(self, server, embedder):
        with server.client() as client:
            body = {"inputs": {"source_sentence": "a", "sentences": ["b", "a"]}}
            found = client.post("/similarity", json=body).json()
            one = embedder.encode(["a", "b", "a"], task="text-matching")
            np.testing.assert_allclose(found, one[1:] @ one[0], atol=1e-5)
            [tokens] = client.post("/tokenize", json={"inputs": "Hällo you"}).json()
        assert [token["special"] for token in tokens][:: len(tokens) - 1] == [True, True]
        assert "".join(token["text"] for token in tokens[1:-1]) == "Hälloyou"

    def test_voyage_words(self, server):
        one = vectors(server.ask("a", input_type="query", output_dimension=8, output_dtype="float"))
        np.testing.assert_array_equal(one, vectors(server.ask("a", task="retrieval.query", dimensions=8)))


class TestState:
    def test_models_and_metrics(self, server):
        with server.client() as client:
            models = client.get("/v1/models").json()["data"]
            assert [model["id"] for model in models] == ["small", "jina-embeddings-v3"]
            assert models[0]["max_model_len"] == LONGEST
            metrics = client.get("/metrics").text
            assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 200
        for name in (
            "request_count_total",
            "queue_size",
            "batch_tokens_bucket",
            "padding_ratio_sum",
            "compiled_shapes",
            "tokens_total",
        ):
            assert f"\njina_jax_{name}" in metrics

    def test_the_server_answers_while_the_model_computes(self, server):
        texts = ["word " * 100] * 100
        with concurrent.futures.ThreadPoolExecutor(1) as threads, server.client() as client:
            bulk = threads.submit(server.ask, texts)
            times = []
            while not bulk.done():
                start = time.perf_counter()
                assert client.get("/live").status_code == 200
                times.append(time.perf_counter() - start)
        assert bulk.result().status_code == 200
        assert np.median(times) < 0.25

    def test_a_client_that_goes_away(self, server):
        before = server.built.service.metrics.cancelled._value.get()
        body = json.dumps({"input": ["word " * 100] * 2000}).encode()
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as one:
            head = f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            one.sendall(head.encode() + body)
            until(lambda: server.built.service.batcher.requests)
        until(lambda: not server.built.service.batcher.requests)
        assert server.built.service.batcher.waiting_tokens == 0
        until(lambda: server.built.service.metrics.cancelled._value.get() == before + 1)

    def test_a_killed_worker_comes_back(self, server):
        supervisor: Supervisor = server.built.supervisor
        batcher = server.built.service.batcher
        until(lambda: not batcher.running)
        with concurrent.futures.ThreadPoolExecutor(2) as threads, server.client() as client:
            accepted = threads.submit(server.ask, ["word " * 50] * 200, dimensions=4)
            until(lambda: batcher.running)
            os.kill(supervisor.pid, signal.SIGKILL)
            until(lambda: client.get("/ready").status_code == 503)
            assert client.get("/live").status_code == 200
            assert client.get("/health").status_code == 503
            refused = server.ask("a")
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            until(lambda: client.get("/ready").status_code == 200)
            assert vectors(accepted.result()).shape == (200, 4)  # what was accepted is answered
        assert server.ask("a").status_code == 200
        assert supervisor.restarts == 1


class TestLimits:
    """A server with small limits, keys, a cache, token ids, CORS and two models."""

    @staticmethod
    def post(strict, body, key="second-key"):
        with strict.client(headers={"authorization": f"Bearer {key}"}) as client:
            return client.post("/v1/embeddings", json=body)

    @pytest.mark.parametrize(
        ("header", "code"),
        [
            (None, "AUTH_MISSING_API_KEY"),
            ("Basic first-key", "AUTH_INVALID_FORMAT"),
            ("first-key", "AUTH_INVALID_FORMAT"),
            ("Bearer", "AUTH_INVALID_FORMAT"),
            ("Bearer wrong", "AUTH_INVALID_API_KEY"),
            ("Bearer first-key2", "AUTH_INVALID_API_KEY"),
            ("Bearer ÿ", "AUTH_INVALID_API_KEY"),
        ],
    )
    def test_keys(self, strict, header, code):
        headers = {} if header is None else {"authorization": header.encode("latin-1")}
        with strict.client(headers=headers) as client:
            for path in ("/v1/embeddings", "/", "/nowhere"):
                response = client.post(path, content=b"not even read")
                assert response.status_code == 401
                assert response.json()["code"] == code
                assert response.headers["www-authenticate"] == "Bearer"
            assert client.get("/v1/models").status_code == 401
            assert client.get("/ready").status_code == 200
        assert self.post(strict, {"input": "a"}, "first-key").status_code == 200

    def test_sizes(self, strict):
        assert self.post(strict, {"input": ["word " * 100] * 50}).json()["code"] == "INPUT_TOKEN_LIMIT_EXCEEDED"
        assert self.post(strict, {"input": "x" * 100_001}).status_code == 413

    def test_a_full_queue_says_so_at_once(self, strict):
        def one(number):
            start = time.perf_counter()
            response = self.post(strict, {"input": [f"{number} " + "word " * 90] * 30})
            return response, time.perf_counter() - start

        with concurrent.futures.ThreadPoolExecutor(24) as threads:
            found = list(threads.map(one, range(24)))
        statuses = [response.status_code for response, _ in found]
        assert set(statuses) == {200, 429}
        for response, _ in found:
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["type"] == "rate_limit_error"
            else:
                assert len(response.json()["data"]) == 30
        assert self.post(strict, {"input": "a"}).status_code == 200

    @pytest.mark.parametrize(
        "sent",
        [b"", b"POST /v1/embeddings HT", b"GET /live HTTP/1.1\r\nHost: x\r\nX: "],
        ids=["nothing", "line", "header"],
    )
    def test_slow_headers(self, strict, sent):
        with socket.create_connection(("127.0.0.1", int(strict.url.rsplit(":", 1)[1])), timeout=10) as one:
            one.sendall(sent)
            assert one.recv(1000) == b""  # closed

    def test_slow_bodies(self, strict):
        with socket.create_connection(("127.0.0.1", int(strict.url.rsplit(":", 1)[1])), timeout=10) as one:
            key = b"Authorization: Bearer first-key\r\n"
            one.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n" + key + b'\r\n{"input":')
            found = b""
            while part := one.recv(10_000):
                found += part
        assert found.startswith(b"HTTP/1.1 408")
        assert b"REQUEST_TIMEOUT" in found

    def test_headers_without_end(self, strict):
        with socket.create_connection(("127.0.0.1", int(strict.url.rsplit(":", 1)[1])), timeout=10) as one:
            one.sendall(b"GET /live HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(20_000)))
            assert one.recv(100).startswith(b"HTTP/1.1 400")

    def test_cache(self, strict, embedder):
        first = vectors(self.post(strict, {"input": ["cached", "twice"]}))
        again = vectors(self.post(strict, {"input": ["twice", "cached", "new"], "dimensions": 8}))
        np.testing.assert_allclose(first, embedder.encode(["cached", "twice"], task="separation"), atol=TOLERANCE)
        wanted = embedder.encode(["twice", "cached", "new"], task="separation", dimensions=8)
        np.testing.assert_allclose(again, wanted, atol=TOLERANCE)
        assert strict.built.service.metrics.cache.labels("hit")._value.get() >= 2
        self.post(strict, {"input": [str(number) for number in range(60)]})
        assert len(strict.built.service.cache) == 50

    def test_token_ids(self, strict, embedder):
        ids = embedder.tokenizer.encode("a text").ids.tolist()
        wanted = embedder.encode("a text", task="separation")
        for given in (ids, [ids]):
            np.testing.assert_allclose(vectors(self.post(strict, {"input": given}))[0], wanted, atol=TOLERANCE)
        for wrong in ([-1], [10**6], [10**30], [[0], []]):
            assert self.post(strict, {"input": wrong}).status_code == 422
        assert self.post(strict, {"input": [ids], "late_chunking": True}).status_code == 422

    def test_models_by_name(self, strict):
        one = self.post(strict, {"input": "a", "model": "other"})
        assert one.json()["model"] == "other"
        np.testing.assert_allclose(vectors(one), vectors(self.post(strict, {"input": "a"})), atol=TOLERANCE)

    def test_cors(self, strict):
        with strict.client() as client:
            ask = {"origin": "http://page.example", "access-control-request-method": "POST"}
            allowed = client.options("/v1/embeddings", headers=ask)
            assert allowed.headers["access-control-allow-origin"] == "http://page.example"
            other = client.options("/v1/embeddings", headers=ask | {"origin": "http://other.example"})
            assert "access-control-allow-origin" not in other.headers


def test_no_cors_by_default(server):
    with server.client() as client:
        ask = {"origin": "http://page.example", "access-control-request-method": "POST"}
        assert "access-control-allow-origin" not in client.options("/v1/embeddings", headers=ask).headers


@pytest.mark.nightly
def test_many_devices(folder, embedder):
    with running(folder, mesh=(("data", -1), ("tensor", 2))) as one:
        texts = [f"text number {number} " * (number % 9) for number in range(40)]
        for task in (None, "separation"):
            found = vectors(one.ask(texts, task=task))
            np.testing.assert_allclose(found, embedder.encode(texts, task=task), atol=TOLERANCE)
        late = vectors(one.ask(texts[1:4], late_chunking=True))
        np.testing.assert_allclose(
            late, embedder.encode_chunks(chunks=texts[1:4], task=None).embeddings, atol=TOLERANCE
        )
