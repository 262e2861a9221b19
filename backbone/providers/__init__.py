"""Where networks come from: our ResNets and timm's models, each behind the contract of ``backbone.features``."""
