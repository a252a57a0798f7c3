"""What a row of the table stands for, and which figures were measured of it in which benchmark."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.benchmarks.accuracy.variants import site_of
from ficoco_vllm.benchmarks.concurrency.kinds import KINDS as CONCURRENCY_KINDS
from ficoco_vllm.benchmarks.harness import model
from ficoco_vllm.benchmarks.ttft.kinds import KINDS as TTFT_KINDS
from ficoco_vllm.benchmarks.ttft.kinds import NUM_TEXT_TOKENS, PATCHES, WHOLE_MODEL, Kind, token_plan
from ficoco_vllm.reduction.cost import estimate, model_shape

TITLES = {"ficoco-v": "FiCoCo-V", "ficoco-l": "FiCoCo-L", "ficoco-vl": "FiCoCo-VL"}

# Name of a benchmark to the content of its committed JSON.
Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Setting:
    """A method with its budget.

    Attributes:
        method: name, or None: stock vLLM.
        keep: visual tokens that are left in the end.
        schedule: where it is not the method's own.
    """

    method: str | None = None
    keep: int = PATCHES
    schedule: str | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any] | None, keep: int | None = None) -> "Setting":
        """The setting of a server.

        Args:
            settings: ours, or None for stock vLLM.
            keep: where requests ask for it, instead of the settings'.
        """
        if settings is None:
            return cls()
        return cls(settings["method"], keep or settings["keep"], settings.get("schedule"))

    @property
    def label(self) -> str:
        """As the table prints it."""
        if self.method is None:
            return f"stock vLLM, {self.keep}"
        name = TITLES.get(self.method, f"`{self.method}`")
        return f"{name} {self.keep}" + (f", {self.schedule}" if self.schedule else "")

    def kv_megabytes(self) -> float:
        """KV cache of the prompt in the whole LLaVA-1.5-7B, fp16, by the planner; decimal megabytes."""
        given = {"method": self.method, "keep": self.keep, "schedule": self.schedule}
        settings = {key: value for key, value in given.items() if value is not None}
        in_decoder = self.method is not None and site_of(self.method) != "tower"
        kind = Kind("", settings if self.method else None, self.keep, in_decoder)
        plan = token_plan(kind, WHOLE_MODEL)
        shape = model_shape(model.config(WHOLE_MODEL))
        return estimate(shape, plan, num_text_tokens=NUM_TEXT_TOKENS).kv_bytes / 1e6


@dataclass
class Measured:
    """Figures of one setting; None where nothing was measured.

    Attributes:
        accuracy: row of `bench accuracy`.
        ttft: of the shallowest decoder.
        ttft_whole: extrapolated to the whole model.
        load: of the largest load.
        concurrency: of `make bench-concurrency`.
    """

    accuracy: Mapping[str, Any] | None = None
    ttft: Mapping[str, Any] | None = None
    ttft_whole: Mapping[str, Any] | None = None
    load: Mapping[str, Any] | None = None
    concurrency: Mapping[str, Any] | None = None

    @property
    def is_served(self) -> bool:
        """Whether anything but accuracy was measured."""
        return any((self.ttft, self.load, self.concurrency))


def collect(results: Results) -> dict[Setting, Measured]:
    """Bring together what the benchmarks measured.

    Args:
        results: of `accuracy`, `accuracy-decoder`, `ttft`, `load` and `concurrency` those that there are.

    Returns:
        Every setting of which anything was measured: stock vLLM, then methods in the order of the benchmarks, larger
        budgets first.
    """
    found: dict[Setting, Measured] = {Setting(): Measured()}
    for name, read in _READERS.items():
        for attribute, setting, figures in read(results[name]) if name in results else ():
            setattr(found.setdefault(setting, Measured()), attribute, figures)
    methods = list(dict.fromkeys(setting.method for setting in found))
    order = sorted(found, key=lambda s: (methods.index(s.method), -s.keep, s.schedule or ""))
    return {setting: found[setting] for setting in order}


Read = Iterator[tuple[str, Setting, Mapping[str, Any]]]


def _ttft(result: Mapping[str, Any]) -> Read:
    run = shallowest(result)
    for attribute, rows in (("ttft", run["kinds"]), ("ttft_whole", result["whole_model"])):
        for name, row in rows.items():
            kind = TTFT_KINDS[name]
            yield attribute, Setting.of(kind.settings, kind.keep), row


def _concurrency(result: Mapping[str, Any]) -> Read:
    for name, row in result["kinds"].items():
        yield "concurrency", Setting.of(CONCURRENCY_KINDS[name]), row


def _load(result: Mapping[str, Any]) -> Read:
    point = largest_load(result)
    servers = {server["name"]: server for server in result["servers"]}
    for row in result["summary"]:
        if row["point"] == point:
            server = servers[row["server"]]
            yield "load", Setting.of(server if server["method"] else None), row


def _accuracy(result: Mapping[str, Any]) -> Read:
    for row in result["rows"]:
        if row["table"] != "methods":
            continue
        if row["method"]:
            yield "accuracy", Setting(row["method"], row["keep"]), row
        elif row["label"] == "full" and row["site"] == "tower":
            yield "accuracy", Setting(), row


_READERS = {
    "ttft": _ttft,
    "load": _load,
    "concurrency": _concurrency,
    "accuracy": _accuracy,
    "accuracy-decoder": _accuracy,
}


def shallowest(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The run of `make bench-ttft` that was measured with the fewest decoder layers."""
    run: Mapping[str, Any] = min(result["runs"], key=lambda run: run["layers"])
    return run


def largest_load(result: Mapping[str, Any]) -> str:
    """Name of the point of a load test at which most requests were open."""
    traffic = {row["point"]: row["traffic"] for row in result["rows"]}
    return max(traffic, key=lambda name: (traffic[name]["rate"] is None, traffic[name]["concurrency"] or 0))
