"""Ask a ficoco-vllm server about an image, from the command line or from Python.

python examples/chat.py IMAGE QUESTION [--keep N] [--method NAME] [--url URL]
"""

import argparse
import base64
import mimetypes
import os
from pathlib import Path
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletion


def ask(image: str | Path, question: str, url: str | None = None, **budget: Any) -> ChatCompletion:
    """Send one chat about one image.

    Args:
        image: file with the image.
        question: text of the user's message.
        url: server; default: the environment variable FICOCO_URL, else http://127.0.0.1:8000.
        **budget: `method`, `keep` or `kv_budget` of this request; default: those of the server.

    Returns:
        The answer; `usage.ficoco` reports the applied method and the visual tokens before and after.
    """
    url = url or os.environ.get("FICOCO_URL", "http://127.0.0.1:8000")
    client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("VLLM_API_KEY", "none"))
    data = base64.b64encode(Path(image).read_bytes()).decode()
    image_url = f"data:{mimetypes.guess_type(image)[0]};base64,{data}"
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        temperature=0,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": image_url}},
                    {"type": "text", "text": question},
                ],
            }
        ],
        extra_body={"ficoco": budget} if budget else {},
    )


def main() -> None:
    """Print the answer and what it used."""
    parser = argparse.ArgumentParser(description="Ask a ficoco-vllm server about an image.")
    parser.add_argument("image")
    parser.add_argument("question")
    parser.add_argument("--url", help="default: FICOCO_URL, else http://127.0.0.1:8000")
    parser.add_argument("--method", help="reduction method of this request; default: the server's")
    parser.add_argument("--keep", type=int, help="visual tokens that the image keeps; default: the server's")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    answer = ask(**given)
    print((answer.choices[0].message.content or "").strip())
    usage = answer.usage
    print(usage and usage.prompt_tokens, "prompt tokens", getattr(usage, "ficoco", None))


if __name__ == "__main__":
    main()
