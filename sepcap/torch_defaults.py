"""The torch settings that the package computes under, whatever the caller has set."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def torch_defaults() -> Iterator[None]:
    """New tensors are float32, on the CPU and no inference tensors, unless a call inside specifies otherwise.

    Entered by every public function (`sepcap.checks.checked`); if torch is not imported yet, nothing is set.
    """
    torch = sys.modules.get("torch")
    with ExitStack() as stack:
        if torch is not None:
            before = torch.get_default_dtype()
            if before != torch.float32:
                stack.callback(torch.set_default_dtype, before)
                torch.set_default_dtype(torch.float32)
            if torch.get_default_device().type != "cpu":  # this slows every call of torch a little
                stack.enter_context(torch.device("cpu"))
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
        yield
