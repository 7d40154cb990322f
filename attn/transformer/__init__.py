"""The systems of the transformer: positions, layers, stacks, models, caches; all on `attn.MultiheadAttention`.

| module | what |
| --- | --- |
| `config` | `LayerConfig`: what a layer is made of |
| `positions`, `position_bias` | positions added to features or to scores |
| `norms` | layer, batch and rms norm by name |
| `attention` | the attention of a layer: `attn.MultiheadAttention`, with positions in its scores and with a cache |
| `layers`, `stacks` | encoder and decoder, parameters as in `torch.nn` |
| `convert` | from and to `torch.nn` |
| `cache` | keys and values of decoded tokens, contiguous or paged |
| `embedding`, `token_model` | what the models share |
| `gpt`, `bert`, `seq2seq` | models |
| `search` | greedy and beam search |
"""

from __future__ import annotations

from attn.transformer.attention import Attention
from attn.transformer.bert import BERT, hide
from attn.transformer.cache import KVCache
from attn.transformer.config import LayerConfig
from attn.transformer.convert import from_torch, to_torch
from attn.transformer.embedding import TokenEmbedding
from attn.transformer.gpt import GPT
from attn.transformer.layers import DecoderLayer, EncoderLayer
from attn.transformer.norms import make_norm
from attn.transformer.position_bias import Alibi, RelativeBias
from attn.transformer.positions import LearnedPositions, OneHotPositions, SinusoidalPositions, scheme
from attn.transformer.search import beam, greedy
from attn.transformer.seq2seq import CrossDecoder, EncoderDecoder
from attn.transformer.stacks import Decoder, Encoder, Transformer

__all__ = [
    "BERT",
    "GPT",
    "Alibi",
    "Attention",
    "CrossDecoder",
    "Decoder",
    "DecoderLayer",
    "Encoder",
    "EncoderDecoder",
    "EncoderLayer",
    "KVCache",
    "LayerConfig",
    "LearnedPositions",
    "OneHotPositions",
    "RelativeBias",
    "SinusoidalPositions",
    "TokenEmbedding",
    "Transformer",
    "beam",
    "from_torch",
    "greedy",
    "hide",
    "make_norm",
    "scheme",
    "to_torch",
]
