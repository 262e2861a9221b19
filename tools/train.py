"""Train a detector or segmenter; ``--help`` tells how. All of it is in ``backbone.training``."""

from backbone.training.train import app

if __name__ == "__main__":
    app()
