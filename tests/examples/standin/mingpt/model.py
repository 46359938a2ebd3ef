"""A stand-in for karpathy's minGPT: its names, its checkpoint layout and its config interface, written anew."""

import torch
from torch import nn
from torch.nn import functional as F

TYPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


class Config:
    model_type, n_layer, n_head, n_embd, vocab_size, block_size = "gpt", None, None, None, None, None


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        mask = torch.ones(1, 1, config.block_size, config.block_size).tril()
        self.register_buffer("bias", mask)  # persistent: a checkpoint holds it

    def forward(self, x):
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)
        )
        scores = query @ key.mT * (width // self.n_head) ** -0.5
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        return self.c_proj((scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        mlp = {
            "c_fc": nn.Linear(config.n_embd, 4 * config.n_embd),
            "c_proj": nn.Linear(4 * config.n_embd, config.n_embd),
            "act": nn.GELU(approximate="tanh"),
            "dropout": nn.Dropout(0.1),
        }
        self.mlp = m = nn.ModuleDict(mlp)
        self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))  # no module, and it holds on to the ModuleDict

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class GPT(nn.Module):
    get_default_config = staticmethod(Config)

    def __init__(self, config):
        super().__init__()
        sizes = (config.n_layer, config.n_head, config.n_embd)
        assert (config.model_type is None) != (None in sizes), "either a model_type or the three sizes"
        if config.model_type is not None:
            config.n_layer, config.n_head, config.n_embd = TYPES[config.model_type]  # so a config serves only once
        self.block_size = config.block_size
        parts = {
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(0.1),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        print(f"number of parameters: {sum(p.numel() for p in self.transformer.parameters()) / 1e6:.2f}M")

    def forward(self, idx, targets=None):
        parts = self.transformer
        positions = torch.arange(idx.shape[1], device=idx.device).unsqueeze(0)
        x = parts.drop(parts.wte(idx) + parts.wpe(positions))
        for block in parts.h:
            x = block(x)
        logits = self.lm_head(parts.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens):
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.block_size :])
            idx = torch.cat([idx, logits[:, -1:].argmax(dim=-1)], dim=1)
        return idx
