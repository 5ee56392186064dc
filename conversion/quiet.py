"""Transformers' remarks and bars, kept from those whom they tell no news."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from .progress import bars_shown


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of Transformers' below an error is shown, and its bars in terminals alone."""
    verbosity, hidden = logging.get_verbosity(), logging.is_progress_bar_enabled() and not bars_shown()
    logging.set_verbosity_error()
    if hidden:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if hidden:
            logging.enable_progress_bar()
