"""mmdetection, mmsegmentation and mmpretrain as hosts: ``type='PluginBackbone'``. Importing this registers it.

custom_imports = dict(imports=["backbone.hosts.mmdetection"])
model = dict(backbone=dict(type="PluginBackbone"))  # the keys of the base config's ResNet stay as they are
"""

try:
    import mmengine as _mmengine
except ModuleNotFoundError as error:
    if error.name != "mmengine":
        raise
    raise ModuleNotFoundError(
        "backbone.hosts.mmdetection needs mmengine, which is not installed: pip install 'backbone[mmdet]'",
        name=error.name,
    ) from None

from backbone.hosts.mmdetection.module import PluginBackbone

__all__ = ["PluginBackbone"]

del _mmengine
