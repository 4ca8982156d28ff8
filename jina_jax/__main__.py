"""`python -m jina_jax` is `jina-jax`."""

import sys

from jina_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
