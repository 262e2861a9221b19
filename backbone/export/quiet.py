"""The exporters' own chatter, kept from the user: they warn of what they do to themselves."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch._export", "root")


@contextmanager
def quiet() -> Iterator[None]:
    """Let libraries neither print nor warn; their errors are raised all the same."""
    loggers = [logging.getLogger(None if name == "root" else name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
