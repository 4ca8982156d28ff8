"""Embeds corpora of any size into Parquet: planned once, done shard by shard, resumable after any kill.

`plan` cuts the inputs into shards and writes the manifest, `job` embeds the shards of one process, and
`verification` checks what is there. Processes share nothing but the output directory: shard s belongs to process
s mod n, a file appears whole or not at all, and a shard's bytes depend on nothing outside it.
"""

try:
    import fsspec  # noqa: F401
    import pyarrow  # noqa: F401
except ImportError as error:
    raise ImportError(f"{error}; a corpus needs more packages: pip install 'jina-jax[corpus]'") from error

from jina_jax.corpus.inputs import Columns
from jina_jax.corpus.job import Job, run
from jina_jax.corpus.plan import describe_model
from jina_jax.corpus.verification import verify

__all__ = ["Columns", "Job", "describe_model", "run", "verify"]
