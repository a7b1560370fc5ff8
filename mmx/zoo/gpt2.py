"""GPT-2: a causal text stream, pre-norm, tanh GELU; its dense layers are published as (in, out)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mmx.heads import Pooler, TiedDecoder
from mmx.modalities import Ids
from mmx.model import MultimodalTransformer, build_model
from mmx.topologies import PerStream
from mmx.zoo.config import activation, only
from mmx.zoo.family import Family, Generation, Runner, padded
from mmx.zoo.loss import token_loss
from mmx.zoo.texts import Texts
from mmx.zoo.weights import Table, conv1d, layers

LAYER: Table = {
    "ln_1": "self_norm",
    "attn.c_attn": conv1d("self/query", "self/key", "self/value"),
    "attn.c_proj": conv1d("self/out"),
    "ln_2": "mlp_norm",
    "mlp.c_fc": conv1d("mlp/up"),
    "mlp.c_proj": conv1d("mlp/down"),
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """The published fields of GPT-2."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True


def _build(c: GPT2Config, heads: Sequence[str], dtype: str) -> MultimodalTransformer:
    only(c, add_cross_attention=False)
    scores = TiedDecoder("text", transform=False, bias=False, own=not c.tie_word_embeddings)
    return build_model(
        {"text": Ids(c.vocab_size, c.n_positions, width=c.n_embd)},
        (PerStream(c.n_layer, causal=("text",)),),
        width=c.n_embd,
        heads=c.n_head,
        mlp=c.n_inner or 4 * c.n_embd,
        activation=activation(c.activation_function, "activation_function"),
        eps=c.layer_norm_epsilon,
        scale_by_layer=c.scale_attn_by_inverse_layer_idx,
        blind=True,
        scale=None if c.scale_attn_weights else 1.0,
        embed=0,
        poolers={"text": Pooler("last")},
        outputs={"captioning": scores} if "captioning" in heads else {},
        dtype=dtype,
    )


def _table(c: GPT2Config) -> Table:
    return {
        "transformer.wte": "modalities_text/token",
        "transformer.wpe.weight": "modalities_text/position",
        **layers("transformer.h.{}", "stages_0/text/layers/block", LAYER),
        "transformer.ln_f": "stages_0/text/norm",
        "lm_head": "heads_captioning/decoder",
    }


def _forward(run: Runner, c: GPT2Config, inputs: Mapping[str, Any]) -> dict[str, Any]:
    ids = inputs["input_ids"]
    beside = {"place": inputs["position_ids"]} if "position_ids" in inputs else {}
    r = run({"text": padded(ids, inputs.get("attention_mask"), **beside)})
    logits, last = r.out.logits.get("captioning"), r.out.streams["text"].values
    states = r.states("stages_0", "text")
    return {
        "loss": token_loss(logits[:, :-1], inputs["labels"][:, 1:]) if logits is not None and "labels" in inputs else None,
        "logits": logits,
        "last_hidden_state": last,
        "hidden_states": (*states[:-1], last),  # the last one is behind the norm
    }


FAMILIES = (
    Family(
        "gpt2",
        GPT2Config,
        _build,
        _table,
        _forward,
        names={
            "gpt2": {},
            "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
            "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
            "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
            "distilgpt2": {"n_layer": 6},
        },
        heads={"captioning": "transformer."},
        prefix="transformer",
        generation=Generation(places=True),
        texts=Texts(pad="<|endoftext|>", unknown="<|endoftext|>"),
        length=lambda c: c.n_positions,
        known=(r"\.attn\.(bias|masked_bias)$", r"^lm_head\.weight$"),
    ),
)
