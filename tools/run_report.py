"""Write the report on a run of training, one page of HTML that needs nothing else.

python tools/run_report.py output/my_lora
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import run_script
from library.logs import start_logging
from library.options.cli import read_options
from library.options.fields import REQUIRED, OptionGroup, option
from library.options.groups import LoggingOptions


@dataclass(frozen=True, kw_only=True)
class RunReportOptions(OptionGroup):
    """Write the report on a run of training"""

    run: str = option(REQUIRED, "OUTPUT_DIR/NAME of the run", flag_type="path", is_positional=True)


OPTIONS = RunReportOptions


def main(argv: list[str] | None = None) -> None:
    options = read_options(OPTIONS, argv)
    start_logging(LoggingOptions())
    from library.generating.report import write_report
    from library.generating.report_pictures import parts_of
    from library.generating.runs import find_run

    run = find_run(options.run, "run")
    print(write_report(run, parts_of(run)))


if __name__ == "__main__":
    run_script(main)
