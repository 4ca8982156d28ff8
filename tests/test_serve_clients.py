"""Clients that people use, against `jina-jax serve` with the bundled model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Process

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "tests" / "clients").glob("c*.py"))


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    # The adapters of the bundled model are the identity and its prompts empty: a prompt makes tasks differ.
    flags = ("--prompt", "retrieval.query=query: ", "--max-model-len", "510", "--api-key", "a-key")
    server = Process("mini", tmp_path_factory.mktemp("serve"), *flags)
    try:
        yield server.ready().url
    finally:
        server.process.terminate()
        server.process.wait(60)


def test_there_are_scripts():
    assert len(SCRIPTS) >= 5


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_client(script, url):
    # huggingface_hub takes even this machine for the hub: offline, it asks nobody.
    names = {"BASE_URL": url, "API_KEY": "a-key", "STRICT": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, str(script)], env=os.environ | names, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RESULT: PASS" in done.stdout
