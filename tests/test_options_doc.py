"""docs/options.md says what the declarations say."""

from library.options.fields import flags_of
from library.options.groups import TrainNetworkOptions
from tools.write_options_doc import PATH, options_document


def test_the_page_is_what_the_declarations_make():
    assert PATH.read_text(encoding="utf-8") == options_document(), "run python tools/write_options_doc.py"


def test_every_flag_has_a_row():
    page = options_document()
    assert all(f"| `--{name}` |" in page for name in flags_of(TrainNetworkOptions))
