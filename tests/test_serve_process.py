"""`jina-jax serve` as a process: its flags, its end, and the end of its worker."""

import concurrent.futures
import os
import re
import signal

import httpx
import pytest
from serving import Process, save_small, until

from jina_jax.cli import main
from jina_jax.records import InputError
from jina_jax.serve import settings, start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture
def launch(folder, tmp_path):
    found = []

    def one(*flags, **environment):
        found.append(Process(folder, tmp_path, "--batch-tokens", "128", *flags, **environment))
        return found[-1]

    yield one
    for process in found:
        if process.process.poll() is None:
            process.process.kill()
        process.process.wait()


def test_sigterm_under_load_loses_nothing(launch):
    server = launch("--drain", "0.3", JINA_JAX_API_KEY="very-secret-key").ready()
    worker, statuses, refused = server.worker(), [], 0
    headers = {"authorization": "Bearer very-secret-key"}

    def client(number):
        nonlocal refused
        with httpx.Client(base_url=server.url, headers=headers, timeout=300) as one:
            for turn in range(1000):
                try:
                    body = {"input": [f"secret-text {number} {turn}"] * 3, "dimensions": number + 1}
                    response = one.post("/v1/embeddings", json=body)
                except (httpx.ConnectError, httpx.ReadError):  # nobody listens any more: that was not taken
                    refused += 1
                    return
                statuses.append(response.status_code)
                assert [len(row["embedding"]) for row in response.json()["data"]] == [number + 1] * 3

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        clients = [threads.submit(client, number) for number in range(8)]
        until(lambda: len(statuses) > 20)
        server.process.send_signal(signal.SIGTERM)
        for one in clients:
            one.result()
    assert server.process.wait(300) == 0
    assert set(statuses) == {200}
    assert refused == 8
    until(lambda: not worker.is_running())
    log = server.log.read_text()
    assert "very-secret-key" not in log
    assert "secret-text" not in log
    events = [one["event"] for one in server.events()]
    assert events[-1] == "stopped"
    assert "draining" in events
    lines = [one for one in server.events() if one["event"] == "request" and one["path"] == "/v1/embeddings"]
    # What was taken was answered: an error that a client saw can only be of what was never taken.
    assert [one["status"] for one in lines] == statuses
    line = lines[0]
    assert {"request_id", "status", "ms", "texts", "tokens", "task", "path"} <= set(line)


def test_a_worker_that_cannot_come_back_ends_the_server(launch, folder):
    server = launch("--worker-restarts", "0").ready()
    server.worker().kill()
    assert server.process.wait(300) == 1
    assert "the model's process ended 1 times in a row" in server.log.read_text()


def test_a_damaged_model_ends_the_server(launch, folder, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (bad / name).write_bytes((folder / name).read_bytes())
    server = launch("--model", str(bad))
    assert server.process.wait(300) == 1
    assert "Traceback" not in server.log.read_text()
    assert "error: the server ended: " in server.log.read_text()


class TestSettings:
    @pytest.fixture(autouse=True)
    def clean(self, monkeypatch):
        for name in os.environ:
            if name.startswith("JINA_JAX_"):
                monkeypatch.delenv(name)

    def read(self, *flags):
        import argparse

        parser = argparse.ArgumentParser()
        settings.add_arguments(parser)
        return settings.from_arguments(parser.parse_args(flags))

    def test_defaults(self):
        assert self.read() == settings.Settings()

    def test_flags_and_environment(self, monkeypatch):
        monkeypatch.setenv("JINA_JAX_PORT", "9000")
        monkeypatch.setenv("JINA_JAX_API_KEY", "a, b")
        monkeypatch.setenv("JINA_JAX_ALLOW_TOKEN_IDS", "1")
        monkeypatch.setenv("JINA_JAX_MESH", "data=-1,tensor=2")
        found = self.read("--port", "9001", "--model", "a=mini", "--model", "b=mini", "--no-warmup")
        assert (found.port, found.api_key, found.allow_token_ids) == (9001, ("a", "b"), True)
        assert (found.mesh, found.model, found.warmup) == ((("data", -1), ("tensor", 2)), ("a=mini", "b=mini"), False)

    def test_every_flag_says_its_variable(self, capsys):
        assert main(["serve", "--help"]) == 0
        words = re.sub(r"\s+", " ", capsys.readouterr().out)
        for name in settings.Settings.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in words
            assert f"JINA_JAX_{name.upper()}" in words

    def test_keys(self, tmp_path):
        file = tmp_path / "keys"
        file.write_text("# ours\none\n\ntwo\n")
        assert settings.keys(self.read("--api-key", "zero", "--api-key-file", str(file))) == ("zero", "one", "two")
        file.write_text("# none\n")
        with pytest.raises(InputError, match="has no key"):
            settings.keys(self.read("--api-key-file", str(file)))
        with pytest.raises(InputError, match="blanks"):
            settings.keys(self.read("--api-key", "two words"))

    def test_names(self, folder):
        def names(*flags):
            return start.models(self.read(*flags))[1]

        assert names() == {"jina-jax-mini": ("mini", "jina-embeddings-v3")}
        assert names("--model", str(folder)) == {"small": ("jina-embeddings-v3",)}
        assert names("--model", "a=mini", "--model", f"b={folder}") == {"a": ("mini",), "b": ()}
        assert names("--model", str(folder), "--served-model-name", "x", "--served-model-name", "y") == {"x": ("y",)}
        with pytest.raises(InputError, match="two models"):
            names("--model", str(folder), "--model", str(folder))
        [spec] = start.models(self.read("--adapter", "mine=a/b", "--prompt", "separation=To sort: "))[0]
        assert (spec.adapters, spec.prompts) == ({"mine": "a/b"}, {"separation": "To sort: "})

    @pytest.mark.parametrize(
        ("flags", "word"),
        [
            (["--port", "x"], "whole number"),
            (["--mesh", "rows=2"], "no axis"),
            (["--adapter", "x"], "TASK=DIR"),
            (["--model", "/no/such/place"], "no directory"),
            (["--host", "999.1.1.1"], "cannot listen"),
            (["--log-format", "xml"], "json"),
        ],
    )
    def test_mistakes(self, flags, word, capsys):
        assert main(["serve", *flags]) == 2
        assert word in capsys.readouterr().err
