"""Whether a hub model can be loaded: one short request to the hub, where transformers would retry for half a minute."""

import os
import queue
import threading

PATIENCE = 1.5
"""Seconds within which the hub must answer, name resolution included."""

WAYS_OUT = (
    "Alternatives: load_model() for the embedded model; the path of a folder saved by save_pretrained; HF_HOME pointing at a cache "
    "that has it; or a connection (HF_ENDPOINT for a mirror)."
)


def must_be_local(name: str, revision: str | None) -> bool:
    """Whether a hub model is to be read from the local cache alone, because the hub cannot be reached.

    Raises:
        ConnectionError: it is not in the cache either.
        FileNotFoundError: the name is neither an existing folder nor a valid name of a hub model.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    except HFValidationError as error:
        raise FileNotFoundError(f"model={name!r} is neither an existing folder nor a name of a hub model ('owner/name')") from error
    offline = constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1"
    if not offline and reachable(f"{constants.ENDPOINT}/{name}/resolve/{revision or 'main'}/config.json"):
        return False
    if not cached:
        why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} does not answer within {PATIENCE} s"
        raise ConnectionError(f"model={name!r} is neither a folder nor in the local Hugging Face cache, and {why}. {WAYS_OUT}")
    return True


def reachable(url: str) -> bool:
    """Whether a server answers, through the same session (proxies, certificates) that downloads use.

    "No such model" and "not allowed" are answers: transformers explains those better.
    """
    answer: queue.Queue[bool] = queue.Queue()

    def ask() -> None:
        from huggingface_hub.utils import get_session

        try:
            answer.put(get_session().head(url, timeout=PATIENCE).status_code < 500)
        except Exception:
            # after any failure (name resolution, proxy, certificate, timeout) the hub counts as unreachable
            answer.put(False)

    # a session's timeout does not bound name resolution, which can take ten seconds on a machine without network
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=PATIENCE)
    except queue.Empty:
        return False
