"""Who may import whom: downward only, no cycles, no torch before training starts. Read from the sources, not run."""

import ast
import gc
from pathlib import Path

import pytest

from library.importing import quick_imports

ROOT = Path(__file__).parents[1]

# From low to high: a module imports from its own row and from the rows above it here. A name stands for the module and
# everything inside it; of two that match, the longer one counts.
LAYERS: list[tuple[str, ...]] = [
    (
        "library",
        "library.errors",
        "library.files",
        "library.safetensors_header",
        "library.secrets",
        "library.signatures",
        "library.texts",
    ),
    ("library.options", "library.network_files"),
    ("library.logs", "library.families", "library.dataset", "library.layers", "library.captioning"),
    ("library.families.clip", "library.families.checkpoints", "library.dataset.dataset", "networks"),
    ("library.families.sd", "library.families.sdxl", "library.dataset.own_dataset"),
    ("library.dataset.loader",),
    ("library.training", "library.adapters"),
    (
        "library.caching_preflight",
        "library.folders",
        "library.disk_space",
        "library.given_files",
        "library.network_choice",
        "library.preflight",
        "library.report",
    ),
    ("library.recipes", "library.generating", "library.preparing"),
    (
        "scripts",  # train_network.py and its kin, and tools/
        "networks.check_lora_weights",
        "networks.convert_lora",
        "networks.extract_lora_from_dylora",
        "networks.extract_lora_from_models",
        "networks.lora_interrogator",
        "networks.merge_lora",
        "networks.resize_lora",
        "networks.sdxl_merge_lora",
        "networks.svd_merge_lora",
        "networks.verify_lora",
    ),
]

# What must be there before torch is: all that `--help` and the checks of a run need.
TORCH_FREE = (
    "train_network",
    "finetune",
    "library.caching_preflight",
    "library.captioning.batches",
    "library.captioning.cleaning",
    "library.captioning.listing",
    "library.captioning.metadata",
    "library.captioning.sinks",
    "library.captioning.tagger",
    "library.captioning.tags",
    "library.adapters.block_weights",
    "library.adapters.consumers",
    "library.adapters.covers",
    "library.adapters.file_kind",
    "library.adapters.flags",
    "library.adapters.keys",
    "library.adapters.metadata",
    "library.adapters.names",
    "library.adapters.spellings",
    "library.adapters.traits",
    "library.adapters.verdict_report",
    "library.adapters.verdicts",
    "gen_img",
    "sdxl_gen_img",
    "library.dataset.sheet",
    "library.disk_space",
    "library.errors",
    "library.families.blocks",
    "library.families.agreement",
    "library.families.clip_vocabulary",
    "library.families.detect",
    "library.families.kinds",
    "library.families.layer_names",
    "library.families.ldm_names",
    "library.families.prompt_weights",
    "library.files",
    "library.folders",
    "library.generating.axes",
    "library.generating.cards",
    "library.generating.charts",
    "library.generating.dynamic_prompts",
    "library.generating.grid_options",
    "library.generating.grid_pages",
    "library.generating.html",
    "library.generating.options",
    "library.generating.outputs",
    "library.generating.preparation",
    "library.generating.report",
    "library.generating.report_pictures",
    "library.generating.requests",
    "library.generating.runs",
    "library.importing",
    "library.given_files",
    "library.leftovers",
    "library.logs",
    "library.options",
    "library.panels",
    "library.parallel",
    "library.pictures",
    "library.preparing.crop_folder",
    "library.preparing.duplicates",
    "library.preparing.options",
    "library.preparing.resizing",
    "library.preparing.unpacking",
    "library.preparing.upscaling",
    "library.texts",
    "library.network_choice",
    "library.network_rules",
    "library.preflight",
    "library.report",
    "library.recipes.dataset_page",
    "library.recipes.debug_dataset",
    "library.safetensors_header",
    "library.secrets",
    "library.signatures",
    "library.recipes.overview",
    "library.training.hub",
    "library.training.losses",
    "library.training.memory_savers",
    "library.training.optimizer_names",
    "library.training.model_hashes",
    "library.training.optimizers",
    "library.training.plan",
    "library.training.prompts",
    "library.training.reports",
    "library.training.resuming",
    "library.training.saving",
    "library.training.tracker_checks",
    "library.user_cache",
    "networks.arguments",
    "networks.check_lora_weights",
    "networks.convert_lora",
    "networks.blocks",
    "networks.extract_lora_from_dylora",
    "networks.extract_lora_from_models",
    "networks.lora_interrogator",
    "networks.merge_lora",
    "networks.resize_lora",
    "networks.sdxl_merge_lora",
    "networks.svd_merge_lora",
    "networks.verify_lora",
    "networks.patterns",
    "tools.benchmark",
    "tools.edit_metadata",
    "tools.cache_latents",
    "tools.cache_text_encoder_outputs",
    "tools.clean_captions",
    "tools.compare_base_bits",
    "tools.compare_networks",
    "tools.install",
    "tools.make_captions",
    "tools.make_regularization_images",
    "tools.merge_captions_to_metadata",
    "tools.prepare_buckets_latents",
    "tools.show_metadata",
    "tools.tag_images_by_wd14_tagger",
    "tools.run_report",
    "tools.xyz_grid",
    "tools.crop_images",
    "tools.dataset_sheet",
    "tools.extract_parquet",
    "tools.find_duplicates",
    "tools.install",
    "tools.resize_images_to_resolution",
    "tools.upscale_images",
    *(f"networks.{path.stem}" for path in (ROOT / "networks").glob("*_arguments.py")),
)
HEAVY = ("accelerate", "bitsandbytes", "diffusers", "safetensors.torch", "torch", "transformers")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path
    for pattern in ("library/**/*.py", "networks/**/*.py", "tools/**/*.py", "finetune/*.py", "*.py")
    for path in ROOT.glob(pattern)
}


def is_left_out(node: ast.AST) -> bool:
    """Whether the inside of a statement is not run when its module is loaded."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def statements(tree: ast.AST, inside_functions: bool) -> list[ast.Import | ast.ImportFrom]:
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif inside_functions or not is_left_out(node):
            found += statements(node, inside_functions)
    return found


def imported(name: str, inside_functions: bool = True) -> set[str]:
    """The modules that a module imports, its own as they are called here, others by their dotted names."""
    tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in statements(tree, inside_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            assert not node.level, f"{name}: relative import"
            names |= {
                inner if (inner := f"{node.module}.{alias.name}") in SOURCES else node.module for alias in node.names
            }
    return names


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer(name: str) -> int:
    """The row of the longest name that matches; scripts are what is in no package of ours."""
    if not name.startswith(("library", "networks")):
        name = "scripts"
    matching = [(len(known), row) for row, names in enumerate(LAYERS) for known in names if is_inside(name, known)]
    return max(matching)[1]


OURS = {name: imported(name) & SOURCES.keys() for name in SOURCES}


def loaded_by(name: str) -> set[str]:
    """All modules, ours and others, that are loaded with a module, packages included."""
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in SOURCES:
            waiting += imported(current, inside_functions=False)
            waiting += [current.rpartition(".")[0]] if "." in current else []
    return seen


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_go_down(name):
    upward = {other for other in OURS[name] if layer(other) > layer(name)}
    assert not upward, f"{name} is below {sorted(upward)}"


def test_library_never_imports_a_network_by_name():
    """Networks are chosen with --network_module; the library knows them by what they answer."""
    guilty = {
        name: sorted(networks)
        for name, others in OURS.items()
        if is_inside(name, "library") and (networks := {other for other in others if is_inside(other, "networks")})
    }
    assert "networks.lora" in SOURCES
    assert not guilty


def test_nothing_imports_a_script_but_the_one_that_names_its_family():
    scripts = {name for name in SOURCES if not name.startswith(("library", "networks", "tools", "finetune"))}
    guilty = {name: others & scripts for name, others in OURS.items() if others & scripts}
    assert guilty.pop("sdxl_train_network") == {"train_network"}
    assert guilty.pop("sdxl_gen_img") == {"gen_img"}
    assert {"train_network", "gen_img"} <= scripts
    assert not guilty


def test_there_are_no_cycles():
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in finished:
            for other in sorted(OURS[name]):
                visit(other, (*path, name))
            finished.add(name)

    for name in sorted(SOURCES):
        visit(name, ())


@pytest.mark.parametrize("name", sorted(name for name in SOURCES if any(is_inside(name, free) for free in TORCH_FREE)))
def test_module_is_loaded_without_torch(name):
    heavy = {other for other in loaded_by(name) if any(is_inside(other, package) for package in HEAVY)}
    assert not heavy


def test_training_itself_is_seen_to_load_torch():
    assert "torch" in loaded_by("library.recipes.network")


def test_every_name_of_the_tables_is_a_module():
    named = {name for names in LAYERS for name in names} | set(TORCH_FREE)
    assert named - SOURCES.keys() <= {"scripts", "finetune"}


def test_models_of_an_earlier_run_are_collected_where_nothing_new_is_imported():
    frozen = gc.get_freeze_count()
    with quick_imports():
        import json  # noqa: F401
    assert gc.get_freeze_count() == frozen
