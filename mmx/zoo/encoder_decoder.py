"""What encoder-decoders share: a source stream that is encoded, a causal stream `target` that reads it, teacher forcing."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from mmx.layers import BlockConfig
from mmx.topologies import Cross, PerStream, Stage
from mmx.types import Masked
from mmx.zoo.family import Generation, Runner, padded
from mmx.zoo.loss import token_loss

TARGET = "target"


def start_id(c: Any) -> int:
    """The id that is written first."""
    return c.pad_token_id if c.decoder_start_token_id is None else c.decoder_start_token_id


GENERATION = Generation(TARGET, "decoder_input_ids", "decoder_attention_mask", start=start_id)


def stages(source: str, depth: int, block: BlockConfig, target_depth: int, target_block: BlockConfig) -> tuple[Stage, ...]:
    """An encoder, then a decoder whose layers read themselves and what the encoder left."""
    decoder = Cross(target_depth, {TARGET: target_block}, "self cross mlp", edges={TARGET: (source,)}, steps=(TARGET,))
    return PerStream({source: depth}, {source: block}), decoder


def read_target(c: Any, inputs: Mapping[str, Any]) -> Masked:
    """`decoder_input_ids` and their mask; without them the labels, one place later, behind the id that is written first."""
    ids, labels = inputs.get("decoder_input_ids"), inputs.get("labels")
    if ids is None and labels is not None:
        before = jnp.where(labels == -100, c.pad_token_id, labels)[:, :-1]
        ids = jnp.pad(before, ((0, 0), (1, 0)), constant_values=start_id(c))
    return padded(inputs["decoder_input_ids"] if ids is None else ids, inputs.get("decoder_attention_mask"))


def forward(source: str, read: Callable[[Any, Mapping[str, Any]], Any]) -> Callable[..., dict[str, Any]]:
    """The forward function of a family whose source `read(config, inputs)` reads."""

    def run_both(run: Runner, c: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        r = run({source: read(c, inputs), TARGET: read_target(c, inputs)}, causal=(TARGET,))
        logits = r.out.logits.get("captioning")
        encoded, decoded = r.out.streams[source].values, r.out.streams[TARGET].values
        return {
            "loss": token_loss(logits, inputs["labels"]) if logits is not None and "labels" in inputs else None,
            "logits": logits,
            "last_hidden_state": decoded,
            "decoder_hidden_states": (*r.states("stages_1", TARGET)[:-1], decoded),  # the last one is behind the norm
            "encoder_last_hidden_state": encoded,
            "encoder_hidden_states": (*r.states("stages_0", source)[:-1], encoded),
        }

    return run_both
