"""The three floors of the house, read off the source: who may import whom, and what no file may do."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"radiographs", "radiographs.adapters", "phantoms", "reporting"}
PATHS = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
for folder in sorted(FOLDERS):
    inside = sorted((ROOT / folder.replace(".", "/")).glob("*.py"))
    PATHS |= {f"{folder}.{path.stem}": path for path in inside}
FILES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}
SCRIPTS = {"train_vae", "extract_latents", "train_flowdiff", "inference", "export"}
PARTS = {
    "anomaly",
    "archive",
    "augmentation",
    "calibration",
    "dataset",
    "flowdiff_batch",
    "flowdiff_loss",
    "flowdiff_model",
    "fusion",
    "latent_dataset",
}
PARTS |= {
    "examination",
    "exported",
    "features",
    "model",
    "normalizer",
    "reader",
    "reader_pool",
    "reader_training",
    "standardization",
    "survey",
}
PARTS |= {"conclusion", "merging", "publishing", "showing", "tuned_backbone", "tuned_training"}
LEAVES = {
    "backbone",
    "checks",
    "command_line",
    "computing",
    "config_reading",
    "corruption",
    "depthwise",
    "decoded",
    "files",
    "flowdiff_process",
    "growing",
    "guard",
    "holding",
    "image_ops",
    "interruption",
    "last_step",
    "ledger",
    "metrics",
    "presets",
    "progress",
    "results",
    "run_log",
    "runtime",
    "scratch",
    "shards",
    "shelf",
    "thresholds",
    "tiles",
    "typical",
    "waiting",
    "writing",
}
LEAVES |= {name for name in FILES if "." in name}  # a folder is a leaf with several doors
LIGHT = {
    "config",
    "config_reading",
    "checks",
    "command_line",
    "corruption",
    "files",
    "interruption",
    "metrics",
    "presets",
    "progress",
    "thresholds",
    "typical",
    "writing",
} | {name for name in FILES if "." in name}  # run without torch
HEAVY = {"torch", "accelerate", "diffusers", "torchmetrics"}

each_file = pytest.mark.parametrize("name", FILES)


def house(module):
    """The file of the house behind an imported module, or its top-level name."""
    return module if module in FILES else module.split(".")[0]


def imported_at(nodes):
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {house(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute: no relative ones"
            found |= {
                house(f"{node.module}.{alias.name}") if node.module in FOLDERS else house(node.module)
                for alias in node.names
            }
    return found


def imports(name):
    """Everything the file imports, inside functions too: files of the house, and top-level names of libraries."""
    return imported_at(ast.walk(FILES[name]))


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


def test_config_imports_its_checks_and_nothing_else_of_the_house():
    assert imports("config") & set(FILES) == {"checks", "config_reading"}
    assert imports("config_reading") & set(FILES) == {"checks"}


def test_the_loss_imports_no_network():
    assert not imports("flowdiff_loss") & {"flowdiff_model", "model", "diffusers"}


def test_runtime_knows_no_model():
    assert not imports("runtime") & (PARTS | {"diffusers"})


def test_only_the_figures_import_matplotlib():
    assert [name for name in FILES if "matplotlib" in imports(name)] == ["reporting.figures"]


@pytest.mark.parametrize("name", sorted(LIGHT))
def test_light_files_import_no_torch(name):
    """When they are imported; files.py asks for it where a checkpoint is read."""
    reached, waiting = set(), {name}
    while waiting:
        reached |= waiting
        waiting = {other for file in waiting for other in imported_at(FILES[file].body) & set(FILES)} - reached
    assert not set().union(*(imported_at(FILES[file].body) for file in reached)) & HEAVY


def test_there_is_no_utils():
    assert not {path.stem for path in PATHS.values()} & {"utils", "util", "helpers", "common", "misc"}


@each_file
def test_everything_public_has_a_docstring(name):
    """A script's main is described by the docstring of the file, which is its --help."""
    public = [
        node
        for node in FILES[name].body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    bare = [
        node.name for node in public if not ast.get_docstring(node) and not (node.name == "main" and name in SCRIPTS)
    ]
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


def test_assets_hold_data_only():
    assert not [path for path in (ROOT / "assets").rglob("*") if path.suffix in (".py", ".sh", ".ipynb")]


@each_file
def test_a_room_is_small_enough_to_hold_in_the_head(name):
    assert PATHS[name].read_text().count("\n") <= 350


def test_a_folder_is_entered_by_its_files_and_holds_nothing_else():
    """A folder that is not named here would be on no floor."""
    known = {folder.split(".")[0] for folder in FOLDERS} | {"assets", "benchmarks", "tests"}
    with_code = {path.relative_to(ROOT).parts[0] for path in ROOT.glob("*/*.py") if not path.parts[-2].startswith(".")}
    assert with_code <= known


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_imports_leaves_and_itself(folder):
    """What radiographs need of reporting, or phantoms of the pipeline, would make one room of two."""
    inside = {name for name in FILES if name.split(".")[0] == folder.split(".")[0]}
    reached = set().union(*map(imports, inside)) & set(FILES)
    assert reached <= inside | {"checks", "config", "files", "progress"}
