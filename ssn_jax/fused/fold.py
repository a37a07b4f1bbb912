"""Folds trained variables, so that the network is one fast, exact function of images.

Everything between the backbone and the first non-linearity is linear, and linear maps of channels
commute with upscaling and pooling, which are linear maps of positions. So, without training
anything anew, each BatchNorm is folded into the convolution before it, ImageNet's standard
deviation into the first convolution, and adaptor, embedding and projection into what follows them.
The direct form, the networks of `models/`, remains the reference that tests compare with.
"""

from flax import linen as nn, struct
import jax
import numpy as np

from ssn_jax.models import efficientnet, grid as grid_lib, resnet, systems
from ssn_jax.models.layers import EPSILON


@struct.dataclass
class ResNet:
    """A ResNet, folded.

    Attributes:
      stem: a convolution: 'kernel' (k, k, C, D) and 'bias' (D,).
      stages: lists of blocks: their 'convs' and, if the shortcut has one, its 'downsample'.
    """

    stem: dict
    stages: list

    def channels(self) -> list[int]:
        """How many channels each of its outputs has."""
        return [blocks[-1]['convs'][-1]['bias'].size for blocks in self.stages]


@struct.dataclass
class EfficientNet:
    """An EfficientNet, folded.

    Attributes:
      stem: a convolution: 'kernel' (k, k, C, D) and 'bias' (D,).
      blocks: of each the convolutions 'expand' (but in the first), 'depthwise', 'project'.
    """

    stem: dict
    blocks: list

    def channels(self) -> list[int]:
        """How many channels each of its outputs has."""
        outputs = efficientnet.BACKBONES['efficientnet_lite0'].outputs
        return [self.blocks[i]['project']['bias'].size for i in outputs]


@struct.dataclass
class Fused:
    """A backbone and a network on it, folded: a tree of arrays.

    Attributes:
      backbone: its convolutions.
      heads: the network's arrays, by what they do in `forward.heads`. Convolutions have a 'kernel'
        (k, k, C, D) or (C, D), whose C are all layers' channels, and a 'bias' (D,).
      network: what the heads were; no array.
    """

    backbone: ResNet | EfficientNet
    heads: dict
    network: nn.Module = struct.field(pytree_node=False)


def fuse(backbone_variables: dict, variables: dict, network: nn.Module) -> Fused:
    """Trained variables, folded: what `forward.predict` takes, float32 arrays on the host.

    Args:
      backbone_variables: parameters and statistics of one of `backbones.BACKBONES`.
      variables: parameters and statistics of the network.
      network: a `SuperSimpleNet`, `GapCam` or `SimpleNet`.
    """
    # Products of weights are formed in float64: folding adds no rounding to that of `predict`.
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(variables))
    backbone = fuse_backbone(backbone_variables)
    channels = grid_lib.selected_channels(backbone.channels(), network.layers)
    simple = isinstance(network, systems.SimpleNet)
    fuse_heads = _fuse_simplenet if simple else _fuse_heads
    heads = fuse_heads(variables['params'], variables['batch_stats'], network, channels)
    return Fused(backbone, jax.tree.map(np.float32, heads), network)


def _fuse_heads(params, stats, network, channels):
    """SuperSimpleNet's or GAP+CAM's adaptor and heads, for `forward._heads`.

    'adaptor', if it is a convolution. Of the segmentation head, if there is one, 'hidden', with the
    kernel (D,) of its 'out'put. Of the classification head 'cls': the 'kernel' that meets the
    layers, or 'adapted', which meets an adaptor's output; 'bias'; a 'constant' (k, k, 1, D), which
    meets ones; 'map', which meets the other head's logits; 'score'.
    """
    adaptor, heads, linear = params['adaptor'], {}, network.adaptor == 'linear'
    if linear:
        weight, bias = adaptor['projection']['kernel'], adaptor['projection']['bias']
    else:
        heads['adaptor'] = _fold(adaptor['conv'], adaptor['norm'], stats['adaptor']['norm'])
    if 'cls_head' in params:
        head, with_map = params['cls_head'], 'seg_head' in params
        conv = _fold(head['conv'], head['norm'], stats['cls_head']['norm'])
        cls = heads['cls'] = {'bias': conv['bias'], 'score': head['score']}
        features = conv['kernel']
        if with_map:
            features, cls['map'] = features[:, :, :-1], features[:, :, -1:]
        adapted = not with_map or network.adapt_cls_features
        if adapted and linear:
            # Near the border fewer taps meet the bias: no constant, so it stays by itself.
            cls['constant'] = np.tensordot(bias, features, (0, 2))[:, :, None]
            features = np.moveaxis(np.tensordot(weight, features, (1, 2)), 0, 2)
        # What Scenario B's adaptor passes on is not linear in the layers.
        cls['adapted' if adapted and not linear else 'kernel'] = features
    if 'seg_head' in params:
        seg = params['seg_head']
        hidden = _fold(seg['hidden'], seg['norm'], stats['seg_head']['norm'])
        if linear:
            own = len(weight)
            of_code, hidden['kernel'] = hidden['kernel'][own:], hidden['kernel'][:own]
            hidden['bias'] += bias @ hidden['kernel']
            # The code comes as more channels of the first layer.
            kernel = np.split(weight @ hidden['kernel'], [channels[0]])
            hidden['kernel'] = np.concatenate([kernel[0], of_code, kernel[1]])
        heads['hidden'] = hidden | {'out': seg['out']['kernel'][:, 0]}
    return heads


def _fuse_simplenet(params, stats, network, channels):
    """SimpleNet's embedding, projection and discriminator, for `forward._simplenet`.

    All up to the hidden layer is linear: a 3x3 convolution of each layer at its own grid. Where the
    embedding averages whole rows of patches, as WideResNet50-2's, it is one of 3x1 of the average
    of three columns, a third of the work.
    """
    discriminator, size = params['discriminator'], network.embedding
    hidden = _fold(discriminator['hidden'], discriminator['norm'], stats['discriminator']['norm'])
    adaptor, count = params['adaptor'], len(channels)
    joined = np.asarray(systems.adaptive_average(np.eye(count * size), size), np.float64)
    joined = joined @ adaptor['kernel'] @ hidden['kernel']
    bias = hidden['bias'] + adaptor['bias'] @ hidden['kernel']
    patches = []
    for n, kernel in zip(channels, np.split(joined, count), strict=True):
        # Of a patch channels are slowest, then rows, then columns.
        averages = np.asarray(systems.adaptive_average(np.eye(9 * n), size), np.float64)
        kernel = (averages @ kernel).reshape(n, 3, 3, -1).transpose(1, 2, 0, 3)
        patches.append(kernel.sum(1, keepdims=True) if 3 * n % size == 0 else kernel)
    # The discriminator's output is high for what is normal, an anomaly logit is its opposite.
    out = -discriminator['out']['kernel'][:, 0]
    return {'patches': patches, 'bias': bias, 'out': out}


def fuse_backbone(variables: dict) -> ResNet | EfficientNet:
    """A backbone's variables with BatchNorm and the standard deviation of its input folded in."""
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(variables))
    params, stats = variables['params'], variables['batch_stats']
    if 'conv_stem' in params:
        return _fuse_efficientnet(params, stats)

    stem = _fold_named(params, stats, 'conv1', 'bn1')
    stem['kernel'] /= 255.0 * np.array(resnet.IMAGENET_STD)[:, None]
    stages = [[], [], []]
    blocks = [n for n in params if n.startswith('layer')]
    for name in sorted(blocks, key=lambda n: [int(part) for part in n[5:].split('_')]):
        of, statistics = params[name], stats[name]
        names = [f'{i}' for i in (1, 2, 3) if f'conv{i}' in of]
        block = {'convs': [_fold_named(of, statistics, f'conv{i}', f'bn{i}') for i in names]}
        if 'downsample_0' in of:
            block['downsample'] = _fold_named(of, statistics, 'downsample_0', 'downsample_1')
        stages[int(name[5]) - 1].append(block)
    return jax.tree.map(np.float32, ResNet(stem, stages))


def _fuse_efficientnet(params, stats):
    """`fuse_backbone` of an EfficientNet."""
    epsilon = efficientnet.EPSILON
    stem = _fold_named(params, stats, 'conv_stem', 'bn0', epsilon)
    stem['kernel'] /= efficientnet.STD
    blocks, number = [], sum(name.startswith('blocks_') for name in params)
    for name in (f'blocks_{i}' for i in range(number)):
        parts = {'expand': 'bn0', 'depthwise': 'bn1', 'project': 'bn2'}
        blocks.append(
            {
                part: _fold_named(params[name], stats[name], f'{part}_conv', norm, epsilon)
                for part, norm in parts.items()
                if f'{part}_conv' in params[name]
            }
        )
    return jax.tree.map(np.float32, EfficientNet(stem, blocks))


def _fold_named(params, stats, conv, norm, epsilon=EPSILON):
    """`_fold` of a convolution and a BatchNorm by their names."""
    return _fold(params[conv], params[norm], stats[norm], epsilon)


def _fold(conv, norm, stats, epsilon=EPSILON):
    """A convolution without or with bias, and the BatchNorm after it, as one convolution."""
    gain = norm['scale'] / np.sqrt(stats['var'] + epsilon)
    bias = norm['bias'] + (conv.get('bias', 0.0) - stats['mean']) * gain
    return {'kernel': conv['kernel'] * gain, 'bias': bias}
