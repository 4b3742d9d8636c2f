"""What `llava-mole check-data` remembers of millions of records: hashes."""

import io
import tracemalloc

from llava_mole.analysis.check.records import check_records
from llava_mole.analysis.check.report import FindingsFile, SourceFindings
from llava_mole.conversation import Turn
from llava_mole.data.records import Record


def test_memory_holds_hashes_only() -> None:
    number = 40_000
    talk = (Turn("user", "<image>\nWhat is this?"), Turn("assistant", "It is red."))
    made = (Record(f"{n}", (f"folder/{n:012}.jpg",), talk, "s", f"s.json:{n}") for n in range(number))
    source = SourceFindings("s")
    tracemalloc.start()
    check_records(made, source, FindingsFile(io.StringIO()), None, None, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (source.images, source.duplicates) == (number, 0)
    assert peak < 2 * 160 * number  # two hashes a record; a set takes 75 to 155 bytes for each
