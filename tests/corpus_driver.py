"""`jina-jax` in a process that dies by SIGKILL when it renames a file.

    python tests/corpus_driver.py before|middle|after PART NUMBER COMMAND...

Before or after the rename, or with half of the file written, of the NUMBER-th file (from 0) with PART in its path.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

from jina_jax.cli import main

when, part, number, *command = sys.argv[1:]
rename, counter = Path.replace, itertools.count()


def rename_or_die(source, target):
    last = part in str(target) and next(counter) == int(number)
    if last and when == "middle":
        os.truncate(source, source.stat().st_size // 2)
    if last and when != "after":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)


Path.replace = rename_or_die
sys.exit(main(command))
