"""From the name of a model to a directory that holds it."""

import os
from pathlib import Path

REAL_MODEL = "jinaai/jina-embeddings-v3"
BUNDLED = {"mini": Path(__file__).parent / "mini", "jina-jax-mini": Path(__file__).parent / "mini"}
BUNDLED_NOTE = (
    "jina-jax-mini, the small bundled model (26M parameters, no instructions, identity adapters), "
    f"not jina-embeddings-v3; for that one ask for {REAL_MODEL}"
)
FILES = (
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "sentencepiece.bpe.model",
    "*/adapter_config.json",
    "*/adapter_model.safetensors",
)


def find(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Directory of a model: bundled, local, or downloaded from the Hugging Face hub.

    Args:
        name_or_path: "mini", a directory, or "owner/name" on the hub. Only the files needed are downloaded, and
            only once.
        revision: Branch, tag or commit on the hub.

    Returns:
        The directory.

    Raises:
        FileNotFoundError: If there is no such directory, or the hub has no such model or cannot be reached.
    """
    path = Path(name_or_path)
    if str(name_or_path) in BUNDLED:
        return BUNDLED[str(name_or_path)]
    if path.is_dir():
        return path
    name = str(name_or_path)
    if path.exists():
        raise NotADirectoryError(f"{name} is a file; pass the directory that holds config.json and model.safetensors")
    if name.count("/") != 1 or name.startswith((".", "~", os.sep)) or name.endswith("/"):
        raise FileNotFoundError(
            f"no directory {name!r}; pass a directory, a name on the hub such as {REAL_MODEL}, or 'mini'"
        )

    # Imported here because it is slow and most uses never need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except (LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code < 500:
            raise FileNotFoundError(f"the hub has no model {name!r} (revision {revision}) for you: {error}") from error
        raise FileNotFoundError(
            f"{name!r} is neither a directory here nor in the cache, and the Hugging Face hub cannot be reached. On a "
            f"machine that can, run\n  hf download {name} --local-dir DIRECTORY\n"
            "then copy the directory here (config.json, model.safetensors, tokenizer.json; for the -hf layout also "
            "the five adapter folders) and pass its path"
        ) from error
    except HFValidationError as error:
        raise FileNotFoundError(f"no directory {name!r}, and not a name on the hub either: {error}") from error
