"""transformers: any backbone of this package as ``backbone_config`` of its detectors and segmenters.

Importing this module registers model type ``backbone_plugin`` with AutoConfig and AutoBackbone:

    from transformers import RTDetrConfig, RTDetrForObjectDetection
    from backbone.hosts.transformers import TransformersBackboneConfig

    body = TransformersBackboneConfig({"name": "resnet50", "freeze_at": 2}, out_features=["stage2", "stage3", "stage4"])
    model = RTDetrForObjectDetection(RTDetrConfig(backbone_config=body))
"""

try:
    import transformers
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
except ModuleNotFoundError as error:
    if error.name == "transformers":
        raise ModuleNotFoundError(
            "backbone.hosts.transformers needs transformers, which is not installed: pip install "
            "'backbone[transformers]'",
            name="transformers",
        ) from None
    if error.name == "transformers.conversion_mapping":
        raise ImportError(
            f"backbone.hosts.transformers needs transformers 5 or later, got {transformers.__version__}: pip install "
            f"'backbone[transformers]'"
        ) from None
    raise

from transformers import AutoBackbone, AutoConfig

from backbone.hosts.transformers.configuration import MODEL_TYPE, TransformersBackboneConfig
from backbone.hosts.transformers.model import TransformersBackbone, find_backbone
from backbone.hosts.transformers.published import PublishedNames

__all__ = ["MODEL_TYPE", "TransformersBackbone", "TransformersBackboneConfig", "find_backbone"]

AutoConfig.register(MODEL_TYPE, TransformersBackboneConfig, exist_ok=True)
AutoBackbone.register(TransformersBackboneConfig, TransformersBackbone, exist_ok=True)
register_checkpoint_conversion_mapping(MODEL_TYPE, [PublishedNames()], overwrite=True)
