"""Settings of the target, and the file of its counts."""

import json
from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm.quality.controller import record, start
from ficoco_vllm.quality.settings import QualitySettings
from ficoco_vllm.quality.states import as_json, check_state, read_states


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "quality.target_agreement is missing; allowed: a number above 0, below 1"),
        (
            {"target_agreement": 1.0},
            "quality.target_agreement = 1.0 is not allowed; allowed: a number above 0",
        ),
        ({"target_agreement": 0}, "quality.target_agreement = 0"),
        ({"target_agreement": float("nan")}, "quality.target_agreement = nan"),
        (
            {"target_agreement": 0.9, "ladder": [64]},
            "quality.ladder = [64] is not allowed; allowed: increasing",
        ),
        ({"target_agreement": 0.9, "ladder": [64, 64]}, "quality.ladder = [64, 64] is not allowed"),
        ({"target_agreement": 0.9, "ladder": [96, 64]}, "quality.ladder = [96, 64] is not allowed"),
        ({"target_agreement": 0.9, "ladder": [0, 64]}, "quality.ladder = [0, 64] is not allowed"),
        ({"target_agreement": 0.9, "ladder": "64"}, "quality.ladder = '64' is not allowed"),
        (
            {"target_agreement": 0.9, "share": 0},
            "quality.share = 0 is not allowed; allowed: a number above 0",
        ),
        ({"target_agreement": 0.9, "budget": 1}, "quality.budget is not a field; allowed: target_agreement"),
        (
            {"target_agreement": 0.9, "class_header": "x", "class_metadata": "y"},
            "quality.class_metadata = 'y' is not allowed; allowed: a key of the request's metadata, without",
        ),
        (0.98, "quality = 0.98 is not allowed; allowed: an object"),
    ],
)
def test_wrong_settings_are_named(values: Any, text: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        QualitySettings.parse(values)
    assert text in str(error.value)


def test_one_request_in_a_hundred_is_compared_unless_the_operator_says_otherwise() -> None:
    assert QualitySettings.parse({"target_agreement": 0.9}).share == 0.01


def test_the_ladder_fits_model_and_operator() -> None:
    settings = QualitySettings(target_agreement=0.9)
    assert settings.on_model(576).ladder == (32, 64, 96, 128, 192, 288, 576)
    assert settings.on_model(576, min_keep=65).ladder == (96, 128, 192, 288, 576)
    assert settings.on_model(4).ladder == (1, 2, 4)
    named = QualitySettings(target_agreement=0.9, ladder=(64, 288))
    assert named.on_model(576).ladder == (64, 288)
    with pytest.raises(ValueError, match=r"quality.ladder = \[64, 288\] .* from 1 to 287"):
        named.on_model(287)
    with pytest.raises(ValueError, match=r"from 65 to 576"):
        named.on_model(576, min_keep=65)


def test_states_survive_their_file() -> None:
    settings = QualitySettings(target_agreement=0.9).on_model(576)
    state = start(settings)
    for score in (1.0, 0.25, 1.0):
        state = record(settings, state, [(6, 1.0), (0, score)])
    written = json.loads(json.dumps(as_json(settings, "best", {"": state, "ocr": start(settings)})))
    assert read_states(settings, "best", written) == {"": state, "ocr": start(settings)}
    assert read_states(settings, "best", None) == {}
    assert read_states(settings, "ficoco-v", written) == {}, "of another method"
    assert read_states(settings.model_copy(update={"ladder": (64, 576)}), "best", written) == {}


def test_the_operator_s_file_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    def check(path: Path) -> None:
        check_state(QualitySettings(target_agreement=0.9, state=str(path)).on_model(576), "best")

    check_state(QualitySettings(target_agreement=0.9).on_model(576), "best")
    check(tmp_path / "new.json")
    with pytest.raises(ValueError, match=r"quality.state = .* is not in an existing folder"):
        check(tmp_path / "missing" / "new.json")
    with pytest.raises(ValueError, match=r"quality.state = .* cannot be read"):
        check(tmp_path)
    wrong = tmp_path / "wrong.json"
    for text, why in (
        ("{", "is not valid JSON"),
        ("[1]", "holds no state"),
        ('{"states": 1}', "holds no state"),
    ):
        wrong.write_text(text)
        with pytest.raises(ValueError, match=why):
            check(wrong)
