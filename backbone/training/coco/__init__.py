"""COCO-format data: annotations, images, metrics."""
