"""A server of the OpenAI API without a model: it answers from a table, and worse with fewer visual tokens."""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.harness.http import data_url

NUM_TOKENS, NUM_TEXT = 576, 20


class Answering:
    """The answers, and what was asked.

    Args:
        items: questions with answers.
        needs: method to the visual tokens below which it answers wrongly.

    Attributes:
        asked: the field `ficoco` of each chat, in order.
    """

    def __init__(self, items: Sequence[Item], needs: Mapping[str, int]) -> None:
        self.asked: list[Any] = []
        self._answers = {
            (item.question, data_url(item.image or b"", item.media_type)): item.answer or "yes"
            for item in items
        }
        self._needs = needs

    def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """One chat completion, of a single chunk."""
        *images, text = body["messages"][0]["content"]
        field = body.get("ficoco", "off")
        self.asked.append(field)
        answer, num_visual, logprob = "no image", 0, -1.0
        if images:
            num_visual, logprob = NUM_TOKENS, -0.01
            answer = self._answers.get((text["text"], images[0]["image_url"]["url"]), "new image")
            if field != "off":
                num_visual, logprob = field["keep"], -0.02
                if field["keep"] < self._needs[field["method"]]:
                    answer, logprob = f"not {answer}", -2.0
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer},
            "delta": {"role": "assistant", "content": answer},
            "finish_reason": "stop",
            "logprobs": {
                "content": [
                    {
                        "token": answer,
                        "logprob": logprob,
                        "top_logprobs": [{"token": answer, "logprob": logprob}],
                    }
                ]
            },
        }
        usage = {"prompt_tokens": NUM_TEXT + num_visual, "completion_tokens": 1}
        usage["total_tokens"] = sum(usage.values())
        return {"id": "1", "object": "chat", "created": 0, "model": "m", "choices": [choice], "usage": usage}


@contextmanager
def answering(items: Sequence[Item], needs: Mapping[str, int]) -> Iterator[tuple[str, Answering]]:
    """Serve on a free port until the block ends.

    Args:
        items: questions with answers.
        needs: method to the visual tokens below which it answers wrongly.

    Yields:
        Base URL, without a path, and the answers.
    """
    answers = Answering(items, needs)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send({"object": "list", "data": [{"id": "m", "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self.send_error(404)
            elif body.get("stream"):
                self._send(answers.chat(body), stream=True)
            else:
                self._send(answers.chat(body))

        def _send(self, content: Mapping[str, Any], *, stream: bool = False) -> None:
            text = json.dumps(content)
            data = (f"data: {text}\n\ndata: [DONE]\n\n" if stream else text).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream" if stream else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", answers
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
