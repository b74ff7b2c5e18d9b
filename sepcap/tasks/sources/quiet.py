"""Calls of `datasets` without its progress bars."""

from typing import Any


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of `datasets` without its own progress bars, which are of no use to a user of sepcap."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return function(*args, **kwargs)
    finally:
        if shown:
            enable_progress_bar()
