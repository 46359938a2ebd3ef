"""A stand-in for minGPT's tokenizer: one token a byte, and nothing to download."""

import torch


class BPETokenizer:
    def __call__(self, text):
        return torch.tensor([list(text.encode())])

    def decode(self, ids):
        return bytes(ids.tolist()).decode()
