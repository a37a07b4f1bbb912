"""ResNets to their third stage, in evaluation mode: the frozen feature extractor.

He et al., "Deep residual learning for image recognition", CVPR 2016; Zagoruyko and Komodakis,
"Wide residual networks", BMVC 2016; strides as in torchvision (ResNet v1.5: the 3x3 convolution
of a bottleneck carries the stride). Submodules bear torchvision's names with '_' for '.', so that
`weights.py` ports a state_dict by name alone.
"""

from collections.abc import Sequence
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp

_Conv = functools.partial(nn.Conv, use_bias=False)
_BatchNorm = functools.partial(nn.BatchNorm, use_running_average=True, epsilon=1e-5)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(images: jax.Array) -> jax.Array:
    """Scales RGB images (N, H, W, 3) in 0..255 to ImageNet's mean 0 and standard deviation 1."""
    mean, std = jnp.array(IMAGENET_MEAN), jnp.array(IMAGENET_STD)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet18, ResNet34)."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides, same = (self.stride, self.stride), ((1, 1), (1, 1))
        y = _Conv(self.width, (3, 3), strides, same, name='conv1')(x)
        y = nn.relu(_BatchNorm(name='bn1')(y))
        y = _Conv(self.width, (3, 3), padding=same, name='conv2')(y)
        y = _BatchNorm(name='bn2')(y)
        if x.shape != y.shape:
            x = _Conv(self.width, (1, 1), strides, name='downsample_0')(x)
            x = _BatchNorm(name='downsample_1')(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut; `widen` scales the inner width only."""

    width: int
    stride: int
    widen: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        strides, same = (self.stride, self.stride), ((1, 1), (1, 1))
        inner, outer = self.width * self.widen, self.width * 4
        y = nn.relu(_BatchNorm(name='bn1')(_Conv(inner, (1, 1), name='conv1')(x)))
        y = _Conv(inner, (3, 3), strides, same, name='conv2')(y)
        y = nn.relu(_BatchNorm(name='bn2')(y))
        y = _BatchNorm(name='bn3')(_Conv(outer, (1, 1), name='conv3')(y))
        if x.shape != y.shape:
            x = _Conv(outer, (1, 1), strides, name='downsample_0')(x)
            x = _BatchNorm(name='downsample_1')(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The stem and stages 1 to 3 of a ResNet.

    Calling it on images (N, H, W, 3), normalised with ImageNet's mean and standard deviation,
    returns the outputs of layer1 (N, H/4, W/4, .), layer2 (N, H/8, W/8, .) and layer3
    (N, H/16, W/16, .); odd sizes are rounded up at each halving.
    """

    block: type[nn.Module]
    depths: Sequence[int]

    normalise = staticmethod(normalise)

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = _Conv(64, (7, 7), (2, 2), ((3, 3), (3, 3)), name='conv1')(images)
        x = nn.relu(_BatchNorm(name='bn1')(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        outputs = []
        for stage, depth in enumerate(self.depths, 1):
            for i in range(depth):
                stride = 2 if stage > 1 and i == 0 else 1
                x = self.block(32 * 2**stage, stride, name=f'layer{stage}_{i}')(x)
            outputs.append(x)
        return tuple(outputs)


BACKBONES = {
    'resnet18': ResNet(BasicBlock, (2, 2, 2)),
    'wide_resnet50_2': ResNet(functools.partial(Bottleneck, widen=2), (3, 4, 6)),
}

# Channels of layer1, layer2 and layer3.
CHANNELS = {'resnet18': (64, 128, 256), 'wide_resnet50_2': (256, 512, 1024)}
