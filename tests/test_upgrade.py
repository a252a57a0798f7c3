"""Every place of vLLM that our code names or overrides is where the installed version has it."""

import ast
import re
from pathlib import Path, PurePosixPath

import pytest

from tests.support.release import ROOT
from tests.support.seams import Seam, Tree, alternatives, broken, moved, seams

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module")
def installed() -> Tree:
    """Sources of the installed vLLM; it is not imported."""
    from importlib.util import find_spec

    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Tree(Path(spec.origin).parent)


@pytest.fixture(scope="module")
def needed(installed: Tree) -> dict[Seam, set[str]]:
    """Requirements of our sources."""
    return seams(installed)


def test_nothing_has_moved(installed: Tree, needed: dict[Seam, set[str]]) -> None:
    assert {str(seam): what for seam, what in moved(installed, needed).items()} == {}


def test_the_seams_that_the_pages_name_are_among_them(needed: dict[Seam, set[str]]) -> None:
    names = {seam.name for seam in needed}
    for page, seam in (
        ("upgrading-vllm.md", "FullAttentionSpec.is_uniform_with_collection"),
        ("upgrading-vllm.md", "FullAttentionManager.allocate_new_blocks"),
        ("upgrading-vllm.md", "AsyncScheduler._try_schedule_encoder_inputs"),
        ("upgrading-vllm.md", "DefaultModelState.prepare_attn"),
        ("upgrading-vllm.md", "LlavaForConditionalGeneration.embed_multimodal"),
    ):
        assert seam in names, page


@pytest.mark.parametrize("page", ["upgrading-vllm.md"])
def test_the_tests_that_the_pages_name_are_contract_tests(page: str) -> None:
    """A file named without a folder is in the folder named before it, or in any that has such a file."""
    text = (ROOT / "docs" / page).read_text()
    tables = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    named = [PurePosixPath(name) for name in re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py)`", tables)]
    assert named
    files = (ROOT / "tests").rglob("test_*.py")
    contract = [
        PurePosixPath(file.relative_to(ROOT)) for file in files if "pytest.mark.compat" in file.read_text()
    ]
    assert [str(name) for name in named if not any(test.match(str(name)) for test in contract)] == []


def changed(installed: Tree, module: str, old: str, new: str, folder: Path) -> Tree:
    """A copy of vLLM in which one module differs; the others are links."""
    path = Path(*module.split(".")[1:]).with_suffix(".py")
    root = folder / "vllm"
    root.mkdir()
    theirs, ours = installed.root, root
    for part in path.parts[:-1]:
        for entry in theirs.iterdir():
            if entry.name != part:
                (ours / entry.name).symlink_to(entry)
        theirs, ours = theirs / part, ours / part
        ours.mkdir()
    for entry in theirs.iterdir():
        if entry.name != path.name:
            (ours / entry.name).symlink_to(entry)
    text = (installed.root / path).read_text()
    assert old in text
    (root / path).write_text(text.replace(old, new))
    return Tree(root)


@pytest.mark.parametrize(
    ("module", "old", "new", "reported"),
    [
        (
            "vllm.v1.core.single_type_kv_cache_manager",
            "num_tokens_main_model",
            "num_tokens_target",
            {"FullAttentionManager.allocate_new_blocks", "FullAttentionManager.get_num_blocks_to_allocate"},
        ),
        (
            "vllm.v1.kv_cache_interface",
            "class FullAttentionSpec(",
            "class PagedAttentionSpec(",
            {"FullAttentionSpec", "FullAttentionSpec.is_uniform_with_collection", "FullAttentionSpec.merge"},
        ),
    ],
)
def test_moved_seams_are_reported(
    module: str,
    old: str,
    new: str,
    reported: set[str],
    installed: Tree,
    needed: dict[Seam, set[str]],
    tmp_path: Path,
) -> None:
    tree = changed(installed, module, old, new, tmp_path)
    assert {seam.name for seam in moved(tree, needed)} == reported


def test_a_method_that_hands_on_what_it_does_not_name_is_not_broken(
    installed: Tree, needed: dict[Seam, set[str]], tmp_path: Path
) -> None:
    """Both methods of vLLM get a new parameter. Ours in place of `get_bytes` hands on any; the other names each."""
    old, new = "allow_redirects: bool = True,", "allow_redirects: bool = True,\n        again: int = 0,"
    tree = changed(installed, "vllm.connections", old, new, tmp_path)
    names = {"HTTPConnection.get_bytes", "HTTPConnection.get_async_response"}
    assert {seam.name for seam in moved(tree, needed)} == names
    assert {seam.name for seam in broken(tree, installed)} == {"HTTPConnection.get_async_response"}


@pytest.mark.parametrize(
    ("module", "old", "new", "seam"),
    [
        (
            "input_batch",
            "    num_lookahead,\n    idx_mapping_ptr,",
            "    num_lookahead,\n    again_ptr,\n    idx_mapping_ptr,",
            "_prepare_prefill_inputs_kernel",
        ),
        (
            "block_table",
            "positions: torch.Tensor,",
            "places: torch.Tensor,",
            "BlockTables.compute_slot_mappings",
        ),
    ],
)
def test_a_parameter_that_a_replaced_kernel_gets_or_loses_is_reported(
    module: str, old: str, new: str, seam: str, installed: Tree, tmp_path: Path
) -> None:
    """Functions in place of kernels ignore what they do not name, so a new parameter would go unnoticed."""
    tree = changed(installed, f"vllm.v1.worker.gpu.{module}", old, new, tmp_path)
    assert seam in {moved.name for moved in broken(tree, installed)}


def test_a_constructor_that_hands_nothing_on_needs_none_of_vllm(needed: dict[Seam, set[str]]) -> None:
    """`SteadyManager` takes over the state of a manager; `FicocoMediaConnector` calls vLLM's constructor."""
    names = {seam.name for seam in needed}
    assert "KVCacheManager.__init__" not in names
    assert {"KVCacheManager.allocate_slots", "MediaConnector.__init__"} <= names


def test_a_name_may_be_in_one_of_two_places(needed: dict[Seam, set[str]], tmp_path: Path) -> None:
    source = """
def cli_env_setup():
    try:
        from vllm.new import cli_env_setup, unused
    except ImportError:
        from vllm.old import cli_env_setup
    cli_env_setup()
"""
    (places,) = alternatives(ast.parse(source))
    assert places == (("vllm.new", "cli_env_setup"), ("vllm.old", "cli_env_setup"))
    for name, gone in (("old", False), ("new", False), ("older", True)):
        root = tmp_path / name
        root.mkdir()
        (root / f"{name}.py").write_text("def cli_env_setup(): ...\n")
        seam = Seam(*places[0], others=places[1:])
        assert (seam in moved(Tree(root), {seam: set()})) is gone
    assert {seam.name for seam, files in needed.items() if "ficoco_vllm/compat/versions.py" in files} == {
        "InternVLChatImageProcessor",
        "InternVLChatProcessor",
        "InternVLChatVideoProcessor",
        "cli_env_setup",
        "is_quantized_kv_cache",
        "make_arg_parser",
    }
