"""The same arithmetic in PyTorch, to measure against: optional, for benchmark.py alone."""

from collections import OrderedDict

from flax import traverse_util
import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ssn_jax.models import grid as grid_lib, resnet, systems, weights


class _Block(nn.Module):
    """A residual block of given (kernel size, outputs) whose first 3x3 carries the stride."""

    def __init__(self, inputs, convs, stride):
        super().__init__()
        self.names, shortcut, first = [], inputs, True
        for i, (size, outputs) in enumerate(convs, 1):
            s = stride if size == 3 and first else 1
            first = first and size != 3
            conv = nn.Conv2d(
                shortcut if i == 1 else convs[i - 2][1], outputs, size, s, size // 2, bias=False
            )
            self.add_module(f'conv{i}', conv)
            self.add_module(f'bn{i}', nn.BatchNorm2d(outputs))
            self.names.append((f'conv{i}', f'bn{i}'))
        self.downsample = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for i, (conv, norm) in enumerate(self.names):
            y = getattr(self, norm)(getattr(self, conv)(y))
            y = functional.relu(y) if i + 1 < len(self.names) else y
        return functional.relu(y + (x if self.downsample is None else self.downsample(x)))


def _nest(**modules):
    """A module that only holds others, for the published names."""
    outer = nn.Module()
    for name, module in modules.items():
        outer.add_module(name, module)
    return outer


class _Network(nn.Module):
    """What all systems share: the backbone before the heads and the map's smoothing behind them.

    Images uint8 (N, H, W, 3) -> score logits (N,) and full-size anomaly logits (N, H, W). A system
    adds `heads`: from layer2 and layer3 to map logits (N, 1, h, w) and scores (N,).
    """

    def __init__(self, backbone, size, **blur):
        super().__init__()
        self.size = size
        mean, std = (torch.tensor(x) for x in (resnet.IMAGENET_MEAN, resnet.IMAGENET_STD))
        self.register_buffer('mean', mean[:, None, None], persistent=False)
        self.register_buffer('std', std[:, None, None], persistent=False)
        self.backbone = nn.Module()
        self.backbone.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.backbone.bn1 = nn.BatchNorm2d(64)
        basic, inputs = backbone == 'resnet18', 64
        for stage, depth in enumerate((2, 2, 2) if basic else (3, 4, 6), 1):
            width, blocks = 32 * 2**stage, []
            for i in range(depth):
                inner = (
                    ((3, width), (3, width))
                    if basic
                    else ((1, 2 * width), (3, 2 * width), (1, 4 * width))
                )
                blocks.append(_Block(inputs, inner, 2 if stage > 1 and i == 0 else 1))
                inputs = inner[-1][1]
            setattr(self.backbone, f'layer{stage}', nn.Sequential(*blocks))
        self.channels = 384 if basic else 1536
        for name, n in zip(('rows', 'columns'), size, strict=True):
            self.register_buffer(name, torch.from_numpy(grid_lib.blur_matrix(n, **blur)), False)

    def layers(self, images):
        x = (images.permute(0, 3, 1, 2).float() / 255.0 - self.mean) / self.std
        b = self.backbone
        x = functional.max_pool2d(functional.relu(b.bn1(b.conv1(x))), 3, 2, 1)
        x2 = b.layer2(b.layer1(x))
        return x2, b.layer3(x2)

    def forward(self, images):
        logits, scores = self.heads(self.layers(images))
        full = functional.interpolate(logits, self.size, mode='bilinear', align_corners=False)
        return scores, self.rows @ full[:, 0] @ self.columns.T


class SuperSimpleNet(_Network):
    """SuperSimpleNet, and GAP+CAM, which has no segmentation head."""

    def __init__(self, backbone, size, adaptor, adapt_cls_features, gap_cam):
        super().__init__(backbone, size)
        channels, self.gap_cam = self.channels, gap_cam
        self.adapt_cls_features = adapt_cls_features
        self.feature_adaptor = _nest(
            projection=nn.Conv2d(channels, channels, 1)
            if adaptor == 'linear'
            else nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
            )
        )
        self.discriminator = _nest(
            dec_head=nn.Sequential(
                nn.Conv2d(channels + (not gap_cam), 128, 5, padding=2),
                nn.BatchNorm2d(128),
                nn.ReLU(),
            ),
            fc_score=nn.Linear(128 if gap_cam else 258, 1),
        )
        if not gap_cam:
            self.discriminator.seg = nn.Sequential(
                nn.Conv2d(channels, 1024, 1),
                nn.BatchNorm2d(1024),
                nn.LeakyReLU(0.2),
                nn.Conv2d(1024, 1, 1, bias=False),
            )

    def features(self, layers):
        grid = (2 * layers[0].shape[2], 2 * layers[0].shape[3])
        features = torch.cat(
            [functional.interpolate(x, grid, mode='bilinear', align_corners=True) for x in layers],
            1,
        )
        return functional.avg_pool2d(features, 3, 1, 1)

    def heads(self, layers):
        features = self.features(layers)
        adapted = self.feature_adaptor.projection(features)
        d = self.discriminator
        if self.gap_cam:
            x = d.dec_head(adapted)
            weight = d.fc_score.weight[:, :, None, None]
            return functional.conv2d(x, weight), d.fc_score(x.mean((2, 3)))[:, 0]
        return self.classify(adapted, features)

    def classify(self, adapted, features, detach=False):
        """Both heads; with `detach` the score does not teach the map."""
        d = self.discriminator
        logits = d.seg(adapted)
        of_map = logits.detach() if detach else logits
        seen = adapted if self.adapt_cls_features else features
        x = d.dec_head(torch.cat([seen, of_map], 1))
        pooled = [
            f(y) for y in (x, of_map) for f in (lambda y: y.amax((2, 3)), lambda y: y.mean((2, 3)))
        ]
        return logits, d.fc_score(torch.cat(pooled, 1))[:, 0]


class SimpleNet(_Network):
    """SimpleNet: patches averaged to an embedding, projection, discriminator."""

    def __init__(self, backbone, size, embedding, hidden):
        super().__init__(backbone, size, taps=33, repeat_edge=True)
        self.embedding = embedding
        self.pre_projection = _nest(layers=_nest(**{'0fc': nn.Linear(embedding, embedding)}))
        block = nn.Sequential(
            nn.Linear(embedding, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2)
        )
        self.discriminator = _nest(
            body=nn.Sequential(OrderedDict(block1=block)), tail=nn.Linear(hidden, 1, bias=False)
        )

    def heads(self, layers):
        n, _, height, width = layers[0].shape
        parts = []
        for x in layers:
            patches = functional.unfold(x, 3, padding=1).transpose(1, 2)
            y = functional.adaptive_avg_pool1d(patches, self.embedding)
            y = y.transpose(1, 2).reshape(n, self.embedding, *x.shape[2:])
            y = functional.interpolate(y, (height, width), mode='bilinear', align_corners=False)
            parts.append(y.flatten(2).transpose(1, 2))
        x = functional.adaptive_avg_pool1d(torch.cat(parts, 2), self.embedding)
        x = self.pre_projection.layers.get_submodule('0fc')(x.reshape(-1, self.embedding))
        logits = -self.discriminator.tail(self.discriminator.body(x)).reshape(n, 1, height, width)
        return logits, logits.amax((1, 2, 3))


def train_step(module: SuperSimpleNet, optimizer, images, mask, std: float) -> float:
    """One update of the published unsupervised training, as it is written there.

    The backbone runs on every image again, and both copies of the doubled batch through all heads.

    Args:
      module: in training mode but for its backbone.
      optimizer: over what is trained.
      images: uint8 (N, H, W, 3).
      mask: (2N, 1, h, w), 1 where noise is added.
      std: the noise's standard deviation.

    Returns:
      The loss.
    """
    with torch.no_grad():
        features = module.features(module.layers(images))
    adapted = module.feature_adaptor.projection(features)
    features, adapted = torch.cat([features, features]), torch.cat([adapted, adapted])
    noise = std * torch.randn_like(adapted) * mask
    logits, scores = module.classify(adapted + noise, features + noise, detach=True)
    normal, anomalous = logits[mask == 0], logits[mask > 0]
    loss = functional.relu(0.5 + normal).mean() + functional.relu(0.5 - anomalous).mean()
    loss += _focal(logits, mask).mean() + _focal(scores, mask.amax((1, 2, 3))).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _focal(logits, targets):
    signed = torch.where(targets > 0, logits, -logits)
    return torch.sigmoid(-signed) ** 4 * functional.softplus(-signed)


def build(backbone: str, backbone_variables: dict, variables: dict, network, size) -> nn.Module:
    """The module with this project's variables, channels last, in evaluation mode."""
    if isinstance(network, systems.SimpleNet):
        module = SimpleNet(backbone, size, network.embedding, network.hidden)
    else:
        gap_cam = isinstance(network, systems.GapCam)
        adapted = gap_cam or network.adapt_cls_features
        module = SuperSimpleNet(backbone, size, network.adaptor, adapted, gap_cam)
    state = module.state_dict()
    sources = (
        (backbone_variables, weights.backbone_name, 'backbone.'),
        (variables, weights.head_name, ''),
    )
    for tree, name_of, prefix in sources:
        for path, value in traverse_util.flatten_dict(jax.device_get(tree)).items():
            value, name = np.asarray(value), prefix + name_of(path)
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
            state[name] = torch.from_numpy(value.copy()).reshape(state[name].shape)
    module.load_state_dict(state)
    return module.eval().to(memory_format=torch.channels_last)
