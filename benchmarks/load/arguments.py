"""Options of `ficoco-vllm bench load`, apart from the command: the command line reads them without vLLM."""

import argparse

DEMO = "demo"
WIDE = "llava-1.5-7b-width"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, beside those that all benchmarks of a server share."""
    add = parser.add_argument
    add(
        "--model",
        default=DEMO,
        help=f"a folder or name that vLLM serves; {DEMO!r}: the demo model; {WIDE!r}: LLaVA-1.5-7B's shapes with "
        "--layers decoder layers and random weights (default: %(default)s)",
    )
    add("--layers", type=int, default=2, help=f"decoder layers of {WIDE!r} (default: %(default)s)")
    add("--served-model-name", help="name of the model in requests (default with --url: the server's first)")
    add(
        "--tokenizer",
        help="folder or name, for prompts of a known length (default: the model; with --url the server's /tokenize)",
    )
    servers = ["stock", "ficoco-v:64", "ficoco-v:192"]
    add("--servers", nargs="+", default=servers, help="stock, METHOD or METHOD:KEEP, each")
    add("--rates", nargs="*", type=float, default=[], help="requests per second, one point each")
    add("--concurrency", nargs="*", type=int, default=[4, 16], help="concurrent requests, one point each")
    add("--requests", type=int, default=64, help="of a point (default: %(default)s)")
    add("--text-tokens", type=int, default=60, help="of a prompt, beside its image (default: %(default)s)")
    add("--answer-tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    add("--image-side", type=int, default=336, help="pixels (default: %(default)s)")
    add("--rounds", type=int, default=2, help="turns of each server (default: %(default)s)")
    add("--sample-seconds", type=float, default=0.5, help="between two reads of /metrics")
    add(
        "--server-options", default="", help="more options of vLLM's server, as one argument, for all servers"
    )
    add("--bar", type=float, help="least throughput of each method over stock's, at the last point")
    add("--bar-token", type=float, help="most time of a token of each method over stock's, at the last point")
    add("--remark", default="", help="stored with the figures, for example the other load of the machine")
