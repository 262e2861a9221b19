"""Draw a data set of textured shapes; ``--help`` tells how. Its parts are in ``shapes/``."""

from shapes.make_shapes_dataset import app

if __name__ == "__main__":
    app()
