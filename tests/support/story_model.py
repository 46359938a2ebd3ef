"""stories260K, a real language model of 1 MB, as a folder with the tokenizer that transformers needs."""

import shutil
import struct

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers


def story_model(assets, folder):
    """Copy the model of `assets` to `folder`, and its 512 tokens as transformers reads them."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(assets / "stories260K" / name, folder / name)
    pieces, scores = _pieces((assets / "stories260K" / "tok512.bin").read_bytes())
    ids = {piece: index for index, piece in reversed(list(enumerate(pieces)))}
    joined = [(left, right) for left in pieces for right in pieces if left + right in ids]
    merges = sorted(joined, key=lambda pair: -scores[ids[pair[0] + pair[1]]])
    words = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True, fuse_unk=True))
    words.normalizer = normalizers.Prepend(" ")
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def _pieces(data):
    """The tokens of llama2.c's file and their scores: a token is (score, length, bytes)."""
    pieces, scores, at = [], [], 4
    for _ in range(512):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        scores.append(score)
        at += 8 + length
    return pieces, scores
