"""The three floors of the house, read off the source: who may import whom, and what no file may do."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}
SCRIPTS = {"train_vae", "extract_latents", "train_flowdiff", "inference"}
LEAVES = {"corruption", "image_ops", "flowdiff_process", "runtime", "metrics", "plotting", "phantom", "phantom_anatomy", "radiograph_io"}
PARTS = {"calibration", "dataset", "latent_dataset", "model", "normalizer", "flowdiff_model", "flowdiff_loss"}
LIGHT = {"config", "corruption", "phantom", "phantom_anatomy", "radiograph_io", "metrics"}  # run without torch

each_file = pytest.mark.parametrize("name", FILES)


def imports(name):
    """Top-level names of everything the file imports, inside functions too."""
    found = set()
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "the house is flat: no relative imports"
            found.add(node.module.split(".")[0])
    return found


def calls(name):
    """(called name such as torch.load, its keywords as source) of every call in the file."""
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_every_file_has_a_floor():
    assert set(FILES) == {"config"} | SCRIPTS | PARTS | LEAVES


@each_file
def test_nobody_imports_a_script(name):
    assert not imports(name) & SCRIPTS


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_leaves_import_config_and_leaves_only(name):
    assert imports(name) & set(FILES) <= LEAVES | {"config"}


@pytest.mark.parametrize("name", sorted(PARTS))
def test_parts_import_no_script_and_parts_run_no_phase(name):
    assert imports(name) & set(FILES) <= LEAVES | PARTS | {"config"}
    assert not any("__main__" in ast.unparse(node) for node in FILES[name].body)


def test_config_imports_nothing_of_the_house():
    assert not imports("config") & set(FILES)


def test_the_loss_imports_no_network():
    assert not imports("flowdiff_loss") & {"flowdiff_model", "model", "diffusers"}


def test_runtime_knows_no_model():
    assert not imports("runtime") & (PARTS | {"diffusers"})


def test_only_plotting_imports_matplotlib():
    assert [name for name in FILES if "matplotlib" in imports(name)] == ["plotting"]


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_light_files_import_no_torch(name):
    reached, waiting = set(), {name}
    while waiting:
        reached |= waiting
        waiting = {other for file in waiting for other in imports(file) & set(FILES)} - reached
    assert not set().union(*map(imports, reached)) & {"torch", "accelerate", "diffusers", "torchmetrics"}


def test_there_is_no_utils():
    assert not {path.stem for path in ROOT.glob("*.py")} & {"utils", "util", "helpers", "common", "misc"}


@each_file
def test_everything_public_has_a_docstring(name):
    """A script's main is described by the docstring of the file, which is its --help."""
    public = [node for node in FILES[name].body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    bare = [node.name for node in public if not ast.get_docstring(node) and not (node.name == "main" and name in SCRIPTS)]
    assert ast.get_docstring(FILES[name]) and not bare


@each_file
def test_no_bare_except_and_no_except_that_says_nothing(name):
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and not all(isinstance(line, ast.Pass) for line in node.body)


@each_file
def test_weights_are_loaded_whole_or_not_at_all(name):
    assert not [called for called, keywords in calls(name) if keywords.get("strict") == "False" and called != "zip"]


@each_file
def test_nothing_is_unpickled(name):
    for called, keywords in calls(name):
        assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec")
        assert called != "torch.load" or keywords.get("weights_only") == "True"
        assert keywords.get("allow_pickle") != "True"


@each_file
def test_no_class_of_the_house_has_children(name):
    """Classes inherit from libraries or from nothing: no base classes with one child."""
    ours = {node.name for tree in FILES.values() for node in tree.body if isinstance(node, ast.ClassDef)}
    bases = {ast.unparse(base) for node in FILES[name].body if isinstance(node, ast.ClassDef) for base in node.bases}
    assert not bases & ours
