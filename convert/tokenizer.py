"""A SentencePiece model from a tokenizer.json: `python -m convert tokenizer PATH [--output MODEL]`.

The two files of an XLM-RoBERTa checkpoint hold the same pieces, scores and character map in different orders:
fairseq moved `<s>` to the front and added `<pad>` and `<mask>`. So where only the tokenizer.json is at hand,
the model can be had from it. The map must come from the file: what a `sentencepiece` of today has under the
same name differs in many characters.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FAIRSEQ_FIRST = ["<s>", "<pad>", "</s>", "<unk>"]
FAIRSEQ_LAST = "<mask>"


def rebuild(tokenizer_json: Path, output: Path) -> None:
    """Write the SentencePiece model that a tokenizer.json was made from.

    Args:
        tokenizer_json: a Unigram tokenizer with the vocabulary of XLM-RoBERTa in fairseq's order.
        output: the `.model` to write; replaced at once if it exists, untouched if anything fails.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, or not such a tokenizer.
        ImportError: protobuf is not installed.
    """
    try:
        content = json.loads(tokenizer_json.read_bytes())
    except ValueError as error:
        raise ValueError(f"{tokenizer_json} is not JSON ({error}); fetch it again") from error
    try:
        model = _serialize(_pieces(content), _charsmap(content))
    except ValueError as error:
        raise ValueError(f"cannot make a SentencePiece model from {tokenizer_json}: {error}") from error
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(model)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def _pieces(content: Any) -> list[tuple[str, float]]:
    """The pieces and scores after the special ones, in SentencePiece's order."""
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ValueError('it has no "model"; pass a tokenizer.json')
    if model.get("type") != "Unigram":
        raise ValueError(f"its model is {model.get('type')}, only Unigram can be converted")
    if model.get("byte_fallback"):
        raise ValueError("its model falls back to bytes, which XLM-RoBERTa's does not")
    vocab = model.get("vocab") or [(None, 0.0)]
    first, last = [piece for piece, _ in vocab[:4]], vocab[-1][0]
    if first != FAIRSEQ_FIRST or last != FAIRSEQ_LAST:
        raise ValueError(
            f"its vocabulary begins {first} and ends {last!r}, XLM-RoBERTa's begins {FAIRSEQ_FIRST} and ends "
            f"{FAIRSEQ_LAST!r}; pass the tokenizer.json of jina-embeddings-v3"
        )
    return [(piece, score) for piece, score in vocab[4:-1]]


def _charsmap(content: dict[str, Any]) -> bytes:
    """The compiled character map."""
    normalizer = content.get("normalizer") or {}
    if normalizer.get("type") != "Precompiled" or not normalizer.get("precompiled_charsmap"):
        raise ValueError(f"its normalizer is {normalizer.get('type')}, only Precompiled can be converted")
    try:
        return base64.b64decode(normalizer["precompiled_charsmap"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"its character map is not base64 ({error}); fetch the file again") from error


def _serialize(pieces: list[tuple[str, float]], charsmap: bytes) -> bytes:
    """The bytes of the ModelProto, after `sentencepiece` has accepted them."""
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise ImportError('writing a .model needs protobuf: pip install "jina-jax[convert]"') from error
    proto = sentencepiece_model_pb2.ModelProto()
    kind = proto.SentencePiece
    proto.pieces.add(piece="<unk>", score=0.0, type=kind.UNKNOWN)
    proto.pieces.add(piece="<s>", score=0.0, type=kind.CONTROL)
    proto.pieces.add(piece="</s>", score=0.0, type=kind.CONTROL)
    for piece, score in pieces:
        proto.pieces.add(piece=piece, score=score, type=kind.NORMAL)
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "nmt_nfkc"
    proto.normalizer_spec.precompiled_charsmap = charsmap
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = True
    proto.normalizer_spec.escape_whitespaces = True
    serialized: bytes = proto.SerializeToString()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=serialized)
    except RuntimeError as error:
        raise ValueError(f"sentencepiece refuses the result ({error})") from error
    return serialized


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    Args:
        argv: arguments after the command's name; None takes those of the process.

    Raises:
        SystemExit: with a message, if the file cannot be converted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m convert tokenizer", description="Write a SentencePiece .model from a tokenizer.json."
    )
    parser.add_argument("path", type=Path, help="a tokenizer.json, or a directory that has one")
    parser.add_argument("--output", type=Path, help="default: sentencepiece.bpe.model next to the tokenizer.json")
    arguments = parser.parse_args(argv)
    source = arguments.path / "tokenizer.json" if arguments.path.is_dir() else arguments.path
    output = arguments.output or source.with_name("sentencepiece.bpe.model")
    try:
        rebuild(source, output)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    print(output)


if __name__ == "__main__":
    main()
