"""Compiled programs, kept on disk between runs."""

import os
import warnings
from pathlib import Path


def enable_cache() -> None:
    """Keep compiled programs on disk, where that is possible: the second run then starts at once."""
    import jax

    chosen = os.environ.get("JINA_JAX_CACHE")
    if chosen == "off" or jax.config.values["jax_compilation_cache_dir"]:
        return
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        directory = Path(chosen) if chosen else base / "jina_jax" / "xla"
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home directory is a RuntimeError
        return
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
