"""The bars of `make soak`."""

from dataclasses import replace
from typing import Any

from ficoco_vllm.benchmarks.harness.results import Bar, at_most
from ficoco_vllm.benchmarks.soak.growth import growth_bars
from ficoco_vllm.benchmarks.soak.server.client import ABORTED, ANSWERED, FAULTS, REFUSED
from ficoco_vllm.benchmarks.soak.server.mixture import EARLY, MID
from ficoco_vllm.benchmarks.soak.server.state import GAUGES, RESPONSES, total

# MiB for a thousand requests. A leak would show as 420 for a request's pixels (192 x 192 x 3 floats, 432 KiB), 280
# for its embeddings (576 x 128 floats, 288 KiB), 4 for its body (4 KiB), more with an image of 2 MiB.
MOST_GROWTH_MIB = 8.0
OUTCOMES = "ficoco:requests_total"
FINISHED = "vllm:request_success_total"


def bars(record: dict[str, Any], name: str) -> list[Bar]:
    """The bars of a run."""
    ended, rounds = record["outcomes"], record["rounds"]
    named = [
        *(at_most(fault, ended.get(fault, 0)) for fault in FAULTS),
        Bar(
            "ended", sum(ended.get(kind, 0) for kind in (ANSWERED, REFUSED, ABORTED)), record["num_requests"]
        ),
        *(Bar(f"aborts-{when}", record["aborts"].get(when, 0), 1) for when in (EARLY, MID)),
        *_counters(record),
        *(
            at_most(gauge.split(":")[1].replace("_", "-"), max(row["gauges"][gauge] for row in rounds))
            for gauge in GAUGES
        ),
        Bar("longest-queue-of-a-burst", record["longest_queue"], 1),
        at_most("answers-unlike-alone", len(record["different"])),
        Bar("answers-compared", record["num_compared"], 1),
        *growth_bars("growth-mib-per-1000-requests", rounds, "mib", MOST_GROWTH_MIB),
    ]
    return [replace(bar, name=f"soak-{name}-{bar.name}") for bar in named]


def _counters(record: dict[str, Any]) -> list[Bar]:
    """The server's own counters add up to what its clients saw.

    A request whose client disconnected may have ended before the server noticed, and then counts as answered; one that
    the server had not read counts nowhere.
    """
    ended, counted = record["outcomes"], record["counted"]
    answered, aborted = ended.get(ANSWERED, 0), ended.get(ABORTED, 0)
    counters = []
    for name, counts in (("vllm", counted[FINISHED]), ("ficoco", counted[OUTCOMES])):
        done = total(counts, "stop", "length")
        refused = counts.get("refused", 0)
        counters += [
            Bar(f"{name}-counts-answers", done, answered),
            at_most(f"{name}-counts-answers-and-aborts", done + counts.get("abort", 0), answered + aborted),
            at_most(f"{name}-counts-others", sum(counts.values()) - done - counts.get("abort", 0) - refused),
        ]
    responses = counted[RESPONSES]
    return [
        *counters,
        at_most("ficoco-refusals-miscounted", abs(counted[OUTCOMES].get("refused", 0) - record["refusals"])),
        at_most("responses-5xx", responses.get("5xx", 0)),
        # vLLM records 400 for a client that disconnects before its answer begins.
        Bar("responses-4xx", responses.get("4xx", 0), ended.get(REFUSED, 0)),
        at_most("responses-4xx-unexpected", responses.get("4xx", 0) - ended.get(REFUSED, 0) - aborted),
    ]
