"""What a run would do and what was found of its dataset, in tables: `--dry_run`. Needs no torch."""

from math import prod

from library.dataset.audit import Audit
from library.disk_space import DiskNeed, free_bytes, megabytes
from library.errors import counted, quoted_list
from library.preflight import Preflight
from library.training.plan import StepPlan, is_main_process
from library.training.reports import aligned

MAX_SIZES = 12  # sizes and tags shown, the most frequent ones
MAX_TAGS = 30
NAMES_SHOWN = 10


def show_overview(checked: Preflight) -> None:
    """Print the tables to standard output."""
    if is_main_process():
        print("\n\n".join(overview(checked)), flush=True)


def overview(checked: Preflight) -> list[str]:
    """A text for each concern, with its heading."""
    audit = checked.audit
    sections = {
        "model": f"{checked.checkpoint.path}, a {checked.checkpoint.description}",
        "pictures": subsets_table(audit) if audit.subsets else "",
        "sizes of the pictures": sizes_table(audit) if audit.sizes else "",
        "found": findings_table(audit) if audit.subsets else "",
        "tags": tags_table(audit) if audit.tags else "",
        "steps": steps_table(checked.plan),
        "disk": disk_table(checked.disk_needs) if checked.disk_needs else "",
    }
    return [f"{heading}:\n{text}" for heading, text in sections.items() if text]


def subsets_table(audit: Audit) -> str:
    """A row for each folder or metadata file."""
    rows = [("folder", "", "pictures", "repeats", "captions", "empty", "without picture")]
    for subset in audit.subsets:
        counts = (subset.num_pictures, subset.num_repeats, subset.num_captioned, subset.num_empty, subset.num_orphans)
        rows.append((str(subset.source), "reg" if subset.is_reg else "", *map(str, counts)))
    return aligned(rows, numbers=(2, 3, 4, 5, 6))


def sizes_table(audit: Audit) -> str:
    """The most frequent sizes, and how many others there are."""
    rows = [("size", "pictures", "megapixels")]
    for size_wh, count in audit.sizes.most_common(MAX_SIZES):
        rows.append((f"{size_wh[0]}x{size_wh[1]}", str(count), f"{prod(size_wh) / 1e6:.2f}"))
    more = len(audit.sizes) - MAX_SIZES
    return aligned(rows, numbers=(1, 2)) + (f"\nand {counted(more, 'size')} more" if more > 0 else "")


def findings_table(audit: Audit) -> str:
    """Everything that was found, also what is not worth a warning."""
    rows = [("number", "what", "which")]
    for finding in audit.findings:
        which = quoted_list(finding.items, NAMES_SHOWN)
        rows.append((str(len(finding.items)), f"{finding.noun}s {finding.plural_verb} {finding.what}", which))
    return aligned(rows, numbers=(0,)) if audit.findings else "nothing that could be wrong"


def tags_table(audit: Audit) -> str:
    """The most frequent tags, and those in one caption alone, which may be misspelt."""
    rows = [("captions", "tag"), *((str(count), tag) for tag, count in audit.tags.most_common(MAX_TAGS))]
    once = sorted(tag for tag, count in audit.tags.items() if count == 1)
    text = f"{counted(len(audit.tags), 'tag')}, {len(once)} of them in one caption"
    return f"{aligned(rows, numbers=(0,))}\n{text}" + (f": {quoted_list(once, NAMES_SHOWN)}" if once else "")


def steps_table(plan: StepPlan) -> str:
    """The step arithmetic, a row for each operation."""
    shared = f", shared by {plan.num_processes} processes" if plan.num_processes > 1 else ""
    rows = [
        ("number", "what"),
        (str(plan.num_items), "pictures with repeats, an epoch"),
        (
            str(plan.batches_per_epoch),
            f"batches an epoch{shared}; each is of pictures of one size, so some may be short",
        ),
        (str(plan.steps_per_epoch), f"steps an epoch; a step is {counted(plan.accumulation, 'batch', 'batches')}"),
        (str(plan.num_epochs), "epochs"),
        (str(plan.max_train_steps), "steps in all"),
    ]
    return aligned(rows, numbers=(0,))


def disk_table(needs: list[DiskNeed]) -> str:
    """What is written where, and what the disk has."""
    rows = [("files", "what", "size", "free", "folder")]
    for need in needs:
        sizes = (f"about {megabytes(need.num_bytes)}", megabytes(free_bytes(need.folder)))
        rows.append((str(need.num_files), need.what, *sizes, str(need.folder)))
    return aligned(rows, numbers=(0, 2, 3))
