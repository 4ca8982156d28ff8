"""A made-up domain language: what a crew calls its machines and their troubles, and the pages of its handbook.

    python configs/data/jargon.py my_pairs.jsonl held_out.jsonl

Queries are in the crew's own words, passages in plain English; only the place has the same name in both. A model that
has never met the crew can use nothing else, and one that has read some hundred pairs knows every word. Held-out pairs
have combinations of thing, trouble and place that are not among the others.
"""

import argparse
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

# The crew's word for each, made up.
THINGS = {
    "lamp": "zuma",
    "radio": "velo",
    "pump": "kibo",
    "motor": "tagu",
    "door": "gado",
    "window": "nelo",
    "cable": "fopi",
    "fan": "ribo",
    "clock": "miku",
    "phone": "sabi",
    "tank": "davo",
    "camera": "luno",
}
TROUBLES = {
    "is broken": "pemi",
    "is too hot": "hogu",
    "is dirty": "besa",
    "is frozen": "kilu",
    "is too slow": "vora",
    "is empty": "tibu",
    "is wet": "nogi",
    "is loud": "rafu",
    "has no power": "dupi",
    "will not start": "lobi",
}
PLACES = (
    *("in the kitchen", "on the roof", "in the office", "at the harbour", "in the garden"),
    *("in the library", "on the bridge", "in the tower", "at the school", "in the hall"),
)
CURES = ("oil it", "clean it", "replace it", "sell it", "wait", "fix it", "dry it", "test it", "open it", "lock it")
QUERIES = ("{thing} {trouble} {place}", "{place}: {trouble} {thing}", "{trouble} {thing}, {place}?")
PASSAGES = (
    "{thing} {trouble} {place}: {cure}.",
    "{thing} {place} {trouble}: {cure}.",
    "{place}, {thing} {trouble}: {cure}.",
)


def pairs(count: int = 650, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of a query and its passage, no two about the same thing, trouble and place.

    Args:
        count: How many, 1200 at most.
        seed: Decides which, and their order.

    Returns:
        Records of the kind "pair". The first 500, say, to train on, and the others to measure with.
    """
    rng = random.Random(seed)
    made = []
    for thing, trouble, place in rng.sample(list(itertools.product(THINGS, TROUBLES, PLACES)), count):
        slang = rng.choice(QUERIES).format(thing=THINGS[thing], trouble=TROUBLES[trouble], place=place)
        plain = rng.choice(PASSAGES).format(thing=thing, trouble=trouble, place=place, cure=rng.choice(CURES))
        made.append({"query": slang, "pos": plain[0].upper() + plain[1:]})
    return made


def write(path: Path, records: Sequence[dict]) -> Path:
    """Write records as lines of JSON.

    Args:
        path: The file.
        records: The records.

    Returns:
        The file.
    """
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pairs in a made-up domain language.")
    parser.add_argument("train", type=Path, help="file for the pairs to train on")
    parser.add_argument("held_out", type=Path, help="file for the pairs to measure with")
    parser.add_argument("--pairs", type=int, default=500, help="how many to train on; default: 500")
    parser.add_argument("--held-out-pairs", type=int, default=150, help="how many to measure with; default: 150")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    given = parser.parse_args()
    made = pairs(given.pairs + given.held_out_pairs, given.seed)
    write(given.train, made[: given.pairs])
    write(given.held_out, made[given.pairs :])
