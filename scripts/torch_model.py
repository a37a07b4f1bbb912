"""The same arithmetic in PyTorch, to measure against: optional, for scripts/benchmark.py alone."""

from flax import traverse_util
import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ssn_jax import weights
from ssn_jax.models import features as features_lib


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


class SuperSimpleNet(nn.Module):
    """Images uint8 (N, H, W, 3) -> score logits (N,) and full-size anomaly logits (N, H, W)."""

    def __init__(self, backbone, adaptor, adapt_cls_features, size):
        super().__init__()
        self.adapt_cls_features, self.size = adapt_cls_features, size
        mean, std = (
            torch.tensor(x) for x in (features_lib.IMAGENET_MEAN, features_lib.IMAGENET_STD)
        )
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
        channels = 384 if basic else 1536
        self.feature_adaptor = nn.Module()
        self.feature_adaptor.projection = (
            nn.Conv2d(channels, channels, 1)
            if adaptor == 'linear'
            else nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
            )
        )
        self.discriminator = nn.Module()
        self.discriminator.seg = nn.Sequential(
            nn.Conv2d(channels, 1024, 1),
            nn.BatchNorm2d(1024),
            nn.LeakyReLU(0.2),
            nn.Conv2d(1024, 1, 1, bias=False),
        )
        self.discriminator.dec_head = nn.Sequential(
            nn.Conv2d(channels + 1, 128, 5, padding=2), nn.BatchNorm2d(128), nn.ReLU()
        )
        self.discriminator.fc_score = nn.Linear(258, 1)
        for name, n in zip(('rows', 'columns'), size, strict=True):
            self.register_buffer(name, torch.from_numpy(features_lib.blur_matrix(n)), False)

    def forward(self, images):
        x = (images.permute(0, 3, 1, 2).float() / 255.0 - self.mean) / self.std
        b = self.backbone
        x = functional.max_pool2d(functional.relu(b.bn1(b.conv1(x))), 3, 2, 1)
        x2 = b.layer2(b.layer1(x))
        layers = (x2, b.layer3(x2))
        grid = (2 * x2.shape[2], 2 * x2.shape[3])
        features = torch.cat(
            [functional.interpolate(x, grid, mode='bilinear', align_corners=True) for x in layers],
            1,
        )
        features = functional.avg_pool2d(features, 3, 1, 1)
        adapted = self.feature_adaptor.projection(features)
        d = self.discriminator
        logits = d.seg(adapted)
        seen = adapted if self.adapt_cls_features else features
        x = d.dec_head(torch.cat([seen, logits], 1))
        pooled = [
            f(y) for y in (x, logits) for f in (lambda y: y.amax((2, 3)), lambda y: y.mean((2, 3)))
        ]
        scores = d.fc_score(torch.cat(pooled, 1))[:, 0]
        full = functional.interpolate(logits, self.size, mode='bilinear', align_corners=False)
        return scores, self.rows @ full[:, 0] @ self.columns.T


def build(backbone: str, backbone_variables: dict, variables: dict, network, size) -> nn.Module:
    """The module with this project's variables, channels last, in evaluation mode."""
    module = SuperSimpleNet(backbone, network.adaptor, network.adapt_cls_features, size)
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
