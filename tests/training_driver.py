"""One process of a job that trains; `test_training_resume.py` starts two.

python training_driver.py RUN BASE DATA [--kill save:STEP | row:STEP] [arguments of the job]
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import signal
from pathlib import Path

import training

from jina_jax import compilation, distributed
from jina_jax.train import checkpoints, journal, loop


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--kill", default="never:0")
    parser.add_argument("--coordinator")
    parser.add_argument("--process", type=int)
    args = parser.parse_args()
    compilation.enable_cache()
    distributed.start(args.coordinator, 2, args.process)

    where, step = args.kill.split(":")
    save, row = checkpoints.Checkpoints.save, journal.Journal.row

    def saving(self, number, *rest):
        save(self, number, *rest)  # begins to write in the background
        if where == "save" and number == int(step):
            die()

    def told(self, one):
        row(self, one)
        if where == "row" and one["step"] == int(step):
            die()

    checkpoints.Checkpoints.save, journal.Journal.row = saving, told
    outcome = loop.train(training.short(args.base, args.data), args.run)
    assert outcome.finished


if __name__ == "__main__":
    main()
