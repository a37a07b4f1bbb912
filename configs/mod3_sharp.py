"""Labels alone, without GAP+CAM's blobs: the recommended recipe instead of a class activation map.

    ssn-jax train --config mod3_sharp --config.data.root=/data/KolektorSDD2

What mod3.py knows, and no mask. Drawn defects, whose places are known, keep the map sharp, and the
strongest positions of each labelled image are taught to be defective. docs/supervision.md has what
it reaches. Small hardware: --config.backbone.name=efficientnet_lite0.
"""

from ssn_jax.config import load


def get_config():
    config = load('auto')
    config.name = 'mod3_sharp'
    config.image_size = (640, 232)
    config.data.name = 'ksdd2'
    config.data.category = 'surface'
    config.backbone.name = 'wide_resnet50_2'
    config.supervision.kind = 'labels'
    return config
