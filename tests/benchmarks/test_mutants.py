"""What is said of mutants that live is said of code that is there."""

import json

from mutants import JUDGED, ROOT, name_of


def test_every_mutant_that_may_live_is_one_of_a_line_that_exists_and_says_why():
    judged = json.loads(JUDGED.read_text())
    assert len({name_of(one) for one in judged}) == len(judged)
    lines = {
        file: {line.strip() for line in (ROOT / file).read_text().splitlines()}
        for file in {one["file"] for one in judged}
    }
    for one in judged:
        assert one["text"].replace("«", "").replace("»", "") in lines[one["file"]], one
        assert one["why"].partition(": ")[2], one
