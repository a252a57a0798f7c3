"""Names, settings, composition by name, and methods of other packages."""

import itertools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from ficoco_vllm.reduction import available, get, reduce, registry
from ficoco_vllm.reduction.method import SITES
from ficoco_vllm.reduction.methods import BUILTIN
from ficoco_vllm.reduction.signals import WHY_ABSENT
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS
from ficoco_vllm.reduction.testing import make_signals, make_tokens
from tests.reduction.transcription import transcribed

GUIDE = Path(__file__).parents[2] / "docs" / "adding-a-method.md"
TEXT_GUIDED = {"cdpruner", "trim", "recoverable"}


def test_names_by_site() -> None:
    assert {"ficoco-v", "tome", "evit", "turbo", "best"} <= set(available("encoder"))
    assert {"random", "topk-cls", "spatial-pool", "prumerge", "prumerge-plus"} <= set(available("features"))
    assert {"visionzip", "divprune", "cdpruner", "trim", "recoverable"} <= set(available("features"))
    assert {"ficoco-l", "fastv", "sparsevlm", "pyramiddrop", "fitprune"} <= set(available("decoder"))
    assert sorted(name for site in SITES for name in available(site)) == sorted(available())


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method 'fico' is not known; available: .*ficoco-v"):
        get("fico")
    with pytest.raises(ValueError, match="site = 'tower': allowed are encoder, features, decoder"):
        available("tower")


@pytest.mark.parametrize("name", available())
def test_descriptors(name: str) -> None:
    method = get(name)
    assert method.name == name
    assert re.fullmatch(r"\d{4}\.\d{5}", method.source) or (name, method.source) == ("best", "none")
    assert method.default_schedule in ("even", "one-shot", "geometric")
    assert method.num_extra == int(name in ("evit", "trim"))
    # Settings survive a round trip through JSON, as they travel in a server's configuration.
    settings = method.configure().settings
    assert method.settings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize("name", available())
def test_what_a_server_can_measure(name: str) -> None:
    reducer = get(name).configure()
    offered = SITES[reducer.method.site]
    assert (name in TEXT_GUIDED) == ("text_relevance" in reducer.signals)
    reducer.check_signals(offered)


def test_required_signals_follow_the_settings() -> None:
    method = get("ficoco-v")
    assert method.required_signals() == {"visual_attention", "cls_attention"}
    assert method.required_signals(task_redundancy=False) == {"visual_attention"}
    assert method.required_signals(local_redundancy=False, fixed_k=0) == {"cls_attention"}
    assert get("fastv").required_signals(queries="all") == {"visual_attention", "text_attention"}
    assert get("ficoco-l").required_signals(fixed_k=0) == {"visual_attention", "text_attention"}
    text_only = get("ficoco-l").required_signals(local_redundancy=False, direct_correlation=False)
    assert text_only == {"text_attention"}


def test_mass_follows_the_settings() -> None:
    assert get("ficoco-v").configure().merges
    assert not get("ficoco-v").configure(fixed_k=0).merges
    assert not get("ficoco-v").configure(correlate="key_cosine").merges
    assert get("ficoco-v").configure(correlate="key_cosine", compress="nearest_merge").merges
    assert get("tome").configure().settings.model_dump()["proportional_attention"]
    assert not get("ficoco-v").configure().settings.model_dump()["proportional_attention"]


# Variations of the stages in Tables 2, 4, 6 and 7 and Fig. 4 of arXiv:2411.17686.
COMPRESS = [{"fixed_k": 0}, {"fixed_k": 1}, {"fixed_k": 2}, {"average": True}, {"epsilon": 0.5}]
FILTER = [{"local_redundancy": False}, {"task_redundancy": False}]
PENALTY = [{"coefficient": 1.0}, {"window": (3, 2)}]
CORRELATE = [{"gamma": 0.1}, {"direct_correlation": False}, {"indirect_correlation": False}]
ABLATIONS = [
    *(("ficoco-v", {}, change) for change in [*COMPRESS, *FILTER, *PENALTY, {"lam": 0.9}]),
    ("ficoco-v", {}, {"local_penalty": False}),
    *(("ficoco-l", {}, change) for change in [*COMPRESS, *FILTER, *CORRELATE, {"beta": 0.1}]),
    ("ficoco-l", {}, {"local_penalty": True}),
    *(("ficoco-l", {"local_penalty": True}, change) for change in PENALTY),
]


@pytest.mark.parametrize(("name", "base", "change"), ABLATIONS, ids=str)
def test_what_the_paper_varies_is_a_setting_that_matters(name: str, base: dict, change: dict) -> None:
    signals, tokens = make_signals(2, 60, grid=(8, 8)), make_tokens(2, 60)
    base = {"epsilon": 0.8, **base}  # so that sources have several targets among so few
    want = reduce(name, tokens, signals, 12, **base)
    assert not torch.equal(reduce(name, tokens, signals, 12, **{**base, **change}).tokens, want.tokens)


@pytest.mark.parametrize("name", ["ficoco-v", "ficoco-l"])
def test_what_the_model_reads_is_a_setting(name: str) -> None:
    """These settings do not affect a single call: start, schedule and measured attention."""
    settings = {"start_layer": 5, "schedule": (3, 0, 2), "attention": "logits"}
    assert settings.items() <= get(name).configure(**settings).settings.model_dump().items()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": 1.5}, "lam = 1.5 is not allowed for ficoco-v; allowed: float >= 0.0 and <= 1.0"),
        ({"lam": "x"}, "lam = 'x' is not allowed"),
        ({"lam": float("nan")}, "lam = nan is not allowed"),
        ({"epsilon": -0.1}, "epsilon = -0.1 .*>= 0.0"),
        ({"coefficient": 0.5}, "coefficient = 0.5 .*allowed: float >= 1.0"),
        ({"window": 0}, r"window = 0 .*allowed: \(int >= 1, int >= 1\)"),
        ({"window": (2, 2, 2)}, "window = "),
        ({"fixed_k": -1}, r"fixed_k = -1 .*allowed: int >= 0 \| None"),
        ({"attention": "scores"}, r"attention = 'scores' .*allowed: 'probs' \| 'logits'"),
        ({"schedule": "odd"}, "schedule = 'odd' .*'geometric'"),
        ({"start_layer": -1}, "start_layer = -1 .*>= 0"),
        ({"beta": 0.5}, "beta is not a setting of ficoco-v; allowed: .*lam"),
        ({"lam": 2, "epsilon": 2}, "epsilon = 2 .*; lam = 2|lam = 2 .*; epsilon = 2"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("ficoco-v").configure(**settings)


def test_a_square_window_may_be_one_number() -> None:
    assert get("ficoco-v").configure(window=3) == get("ficoco-v").configure(window=(3, 3))


@pytest.mark.parametrize("filter_name", FILTERS)
def test_any_stage_goes_with_any_other(filter_name: str) -> None:
    N = 14
    signals, tokens = make_signals(1, N), make_tokens(1, N)
    for correlate, compress in itertools.product(CORRELATIONS, COMPRESSIONS):
        stages = {"filter": filter_name, "correlate": correlate, "compress": compress}
        reducer = get("ficoco-v").configure(**stages)
        got = reducer(tokens, signals, 5)
        assert got.tokens.shape[1] == N - 5 + reducer.num_extra, stages
        assert got.tokens.isfinite().all(), stages
        if reducer.merges and compress != "quantile_merge":  # it drops sources that correlate with nothing
            torch.testing.assert_close(got.size.sum(), torch.tensor(float(N)), rtol=1e-5, atol=0)


def test_a_composition_is_its_parts() -> None:
    N = 20
    signals, tokens = make_signals(1, N), make_tokens(1, N)
    got = reduce(
        "ficoco-v",
        tokens,
        signals,
        6,
        filter="cls_attention",
        correlate="key_cosine",
        compress="quantile_merge",
    )
    pruned = reduce("topk-cls", tokens, signals, 6)
    assert torch.equal(got.position, pruned.position)
    assert not torch.equal(got.tokens, pruned.tokens)
    same = reduce("ficoco-v", tokens, signals, 6, filter="cls_attention", compress="prune")
    assert torch.equal(same.tokens, pruned.tokens)


def test_exchanged_stages_bring_their_settings_and_limits() -> None:
    method = get("ficoco-v")
    assert method.configure(filter="informativity", alpha=3.0).max_removed(10) == 5
    assert method.configure(compress="fuse").num_extra == 1
    with pytest.raises(ValueError, match=r"lam is not a setting of ficoco-v; allowed: .*alpha"):
        method.configure(filter="informativity", lam=0.3)
    assert get("tome").configure(filter="cls_attention").max_removed(10) == 9


@pytest.mark.parametrize("kind", ["filter", "correlate", "compress"])
def test_unknown_stages_are_named(kind: str) -> None:
    known = {"filter": "local_task", "correlate": "key_cosine", "compress": "prune"}[kind]
    for wrong in ("softmax", 3, None):
        with pytest.raises(ValueError, match=f"{kind} = {wrong!r} is not allowed; allowed: .*{known}"):
            get("ficoco-v").configure(**{kind: wrong})


@pytest.mark.parametrize("name", available())
def test_what_cannot_be_measured_has_a_reason(name: str) -> None:
    """At every site, for every signal that some method needs and a LLaVA cannot measure there."""
    reducer = get(name).configure()
    for offered in SITES.values():
        missing = reducer.signals - offered
        if missing:
            lacks = "; ".join(f"the signal `{signal}` ({WHY_ABSENT[signal]})" for signal in sorted(missing))
            with pytest.raises(ValueError, match=re.escape(f"{name} needs {lacks}; given are: ")):
                reducer.check_signals(offered)


def test_a_composition_names_the_signal_that_it_lacks() -> None:
    reducer = get("ficoco-v").configure(filter="text_relevance")
    with pytest.raises(ValueError, match=r"ficoco-v needs the signal `text_relevance`"):
        reducer.check_signals(SITES["encoder"])


def blocks() -> dict[str, str]:
    """The code blocks of the guide, one of each language."""
    result = re.findall(r"```(\w+)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(result) == len(dict(result))
    return dict(result)


def install(folder: Path, name: str, module: str, code: str, entry: str) -> None:
    """Files of an installation by pip: a module, and a dist-info folder with its entry points."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (folder / f"{module}.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ficoco_vllm.reductions]\n{entry}\n")


def test_the_guide_followed_to_the_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, project = blocks()["python"], tomllib.loads(blocks()["toml"])["project"]
    (name, value), *others = project["entry-points"]["ficoco_vllm.reductions"].items()
    assert not others
    install(tmp_path, project["name"], value.split(":")[0], code, f"{name} = {value}")
    assert name not in available()
    monkeypatch.syspath_prepend(tmp_path)

    assert name in available()
    assert name in available("encoder")
    assert name not in available("decoder")
    signals, tokens = make_signals(2, 25), make_tokens(2, 25)
    got = reduce(name, tokens, signals, 8, power=1.5)
    order = signals.features.norm(dim=-1).argsort(dim=-1)[:, 8:].sort(dim=-1).values
    assert torch.equal(got.position, signals.position.gather(1, order))
    torch.testing.assert_close(got.size.sum(-1), torch.full((2,), 25.0))
    get(name).configure().check_signals(SITES["encoder"])
    with pytest.raises(ValueError, match=r"power = 0.0 is not allowed for small-norm"):
        get(name).configure(power=0.0)


def test_the_guides_contract_holds_against_the_installed_package(tmp_path: Path) -> None:
    """As a researcher runs it: pytest on a test file of three lines, from another folder."""
    value = tomllib.loads(blocks()["toml"])["project"]["entry-points"]["ficoco_vllm.reductions"]["small-norm"]
    install(tmp_path, "small-norm", value.split(":")[0], blocks()["python"], f"small-norm = {value}")
    (tmp_path / "test_small_norm.py").write_text(blocks()["py"])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "."]
    paths = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        command,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d\d passed", done.stdout, re.MULTILINE), done.stdout


NEW_METHOD = """
from dataclasses import replace
from ficoco_vllm.reduction.methods.topk_cls import TOPK_CLS

NEW = replace(TOPK_CLS, name="new-2")
"""


def test_a_method_file_is_all_that_a_new_method_takes(tmp_path: Path) -> None:
    """In a copy of the package the file is discovered, and the missing transcription is reported."""
    package = Path(registry.__file__).parents[1]
    for part in ("__init__.py", "_version.py", "environment.py"):
        (tmp_path / "ficoco_vllm").mkdir(exist_ok=True)
        shutil.copy(package / part, tmp_path / "ficoco_vllm")
    for part in ("reduction", "kernels"):
        shutil.copytree(package / part, tmp_path / "ficoco_vllm" / part)
    (tmp_path / "ficoco_vllm" / "reduction" / "methods" / "new_method.py").write_text(NEW_METHOD)
    code = (
        # Without the editable installation and its imported modules.
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        "for name in [name for name in sys.modules if name.startswith('ficoco_vllm')]: del sys.modules[name]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "for name in ('vllm', 'triton', 'transformers'): sys.modules[name] = None  # an import of them raises\n"
        "from ficoco_vllm.reduction import available; print(*available('features'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    names = set(done.stdout.split())
    assert names - set(available("features")) == {"new-2"}
    assert names - transcribed() == {"new-2"}


def test_every_method_has_a_transcription() -> None:
    assert transcribed() == set(BUILTIN)


def test_the_guides_composition_is_valid() -> None:
    get("ficoco-v").configure(**json.loads(blocks()["json"]))


def test_a_broken_package_breaks_only_its_own_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    code = "raise RuntimeError('no such GPU')"
    install(tmp_path, "broken-pkg", "broken_module", code, "broken = broken_module:METHOD")
    monkeypatch.syspath_prepend(tmp_path)
    assert "broken" in available()
    with caplog.at_level(logging.WARNING):
        assert "ficoco-v" in available("encoder")
    assert "broken" in caplog.text
    with pytest.raises(
        ValueError, match=r"method 'broken' of broken-pkg \(broken_module:METHOD\) .*no such GPU"
    ):
        get("broken")


def test_a_package_that_offers_no_method_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "odd-pkg", "odd_module", "METHOD = 3", "odd = odd_module:METHOD")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="odd_module:METHOD of odd-pkg is not a Method with the name 'odd'"):
        get("odd")


def test_packages_are_scanned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are checked several times for each request; a scan takes milliseconds."""
    assert "ficoco-v" in available()
    monkeypatch.setattr(registry, "entry_points", lambda **_: pytest.fail("scanned again"))
    assert "ficoco-v" in available()


def test_built_in_names_cannot_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "thief-pkg", "thief_module", "METHOD = 3", "tome = thief_module:METHOD")
    monkeypatch.syspath_prepend(tmp_path)
    assert get("tome").title == "ToMe"
    assert available().count("tome") == 1
