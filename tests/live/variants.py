"""Which classes are compared live, how each is called, and in which configurations: data."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from originals import Draw, Reference, Variant, variant


def _bert(c: Any, d: Draw) -> dict[str, Any]:
    text = d.text(c.vocab_size)
    return {
        **text,
        "token_type_ids": d.integers(c.type_vocab_size, d.v.length),
        "labels": d.labels(c.vocab_size),
        "next_sentence_label": d.integers(2),
    }


def _gpt2(c: Any, d: Draw) -> dict[str, Any]:
    return {**d.text(c.vocab_size), "labels": d.labels(c.vocab_size), **_prompt(d.text(c.vocab_size, length=5))}


def _prompt(text: Mapping[str, Any]) -> dict[str, Any]:
    mask = text["attention_mask"]
    return {"generate.input_ids": text["input_ids"], "generate.attention_mask": np.sort(mask, 1)}  # padded on the left


def _encoder_decoder(c: Any, d: Draw, **source: Any) -> dict[str, Any]:
    length = d.v.length - 2
    vocab = getattr(c, "decoder_vocab_size", None) or c.vocab_size
    target = d.text(vocab, length=length)
    return {
        **source,
        "decoder_input_ids": target["input_ids"],
        "decoder_attention_mask": d.mask(length, "right" if d.v.side else None),
        "labels": d.labels(vocab, length),
    }


def _clip(c: Any, d: Draw) -> dict[str, Any]:
    t = c.text_config
    text = d.text(t.vocab_size - 1)
    ends = text["attention_mask"].cumsum(1).argmax(1)
    end = t.vocab_size - 1 if t.eos_token_id == 2 else t.eos_token_id
    text["input_ids"][np.arange(d.v.batch), ends] = end
    return {**text, "pixel_values": d.pixels(c.vision_config)}


def _siglip(c: Any, d: Draw) -> dict[str, Any]:
    return {**d.text(c.text_config.vocab_size), "pixel_values": d.pixels(c.vision_config)}


def _siglip2(c: Any, d: Draw) -> dict[str, Any]:
    v, length = c.vision_config, c.text_config.max_position_embeddings
    most = v.num_patches
    shapes = np.asarray([[2, most // 2], [3, most // 3], [1, most - 1]])[: d.v.batch]
    return {
        **d.text(c.text_config.vocab_size, length=length),
        "pixel_values": d.numbers(most, v.num_channels * v.patch_size**2),
        "pixel_attention_mask": (np.arange(most) < shapes.prod(1)[:, None]).astype(np.int64),
        "spatial_shapes": shapes,
    }


def _visual_bert(c: Any, d: Draw) -> dict[str, Any]:
    regions = d.v.length // 2
    inputs = {
        **d.text(c.vocab_size),
        "token_type_ids": d.integers(c.type_vocab_size, d.v.length),
        "visual_embeds": d.numbers(regions, c.visual_embedding_dim),
        "visual_attention_mask": d.mask(regions),
        "visual_token_type_ids": d.integers(c.type_vocab_size, regions),
        "labels": d.labels(c.vocab_size, d.v.length + regions),
        "sentence_image_labels": d.integers(2),
    }
    if "unaligned" not in d.v.without:
        inputs["image_text_alignment"] = d.integers(d.v.length, regions, 3, low=-1)
    return inputs


def _vilt(c: Any, d: Draw) -> dict[str, Any]:
    pixels = d.pixels(c)
    height, width = pixels.shape[-2:]
    mask = np.zeros((d.v.batch, height, width), np.int64)
    for i in range(d.v.batch):
        h, w = (height, width) if i == 0 else (int(d.random.integers(c.patch_size, n + 1)) for n in (height, width))
        mask[i, :h, :w] = 1
    return {
        **d.text(c.vocab_size),
        "token_type_ids": d.integers(c.type_vocab_size, d.v.length),
        "pixel_values": pixels,
        "pixel_mask": mask,
    }


def _vilt_tokens(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Of words all; of patches those that exist."""
    masks = []
    hook = model.embeddings.register_forward_hook(lambda _, __, out: masks.append(out[1]))
    out, length = model(**inputs, output_hidden_states=True), inputs["input_ids"].shape[1]
    hook.remove()
    last, mask = out.last_hidden_state, masks[0][:, length + 1 :]
    return {
        "text_last_hidden_state": last[:, :length],
        "image_cls_last_hidden_state": last[:, length],
        "raster.image_mask": mask.long(),
        "raster.image_last_hidden_state": last[:, length + 1 :] * mask[..., None],
        **{f"text_hidden_states.{i}": x[:, :length] for i, x in enumerate(out.hidden_states)},
    }


def _lxmert(c: Any, d: Draw) -> dict[str, Any]:
    regions = 5
    inputs = {
        **d.text(c.vocab_size),
        "token_type_ids": d.integers(c.type_vocab_size, d.v.length),
        "visual_feats": d.numbers(regions, c.visual_feat_dim),
        "visual_pos": d.random.random((d.v.batch, regions, c.visual_pos_dim)).astype(np.float32),
        "visual_attention_mask": d.mask(regions),
    }
    if c.task_mask_lm:
        inputs["labels"] = d.labels(c.vocab_size)
    if c.task_matched:
        inputs["matched_label"] = d.integers(2)
    if c.task_qa:
        inputs["ans"] = d.integers(c.num_qa_labels)
    if c.task_obj_predict:
        labels = {
            "obj": d.integers(c.num_object_labels, regions),
            "attr": d.integers(c.num_attr_labels, regions),
            "feat": d.numbers(regions, c.visual_feat_dim),
        }
        for name, label in labels.items():
            if getattr(c, f"visual_{name}_loss"):
                inputs[f"obj_labels.{name}.label"] = label
                inputs[f"obj_labels.{name}.conf"] = d.random.random((d.v.batch, regions)).astype(np.float32)
    return inputs


def _lxmert_more(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of regions, and the loss of each task by itself."""
    tasks = {"labels": "mlm", "matched_label": "matched", "ans": "qa", "obj_labels": "obj"}
    rest = {name: x for name, x in inputs.items() if name not in tasks}
    losses = {f"loss_{task}": model(**rest, **{n: inputs[n]}).loss for n, task in tasks.items() if n in inputs}
    if not model.config.task_obj_predict:
        return losses
    return losses | {f"visual_head.{n}": x for n, x in model.obj_predict_head(model.lxmert(**rest).vision_output).items()}


def _flava(c: Any, d: Draw) -> dict[str, Any]:
    pixels, patch = d.pixels(c.image_config), c.image_config.patch_size
    places = (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    text = d.text(c.text_config.vocab_size)
    labels = d.labels(c.text_config.vocab_size)
    hidden = d.integers(2, places)
    hidden[:, 0] = 1
    pairs = d.integers(2)
    pairs[0] = 1
    return {
        **text,
        "input_ids_masked": np.where(labels == -100, text["input_ids"], 3),
        "token_type_ids": d.integers(c.text_config.type_vocab_size, d.v.length),
        "pixel_values": pixels,
        "bool_masked_pos": hidden,
        "mlm_labels": labels,
        "mim_labels": d.integers(c.image_config.vocab_size, places),
        "itm_labels": pairs,
    }


def _blip(c: Any, d: Draw) -> dict[str, Any]:
    return {**d.text(c.text_config.vocab_size), "pixel_values": d.pixels(c.vision_config)}


def _blip_writes(model: Any, given: Mapping[str, Any]) -> tuple[torch.Tensor, Any]:
    image = model.vision_model(given["pixel_values"]).last_hidden_state
    ids = torch.full((len(image), 1), model.config.text_config.bos_token_id)
    return ids, lambda ids: model.text_decoder(input_ids=ids, encoder_hidden_states=image).logits


def _whisper_writes(model: Any, given: Mapping[str, Any]) -> tuple[torch.Tensor, Any]:
    sound = given["input_features"]
    ids = torch.full((len(sound), 1), model.config.decoder_start_token_id)
    return ids, lambda ids: model(input_features=sound, decoder_input_ids=ids).logits


def _qformer(c: Any, d: Draw) -> dict[str, Any]:
    queries, seen = 5, 7
    inputs = {
        "query_embeds": d.numbers(queries, c.hidden_size),
        "encoder_hidden_states": d.numbers(seen, c.encoder_hidden_size),
        "encoder_attention_mask": d.mask(seen),
    }
    if c.use_qformer_text_input:
        mask = d.mask(d.v.length)
        inputs["text.query_embeds"] = d.numbers(queries + d.v.length, c.hidden_size)
        inputs["text.attention_mask"] = np.concatenate([np.ones((d.v.batch, queries), np.int64), mask], 1)
    return inputs


def _git(c: Any, d: Draw) -> dict[str, Any]:
    return {
        **d.text(c.vocab_size),
        "pixel_values": d.pixels(c.vision_config),
        "labels": d.labels(c.vocab_size),
        "generate.input_ids": np.full((d.v.batch, 2), 2),
    }


def _llava(c: Any, d: Draw) -> dict[str, Any]:
    v = c.vision_config
    paligemma = c.model_type == "paligemma"
    count = (v.image_size // v.patch_size) ** 2 + (not paligemma and c.vision_feature_select_strategy == "full")
    vocab = min(c.image_token_index, c.text_config.vocab_size) if paligemma else c.text_config.vocab_size

    def prompt(length: int, side: str | None) -> dict[str, Any]:
        first = np.full((d.v.batch, count), c.image_token_index)
        ids = d.integers(vocab, length, low=c.image_token_index + 1 if not paligemma else 4)
        mask = d.mask(length, side)
        if side == "left":  # the image stands behind the padding
            rows = [
                np.concatenate([i[: length - m.sum()], f, i[length - m.sum() :]])
                for i, m, f in zip(ids, mask, first, strict=True)
            ]
            ones = np.concatenate([mask, np.ones_like(first)], 1)
            return {"input_ids": np.stack(rows), "attention_mask": np.sort(ones, 1)}
        ids = np.concatenate([first, ids], 1) if paligemma else np.concatenate([ids[:, :1], first, ids[:, 1:]], 1)
        return {"input_ids": ids, "attention_mask": np.concatenate([np.ones_like(first), mask], 1)}

    text, before = prompt(d.v.length, d.v.side), prompt(4, "left" if d.v.side else None)
    length = text["input_ids"].shape[1]
    inputs = {
        **text,
        "pixel_values": d.pixels(v),
        "labels": np.where(text["attention_mask"], d.labels(vocab, length), -100),
        **{f"generate.{n}": x for n, x in before.items()},
    }
    if paligemma:
        types = np.arange(length) >= count + 3
        inputs["token_type_ids"] = np.broadcast_to(types, text["input_ids"].shape).astype(np.int64)
        inputs["generate.token_type_ids"] = np.zeros_like(before["input_ids"])
    return inputs


def _audio_classes(c: Any, d: Draw) -> dict[str, Any]:
    return {"input_values": d.numbers(c.max_length, c.num_mel_bins), "labels": d.integers(c.num_labels)}


def _video_classes(c: Any, d: Draw) -> dict[str, Any]:
    return {"pixel_values": d.pixels(c, c.num_frames), "labels": d.integers(c.num_labels)}


def _perceiver_words(c: Any, d: Draw) -> dict[str, Any]:
    text = d.text(c.vocab_size)
    labels = d.labels(c.vocab_size, c.max_position_embeddings)
    return {"inputs": text["input_ids"], "attention_mask": text["attention_mask"], "labels": labels}


def _frames(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    if "attention_mask" not in inputs:
        return {}
    frames = model(inputs["input_values"]).last_hidden_state.shape[1]
    return {"feature_attention_mask": model._get_feature_vector_attention_mask(frames, inputs["attention_mask"]).int()}


def _boxes(d: Draw, most: int) -> np.ndarray:
    a, b = (d.integers(most, d.v.length, 2) for _ in range(2))
    return np.concatenate([np.minimum(a, b), np.maximum(a, b)], -1)


def _layoutlm(c: Any, d: Draw) -> dict[str, Any]:
    return {
        **d.text(c.vocab_size),
        "bbox": _boxes(d, c.max_2d_position_embeddings),
        "token_type_ids": d.integers(c.type_vocab_size, d.v.length),
        "labels": d.labels(c.vocab_size),
    }


def _layoutlmv3(c: Any, d: Draw) -> dict[str, Any]:
    return {
        **d.text(c.vocab_size, c.pad_token_id),
        "bbox": _boxes(d, 1000),
        "pixel_values": d.pixels(c),
    }


def _tapas(c: Any, d: Draw) -> dict[str, Any]:
    types = np.stack([d.integers(min(size, 3), d.v.length) for size in c.type_vocab_sizes], -1)
    return {**d.text(c.vocab_size), "token_type_ids": np.sort(types, 1)}


def _beit(c: Any, d: Draw) -> dict[str, Any]:
    pixels = d.pixels(c)
    places = (pixels.shape[-2] // c.patch_size) * (pixels.shape[-1] // c.patch_size)
    hidden = d.integers(2, places)
    hidden[:, 0] = 1
    labels = d.random.integers(0, c.vocab_size, int(hidden.sum()))
    return {"pixel_values": pixels, "bool_masked_pos": hidden, "labels": labels}


def _mae(c: Any, d: Draw) -> dict[str, Any]:
    pixels, patch = d.pixels(c), c.patch_size
    patch = (patch, patch) if isinstance(patch, int) else patch
    return {
        "pixel_values": pixels,
        "noise": d.random.random((d.v.batch, (pixels.shape[-2] // patch[0]) * (pixels.shape[-1] // patch[1]))).astype("f"),
    }


def _last(module: str, *more: str) -> dict[str, dict[str, str]]:
    return {module: {name: name for name in ("last_hidden_state", *more)}}


def _coca(c: Any, d: Draw) -> dict[str, Any]:
    size, length = c["vision_cfg"]["image_size"], c["text_cfg"]["context_length"] - 1
    size = (size, size) if isinstance(size, int) else size
    text = d.text(c["text_cfg"]["vocab_size"], c["text_cfg"]["pad_id"], length)
    return {"image": d.numbers(3, *size), "text": text["input_ids"]}


def _coca_model(fields: Mapping[str, Any]) -> torch.nn.Module:
    from open_clip.coca_model import CoCa

    known = ("embed_dim", "multimodal_cfg", "text_cfg", "vision_cfg", "quick_gelu")
    return CoCa(**{name: value for name, value in fields.items() if name in known}).eval()


def _coca_more(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip.loss import CoCaLoss

    out, image, text = model(**inputs), inputs["image"], inputs["text"]
    loss = CoCaLoss(caption_loss_weight=2, clip_loss_weight=1)
    features = (out[name] for name in ("image_features", "text_features", "logits", "labels", "logit_scale"))
    return {
        **dict(zip(("loss_contrastive", "loss_caption_x2"), loss(*features), strict=True)),
        "full_logits": model(**inputs, output_labels=False)["logits"],
        "image_embs": model._encode_image(image)[1],
        "text_token_embs": model._encode_text(text)[1],
        "image_features_raw": model.encode_image(image, normalize=False),
        "text_features_raw": model.encode_text(text, normalize=False),
    }


REFERENCES = {
    "CoCa": Reference(_coca, more=_coca_more, build=_coca_model),
    "BertForPreTraining": Reference(_bert, inside=_last("bert", "pooler_output")),
    "GPT2LMHeadModel": Reference(_gpt2, writes="own"),
    "T5ForConditionalGeneration": Reference(lambda c, d: _encoder_decoder(c, d, **d.text(c.vocab_size)), writes="own"),
    "MarianMTModel": Reference(lambda c, d: _encoder_decoder(c, d, **d.text(c.vocab_size)), writes="own"),
    "ViTForImageClassification": Reference(
        lambda c, d: {"pixel_values": d.pixels(c), "labels": d.integers(c.num_labels)}, inside=_last("vit")
    ),
    "ViTMAEForPreTraining": Reference(_mae, inside=_last("vit")),
    "BeitForMaskedImageModeling": Reference(_beit, inside=_last("beit")),
    "CLIPModel": Reference(
        _clip, calls=(({}, {f"{t}_model_output.pooler_output": f"{t}_pooler_output" for t in ("text", "vision")}),)
    ),
    "SiglipModel": Reference(_siglip),
    "Siglip2Model": Reference(_siglip2),
    "VisualBertForPreTraining": Reference(_visual_bert, inside=_last("visual_bert", "pooler_output")),
    "ViltModel": Reference(_vilt, calls=(({}, {"last_hidden_state": "-", "hidden_states": "-"}),), more=_vilt_tokens),
    "ViltForMaskedLM": Reference(
        lambda c, d: {**_vilt(c, d), "labels": d.labels(c.vocab_size)},
        calls=(({}, {"hidden_states": "-"}),),
        inside={"vilt": {"pooler_output": "pooler_output"}},
    ),
    "LxmertForPreTraining": Reference(
        _lxmert,
        inside={"lxmert": {n: n for n in ("language_output", "vision_output", "pooled_output")}},
        more=_lxmert_more,
    ),
    "FlavaForPreTraining": Reference(
        _flava, unread=tuple(f"{head}_head.bias" for head in ("mim", "mlm", "mmm_image", "mmm_text"))
    ),
    "BlipForConditionalGeneration": Reference(
        lambda c, d: {**_blip(c, d), "labels": d.labels(c.text_config.vocab_size)},
        inside={"text_decoder.bert": {"text_last_hidden_state": "last_hidden_state"}},
        writes=_blip_writes,
    ),
    "BlipForImageTextRetrieval": Reference(
        _blip,
        calls=(
            ({"use_itm_head": True}, {"question_embeds": "question_embeds_itm"}),
            ({"use_itm_head": False}, {"question_embeds": "question_embeds_itc", "itm_score": "itc_score"}),
        ),
    ),
    "Blip2QFormerModel": Reference(_qformer),
    "GitForCausalLM": Reference(
        _git, inside={"git.image_encoder": {"vision_last_hidden_state": "last_hidden_state"}}, writes="own"
    ),
    "PerceiverModel": Reference(lambda c, d: {"inputs": d.numbers(d.v.length, c.d_model), "attention_mask": d.mask()}),
    "PerceiverForMaskedLM": Reference(_perceiver_words, inside=_last("perceiver")),
    "ASTForAudioClassification": Reference(_audio_classes, inside=_last("audio_spectrogram_transformer", "pooler_output")),
    "WhisperForConditionalGeneration": Reference(
        lambda c, d: _encoder_decoder(c, d, input_features=d.numbers(c.num_mel_bins, 2 * c.max_source_positions)),
        writes=_whisper_writes,
    ),
    "Wav2Vec2Model": Reference(
        lambda c, d: {"input_values": d.numbers(d.v.length), "attention_mask": d.mask()},
        more=_frames,
        unread=("masked_spec_embed",),
    ),
    "VideoMAEForVideoClassification": Reference(_video_classes, inside=_last("videomae")),
    "VivitForVideoClassification": Reference(_video_classes, inside=_last("vivit")),
    "TimesformerModel": Reference(lambda c, d: {"pixel_values": d.pixels(c, c.num_frames)}),
    "LayoutLMForMaskedLM": Reference(_layoutlm, inside=_last("layoutlm", "pooler_output")),
    "LayoutLMv3Model": Reference(_layoutlmv3, unread=tuple(f"encoder.rel_pos_{axis}_bias.weight" for axis in "xy")),
    "TapasModel": Reference(_tapas),
    "LlavaForConditionalGeneration": Reference(_llava, writes="own"),
    "PaliGemmaForConditionalGeneration": Reference(_llava, writes="own"),
}

_DEEP = {"num_hidden_layers": 4, "hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 36}
_FLAT = {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 64}
_COARSE = {"layer_norm_eps": 1e-3}

# fmt: off
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "CoCa": (
        variant(1, side=None, embed_dim=24, quick_gelu=True, vision_cfg={"layers": 1, "width": 24, "head_width": 12,
            "mlp_ratio": 4.0, "patch_size": 6, "image_size": 24, "attn_pooler_queries": 3, "attn_pooler_heads": 2,
            "final_ln_after_pool": True}, text_cfg={"width": 24, "heads": 2, "layers": 1, "context_length": 7,
            "proj_bias": True}, multimodal_cfg={"width": 24, "heads": 3, "layers": 3, "ls_init_value": 0.5,
            "context_length": 7}),
        variant(3, vision_cfg={"layers": 4, "width": 32, "attentional_pool": False, "no_ln_pre": True, "ls_init_value": 0.3},
            text_cfg={"ls_init_value": 0.2, "pad_id": 5}),
        variant(4, embed_dim=32, vision_cfg={"image_size": 26}, text_cfg={"final_ln_after_pool": True}),
        variant(2, vision_cfg={"pool_type": "avg"}, refused="pool_type"),
        variant(2, text_cfg={"norm_kwargs": {"eps": 1e-3}}, refused="norm_kwargs"),
    ),
    "BertForPreTraining": (
        variant(1, 31, None, **_DEEP, **_COARSE, hidden_act="relu", type_vocab_size=3, max_position_embeddings=40),
        variant(5, 7, "left", **_FLAT, hidden_act="gelu_new", vocab_size=53, without=("token_type_ids", "labels",
            "next_sentence_label")),
        variant(2, 12, **_FLAT, hidden_act="silu", without=("attention_mask", "token_type_ids")),
        variant(tie_word_embeddings=False),
    ),
    "GPT2LMHeadModel": (
        variant(1, 22, None, n_layer=4, n_embd=40, n_head=5, n_inner=36, activation_function="gelu", layer_norm_epsilon=1e-3,
            n_positions=50),
        variant(4, 6, n_layer=1, n_embd=24, n_head=2, activation_function="relu", scale_attn_weights=False,
            without=("attention_mask",)),
        variant(2, 8, "left", n_layer=3, activation_function="quick_gelu", reorder_and_upcast_attn=True),
        variant(2, 8, scale_attn_by_inverse_layer_idx=True),
        variant(2, 8, tie_word_embeddings=False),
    ),
    "T5ForConditionalGeneration": (
        variant(1, 24, None, d_model=40, d_kv=9, d_ff=30, num_layers=1, num_decoder_layers=1, num_heads=3,
            relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-3),
        variant(3, 14, "left", feed_forward_proj="gated-gelu", dense_act_fn="gelu_new", is_gated_act=True,
            tie_word_embeddings=False, scale_decoder_outputs=False, num_layers=4, num_decoder_layers=2),
        variant(2, 9, feed_forward_proj="gated-silu", dense_act_fn="silu", is_gated_act=True, relative_attention_num_buckets=6,
            relative_attention_max_distance=5, without=("attention_mask", "decoder_attention_mask")),
        variant(2, 9, feed_forward_proj="gelu", dense_act_fn="gelu", scale_decoder_outputs=False, decoder_start_token_id=5,
            without=("decoder_input_ids", "decoder_attention_mask")),
        variant(2, 9, tie_word_embeddings=False),
        variant(2, 9, tie_word_embeddings=False, scale_decoder_outputs=True),
    ),
    "MarianMTModel": (
        variant(1, 20, None, d_model=40, encoder_layers=1, decoder_layers=4, encoder_attention_heads=5,
            decoder_attention_heads=2, encoder_ffn_dim=30, decoder_ffn_dim=70, activation_function="gelu",
            scale_embedding=False),
        variant(4, 8, "left", share_encoder_decoder_embeddings=False, decoder_vocab_size=71, activation_function="swish",
            decoder_start_token_id=70, pad_token_id=70),
        variant(2, 8, d_model=36, encoder_attention_heads=3, decoder_attention_heads=3, without=("attention_mask",
            "decoder_attention_mask")),
        variant(2, 8, tie_word_embeddings=False),
        variant(2, 8, share_encoder_decoder_embeddings=False, decoder_vocab_size=71, tie_word_embeddings=False,
            decoder_start_token_id=70, pad_token_id=70),
    ),
    "ViTForImageClassification": (
        variant(1, **_DEEP, **_COARSE, hidden_act="gelu_new", image_size=[8, 40], qkv_bias=False, num_channels=1, num_labels=3),
        variant(4, **_FLAT, hidden_act="relu", image_size=30, patch_size=[10, 6], without=("labels",)),
        variant(2, hidden_act="quick_gelu", image_size=21, patch_size=5, num_labels=1),
    ),
    "ViTMAEForPreTraining": (
        variant(1, **_DEEP, **_COARSE, hidden_act="relu", qkv_bias=False, num_channels=1, mask_ratio=0.75,
            decoder_hidden_size=36, decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=20),
        variant(3, **_FLAT, norm_pix_loss=False, mask_ratio=0.3, image_size=40, patch_size=8, hidden_act="gelu_new"),
        variant(2, decoder_num_hidden_layers=4, image_size=[36, 36]),  # the original makes no other shape
    ),
    "BeitForMaskedImageModeling": (
        variant(1, **_DEEP, **_COARSE, hidden_act="relu", image_size=24, num_channels=1, vocab_size=17,
            use_absolute_position_embeddings=True, use_relative_position_bias=False),
        variant(3, **_FLAT, hidden_act="gelu_new", image_size=[24, 8], use_relative_position_bias=False,
            use_shared_relative_position_bias=True, use_mean_pooling=False),
        variant(2, layer_scale_init_value=0.0, image_size=[32, 16], use_mean_pooling=False, without=("labels",)),
        variant(2, image_size=24, use_absolute_position_embeddings=True, use_relative_position_bias=True),
        variant(2, use_shared_relative_position_bias=True, refused="use_relative_position_bias"),
    ),
    "CLIPModel": (
        variant(1, 16, None, text_config={**_DEEP, **_COARSE, "hidden_act": "gelu"}, vision_config={**_FLAT,
            "hidden_act": "gelu", "image_size": 30, "patch_size": 10, "num_channels": 1}, projection_dim=11),
        variant(4, 7, text_config={**_FLAT, "eos_token_id": 2}, vision_config={**_DEEP, **_COARSE, "image_size": 20,
            "patch_size": 5}),
        variant(2, 7, "left", text_config={"hidden_act": "relu", "eos_token_id": 50}, vision_config={"hidden_act": "gelu_new"},
            without=("attention_mask",)),
        variant(2, 7, "left", vision_config={"image_size": 26, "patch_size": 8}),
    ),
    "SiglipModel": (
        variant(1, side=None, text_config={**_DEEP, **_COARSE, "hidden_act": "relu", "projection_size": 24},
            vision_config={**_FLAT, "image_size": 30, "patch_size": 10, "num_channels": 1}),
        variant(4, text_config={**_FLAT, "hidden_size": 32, "hidden_act": "gelu"}, vision_config={**_DEEP, **_COARSE,
            "hidden_size": 32, "num_attention_heads": 4, "hidden_act": "quick_gelu", "image_size": 26}),
        variant(2, side="left", text_config={"max_position_embeddings": 20}, without=("attention_mask",)),
    ),
    "Siglip2Model": (
        variant(1, side=None, text_config={**_DEEP, **_COARSE, "hidden_act": "relu", "projection_size": 24,
            "max_position_embeddings": 7}, vision_config={**_FLAT, "patch_size": 4, "num_channels": 1, "num_patches": 25,
            "hidden_act": "gelu"}),
        variant(3, text_config={"max_position_embeddings": 20}, vision_config={**_DEEP, "hidden_size": 24,
            "num_attention_heads": 6, **_COARSE, "num_patches": 36}, without=("attention_mask",)),
    ),
    "VisualBertForPreTraining": (
        variant(1, 18, None, **_DEEP, **_COARSE, hidden_act="relu", visual_embedding_dim=9, type_vocab_size=3,
            special_visual_initialize=False),
        variant(3, 8, "left", **_FLAT, hidden_act="gelu_new", without=("token_type_ids", "visual_token_type_ids", "labels",
            "sentence_image_labels", "image_text_alignment")),
        variant(2, 8, **_FLAT, without=("visual_attention_mask", "attention_mask", "labels", "sentence_image_labels",
            "image_text_alignment")),
        variant(2, 8, bypass_transformer=True, without=("visual_embeds", "visual_attention_mask", "visual_token_type_ids",
            "image_text_alignment", "labels", "sentence_image_labels"), refused="bypass_transformer"),
        variant(2, 8, tie_word_embeddings=False, without=("image_text_alignment",)),
    ),
    "ViltModel": (
        variant(1, 14, None, **_DEEP, **_COARSE, hidden_act="relu", image_size=24, image=(24, 24), qkv_bias=False,
            num_channels=1),
        variant(3, 6, "left", **_FLAT, hidden_act="gelu_new", image=(40, 16), without=("token_type_ids", "pixel_mask")),
        variant(4, 8, image=(32, 48), image_size=40, patch_size=8, without=("attention_mask",)),
        variant(2, 8, image=(32, 32), max_image_length=6),
        variant(2, 8, modality_type_vocab_size=3, refused="modality_type_vocab_size"),
    ),
    "ViltForMaskedLM": (
        variant(1, 14, None, **_DEEP, **_COARSE, hidden_act="relu", image_size=24, image=(24, 24), qkv_bias=False),
        variant(2, 8, **_FLAT, tie_word_embeddings=False, without=("labels",)),
    ),
    "LxmertForPreTraining": (
        variant(1, 14, None, **{n: x for n, x in _DEEP.items() if n != "num_hidden_layers"}, hidden_act="relu", l_layers=1,
            x_layers=3, r_layers=4, num_qa_labels=3, num_object_labels=5, num_attr_labels=2, visual_pos_dim=6,
            visual_feat_dim=11),
        variant(3, 8, "left", hidden_act="gelu_new", l_layers=4, x_layers=1, r_layers=2, task_qa=False, visual_attr_loss=False,
            without=("visual_attention_mask", "token_type_ids")),
        variant(2, 8, l_layers=2, x_layers=1, task_obj_predict=False, visual_loss_normalizer=2.0, without=("labels", "ans")),
        variant(2, 8, task_matched=False, task_mask_lm=False, visual_feat_loss=False),
        variant(2, 8, layer_norm_eps=1e-3, refused="layer_norm_eps"),
        variant(2, 8, tie_word_embeddings=False),
    ),
    "FlavaForPreTraining": (
        variant(1, 14, None, image_config={**_DEEP, **_COARSE, "hidden_act": "relu", "qkv_bias": False, "num_channels": 1,
            "image_size": 24}, text_config={**_DEEP, "num_hidden_layers": 1, "hidden_act": "gelu_new", "type_vocab_size": 3},
            multimodal_config={**_DEEP, **_COARSE, "num_hidden_layers": 3, "qkv_bias": False}, hidden_size=40, projection_dim=9,
            layer_norm_eps=1e-3),
        variant(4, 8, text_config={"qkv_bias": False, "layer_norm_eps": 1e-3}, multimodal_config={"use_cls_token": True,
            "hidden_act": "silu"}, mlm_weight=0.5, itm_weight=2.0, global_contrastive_weight=0.3, mmm_image_weight=0.7,
            mmm_text_weight=0.2, mim_weight=3.0),
        variant(3, 8, "left", skip_unmasked_multimodal_encoder=False, without=("token_type_ids", "itm_labels")),
        variant(3, 8, without=("mlm_labels", "attention_mask")),
        variant(3, 8, itm_weight=0.0, mmm_text_weight=0.0),
        variant(3, 8, multimodal_config={"use_cls_token": False}),
        variant(3, 8, ce_ignore_index=-100, tie_word_embeddings=False),
    ),
    "BlipForConditionalGeneration": (
        variant(1, 14, None, text_config={**_DEEP, **_COARSE, "hidden_act": "relu", "label_smoothing": 0.0,
            "encoder_hidden_size": 24}, vision_config={**_FLAT, "hidden_act": "gelu_new", "image_size": 30, "patch_size": 10}),
        variant(3, 8, text_config={**_FLAT, "encoder_hidden_size": 40, "bos_token_id": 5, "label_smoothing": 0.3},
            vision_config={**_DEEP, **_COARSE, "image_size": 16}, without=("attention_mask",)),
        variant(2, 8, without=("labels",)),
    ),
    "BlipForImageTextRetrieval": (
        variant(1, 14, None, text_config={**_DEEP, **_COARSE, "hidden_act": "relu", "encoder_hidden_size": 24},
            vision_config={**_FLAT, "hidden_act": "gelu_new", "image_size": 30, "patch_size": 10}, image_text_hidden_size=7),
        variant(4, 8, text_config={**_FLAT, "encoder_hidden_size": 40}, vision_config={**_DEEP, **_COARSE, "image_size": 16,
            "patch_size": 8}, without=("attention_mask",)),
    ),
    "Blip2QFormerModel": (
        variant(1, 14, None, **_DEEP, **_COARSE, hidden_act="relu", cross_attention_frequency=1, encoder_hidden_size=40),
        variant(3, 6, **{**_FLAT, "num_hidden_layers": 5}, hidden_act="gelu_new", cross_attention_frequency=3,
            without=("encoder_attention_mask",)),
        variant(2, 6, "left", num_hidden_layers=1, use_qformer_text_input=False),
        variant(2, 6, num_hidden_layers=2, cross_attention_frequency=4),
    ),
    "GitForCausalLM": (
        variant(1, 14, None, **_DEEP, **_COARSE, hidden_act="relu", vision_config={**_FLAT, "hidden_act": "gelu",
            "image_size": 30, "patch_size": 10, "num_channels": 1}),
        variant(3, 8, **_FLAT, hidden_act="gelu_new", vision_config={**_DEEP, **_COARSE, "image_size": 26},
            without=("attention_mask", "labels")),
        variant(2, 8, without=("labels", "pixel_values")),
        variant(2, 8, tie_word_embeddings=True),
        variant(2, 8, num_image_with_embedding=2, without=("labels",), refused="num_image_with_embedding"),
    ),
    "PerceiverModel": (
        variant(1, 20, None, d_latents=40, d_model=28, num_latents=3, num_blocks=1, num_self_attends_per_block=4,
            num_self_attention_heads=5, num_cross_attention_heads=4, hidden_act="relu", cross_attention_widening_factor=2,
            self_attention_widening_factor=3),
        variant(3, 9, "left", num_blocks=3, num_self_attends_per_block=1, qk_channels=16, v_channels=32, hidden_act="gelu_new",
            use_query_residual=False, layer_norm_eps=1e-3),
        variant(2, 9, cross_attention_shape_for_attention="q", without=("attention_mask",)),
        variant(2, 9, qk_channels=24, v_channels=32, num_cross_attention_heads=8, num_self_attention_heads=2),
    ),
    "PerceiverForMaskedLM": (
        variant(1, side=None, d_latents=40, d_model=32, qk_channels=24, v_channels=40, num_latents=3,
            num_self_attends_per_block=4, num_self_attention_heads=4, hidden_act="relu", max_position_embeddings=20,
            vocab_size=41, num_blocks=2),
        variant(3, d_model=40, cross_attention_widening_factor=2, use_query_residual=False, without=("labels",)),
    ),
    "ASTForAudioClassification": (
        variant(1, **_DEEP, **_COARSE, hidden_act="relu", qkv_bias=False, patch_size=6, time_stride=3, frequency_stride=6,
            max_length=25, num_mel_bins=17, num_labels=3),
        variant(3, **_FLAT, hidden_act="gelu_new", patch_size=5, time_stride=7, frequency_stride=2, without=("labels",)),
    ),
    "WhisperForConditionalGeneration": (
        variant(1, 14, None, d_model=40, encoder_layers=1, decoder_layers=4, encoder_attention_heads=5,
            decoder_attention_heads=4, encoder_ffn_dim=30, decoder_ffn_dim=70, activation_function="relu", num_mel_bins=7,
            max_source_positions=20),
        variant(3, 8, encoder_layers=4, decoder_layers=1, activation_function="gelu_new", scale_embedding=True,
            decoder_start_token_id=5, without=("decoder_attention_mask", "labels")),
        variant(3, 8, without=("decoder_input_ids", "decoder_attention_mask")),
        variant(2, 8, tie_word_embeddings=False),
    ),
    "Wav2Vec2Model": (
        variant(1, 500, None, **_DEEP, **_COARSE, hidden_act="relu", num_conv_pos_embeddings=7, num_conv_pos_embedding_groups=8,
            conv_dim=[8, 10], conv_kernel=[8, 4], conv_stride=[4, 3], num_feat_extract_layers=2, conv_bias=True,
            feat_extract_activation="relu"),
        variant(3, 333, **_FLAT, hidden_act="gelu_new", do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True,
            num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
        variant(2, 400, num_hidden_layers=4, do_stable_layer_norm=True, layer_norm_eps=1e-3),
        variant(2, 400, feat_extract_norm="layer", num_conv_pos_embeddings=128, num_conv_pos_embedding_groups=1),
        variant(2, 400, add_adapter=True, refused="add_adapter"),
    ),
    "VideoMAEForVideoClassification": (
        variant(1, **_DEEP, **_COARSE, hidden_act="relu", qkv_bias=False, qv_bias=False, num_channels=1, image_size=24,
            num_frames=6, tubelet_size=3, use_mean_pooling=False, num_labels=3),
        variant(3, **_FLAT, hidden_act="gelu_new", tubelet_size=1, num_frames=2, num_labels=1),
        variant(2, patch_size=[4, 6], without=("labels",)),
    ),
    "VivitForVideoClassification": (
        variant(1, **_DEEP, **_COARSE, hidden_act="relu", qkv_bias=False, num_channels=1, num_frames=6, tubelet_size=[3, 6, 4],
            num_labels=3),
        variant(3, **_FLAT, hidden_act="gelu", tubelet_size=[1, 8, 8], num_frames=2, num_labels=1),
        variant(2, image_size=[24, 16]),
    ),
    "TimesformerModel": (
        variant(1, **_DEEP, **_COARSE, hidden_act="relu", qkv_bias=False, num_channels=1, num_frames=5, image_size=12,
            patch_size=4),
        variant(3, **_FLAT, hidden_act="gelu_new", attention_type="joint_space_time"),
        variant(2, num_hidden_layers=3, attention_type="space_only"),
    ),
    "LayoutLMForMaskedLM": (
        variant(1, 16, None, **_DEEP, **_COARSE, hidden_act="relu", max_2d_position_embeddings=100, type_vocab_size=3),
        variant(3, 8, "left", **_FLAT, hidden_act="gelu_new", without=("labels", "token_type_ids")),
        variant(2, 8, without=("bbox", "attention_mask")),
        variant(2, 8, tie_word_embeddings=False),
    ),
    "LayoutLMv3Model": (
        variant(1, 20, None, **_DEEP, **_COARSE, hidden_act="relu", coordinate_size=8, shape_size=4, input_size=30,
            patch_size=6, type_vocab_size=1, rel_pos_bins=32, max_rel_pos=128, rel_2d_pos_bins=64, max_rel_2d_pos=256),
        variant(3, 8, **{**_FLAT, "hidden_size": 30, "num_attention_heads": 3}, coordinate_size=5, shape_size=5,
            hidden_act="gelu_new", has_relative_attention_bias=False, has_spatial_attention_bias=False),
        variant(2, 8, "left", has_spatial_attention_bias=False, num_channels=1, without=("attention_mask",)),
        variant(2, 8, has_relative_attention_bias=False),
        variant(2, 8, visual_embed=False, without=("pixel_values",), refused="visual_embed"),
        variant(2, 8, text_embed=False, without=("input_ids", "attention_mask", "bbox"), refused="text_embed"),
        variant(2, 8, pad_token_id=0, without=("bbox",)),
    ),
    "TapasModel": (
        variant(1, 20, None, **_DEEP, **_COARSE, hidden_act="relu", type_vocab_sizes=[3, 9, 9, 2, 5, 5, 10],
            reset_position_index_per_cell=False),
        variant(3, 16, "left", **_FLAT, hidden_act="gelu_new", max_position_embeddings=17),
        variant(2, 30, max_position_embeddings=5, without=("attention_mask",)),
        variant(2, 10, without=("token_type_ids",)),
    ),
    "LlavaForConditionalGeneration": (
        variant(1, 14, None, text_config={"num_hidden_layers": 4, "hidden_size": 40, "num_attention_heads": 5,
            "num_key_value_heads": 1, "head_dim": 12, "intermediate_size": 30, "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "attention_bias": True, "mlp_bias": True,
            "hidden_act": "gelu"}, vision_config={**_DEEP, **_COARSE, "hidden_act": "gelu", "image_size": 24},
            projector_hidden_act="relu", multimodal_projector_bias=False, vision_feature_layer=-1,
            vision_feature_select_strategy="full"),
        variant(3, 8, text_config={"num_hidden_layers": 1, "num_key_value_heads": 4}, vision_config={"num_channels": 1},
            vision_feature_layer=[-1, 1], without=("attention_mask",)),
        variant(2, 8, "left", vision_feature_layer=[-2, -3, 2], image_token_index=9, projector_hidden_act="gelu_new"),
        variant(2, 8, vision_feature_layer=1, text_config={"tie_word_embeddings": True}, tie_word_embeddings=True),
        variant(2, 8, text_config={"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}},
            refused="factor"),
    ),
    "PaliGemmaForConditionalGeneration": (
        variant(1, 14, None, text_config={"num_hidden_layers": 4, "hidden_size": 40, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 14, "intermediate_size": 30, "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "attention_bias": True, "hidden_act": "gelu"},
            vision_config={**_DEEP, **_COARSE, "hidden_act": "gelu", "image_size": 24, "projection_dim": 40}, projection_dim=40,
            hidden_size=40),
        variant(3, 8, text_config={"num_hidden_layers": 1, "num_key_value_heads": 4}, vision_config={"num_channels": 1,
            "image_size": 24}, without=("attention_mask",)),
        variant(2, 8, "left"),
        variant(2, 8, without=("token_type_ids", "labels")),
        variant(2, 8, text_config={"tie_word_embeddings": False}, tie_word_embeddings=False),
    ),
}
