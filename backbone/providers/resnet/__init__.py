"""ResNet, ResNeXt and Wide ResNet: network, blocks, deformable convolutions."""
