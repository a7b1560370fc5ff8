"""Published losses through mmx's public names: which input of a recorded call is which argument, and which output which value."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from mmx import losses
from mmx.modalities.patches import cut

Arrays: TypeAlias = Mapping[str, Any]


def momentum(x: Arrays, c: Arrays) -> Arrays:
    keys = {n: jnp.concatenate([x[f"{n}_feat_m"], x[f"{n}_queue"].T]) for n in ("image", "text")}
    pairs = {"sim_i2t": ("image_feat", "text"), "sim_t2i": ("text_feat", "image")}
    pairs |= {"sim_i2t_m": ("image_feat_m", "text"), "sim_t2i_m": ("text_feat_m", "image")}
    scores = {name: losses.similarity(x[query], keys[key], 1 / x["temp"]) for name, (query, key) in pairs.items()}
    loss, hard = (losses.momentum_contrastive_loss(*scores.values(), alpha) for alpha in (c["alpha"], 0.0))
    return {**scores, "loss": loss, "loss_alpha0": hard}


def contrastive(x: Arrays, c: Arrays) -> Arrays:
    image, text, scale = x["image_features"], x["text_features"], jnp.exp(x["logit_scale"])
    logits = losses.similarity(image, text, scale)
    return {"loss": losses.clip_loss(image, text, scale), "logits_per_image": logits, "logits_per_text": logits.T}


def coca(x: Arrays, c: Arrays) -> Arrays:
    pairs = c["clip_loss_weight"] * contrastive(x, c)["loss"]
    each = losses.cross_entropy(x["logits"], x["labels"])
    caption = c["caption_loss_weight"] * losses.masked_mean(each, x["labels"] != c["pad_id"])
    return {"loss": pairs + caption, "contrastive_loss": pairs, "caption_loss": caption}


def frame_order(x: Arrays, c: Arrays) -> Arrays:
    features, rows = x["frame_features"], np.arange(len(x["targets"]))[:, None]
    logits = jnp.zeros_like(features).at[rows, x["shuffled_orders"]].set(features) @ x["weight"].T + x["bias"]
    loss = losses.masked_mean(losses.cross_entropy(logits, x["targets"]), x["targets"] != c["ignore_index"])
    return {"loss": loss, "logits": logits.reshape(-1, logits.shape[-1])}


def masked_frames(x: Arrays, c: Arrays) -> Arrays:
    queries, keys = x["masked_output"], jnp.concatenate([x["pos_output"], x["neg_output"]])
    each = losses.info_nce(queries, keys, jnp.arange(len(queries)), c["nce_temp"])
    return {"loss": each.mean(), "elementwise": each, "logits": losses.similarity(queries, keys)}


def frames_of_the_batch(x: Arrays, c: Arrays) -> Arrays:
    predicted, frames = (x[n].reshape(-1, x[n].shape[-1]) for n in ("frame_prediction", "video"))
    each = losses.info_nce(predicted, frames, jnp.arange(len(frames)), key_mask=x["video_mask"].reshape(-1) != 0)
    return {"loss": losses.masked_mean(each, x["labels"].reshape(-1) != c["ignore_index"])}


def smoothed(x: Arrays, c: Arrays) -> Arrays:
    def mean(logits: Any, labels: Any) -> Any:
        return losses.masked_mean(losses.cross_entropy(logits, labels, c["epsilon"]), labels != c["ignore_index"])

    loss = mean(x["logits"], x["labels"])
    return {"loss": loss, "loss_torch": loss, "loss_shifted": mean(x["logits"][:, :-1], x["labels"][:, 1:])}


def labelled(x: Arrays, c: Arrays) -> Arrays:
    def mean(labels: Any) -> Any:
        return losses.masked_mean(losses.cross_entropy(x["logits"], labels), labels != c.get("ignore_index", -1))

    found = {"loss": mean(x["labels"])}
    return found | {"loss_ignore": mean(x["labels_ignore"])} if "labels_ignore" in x else found


def patches(x: Arrays, c: Arrays) -> Arrays:
    pixels, removed = cut(jnp.moveaxis(x["pixel_values"], 1, -1), (c["patch_size"],) * 2), x["mask"] != 0
    loss, plain = (losses.reconstruction_loss(x["pred"], pixels, removed, n) for n in (c["norm_pix"], False))
    return {"loss": loss, "loss_no_norm": plain, "patchified": pixels}


def bags(x: Arrays, c: Arrays) -> Arrays:
    return {"loss": losses.mil_nce_loss(x["sim_matrix"], c["n_pair"]), "loss_npair1": losses.mil_nce_loss(x["sim_matrix"], 1)}


def region_classes(x: Arrays, c: Arrays) -> Arrays:
    masked, labels = x["label"] == 1, losses.region_labels(x["target"])
    each = losses.cross_entropy(x["scores"], labels)
    return {"loss": losses.masked_mean(each, masked), "hard_targets": labels[masked], "elementwise": each[masked]}


def region_distributions(x: Arrays, c: Arrays) -> Arrays:
    masked, target = x["label"] == 1, x["target"]
    each = optax_terms(x["scores"], target)[masked]
    loss = c["weight"] * losses.masked_mean(losses.kl_divergence(x["scores"], target), masked)
    return {"loss": loss, "uniter_elementwise": each, "uniter_mean": each.mean()}


def optax_terms(scores: Any, target: Any) -> Any:
    """The terms that the divergence is the sum of: each class as a distribution of its own."""
    log = jax.nn.log_softmax(scores)
    return jax.scipy.special.xlogy(target, target) - target * log


def region_features(x: Arrays, c: Arrays) -> Arrays:
    masked = x["label"] == 1
    plain, huber = (losses.masked_mean(losses.regression_loss(x["scores"], x["features"], h), masked) for h in (False, True))
    return {"loss": c["weight"] * plain, "huber": c["weight"] * huber, "uniter_mean": plain}


def sampled_regions(x: Arrays, c: Arrays) -> Arrays:
    predicted, masked = x["scores"][:, 1:], x["label"] == 1
    negatives = x["target"].reshape(-1, x["target"].shape[-1])[x["negative_index"]]
    keys = jnp.concatenate([x["target"][:, :, None], negatives], 2)
    loss = losses.masked_mean(losses.sampled_nce(predicted, x["target"], negatives), masked)
    return {"loss": loss, "nce_logits": jnp.einsum("brd,brkd->brk", predicted, keys)[masked]}


def sigmoid(x: Arrays, c: Arrays) -> Arrays:
    loss = losses.sigmoid_loss(x["image_features"], x["text_features"], jnp.exp(x["logit_scale"]), x["logit_bias"])
    return {"loss": loss}


def transport(x: Arrays, c: Arrays) -> Arrays:
    given, settings = (x["txt_emb"], x["img_emb"]), (c["beta"], c["iteration"])
    masks = (x["txt_pad"] == 0, x["img_pad"] == 0)
    cost, distance = losses.cosine_cost(*given, *masks), losses.transport_distance(*given, *masks, *settings)
    plan = losses.transport_plan(cost, *masks, *settings).swapaxes(1, 2)
    return {
        "loss": losses.word_region_alignment_loss(distance, x["targets"] == 1),
        "distance": distance,
        "cost": cost,
        "plan": plan,
    }


CALLS: dict[str, Callable[[Arrays, Arrays], Arrays]] = {
    "albef_itc_momentum": momentum,
    "clip_infonce": contrastive,
    "coca": coca,
    "hero_fom": frame_order,
    "hero_mfm_nce": masked_frames,
    "itm_ce": labelled,
    "label_smoothed_ce": smoothed,
    "mae_pixel": patches,
    "mil_nce": bags,
    "mlm_ce": labelled,
    "mrc_ce": region_classes,
    "mrc_kl": region_distributions,
    "mrfr_mse": region_features,
    "mrm_nce": sampled_regions,
    "siglip_sigmoid": sigmoid,
    "uniter_ipot_wra": transport,
    "univl_mfm_nce": frames_of_the_batch,
}


def call_of(folder: Path) -> Callable[[Arrays, Arrays], Arrays] | None:
    """The call of a folder that begins with the name of a loss; None: it is no loss."""
    names = [name for name in CALLS if folder.name.startswith(name)]
    return None if (folder / "model.safetensors").exists() or not names else CALLS[max(names, key=len)]


def run(folder: Path) -> dict[str, np.ndarray]:
    """Every recorded output: the recorded names; `grad.X` is the gradient of the loss with respect to the input X."""
    inputs, recorded = (safetensors.numpy.load_file(folder / f"{n}.safetensors") for n in ("inputs", "outputs"))
    config, call = json.loads((folder / "config.json").read_text()), call_of(folder)
    assert call is not None, f"{folder} is no loss"
    moved = {name: x for name, x in inputs.items() if f"grad.{name}" in recorded}
    gradients = jax.grad(lambda moved: call({**inputs, **moved}, config)["loss"])(moved)
    found = {**call(inputs, config), **{f"grad.{name}": x for name, x in gradients.items()}}
    return {name: np.asarray(x) for name, x in found.items() if name in recorded}
