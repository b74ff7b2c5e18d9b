"""Several devices where there is one: tensors that say where they are, and operations that refuse to mix them.

Every tensor lives on the CPU and carries the name of the device that it pretends to be on. Whatever is called on tensors is
called on the CPU, after the rules that torch has for real devices: operands on one device, but for numbers without
dimensions and for indices on the CPU; `numpy` on the CPU only; `to`, `cpu` and `copy_` are the only ways across.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Move:
    """A tensor that was taken from one device to another."""

    before: str
    after: str
    shape: tuple[int, ...]


def where(tensor: Tensor) -> torch.device:
    """The device that a tensor pretends to be on."""
    return getattr(tensor, "_pretended", None) or Tensor.device.__get__(tensor)


def put(tensor: Any, device: torch.device) -> Any:
    if isinstance(tensor, Tensor) and Tensor.device.__get__(tensor).type != "meta":
        tensor._pretended = device
    return tensor


def put_module(module: torch.nn.Module, device: str) -> None:
    """Say of all weights and buffers of a module that they are on a device."""
    for tensor in [*module.parameters(), *module.buffers()]:
        put(tensor, torch.device(device))


def tensors_in(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


class PretendedDevices(TorchFunctionMode):
    """Inside, devices are what tensors pretend; `moves` says what was moved between them."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[Move] = []
        self._new = torch.nn.Parameter.__new__

    def __enter__(self) -> Any:
        # a parameter is made of a tensor without any function that a mode is asked for
        def new(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
            made = self._new(cls, data, requires_grad)
            return made if data is None else put(made, where(data))

        torch.nn.Parameter.__new__ = new
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch.nn.Parameter.__new__ = self._new
        super().__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            return where(args[0])
        if func == Tensor.is_cuda.__get__:
            return where(args[0]).type == "cuda"
        if func == Tensor.data.__set__:
            func(*args)
            return put(args[0], where(args[1]))
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as):
            return self._to(name, *args, **kwargs)
        if func is Tensor.copy_:
            self._note(args[1], where(args[0]))
            return func(*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and where(args[0]).type != "cpu" and not kwargs.get("force"):
            raise TypeError(f"can't convert {where(args[0])} device type tensor to numpy")
        if func is torch._has_compatible_shallow_copy_type:  # which `Module.to` asks of a weight here and one there
            return func(*args)
        device = self._check(func, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == "cuda":
            kwargs["device"] = "cpu"
            device = torch.device(asked)
        elif asked is not None:
            device = torch.device(asked)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            if all(tensor is not given for given in tensors_in([args, kwargs])):
                put(tensor, device)
        return result

    def _to(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype = where(tensor), kwargs.get("dtype")
        if name == "cpu":
            device = CPU
        elif name == "cuda":
            device = torch.device("cuda", 0)
        else:
            for value in (*args, kwargs.get("device"), kwargs.get("other")):
                if isinstance(value, Tensor):
                    device, dtype = (device if name == "type_as" else where(value)), value.dtype
                elif isinstance(value, torch.dtype):
                    dtype = value
                elif isinstance(value, str | torch.device):
                    device = torch.device(value)
        if device.type == "meta":
            return tensor.to("meta")
        self._note(tensor, device)
        result = tensor.to(dtype or tensor.dtype)
        if device != where(tensor) and result is tensor:
            result = tensor.clone()
        return tensor if result is tensor else put(result, device)

    def _note(self, tensor: Any, device: torch.device) -> None:
        if isinstance(tensor, Tensor) and where(tensor) != device:
            self.moves.append(Move(str(where(tensor)), str(device), tuple(tensor.shape)))

    def _check(self, func: Any, args: Any, kwargs: Any) -> torch.device:
        given = list(tensors_in([args, kwargs]))
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            # indices may be on the CPU; what is indexed decides
            indices = [index for index in tensors_in(args[1]) if where(index) != CPU]
            given = [args[0], *indices, *tensors_in(args[2:])]
        devices = {where(tensor) for tensor in given if where(tensor) != CPU or tensor.dim() > 0}
        if len(devices) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func.__name__} got {sorted(map(str, devices))}")
        return devices.pop() if devices else CPU
