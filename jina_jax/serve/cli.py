"""`jina-jax serve` on the command line. Its flags need no package of the server; running it does."""

import argparse
from typing import Any

from jina_jax.serve import settings

ABOUT = """Serve embeddings over HTTP: the hosted Jina API (/v1/embeddings) and OpenAI's, with all tasks, dimensions and
late chunking mixed in one batch; also /embed of text-embeddings-inference, /v2/embed of Cohere and /invocations of
SageMaker. /docs describes all of them, /ready says when the model is there, /metrics is for Prometheus."""
EXAMPLES = """examples:
  jina-jax serve
  jina-jax serve --model jinaai/jina-embeddings-v3 --dtype bfloat16 --host 0.0.0.0 --api-key-file keys.txt
  jina-jax serve --model DIRECTORY --adapter my-domain=ADAPTER_DIRECTORY --default-task my-domain
  jina-jax serve --model small=mini --model large=jinaai/jina-embeddings-v3
  JINA_JAX_PORT=9000 JINA_JAX_API_KEY=secret jina-jax serve --mesh data=-1,tensor=2

"""


def add(commands: Any, formatter: Any, notes: str) -> argparse.ArgumentParser:
    """Add the command.

    Args:
        commands: What holds the parsers of commands.
        formatter: Their formatter.
        notes: What all of them say at their end.

    Returns:
        Its parser.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve the embeddings API over HTTP",
        description=ABOUT,
        epilog=EXAMPLES + notes,
        formatter_class=formatter,
    )
    parser.set_defaults(run=run)
    settings.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """`jina-jax serve`.

    Args:
        args: The parsed arguments.

    Raises:
        ImportError: If packages are missing; says how to get them.
    """
    try:
        import fastapi  # noqa: F401
        import httptools  # noqa: F401
        import orjson  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}; serving needs more packages: pip install 'jina-jax[serve]'") from error
    from jina_jax.serve import start

    start.run(settings.from_arguments(args))
