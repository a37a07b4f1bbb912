"""The frozen networks that features can be taken from, by the name that a config gives them."""

from collections.abc import Sequence

from ssn_jax.models import efficientnet, resnet

# A backbone maps images, scaled by its `normalise`, to three outputs at strides of 4, 8 and 16,
# which a config calls layers 1, 2 and 3.
BACKBONES = resnet.BACKBONES | efficientnet.BACKBONES
CHANNELS = resnet.CHANNELS | efficientnet.CHANNELS


def feature_channels(backbone: str, layers: Sequence[int]) -> int:
    """How many channels some of a backbone's layers have together."""
    return sum(CHANNELS[backbone][layer - 1] for layer in layers)
