"""The trained parts: adaptors, segmentation head, classification head, noise generator.

Rolih et al., "SuperSimpleNet: unifying unsupervised and supervised learning for fast and reliable
surface defect detection", ICPR 2024, section III.
"""

from flax import linen as nn
import jax
import jax.numpy as jnp

from ssn_jax.models.layers import SLOPE, BatchNorm, Conv, Dense, max_pool


class LinearAdaptor(nn.Module):
    """One 1x1 convolution: features (N, H, W, C) -> (N, H, W, C). Published and Scenario A."""

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        del train  # Every adaptor is called alike; this one behaves the same in both modes.
        return Dense(features.shape[-1], name='projection')(features)


class ConvAdaptor(nn.Module):
    """3x3 convolution, BatchNorm, ReLU: (N, H, W, C) -> (N, H, W, C). Scenario B."""

    @nn.compact
    def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
        x = Conv(features.shape[-1], 3, name='conv')(features)
        return nn.relu(BatchNorm(use_running_average=not train, name='norm')(x))


ADAPTORS = {'linear': LinearAdaptor, 'conv': ConvAdaptor}


class SegmentationHead(nn.Module):
    """Adapted features (N, H, W, C) -> anomaly logits (N, H, W, 1)."""

    hidden: int = 1024

    @nn.compact
    def __call__(self, adapted: jax.Array, train: bool = False) -> jax.Array:
        x = Dense(self.hidden, name='hidden')(adapted)
        x = BatchNorm(use_running_average=not train, name='norm')(x)
        return Dense(1, use_bias=False, name='out')(nn.leaky_relu(x, SLOPE))


def mixed(params: dict, share: float) -> dict:
    """A network's parameters with one output of the segmentation head instead of two.

    Args:
      params: of the network. If there is `known`, the kernel (hidden, 1) of a second output, which
        learned real defects above all, it goes into that of the first: logits are linear in it.
      share: of the second output, 0..1.
    """
    if 'known' not in params:
        return params
    params = dict(params)
    known, head = params.pop('known'), params['seg_head']
    kernel = (1 - share) * head['out']['kernel'] + share * known
    return params | {'seg_head': head | {'out': {'kernel': kernel}}}


class ClassificationHead(nn.Module):
    """Features (N, H, W, C) and anomaly logits (N, H, W, 1) -> image logits (N,)."""

    hidden: int = 128

    @nn.compact
    def __call__(self, features: jax.Array, logits: jax.Array, train: bool = False) -> jax.Array:
        x = Conv(self.hidden, 5, name='conv')(jnp.concatenate([features, logits], -1))
        x = nn.relu(BatchNorm(use_running_average=not train, name='norm')(x))
        pooled = [max_pool(x), x.mean((1, 2)), max_pool(logits), logits.mean((1, 2))]
        return Dense(1, name='score')(jnp.concatenate(pooled, -1))[:, 0]


class CamHead(nn.Module):
    """Adapted features (N, H, W, C) -> class activation map (N, H, W, 1), image logits (N,).

    The score is linear in the averages of the activations A_k, so the same weights say what each
    position contributes to it: score = w·mean(A) + b, map = Σ w_k A_k (Zhou et al., "Learning deep
    features for discriminative localization", CVPR 2016).
    """

    hidden: int = 128

    @nn.compact
    def __call__(self, adapted: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        x = Conv(self.hidden, 5, name='conv')(adapted)
        x = nn.relu(BatchNorm(use_running_average=not train, name='norm')(x))
        score = Dense(1, name='score')
        positions = score(x)
        return positions - score.variables['params']['bias'], positions.mean((1, 2))[:, 0]


class HingeDiscriminator(nn.Module):
    """SimpleNet's discriminator with its sign turned: (N, H, W, C) -> anomaly logits (N, H, W, 1).

    Liu et al., "SimpleNet: a simple network for image anomaly detection and localization", CVPR
    2023, section 3.4.
    """

    hidden: int = 1024

    @nn.compact
    def __call__(self, projected: jax.Array, train: bool = False) -> jax.Array:
        x = Dense(self.hidden, name='hidden')(projected)
        x = BatchNorm(use_running_average=not train, name='norm')(x)
        return -Dense(1, use_bias=False, name='out')(nn.leaky_relu(x, SLOPE))
