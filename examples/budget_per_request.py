"""Ask the same question at several budgets: `python examples/budget_per_request.py [URL]`.

The server must run a method of the vision tower, for example `make serve`.
"""

import sys

from chat import ask

from ficoco_vllm.demo_model import examples


def main() -> None:
    """Print the answer and the usage for each budget."""
    url = sys.argv[1] if len(sys.argv) > 1 else None
    example = examples()[0]
    for budget in ({}, {"keep": 192}, {"method": "tome", "keep": 128}, {"method": "off"}):
        answer = ask(example.image, example.question, url, **budget)
        print(
            budget or "server's default",
            (answer.choices[0].message.content or "").strip(),
            answer.usage.ficoco,
            sep="\t",
        )


if __name__ == "__main__":
    main()
