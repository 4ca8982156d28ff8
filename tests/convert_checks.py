"""Running the file-to-file tools as a user does, and comparing the directories that they write."""

import numpy as np
import torch
from safetensors.torch import load_file

import jina_jax
from convert.__main__ import main
from jina_jax.checkpoint import flatten


def run(*arguments):
    """The exit code of `python -m convert ...`."""
    return main([str(argument) for argument in arguments])


def tensors(directory):
    """Every stored tensor by file and name; the prefix that -hf names may or may not have is dropped."""
    found = {}
    for file in sorted(directory.rglob("*.safetensors")):
        content = load_file(file)
        prefix = "" if any(".parametrizations." in name for name in content) else "roberta."
        found |= {f"{file.relative_to(directory)}: {name.removeprefix(prefix)}": content[name] for name in content}
    return found


def same_tensors(one, other):
    """Assert that two directories hold the same tensors: files, names, types and bytes."""
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def same_model(one, other):
    """Assert that two directories load as the same configuration and parameters."""
    (model, held), (other_model, other_held) = jina_jax.load(one), jina_jax.load(other)
    assert model.config == other_model.config
    held, other_held = flatten(held), flatten(other_held)
    assert held.keys() == other_held.keys()
    for path, leaf in held.items():
        np.testing.assert_array_equal(leaf, other_held[path], err_msg=path)


def nothing_left(directory, *expected):
    """Assert that a directory holds these entries alone: no temporary ones."""
    assert sorted(file.name for file in directory.iterdir()) == sorted(expected)
