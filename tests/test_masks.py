"""Which tokens are hidden: shares, and what goes together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.objectives import masks

THERE = jnp.arange(24) < jnp.asarray([24, 20, 7, 1, 0])[:, None]
KEYS = jax.random.split(jax.random.key(0), 30)


def draw(function):
    """Thirty draws, `(30, 5, 24)`; nothing that does not exist is ever hidden."""
    hidden = np.asarray(jax.vmap(function)(KEYS))
    assert not (hidden & ~np.asarray(THERE)).any()
    return hidden


@pytest.mark.parametrize("rate", (0.15, 0.5, 1.0))
def test_a_share_of_the_tokens_that_exist_is_hidden_and_one_at_least(rate):
    count = draw(lambda key: masks.tokens(key, THERE, rate)).sum(-1)
    np.testing.assert_array_equal(count, np.broadcast_to([max(round(rate * n), bool(n)) for n in (24, 20, 7, 1, 0)], count.shape))


def test_every_token_is_hidden_equally_often():
    keys = jax.random.split(jax.random.key(1), 2000)
    share = np.asarray(jax.vmap(lambda key: masks.tokens(key, THERE[:1], 0.25))(keys)).mean((0, 1))
    np.testing.assert_allclose(share, 0.25, atol=0.05)


def test_words_are_hidden_whole():
    words = jnp.asarray(np.repeat(np.arange(10), [1, 2, 3, 1, 4, 2, 3, 1, 4, 3]))
    hidden = draw(lambda key: masks.groups(key, THERE, words, 0.3))[:, 0]
    for number in range(10):
        of_word = hidden[:, np.asarray(words) == number]
        assert (of_word.all(1) == of_word.any(1)).all()
    assert (hidden.sum(1) >= 7).all() and (hidden.sum(1) <= 7 + 3).all()


def test_spans_are_longer_than_single_tokens():
    def runs(hidden):
        return (np.diff(np.pad(hidden, ((0, 0), (1, 0))).astype(int)) == 1).sum()

    there = jnp.ones((200, 60), bool)
    spans, tokens = (np.asarray(f(KEYS[0], there, 0.3)) for f in (masks.spans, masks.tokens))
    assert spans.sum() / runs(spans) > 2.5 > 1.8 > tokens.sum() / runs(tokens)


def test_tubes_hide_the_same_places_in_every_frame_and_frames_hide_whole_ones():
    there = jnp.ones((5, 24), bool)
    tubes = np.asarray(masks.tubes(KEYS[0], there, (4, 2, 3), 0.5)).reshape(5, 4, 6)
    assert (tubes == tubes[:, :1]).all() and (tubes[:, 0].sum(1) == 3).all()
    frames = np.asarray(masks.frames(KEYS[0], there, (4, 2, 3), 0.5)).reshape(5, 4, 6)
    assert (frames == frames[..., :1]).all() and (frames[..., 0].sum(1) == 2).all()


def test_blocks_hide_as_many_patches_and_neighbours_together():
    there = jnp.ones((64, 196), bool)
    blocks, tokens = (
        np.asarray(x).reshape(64, 14, 14)
        for x in (masks.blocks(KEYS[0], there, (14, 14), 0.4), masks.tokens(KEYS[0], there, 0.4))
    )
    assert (blocks.sum((1, 2)) == round(0.4 * 196)).all()

    def together(hidden):  # how often the right-hand neighbour of a hidden patch is hidden too
        return (hidden[:, :, 1:] & hidden[:, :, :-1]).sum() / hidden[:, :, :-1].sum()

    assert together(tokens) < 0.5 < 0.7 < together(blocks)


def test_regions_that_overlap_a_hidden_one_are_hidden_with_it():
    boxes = jnp.asarray([[0, 0, 1, 1], [0.1, 0, 1, 1], [2, 2, 3, 3], [0.9, 0.9, 2, 2]], jnp.float32)[None]
    there = jnp.ones((1, 4), bool)
    hidden = np.asarray(jax.vmap(lambda key: masks.regions(key, there, boxes, 0.25))(KEYS))[:, 0]
    assert (hidden[:, 0] == hidden[:, 1]).all() and hidden[:, 0].any() and not hidden[:, 0].all()
    assert {tuple(row) for row in hidden} <= {(1, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)}


def test_a_whole_modality_is_hidden_in_a_share_of_the_examples():
    hidden = draw(lambda key: masks.whole(key, THERE, 0.5))
    assert (hidden.any(-1) == (hidden == np.asarray(THERE)).all(-1))[:, :4].all()
    assert 0.35 < hidden[:, :4].any(-1).mean() < 0.65
