"""What an endurance run promises, out of its record."""

from typing import Any

from ficoco_vllm.benchmarks.bars import Bar
from ficoco_vllm.benchmarks.endurance.asks import EARLY, MID
from ficoco_vllm.benchmarks.endurance.client import ABORTED, ANSWERED, FAULTS, REFUSED
from ficoco_vllm.benchmarks.endurance.watch import GAUGES, RESPONSES, total
from ficoco_vllm.benchmarks.soak.__main__ import LEAST_ROUNDS, WARM_UP_SHARE, growth

# MiB for a thousand requests. What a leak would keep of one: its pixels (192 x 192 x 3 floats, 432 KiB) 420, its
# embeddings (576 x 128 floats, 288 KiB) 280, its body (4 KiB) 4 and with an image of 2 MiB more.
MOST_GROWTH_MIB = 8.0
OUTCOMES = "ficoco:requests_total"
FINISHED = "vllm:request_success_total"


def promises(record: dict[str, Any], name: str) -> list[Bar]:
    """What is promised of a run.

    Args:
        record: of `drive`.
        name: of the server.
    """
    ended, rounds = record["outcomes"], record["rounds"]
    found = [
        *(_most(fault, ended.get(fault, 0)) for fault in FAULTS),
        Bar(
            "ended", sum(ended.get(kind, 0) for kind in (ANSWERED, REFUSED, ABORTED)), record["num_requests"]
        ),
        *(Bar(f"aborts-{when}", record["aborts"].get(when, 0), 1) for when in (EARLY, MID)),
        *_counters(record),
        *(
            _most(gauge.split(":")[1].replace("_", "-"), max(row["gauges"][gauge] for row in rounds))
            for gauge in GAUGES
        ),
        Bar("longest-queue-of-a-burst", record["longest_queue"], 1),
        _most("answers-unlike-alone", len(record["different"])),
        Bar("answers-compared", record["num_compared"], 1),
    ]
    later = [row for row in rounds if row["num_requests"] > WARM_UP_SHARE * rounds[-1]["num_requests"]]
    if len(later) >= LEAST_ROUNDS:
        found.append(_most("growth-mib-per-1000-requests", growth(later, "mib"), MOST_GROWTH_MIB))
    return [Bar(f"endurance-{name}-{bar.name}", bar.measured, bar.limit, bar.at_least) for bar in found]


def _counters(record: dict[str, Any]) -> list[Bar]:
    """The server's own counters add up to what its clients saw.

    A request that its client gave up may have ended before the server heard of it, and then counts as answered; one
    given up before the server read it counts nowhere.
    """
    ended, counted = record["outcomes"], record["counted"]
    answered, aborted = ended.get(ANSWERED, 0), ended.get(ABORTED, 0)
    found = []
    for name, counts in (("vllm", counted[FINISHED]), ("ficoco", counted[OUTCOMES])):
        done = total(counts, "stop", "length")
        refused = counts.get("refused", 0)
        found += [
            Bar(f"{name}-counts-answers", done, answered),
            _most(f"{name}-counts-answers-and-aborts", done + counts.get("abort", 0), answered + aborted),
            _most(f"{name}-counts-others", sum(counts.values()) - done - counts.get("abort", 0) - refused),
        ]
    responses = counted[RESPONSES]
    return [
        *found,
        _most("ficoco-refusals-miscounted", abs(counted[OUTCOMES].get("refused", 0) - record["refusals"])),
        _most("responses-5xx", responses.get("5xx", 0)),
        # vLLM answers a client that has gone with 400, if it notices before the answer begins.
        Bar("responses-4xx", responses.get("4xx", 0), ended.get(REFUSED, 0)),
        _most("responses-4xx-unexpected", responses.get("4xx", 0) - ended.get(REFUSED, 0) - aborted),
    ]


def _most(name: str, measured: float, limit: float = 0) -> Bar:
    return Bar(name, measured, limit, at_least=False)
