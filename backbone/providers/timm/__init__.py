"""timm's models: how they are planned, built, divided into stages and fused."""
