"""Calls of `datasets` that show nothing."""

from typing import Any


def quietly(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of `datasets` without its own progress bars, which tell a user of sepcap nothing."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        return function(*args, **kwargs)
    finally:
        if shown:
            enable_progress_bar()
