"""Schemas of all JSON that sepcap writes: one type per kind of file, and one function that checks a value against it."""

from functools import cache
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, FiniteFloat, InstanceOf, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from sepcap.errors import CorruptFile

Text = InstanceOf[str]
"""Any string, even one that UTF-8 cannot encode, as file names can be."""
Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Role = Literal["forget", "retain"]
Site = Literal["mlp", "attn_pre_out", "attn_value", "heads"]
Share = Annotated[FiniteFloat, Field(gt=0, le=1)]
Amount = Annotated[int, Field(ge=1)] | Share


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is outside the folder")
    return name


def _complete(metrics: dict[str, float]) -> dict[str, float]:
    needed = ("n", "loss", "loss_se", "top1", "top10", "perplexity", "perplexity_se")
    if missing := [name for name in needed if name not in metrics]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return metrics


Within = Annotated[str, Field(max_length=1000), AfterValidator(_inside)]
"""A file in the folder, never one outside of it."""


@with_config(ConfigDict(strict=True, extra="allow"))
class Strict(TypedDict):
    """Strings, numbers and flags are not converted into each other; fields not named here are allowed."""


class Seal(Strict):
    """What `storage.seals_of` records of a file."""

    bytes: Count
    sha256: Digest


class Folder(Strict):
    """config.json of any folder."""

    format: Text


class RunConfig(Folder):
    """config.json of a pruning run."""

    steps: Annotated[int, Field(ge=0)]
    forget: Text
    retain: Text
    importance: Text
    fractions: Annotated[dict[Site, Amount], Field(min_length=1)]
    schedule: NotRequired[Annotated[list[Annotated[dict[Site, Amount], Field(min_length=1)]], Field(min_length=1)]]
    eps: Annotated[FiniteFloat, Field(gt=0)] | None
    samples: dict[Literal["collect", "evaluate"], dict[Role, Text]]
    model: NotRequired[Text]
    model_fingerprint: NotRequired[Text]
    dtype: NotRequired[Text]
    seed: NotRequired[Count]
    baseline: NotRequired[Literal["uniform", "per_layer", "activity"]]
    matched: NotRequired[Text]
    matched_neurons: NotRequired[Digest]
    rotation: NotRequired[Literal["none", "fold", "rotate"]]
    positions: NotRequired[Literal["all", "correct"]]
    offset: NotRequired[Text]
    versions: NotRequired[dict[Text, Text]]
    documents: NotRequired[dict[Text, dict[Role, list[Any]]]]
    n_documents: NotRequired[dict[Literal["collect", "evaluate"], dict[Role, Count]]]
    prompts: NotRequired[dict[Role, Text]]


class TaskRecord(Strict):
    """One evaluation, as a step records it. Metrics of a damaged model can be infinite or NaN."""

    task: Text
    metrics: Annotated[dict[Text, float], AfterValidator(_complete)]
    skip_tokens: list[int]
    sample: Text
    tokens: Count
    asked: Count


class Record(Strict):
    """record.json of a step."""

    run: Digest
    step: Count
    tasks: Annotated[dict[Role, TaskRecord], Field(min_length=2)]
    pruned_per_layer: Annotated[dict[Site, list[Count]], Field(min_length=1)]
    thresholds: dict[Site, float]
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    tokens: Count
    files: dict[Within, Seal]


class StudyConfig(Folder):
    """config.json of a study, or of a folder of runs: then with the name of each run and a digest of its configuration."""

    study: Text
    runs: NotRequired[dict[Within, Digest | None]]


class Finished(Strict):
    """result.json of a study."""

    study: Digest
    tables: list[Annotated[str, Field(pattern=r"^\w[\w.-]*$")]]
    tensors: list[Text]
    files: dict[Within, Seal]


class Continued(Strict):
    """A model's continuations of a prompt, before and after pruning."""

    kind: Text
    prompt: Text
    before: Text
    after: Text


class Generations(Strict):
    """generations.json of a run."""

    step: Count
    model_fingerprint: Text
    rows: list[Continued]


class Header(Strict):
    """Header of every tensor file."""

    kind: Text


class StatisticsHeader(Header):
    """Header of statistics."""

    counts: dict[Text, Count]
    info: dict[Text, Any]
    gradients: NotRequired[dict[Text, dict[Text, Any]]]
    replicates: NotRequired[dict[Text, dict[Text, Text]]]


class InfoHeader(Header):
    """Header of neuron sets and scores."""

    info: dict[Text, Any]


class EvaluationHeader(InfoHeader):
    """Header of an evaluation."""

    task: Text
    skip_tokens: list[int]


class PieceHeader(Header):
    """Header of a piece of a study."""

    name: Text
    study: Digest
    note: Any


class ScoresHeader(InfoHeader):
    """Header of scores."""

    sites: list[Text]


class ToxicityHeader(InfoHeader):
    """Header of a parquet file of toxicity. The perplexity is NaN if it was not measured."""

    sha256: Digest
    threshold: FiniteFloat
    perplexity: float
    perplexity_se: float


class ClustersHeader(InfoHeader):
    """Header of clusters of neurons."""

    k: Annotated[int, Field(ge=1)]
    fingerprint: Text


class RotationHeader(Header):
    """Header of a basis of values."""

    bias: Literal["fold", "rotate"]
    source: Text
    rotated: Text


class RowsHeader(Header):
    """Header of the evaluation sums per row of a step; groups are the packages of the documents, where they are known."""

    columns: list[Text]
    groups: NotRequired[dict[Role, list[Any] | None]]


HEADERS: dict[str, Any] = {
    "statistics": StatisticsHeader,
    "neurons": InfoHeader,
    "scores": ScoresHeader,
    "evaluation": EvaluationHeader,
    "piece": PieceHeader,
    "clusters": ClustersHeader,
    "rotation": RotationHeader,
    "rows": RowsHeader,
}
"""Kind of a tensor file -> schema of its header. For other kinds (positions, biases, labels, results of studies), which have nothing
but the kind, `Header`."""


def validated(schema: Any, value: Any, path: str | Path) -> Any:
    """The value, checked against the schema; `CorruptFile` names the path and the first fault."""
    try:
        return _adapter(schema).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        lacks = f"{where} is missing" if first["type"] == "missing" else f"{where}: {first['msg']}"
        raise CorruptFile(f"{path} is corrupt: {lacks}; restore it, or delete it and recreate it") from error


@cache
def _adapter(schema: Any) -> Any:
    return TypeAdapter(schema)
