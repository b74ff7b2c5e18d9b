import pytest

import sepcap
from sepcap.compiled.programs import PAIRS


@pytest.fixture(scope="session", params=list(PAIRS))
def compiled(request):
    """Every compiled model in turn; no test changes it."""
    return sepcap.load_compiled(request.param, device="cpu", texts=1_000)
