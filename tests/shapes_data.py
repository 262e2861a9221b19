"""Small COCO-format data and recipes for the tests of the training programs."""
