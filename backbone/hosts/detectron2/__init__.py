"""detectron2 as a host: its recipes with our backbones, by changing one name. Importing this registers the builders.

from backbone.hosts.detectron2 import DROP_IN_BUILDERS, add_backbone_config
add_backbone_config(cfg)  # MODEL.BACKBONE_PLUGIN, for what detectron2's own keys cannot say
cfg.MODEL.BACKBONE.NAME = DROP_IN_BUILDERS[cfg.MODEL.BACKBONE.NAME]
"""

try:
    import detectron2 as _detectron2
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ImportError(
        "backbone.hosts.detectron2 needs detectron2, which is on no package index: "
        "`pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2`"
    ) from None

from backbone.hosts.detectron2.builders import DROP_IN_BUILDERS, add_backbone_config
from backbone.hosts.detectron2.modules import DetectronBackbone, DetectronPyramid, HostedBackbone
from backbone.hosts.detectron2.schedule import FreezeScheduleHook

__all__ = [
    "DROP_IN_BUILDERS",
    "DetectronBackbone",
    "DetectronPyramid",
    "FreezeScheduleHook",
    "HostedBackbone",
    "add_backbone_config",
]

del _detectron2
