"""Placement of a model's parts: on one device, on several, or (offloaded) on none while they are not used."""

from collections.abc import Mapping
from typing import Any

import torch

from sepcap.errors import unknown
from sepcap.models.kinds import inner

PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways in which accelerate spreads the layers of a model over the available devices."""

DeviceMap = str | Mapping[str, Any]
"""One of `PLANS`, or name of a module -> device."""


def device_of(model: Any) -> torch.device:
    """Device of the model's embedding, and so of its input."""
    whole = inner(model)
    try:
        embedding = whole.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # of a HookedTransformer, or of a model that takes no tokens
        embedding = None
    return place_of(whole if embedding is None else embedding)


def layer_device(model: Any, layer: int) -> torch.device:
    """Device of a block, and so of its activations."""
    return place_of(model.blocks[layer])


def place_of(module: torch.nn.Module) -> torch.device:
    """Device on which a module computes.

    Raises:
        NotImplementedError: its weights are offloaded.
    """
    found = next(module.parameters()).device
    if found.type == "meta":
        check_at_hand(module, "a forward pass")
    return found


def check_at_hand(part: torch.nn.Module, what: str) -> None:
    """Raise if weights are not in memory: views of them are empty, and edits of the views are lost.

    Raises:
        NotImplementedError: some weights are offloaded to the CPU or to a disk.
    """
    away = [name for name, parameter in part.named_parameters() if parameter.is_meta]
    if away:
        raise NotImplementedError(
            f"{what} needs the weights in memory, but {len(away)} of them ({away[0].replace('._original_component', '')}, …) are "
            "offloaded: the devices of the device_map are too small, or it requests offloading. Give dtype='bfloat16', more devices, "
            "more max_memory, or device='cpu'"
        )


def checked_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; default is the CUDA GPU if there is one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or sees no CUDA.
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: torch knows no such device; give 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: torch sees no CUDA device here; leave device out, or give 'cpu'")
    return device


def checked_device_map(device_map: Any, max_memory: Any, device: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the placement on devices; empty without a map.

    Raises:
        TypeError: neither a name nor a mapping.
        ValueError: an unknown plan, an unavailable device, disk, `device` as well, or `max_memory` alone.
    """
    if device_map is None:
        if max_memory is not None:
            raise ValueError("max_memory limits the memory of each device that a device_map may use: give device_map='auto' too")
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
    """One device in the form in which accelerate compares them: the number of a CUDA device, or a name."""
    if place == "disk":
        raise ValueError(f"{said}: weights on a disk can be neither measured nor edited; give devices in memory")
    try:
        at = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{said}: give the number of a CUDA device, 'cuda:0' or 'cpu'") from error
    if at.type == "cuda" and (at.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{said}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return (at.index or 0) if at.type == "cuda" else str(at)
