"""Where the parts of a model are: on one device, on several, or (offloaded) on none while nobody computes with them."""

from collections.abc import Mapping
from typing import Any

import torch

from sepcap.errors import unknown
from sepcap.models.kinds import inner

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which accelerate spreads the layers of a model over the devices that there are."""

DeviceMap = str | Mapping[str, Any]
"""One of `PLANS`, or name of a module -> device."""


def device_of(model: Any) -> torch.device:
    """Where the model's embedding, and so its input, lives."""
    whole = inner(model)
    try:
        embedding = whole.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # of a HookedTransformer, or of a model that takes no tokens
        embedding = None
    return place_of(whole if embedding is None else embedding)


def layer_device(model: Any, layer: int) -> torch.device:
    """Where a block, and so its activations, is."""
    return place_of(model.blocks[layer])


def place_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes.

    Raises:
        NotImplementedError: its weights are offloaded.
    """
    found = next(module.parameters()).device
    if found.type == "meta":
        check_at_hand(module, "a pass")
    return found


def check_at_hand(part: torch.nn.Module, what: str) -> None:
    """Raise where weights are not in memory: what a view of them shows is empty, and what is written to it is lost.

    Raises:
        NotImplementedError: some weights are offloaded to the CPU or to a disk.
    """
    away = [name for name, parameter in part.named_parameters() if parameter.is_meta]
    if away:
        raise NotImplementedError(
            f"{what} needs the weights in memory, but {len(away)} of them ({away[0].replace('._original_component', '')}, …) are "
            "offloaded: the devices of the device_map are too small, or it says so. Give dtype='bfloat16', more devices, more "
            "max_memory, or device='cpu'"
        )


def check_device(device: torch.device) -> None:
    """Raise where a device that is asked for is not there."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no CUDA device here; leave device out, or give 'cpu'")


def checked_device_map(device_map: Any, max_memory: Any, device: Any) -> dict[str, Any]:
    """What `from_pretrained` is to be told about devices; nothing without a map.

    Raises:
        TypeError: neither a name nor a mapping.
        ValueError: an unknown plan, a device that is not there, disk, `device` as well, or `max_memory` alone.
    """
    if device_map is None:
        if max_memory is not None:
            raise ValueError("max_memory says how much of each device a device_map may use: give device_map='auto' too")
        return {}
    if device is not None:
        raise ValueError(f"device={str(device)!r} and device_map={device_map!r}: give one of them")
    if isinstance(device_map, str) and device_map not in PLANS:
        raise unknown("device_map", device_map, PLANS, "For one device use device=; or a mapping from module to device.")
    if not isinstance(device_map, str | Mapping) or not device_map:
        raise TypeError(f"device_map={device_map!r}: give 'auto', or name of a module -> device, such as {{'model.layers.0': 0}}")
    if isinstance(device_map, Mapping):
        device_map = {module: _checked_place(f"device_map[{module!r}]={place!r}", place) for module, place in device_map.items()}
    return {"device_map": device_map} | ({} if max_memory is None else {"max_memory": dict(max_memory)})


def _checked_place(said: str, place: Any) -> int | str:
    """One device as accelerate compares them: a number of a CUDA device, or a name."""
    if place == "disk":
        raise ValueError(f"{said}: weights on a disk can be neither measured nor edited here; give devices in memory")
    try:
        at = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{said}: give the number of a CUDA device, 'cuda:0' or 'cpu'") from error
    if at.type == "cuda" and (at.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{said}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return (at.index or 0) if at.type == "cuda" else str(at)
