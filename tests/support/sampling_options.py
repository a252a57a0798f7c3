"""Every option of vLLM's requests that concerns sampling or output, with values that a client may send."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import httpx

from tests.support.server import API_KEY, Server, data_url, message

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TAG = {"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}
STRUCTURAL_TAG = json.dumps({"type": "structural_tag", "format": TAG})
# Field of StructuredOutputsParams to values of the whole.
STRUCTURED: dict[str, list[dict[str, Any]]] = {
    "json": [{"json": SCHEMA}, {"json": "{}"}, {"json": "no schema"}, {"json": {"type": "thing"}}],
    "regex": [{"regex": "[0-9]{1,3}"}, {"regex": "("}, {"regex": ""}],
    "choice": [{"choice": ["yes", "no"]}, {"choice": []}, {"choice": [""]}],
    "grammar": [{"grammar": 'root ::= "yes" | "no"'}, {"grammar": "root ::= nothing"}],
    "json_object": [{"json_object": True}, {"json_object": True, "regex": "a"}],
    "disable_any_whitespace": [{"json": SCHEMA, "disable_any_whitespace": True}],
    "disable_additional_properties": [{"json": SCHEMA, "disable_additional_properties": True}],
    "whitespace_pattern": [{"json": SCHEMA, "whitespace_pattern": " ?"}],
    "structural_tag": [{"structural_tag": STRUCTURAL_TAG}, {"structural_tag": "{"}],
}
# Field of SamplingParams that a request names to values: the first is valid, and deterministic with others like it.
SAMPLING: dict[str, list[Any]] = {
    "n": [2, 0, 10**6],
    "presence_penalty": [1.5, -2.0, 3.0],
    "frequency_penalty": [1.5, -2.0, 3.0],
    "repetition_penalty": [1.3, 0.1, 1e300, 0.0],
    "temperature": [0.7, 2.0, 1e-6, -1.0, 1e300],
    "top_p": [0.5, 1e-9, 0.0],
    "top_k": [2, 1, 10**12, -1, -2],
    "min_p": [0.2, 1.0, 2.0],
    "seed": [7, -(2**63), 2**63 - 1, 2**63],
    "stop": [["a", "e"], [""]],
    "stop_token_ids": [[5, 6], list(range(300)), [10**9], [-1]],
    "ignore_eos": [True],
    "max_tokens": [4, 1, 10**9, 2**40, 0],
    "min_tokens": [2, 3, 2**40, -1],
    "logprob_token_ids": [[1, 2, 3], list(range(129)), [10**9]],
    "prompt_logprobs": [2, 0, -1, 10**6],
    "skip_special_tokens": [False],
    "spaces_between_special_tokens": [False],
    "include_stop_str_in_output": [True],
    "stream_interval": [2, 0],
    "structured_outputs": [value for values in STRUCTURED.values() for value in values],
    "logit_bias": [{"5": 50.0, "6": -100.0}, dict.fromkeys(map(str, range(1100)), 1.0), {"1000000": 1.0}],
    "allowed_token_ids": [[5, 6, 7], list(range(1100)), [10**9], []],
    "bad_words": [
        ["yes", "no"],
        ["a", "b"] * 100,
        [f"{word} abcdefghijklmnopqrstuvwxyz" for word in range(60)],
        [""],
    ],
    "thinking_token_budget": [2, 0, -1, 2**40],
    "repetition_detection": [{"max_pattern_size": 2, "min_count": 2}, {"max_pattern_size": -1}],
    "routed_experts_prompt_start": [1, -1],
    "watermarking": [False, True],
}
# The same for fields of a chat or completion alone.
CHAT: dict[str, list[Any]] = {
    "logprobs": [True],
    "top_logprobs": [2, 0, -1, 10**6],
    "max_completion_tokens": [3, 2**40],
    "response_format": [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "thing"}}},
        {"type": "structural_tag", "format": TAG},
        {"type": "text"},
    ],
    "use_beam_search": [True],
    "length_penalty": [1.5],
    "echo": [True],
    "reasoning_effort": ["low"],
    "include_reasoning": [False],
}
COMPLETION: dict[str, list[Any]] = {
    "logprobs": [2, 0, -1, 10**6],
    "response_format": CHAT["response_format"],
    "use_beam_search": [True],
    "length_penalty": [1.5],
    "echo": [True],
    "suffix": ["x"],
}
# Fields that leave no token: the only allowed one begins no answer in this form.
CONTRADICTIONS: list[dict[str, Any]] = [
    {"allowed_token_ids": [5], "structured_outputs": {"regex": "[0-9]{3}"}},
    {"allowed_token_ids": [5], "response_format": {"type": "json_object"}, "min_tokens": 2},
]
# Fields that choose no token: the prompt, the form of the answer, routing.
OTHER = (
    "messages model prompt prompt_embeds stream stream_options user tools tool_choice parallel_tool_calls "
    "truncate_prompt_tokens truncation_side add_generation_prompt continue_final_message add_special_tokens "
    "documents chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs priority request_id "
    "session_id return_tokens_as_token_ids return_token_ids return_token_offsets return_prompt_text mm_payload "
    "return_mm_kwargs return_weight_versions cache_salt kv_transfer_params ec_transfer_params vllm_xargs"
)
# Fields of SamplingParams that no request over HTTP names, or names otherwise.
NOT_IN_REQUESTS = {
    "logprobs": "CHAT and COMPLETION",
    "extra_args": "vllm_xargs",
    "output_kind": "stream",
    "prompt_logprob_token_ids": "offline",
    "prompt_logprob_start": "offline",
    "flat_logprobs": "offline",
    "detokenize": "offline",
    "skip_clone": "vLLM's own",
    "output_text_buffer_length": "vLLM's own",
    "skip_reading_prefix_cache": "set from prompt_logprobs",
    "trace_decode_token_ids": "offline, where the server enables it",
}


def pairs() -> list[dict[str, Any]]:
    """The first values of each two fields of SamplingParams together."""
    return [
        {"temperature": 0.9, one: SAMPLING[one][0], other: SAMPLING[other][0]}
        for one, other in combinations(SAMPLING, 2)
    ]


def check_sweep(server: Server, model: str, route: str, image: Any) -> None:
    """Send every value to a route, sampled at random; each is answered, or refused with 400 and a reason.

    vLLM answers `CONTRADICTIONS` with 500.

    Args:
        server: whose engine lives on.
        model: its name.
        route: "chat/completions" or "completions".
        image: of the chats.
    """
    body: dict[str, Any] = {"model": model, "max_tokens": 3}
    if route == "completions":
        body["prompt"], own = "what is this?", COMPLETION
    else:
        body["messages"], own = [message("what is this?", [data_url(image)])], CHAT
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with httpx.Client(timeout=300, headers=headers) as client, ThreadPoolExecutor(16) as pool:

        def send(fields: dict[str, Any]) -> tuple[int, str]:
            answer = client.post(f"{server.url}/v1/{route}", json={**body, **fields})
            return answer.status_code, answer.text

        values = SAMPLING | own
        asked = [{"temperature": 1, name: value} for name in values for value in values[name]]
        outcomes = dict(zip(map(json.dumps, asked), pool.map(send, asked), strict=True))
        contradictions = list(pool.map(send, CONTRADICTIONS))
    assert {fields: outcome for fields, outcome in outcomes.items() if outcome[0] not in (200, 400)} == {}
    assert server.is_healthy()
    assert [status for status, _ in contradictions] == [400] * len(CONTRADICTIONS)
    assert all("no token is left" in text for _, text in contradictions)
    refusals = [json.loads(text)["error"]["message"] for status, text in outcomes.values() if status == 400]
    assert all(refusals)
    assert len(refusals) < len(outcomes) / 2
