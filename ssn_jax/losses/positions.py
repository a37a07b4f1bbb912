"""The loss of a network without a classification head: every position is judged by itself.

Adaptor and segmentation head look at one position at a time, so any sample of positions gives an
unbiased estimate of the loss, at a cost that follows from the sample and not from the grid.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from ssn_jax import config as config_lib, synthesis
from ssn_jax.losses import terms as loss_terms
from ssn_jax.models import heads
from ssn_jax.models.grid import feature_grid, sample_features

# What a position teaches: that it is normal, which kind of anomaly it is, or, of the strongest of a
# normal image and around those of a defective one, again that it is normal.
_NORMAL, _DRAWN, _NOISE, _MISPLACED, _REAL, _STRONGEST, _HARD, _AROUND = range(8)
# Of images whose strongest positions teach: how many a step asks, at how many positions for each
# of `config.positions`, and which share of these are the strongest. Where all positions are taught,
# at as many as for 32.
_ASKED, _AT, _STRONG = 2, 32, 1 / 128
# What real defects weigh beside drawn ones and noise in the output that learns them above all, and
# what is normal around their strongest positions beside all else that is normal.
_ABOVE_ALL, _OF_AROUND = 100.0, 0.2
# For each of a defect's strongest positions: how many may look defective in a small defect, and how
# many around it are taught to be normal.
_PER_STRONG = 4


def make_map_loss(
    config: ml_collections.ConfigDict, network: nn.Module, noise_fn: Callable
) -> Callable:
    """The loss of both players; arguments and result as of `steps.make_loss`.

    The first half of a batch, its normal images first, gives `config.positions` positions an image,
    and every other one of normal images comes once more with noise; the rest of the batch gives a
    quarter as many. `config.product_share` of a normal image's are on the product and the others
    anywhere; a defective image's are of its defect, weighted as its mask is (one whose mask is
    unknown gives none), and with `config.surroundings` the rest of the batch gives as many more
    beside its defects, which are normal. Of some images with real defects the strongest positions
    come besides. Normal and anomalous positions count alike, and of these all kinds alike. With
    `config.hard_normal` the strongest positions of some normal images have that weight besides.
    With `config.supervision.known` a second output of the head learns the same positions, but real
    defects above all, and, with `config.surroundings`, that these end somewhere (`_around`);
    `heads.mixed` makes one of both.

    Args:
      config: the run's config.
      network: a `SuperSimpleNet` without a classification head.
      noise_fn: `(generator, adapted, key) -> noise`, called with adapted features (K, C).
    """

    def loss_fn(params, generator, batch_stats, batch, key, stop_map_gradient=True):
        del stop_map_gradient  # The map feeds nothing.

        def apply(x, method, params=params, **options):
            variables = {'params': params, 'batch_stats': batch_stats}
            x, updates = network.apply(
                variables, x, train=True, method=method, mutable=['batch_stats'], **options
            )
            return x, updates.get('batch_stats', {})

        k_places, k_noise = jax.random.split(key)
        sampled = _sample(k_places, batch, config.positions, config_lib.product_share(config))
        judge = functools.partial(_judge, network, batch_stats, feature_grid(batch['layers']))
        evaluated = heads.mixed(params, config.supervision.known)
        who = {_STRONGEST: batch['real']} if 'real' in batch else {}
        if config.hard_normal:
            who[_HARD] = 1 - batch.get('label', jnp.zeros(len(batch['layers'][0])))
        for stream, (kind, of) in enumerate(who.items(), 3):
            k_asked = jax.random.fold_in(key, stream)
            asked = _ask(k_asked, batch, of, _AT * (config.positions or 32))
            logits = judge(evaluated, asked)
            best, strongest = _strongest(asked, logits, kind)
            parts = [sampled[:4], strongest]
            if kind == _STRONGEST and 'known' in params and any(config.surroundings):
                unaware = judge(heads.mixed(params, 0.0), asked)
                parts.append(_around(asked, logits, best, unaware, config.surroundings))
            joined = (jnp.concatenate(x) for x in zip(*parts, strict=True))
            sampled = _Sample(*joined, sampled.first)
        adapted, of_adaptor = apply(sampled.features, 'adapt')
        noisy = sampled.weight[: sampled.first : 2] * (sampled.kind[: sampled.first : 2] == _NORMAL)
        clean = adapted[: sampled.first : 2]
        noise = noise_fn(generator, clean, k_noise) * noisy[:, None]
        [scale] = synthesis.noise_scales(config.noise.unit, adapted)
        seen = jnp.concatenate([adapted, clean + noise * scale])
        weight = jnp.concatenate([sampled.weight, noisy])
        kind = jnp.concatenate([sampled.kind, _NOISE * jnp.ones_like(noisy)])
        options = {}
        if network.waves:
            codes = network.places(feature_grid(batch['layers']))
            codes = codes.reshape(-1, codes.shape[-1])
            places = jnp.concatenate([sampled.places, sampled.places[: sampled.first : 2]])
            if config.misplaced:
                # What is normal, said to lie where another image's position does.
                moved = slice(1, sampled.first, 2)
                elsewhere = jax.random.permutation(
                    jax.random.fold_in(key, 1), sampled.places[moved]
                )
                seen = jnp.concatenate([seen, adapted[moved]])
                places = jnp.concatenate([places, elsewhere])
                normal = sampled.weight[moved] * (sampled.kind[moved] == _NORMAL)
                weight = jnp.concatenate([weight, normal])
                kind = jnp.concatenate([kind, _MISPLACED * jnp.ones_like(normal)])
            options = {'code': codes[places]}
        logits, of_head = apply(seen, 'segment', **options)
        target = (kind > _NORMAL) & (kind < _HARD)

        def judged(logits, name, real=1.0, around=0.0):
            shares = _shares(kind, weight > 0, config.misplaced, config.hard_normal, real, around)
            share, logits = weight * shares, logits[:, 0]
            if config.map_loss == 'cross_entropy':
                # Beyond a margin the truncated L1 is content; this one goes on telling apart.
                losses = loss_terms.focal(logits, target, gamma=0.0)
                return {f'{name}_cross_entropy': (share * losses).sum()}
            beyond, focal = (
                f(logits, target) for f in (loss_terms.beyond_margin, loss_terms.focal)
            )
            return {
                f'{name}_l1': (share * beyond).sum(),
                f'{name}_focal': (share * focal).sum() / 2,
            }

        terms = judged(logits, 'map')
        if 'known' in params:
            # The compiler sees that all but the last layer is as before.
            logits, _ = apply(seen, 'segment', heads.mixed(params, 1.0), **options)
            terms |= judged(logits, 'known', _ABOVE_ALL, _OF_AROUND)
        loss = sum(terms.values())
        power = loss_terms.mean_where(noise**2, noisy[:, None])
        terms |= loss_terms.generator_terms(loss, power, config.noise.penalty)
        return loss, (terms, batch_stats | of_adaptor | of_head)

    return loss_fn


def _shares(kind, taught, misplaced, hard, real=1.0, around=0.0):
    """Each position's share (K,): 1 of the normal ones, 1 of the anomalous ones together.

    Of these drawn defects and noise have 1 part, masks of real ones and their strongest positions
    `real`, as far as there are any: noise is endless, defects are few, and what there is less of
    would be drowned. What is misplaced, the strongest positions of normal images, and what is
    around those of defective ones have their own weights besides.
    """
    counts = jnp.stack([(taught * (kind == k)).sum() for k in range(8)])
    parts = jnp.float32([0, 1, 1, 0, real, real, 0, 0]) * (counts > 0)
    weights = jnp.float32([1, 0, 0, misplaced, 0, 0, hard, around])
    weights += parts / jnp.maximum(parts.sum(), 1e-6)
    return taught * (weights / jnp.maximum(counts, 1))[kind.astype(jnp.int32)]


class _Sample(NamedTuple):
    """Positions of a batch: features (K, C); (K,) what they teach, how much they count, where.

    The first `first` ones are those of the first half of the images, normal ones if there are any.
    """

    features: jax.Array
    kind: jax.Array
    weight: jax.Array
    places: jax.Array
    first: int


def _sample(key, batch, positions, product_share):
    """Chooses positions of a batch, as `make_map_loss` says."""
    layers = batch['layers']
    n, (height, width) = len(layers[0]), feature_grid(layers)
    label = batch.get('label', jnp.zeros(n))[:, None]
    kind = label + (_REAL - _DRAWN) * batch.get('real', jnp.zeros(n))[:, None]
    mask = batch.get('mask', jnp.zeros((n, height, width, 1))).reshape(n, -1)
    anywhere, own = jnp.full_like(mask, 1 / mask.shape[1]), 1.0
    if 'own' in batch:  # Of padded images.
        own = batch['own'].reshape(n, -1)
        anywhere = own / jnp.maximum(own.sum(1, keepdims=True), 1)
    if product_share:
        product = batch['product'].reshape(n, -1)
        on_product = product / jnp.maximum(product.sum(1, keepdims=True), 1)
        anywhere += product_share * (on_product - anywhere)
    # Elsewhere in a defective image nothing is sure.
    chances = jnp.where(label > 0, mask, anywhere)
    weight = batch['weight'].reshape(n, -1) if 'weight' in batch else 1.0
    worth = jnp.where(label > 0, mask * weight, own)

    def draw(k, images, chances, worth, kind, count):
        if count:
            places = _draw_places(k, chances[images], count)
        else:
            places = jnp.broadcast_to(jnp.arange(height * width), (len(images), height * width))
        weight = jnp.take_along_axis(worth[images], places, 1)
        rows = sample_features(layers, places, images)
        taught = jnp.broadcast_to(kind[images], places.shape)
        rows = rows.reshape(-1, rows.shape[-1])
        return rows, *(x.reshape(-1) for x in (taught, weight, places))

    images = jnp.arange(n)
    if 'label' not in batch:
        found = draw(key, images, chances, worth, kind, positions)
        return _Sample(*found, len(found[1]))
    # Defects are small, and the same few positions soon come again: most are taken of the half
    # that the normal images come first in, whatever their number in this batch is.
    images = jnp.argsort(label[:, 0], stable=True)
    half, fewer = n - n // 2, math.ceil(positions / 4)
    k_first, k_second = jax.random.split(key)
    parts = [draw(k_first, images[:half], chances, worth, kind, positions)]
    parts.append(draw(k_second, images[half:], chances, worth, kind, fewer))
    if 'beside' in batch:
        beside, k_beside = batch['beside'].reshape(n, -1), jax.random.fold_in(key, 2)
        normal = jnp.zeros_like(kind)
        parts.append(draw(k_beside, images[half:], beside, beside, normal, fewer))
    joined = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    return _Sample(*joined, len(parts[0][1]))


def _draw_places(key, chances, count):
    """Positions (M, count) with chances (M, H * W), which need not add up to 1."""
    sums = jnp.cumsum(chances, axis=1)
    drawn = jax.random.uniform(key, (len(chances), count)) * sums[:, -1:]
    places = jax.vmap(lambda s, d: jnp.searchsorted(s, d, side='right'))(sums, drawn)
    return jnp.minimum(places, chances.shape[1] - 1)


class _Asked(NamedTuple):
    """Positions of some images that are judged before it is known what they teach.

    Features (M, P, C), where they lie (M, P), rows and columns of that (M, P, 2), whether a mask
    says that they are defective (M, P), and 1 of an image that may be asked, else 0 (M, 1).
    """

    features: jax.Array
    places: jax.Array
    at: jax.Array
    masked: jax.Array
    weight: jax.Array

    def teach(self, which, weight, kind):
        """As of `_Sample`: positions `which` (M, K) of them, and how much they count (M, K)."""
        features = jnp.take_along_axis(self.features, which[..., None], 1)
        weight = jnp.broadcast_to(weight, which.shape).ravel()
        places = jnp.take_along_axis(self.places, which, 1).ravel()
        features = features.reshape(-1, features.shape[-1])
        return features, jnp.full_like(weight, kind), weight, places


def _ask(key, batch, of, count):
    """Draws `count` positions each of `_ASKED` images, first of those where `of` (N,) is 1."""
    layers = batch['layers']
    k_images, k_places = jax.random.split(key)
    images = jnp.argsort(-of * jax.random.uniform(k_images, of.shape, minval=0.5))[:_ASKED]
    height, width = feature_grid(layers)
    if 'own' in batch:
        own = batch['own'].reshape(len(of), -1)
        places = _draw_places(k_places, own[images], count)
    else:
        places = jax.random.randint(k_places, (len(images), count), 0, height * width)
    masked = jnp.zeros(places.shape, bool)
    if 'mask' in batch:
        mask = batch['mask'].reshape(len(of), -1)[images]
        masked = jnp.take_along_axis(mask, places, 1) > 0
    at = jnp.stack([places // width, places % width], -1)
    return _Asked(sample_features(layers, places, images), places, at, masked, of[images, None])


def _judge(network, batch_stats, grid, params, asked):
    """The logits (M, P) of what is asked as the network is now; no gradient goes there."""
    variables = jax.lax.stop_gradient({'params': params, 'batch_stats': batch_stats})
    adapted, options = network.apply(variables, asked.features, method='adapt'), {}
    if network.waves:
        codes = network.places(grid)
        options['code'] = codes.reshape(-1, codes.shape[-1])[asked.places]
    return network.apply(variables, adapted, method='segment', **options)[..., 0]


def _strongest(asked, logits, kind):
    """The positions (M, K) with the highest logits, and what they teach, as of `_Sample`.

    Those of images with a real defect: multiple-instance learning, as Sultani, Chen and Shah
    ("Real-world anomaly detection in surveillance videos", CVPR 2018) do it with a bag's strongest
    instances: some position of such an image is defective, and the ones that look most like it now
    are taught to be, whether its mask is known or not. Those of normal images: hard examples, as
    Shrivastava, Gupta and Girshick ("Training region-based object detectors with online hard
    example mining", CVPR 2016) choose them: an image's score is its map's maximum, and the places
    that look least normal are seldom among positions drawn at random.
    """
    _, best = jax.lax.top_k(logits, max(1, round(_STRONG * logits.shape[1])))
    return best, asked.teach(best, asked.weight, kind)


def _around(asked, logits, best, unaware, surroundings):
    """What is normal around the strongest positions of a small defect, as of `_Sample`.

    An image's label does not say where its defect ends, and the strongest positions alone pull
    along whatever has features like theirs. Taken to be normal is what lies beside them, is not
    masked, and is below half way between them and the image's median. That is wrong inside of a
    large defect, of which the strongest positions are a small part. So it is done only where they
    are a good part of all that looks defective to the output that does not learn this.

    Args:
      asked: of images with a real defect.
      logits: (M, P), as the map's are.
      best: (M, K), which positions are the strongest.
      unaware: (M, P), logits of the other output.
      surroundings: from how many positions of the grid to how many beside them.
    """
    nearest, farthest = surroundings
    count = _PER_STRONG * best.shape[1]
    strong = jnp.take_along_axis(asked.at, best[..., None], 1)
    distance = jnp.abs(asked.at[:, :, None] - strong[:, None]).max(-1).min(-1)
    beside = (distance > nearest) & (distance <= farthest)
    top = jnp.take_along_axis(logits, best, 1).mean(1, keepdims=True)
    low = logits < (top + jnp.median(logits, axis=1, keepdims=True)) / 2
    small = (unaware > 0).sum(1, keepdims=True) <= count
    # They were drawn at random, so the first ones are as good as any.
    normal, which = jax.lax.top_k((beside & low & small & ~asked.masked).astype(jnp.float32), count)
    return asked.teach(which, normal * asked.weight, _AROUND)
